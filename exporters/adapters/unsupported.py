"""Formats that are recognised and refused by name, until each has a file of its own.

Suffixes as written by KohakuBlueleaf/LyCORIS, kohya-ss/sd-scripts, huggingface/peft and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import ModuleTensors, WeightUpdate


@dataclass(frozen=True)
class UnsupportedFormat:
    """A format known by its parameters alone: a module that has any of ``marks`` is of it."""

    name: str
    suffixes: Mapping[str, str]
    marks: frozenset[str]

    def owns(self, parameters: frozenset[str]) -> bool:
        """Whether one of the marks is there."""
        return bool(parameters & self.marks)

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """Always an error that names the format."""
        raise module.error(f"is of the format {self.name}; this version reads LoRA and LoCon")


def _dotted(name: str, *parameters: str, shared: tuple[str, ...] = ()) -> UnsupportedFormat:
    """A format whose suffixes are its parameter names behind a dot; ``shared`` ones do not mark it."""
    return UnsupportedFormat(name, {f".{p}": p for p in (*parameters, *shared)}, frozenset(parameters))


# In the order in which a module is tested: what modifies another format comes first.
DORA = _dotted("DoRA", "dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
OTHERS = (
    _dotted("LoHa", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    _dotted(
        "LoKr", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"
    ),
    _dotted("IA3", "on_input", shared=("weight",)),
    _dotted("OFT", "oft_blocks", "oft_diag", "oft_R.weight", shared=("rescale",)),
    _dotted("GLoRA", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    _dotted("full difference", "diff", "diff_b", "set_weight"),
    _dotted("norm difference", "w_norm", "b_norm"),
    _dotted("T-LoRA", "q_layer.weight", "p_layer.weight", "lambda_layer"),
    _dotted("sparse remainder", "bias_indices", "bias_values", "bias_size"),
)

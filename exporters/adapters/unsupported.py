"""What is recognised and refused by name: formats whose change cannot be had from the file and the weight.

Suffixes as written by KohakuBlueleaf/LyCORIS, huggingface/peft, Nerogar/OneTrainer and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import ModuleTensors, WeightUpdate


@dataclass(frozen=True)
class UnsupportedFormat:
    """A format known by its parameters alone: a module that has any of ``marks`` is of it."""

    name: str
    why: str
    marks: tuple[str, ...]

    @property
    def suffixes(self) -> Mapping[str, str]:
        """The marks behind a dot."""
        return {f".{name}": name for name in self.marks}

    def owns(self, parameters: frozenset[str]) -> bool:
        """Whether one of the marks is there."""
        return not parameters.isdisjoint(self.marks)

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """Always an error that names the format and says why it cannot be baked."""
        raise module.error(f"is of the format {self.name}, which cannot be baked: {self.why}")


UNSUPPORTED = (
    UnsupportedFormat(
        "T-LoRA",
        "it needs factors of the base that the file does not hold",
        ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    ),
    UnsupportedFormat(
        "DoRA over OFT",
        "its readers do not agree on what it means",
        ("initial_norm", "dora_multiplier", "dora_multiplier.weight"),
    ),
    UnsupportedFormat(
        "FLUX's padded LoRA", "it gives a weight another shape than the graph has", ("reshape_weight",)
    ),
    UnsupportedFormat(
        "PEFT's IA3", "it has no name that tells inputs from outputs; convert it to LyCORIS's", ("ia3_l",)
    ),
    UnsupportedFormat("PEFT's BOFT", "its permutations are not in the file", ("boft_R", "boft_s")),
    UnsupportedFormat("VeRA", "its random matrices are not in the file", ("vera_lambda_b", "vera_lambda_d")),
    UnsupportedFormat("an older LoKr", "lokr_t1 was never used by any trainer", ("lokr_t1",)),
)

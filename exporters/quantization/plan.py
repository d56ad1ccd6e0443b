"""Which weights of a bundle become int8, and how they are streamed: settled before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...errors import CheckpointError
from ...int8 import SCALE_SUFFIX
from .attention import score_operands
from .hurting import SHORTCUT, hurting_weights
from .qdq import Operand, Site, operands, quantize_activations, sites
from .quantize import quantize_weight
from .store import Calibration

if TYPE_CHECKING:
    import onnx

    from ..weights import Placed

WEIGHTS, FULL = "int8", "int8-full"
INT8_PRECISIONS = (WEIGHTS, FULL)

# A component below this is left as it is: the bundled model's VAE would shrink by 0.3 MB.
_LEAST_COMPONENT = 1_000_000
# Smaller matrices stay: together they are less than 0.1 % of SD1.5.
_LEAST_WEIGHT = 4096
# int8 comes first in the file, so what follows begins at a multiple of the widest type's size.
_MULTIPLE = 8
# First and last convolution: 0.1 % of the work; of the bundled model's activations, that of the first alone
# makes half of the squared error (0.030 of 0.042).
_ENDS = ("conv_in.weight", "conv_out.weight")
# Of a VAE's decoder. With shortcuts and upsamplers in int8 too SD1.5's (random weights) decodes 512x512 in
# 3.5 s, 38 dB from fp32; without in 4.0 s and 49.6 dB, as near as bf16, which takes 5.9 s (OpenVINO; ONNX
# Runtime takes 14.4 s in place of 12.5). A tiny autoencoder normalizes nothing.
_NORMALIZED = (".resnets.", ".attentions.")
# Their activations have one row or come from the text: less than 2 % of the work.
_WEIGHT_ONLY = ("time_embedding.", ".time_emb_proj.", ".attn2.to_k.", ".attn2.to_v.")


def weight_sites(component: str, graph: onnx.ModelProto) -> tuple[Site, ...]:
    """The sites of a component whose weights become int8."""
    found = sites(graph)
    if sum(int(np.prod(site.shape)) for site in found) < _LEAST_COMPONENT:
        return ()
    # Tables of embeddings stay: in the bundled model they cost more than the whole UNet (the text encoder has
    # 43.1 dB without them, 39.7 dB with them, the UNet 43.4 dB).
    return tuple(s for s in found if s.activation and not s.weight.endswith(_ENDS) and _fits(s))


def _fits(site: Site) -> bool:
    size = int(np.prod(site.shape))
    return size >= _LEAST_WEIGHT and size % _MULTIPLE == 0


def unet_activations(graph: onnx.ModelProto, chosen: Sequence[Site]) -> tuple[Operand, ...]:
    """What else of a UNet may be int8: what meets the int8 weights of some sites, and queries and keys."""
    able = [site for site in chosen if not any(part in site.weight for part in _WEIGHT_ONLY)]
    return operands(able) + score_operands(graph, chosen)


def decoder_activations(chosen: Sequence[Site]) -> tuple[Operand, ...]:
    """What else of a VAE's decoder may be int8: what meets the int8 weights of its resnets and attentions.

    These begin with a normalization. Shortcuts do not, nor do upsamplers.
    """
    normalized = [s for s in chosen if any(part in s.weight for part in _NORMALIZED)]
    return operands([site for site in normalized if SHORTCUT not in site.weight])


@dataclass(frozen=True)
class Int8Plan:
    """What becomes int8 in a bundle: weights by component, and with a calibration activations of some.

    ``able`` are those that may, by component; which of them do, the calibration says. ``weights_kept`` are
    the UNet's weights that stay in floating point because they hurt.
    """

    precision: str
    chosen: Mapping[str, tuple[Site, ...]]
    able: Mapping[str, tuple[Operand, ...]] = field(default_factory=dict)
    calibration: Calibration | None = None
    weights_kept: tuple[str, ...] = ()
    _scales: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def types(self, component: str) -> dict[str, str]:
        """safetensors types of the int8 weights of a component and of their scales, by name."""
        names = [site.weight for site in self.chosen.get(component, ())]
        return dict.fromkeys(names, "I8") | dict.fromkeys((n + SCALE_SUFFIX for n in names), "F32")

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the scales of a component, by name."""
        return {site.weight + SCALE_SUFFIX: site.shape[:1] for site in self.chosen.get(component, ())}

    def quantized(self, component: str, name: str, weight: np.ndarray) -> np.ndarray:
        """int8 values of a weight with all adapters added; its scales are kept for ``take_scale``.

        Raises:
            CheckpointError: the weight holds NaN or infinity.
        """
        if not np.isfinite([weight.max(), weight.min()]).all():
            raise CheckpointError(
                f"{component} tensor {name} holds NaN or infinity and cannot be int8; "
                "the checkpoint or an adapter is damaged"
            )
        made = quantize_weight(weight)
        self._scales[name + SCALE_SUFFIX] = made.scale
        return made.values

    def take_scale(self, name: str) -> np.ndarray:
        """The scales of a weight that was quantized before, by their own name; once."""
        return self._scales.pop(name)

    def quantized_activations(self, component: str) -> tuple[Operand, ...]:
        """What of a component goes through uint8."""
        if self.calibration is None:
            return ()
        kept, ranges = set(self.calibration.kept), self.calibration.ranges_of(component)
        return tuple(o for o in self.able.get(component, ()) if o.layer not in kept and o.tensor in ranges)

    def finish_graph(self, component: str, graph: onnx.ModelProto) -> None:
        """Put the activations of a bound graph through uint8 where that is planned; in place."""
        chosen = self.quantized_activations(component)
        if self.calibration is not None and chosen:
            quantize_activations(graph, chosen, self.calibration.ranges_of(component))

    def facts(self, component: str) -> dict[str, object]:
        """For the manifest: how many weights and activations are int8, and what was kept because it hurt."""
        chosen = self.chosen.get(component, ())
        facts: dict[str, object] = {"weights": len(chosen)}
        if component in self.able:
            facts["activations"] = len(self.quantized_activations(component))
        if component == "unet":
            facts["weights_kept"] = list(self.weights_kept)
            if self.calibration is not None:
                facts["kept"] = list(self.calibration.kept)
        return facts


def weights_plan(chosen: Mapping[str, tuple[Site, ...]]) -> Int8Plan:
    """The plan of int8 weights alone, without those of the UNet that hurt."""
    kept = hurting_weights(site.weight for site in chosen["unet"])
    return Int8Plan(WEIGHTS, _without(kept, chosen), weights_kept=kept)


def full_plan(
    chosen: Mapping[str, tuple[Site, ...]],
    able: Mapping[str, tuple[Operand, ...]],
    calibration: Calibration,
) -> Int8Plan:
    """The plan of int8 weights and activations.

    A weight that hurts is quantized all the same if what it meets is: the product could not be of int8 else.
    """
    hurting = hurting_weights(site.weight for site in chosen["unet"])
    kept = tuple(name for name in hurting if name in set(calibration.kept))
    return Int8Plan(FULL, _without(kept, chosen), able, calibration, kept)


def _without(kept: Sequence[str], chosen: Mapping[str, tuple[Site, ...]]) -> dict[str, tuple[Site, ...]]:
    return {**chosen, "unet": tuple(site for site in chosen["unet"] if site.weight not in kept)}


def bind_scales(graph: onnx.ModelProto, placed: Mapping[str, Placed], location: str) -> None:
    """Give a graph the scales of its int8 weights as external initializers; in place."""
    import onnx

    for name, at in placed.items():
        if not name.endswith(SCALE_SUFFIX) or name.removesuffix(SCALE_SUFFIX) not in placed:
            continue
        tensor = graph.graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, dims=at.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(at.offset)), ("length", str(at.nbytes))):
            tensor.external_data.add(key=key, value=value)

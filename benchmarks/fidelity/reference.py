"""What outputs are compared with: the same bundle in fp32, on the engine nearest to the definition."""

from __future__ import annotations

from collections.abc import Collection

from ...backends.registry import probe_all
from ...bundle import Bundle
from ...errors import BackendUnavailable
from ..records.record import Requested

# diffusers' own modules first, then engines. On the processor, because that is the same on every machine.
_ORDER = (("torch", "cpu"), ("openvino", "CPU"), ("onnxruntime", "cpu"))


def rounds_activations(bundle: Bundle) -> bool:
    """Whether the bundle is of ``int8-full``, which only its graph describes: torch has none."""
    return str(bundle.manifest.get("storage")) == "int8-full"


def plan_reference(bundle: Bundle, installed: Collection[str] | None = None) -> Requested:
    """The reference of a bundle: fp32 on the processor.

    torch where it is installed, else OpenVINO, else ONNX Runtime; OpenVINO first for ``int8-full``, whose
    rounding of activations torch's modules do not have.

    Args:
        bundle: what is measured.
        installed: names of the backends that may be used; None asks the registry.

    Raises:
        BackendUnavailable: none of the three is there.
    """
    usable = _usable() if installed is None else set(installed)
    for name, device in _ORDER:
        if name in usable and not (name == "torch" and rounds_activations(bundle)):
            return Requested("kiln", name, device, "fp32")
    raise BackendUnavailable(
        "parity needs a reference in fp32: torch, openvino or onnxruntime on the processor, and none of them "
        f"can be used for {bundle.name} (usable: {', '.join(sorted(usable)) or 'nothing'}); "
        "pip install 'kiln-diffusion[cpu]', or measure with --no-parity"
    )


def _usable() -> set[str]:
    return {name for name, found in probe_all().items() if found.available}

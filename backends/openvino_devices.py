"""OpenVINO's devices: the processor, Intel's graphics, Intel's NPU; in what they compute, how they are asked.

What an engine would choose by itself differs between devices and versions, so precision, hint and streams
are always given. Sources: OpenVINO's documentation of the properties of its CPU, GPU and NPU plugins; that
the VAE gives black images in fp16 on graphics: huggingface/optimum-intel#432. Only CPU has been run; GPU and
NPU are tested against a stand-in for OpenVINO's API.
"""

from __future__ import annotations

from typing import Any

from ..errors import BackendUnavailable, SessionError
from .base import Device, GraphSource, PrepareOptions
from .cpu import threads_are_limited, usable_cores
from .feeds import contract_of

CPU, GPU, NPU = "CPU", "GPU", "NPU"
KINDS = (CPU, GPU, NPU)

# OpenVINO's names for a precision: what the device can do, what is asked for.
_CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# The order in which a device is offered precisions. fp16 on a processor is emulated on most, so it is last.
_ORDER = {CPU: ("bf16", "fp32", "fp16"), GPU: ("fp16", "fp32", "bf16"), NPU: ("fp16",)}
_FP32_VAE = ("vae_decoder", "vae_encoder")


def kind_of(device: str) -> str:
    """``GPU.1`` is of the kind ``GPU``."""
    return device.partition(".")[0]


def list_devices(core: Any) -> tuple[Device, ...]:
    """What OpenVINO sees, of the kinds that Kiln runs on, with what each computes in."""
    return tuple(
        Device(name, str(core.get_property(name, "FULL_DEVICE_NAME")), precisions(core, name))
        for name in core.available_devices
        if kind_of(name) in KINDS
    )


def chosen_device(core: Any, asked: str) -> str:
    """The device to compile for; ``auto`` is the processor.

    Raises:
        BackendUnavailable: OpenVINO does not see it, or it is none (``AUTO:``, ``HETERO:`` would choose
            another in silence).
    """
    name = CPU if asked.lower() == "auto" else asked.upper()
    seen = list(core.available_devices)
    # One card is listed as GPU, several as GPU.0, GPU.1; GPU is then the first.
    known = {*seen, *(kind_of(device) for device in seen), *(f"{d}.0" for d in seen if d == GPU)}
    if name not in known or kind_of(name) not in KINDS:
        missing = {GPU: "; graphics need intel-opencl-icd or level-zero and the group render"}
        raise BackendUnavailable(
            f"the openvino backend was asked for the device {asked!r}, but OpenVINO sees {', '.join(seen)}"
            + missing.get(kind_of(name), "")
        )
    return name


def precisions(core: Any, device: str) -> tuple[str, ...]:
    """What a device computes in, best first."""
    capabilities = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    return tuple(name for name in _ORDER[kind_of(device)] if _CAPABILITY[name] in capabilities)


def chosen_precision(source: GraphSource, asked: str, device: str, possible: tuple[str, ...]) -> str:
    """The precision to ask the device for.

    Raises:
        SessionError: the device does not compute in it.
    """
    if asked == "auto":
        if kind_of(device) == GPU and source.component in _FP32_VAE and "fp32" in possible:
            return "fp32"  # its activations leave the range of fp16
        return next(iter(possible), "fp32")
    if asked not in possible:
        where = "this processor" if kind_of(device) == CPU else device
        raise SessionError(
            f"OpenVINO does not compute in {asked} on {where}; use auto or one of {', '.join(possible)}"
        )
    return asked


def properties_of(device: str, precision: str, options: PrepareOptions) -> dict[str, object]:
    """The properties to compile with; none that matters is left to a default of the machine."""
    kind = kind_of(device)
    given: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINT[precision]}
    if kind != NPU:  # which has one stream and does not let it be set
        given["NUM_STREAMS"] = 1
    if kind == GPU:  # else fp32 is a wish, and operators that are faster in fp16 take that
        given["EXECUTION_MODE_HINT"] = "ACCURACY" if precision == "fp32" else "PERFORMANCE"
    if kind == CPU:
        # The default quantizes the activations of linears whose weights are integers.
        given["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if options.threads:
            given["INFERENCE_NUM_THREADS"] = options.threads
        elif threads_are_limited():  # OpenVINO sees affinity masks but not the quota of a container
            given["INFERENCE_NUM_THREADS"] = usable_cores()
    elif options.threads:
        given["COMPILATION_NUM_THREADS"] = options.threads  # the only ones that such a device has
    return given


def check_shapes(source: GraphSource, device: str, options: PrepareOptions) -> None:
    """The NPU runs fixed shapes only.

    Raises:
        SessionError: an input's shape is not given.
    """
    free = [port.name for port in contract_of(source.component).inputs if port.name not in options.shapes]
    if kind_of(device) == NPU and free:
        raise SessionError(
            f"the NPU runs fixed shapes only; {source.component} leaves {', '.join(free)} free"
        )


def check_executed(device: str, executed: list[str]) -> None:
    """Refuse a model that OpenVINO put elsewhere.

    Raises:
        SessionError: another device, or more than one.
    """
    same = len(executed) == 1 and kind_of(executed[0]) == kind_of(device)
    if same and "." in device and "." in executed[0]:
        same = executed[0] == device
    if not same:
        raise SessionError(
            f"{device} was asked for, but OpenVINO executes on {'+'.join(executed) or 'nothing'}; "
            "name the device that is meant"
        )

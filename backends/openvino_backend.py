"""Run components with OpenVINO on processors, Intel's graphics and NPUs, at fixed shapes, from a cache.

Everything that matters is asked for explicitly and read back from the compiled model. On a processor
attention stays one operator: OpenVINO fuses it into one kernel (a ``Subgraph``) that keeps its scores in the
second-level cache. Measured for 4,096 tokens of 8 heads of 40 in bf16 on two cores with 1 MB each: 175 ms;
queries in 4 and in 16 pieces 184 and 198 ms, heads padded to 48 and to 64 184 and 207 ms, keys transposed
before 176 ms, matrix products and softmax by themselves 216 to 223 ms. Other rewrites that did not pay: the
22 projections of the timestep as one (0.15 % of a step at most), a graph typed bf16 (error 0.020 in place of
0.016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .errors_map import engine_errors
from .feeds import check_options
from .openvino_compile import Plan, compiled_model
from .openvino_devices import (
    check_executed,
    check_shapes,
    chosen_device,
    chosen_precision,
    kind_of,
    list_devices,
    precisions,
    properties_of,
)
from .openvino_engine import ENGINE, NAME, core, version
from .openvino_prompt import Prompt
from .openvino_session import OpenVINOSession

# Kiln's own option in ``PrepareOptions.extra``: both halves of the batch have the same latents.
SHARED_SAMPLE = "SHARED_SAMPLE"
WHERE_POSSIBLE = "where possible"

_READ_BACK = {
    "f32": "fp32",
    "float32": "fp32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "f16": "fp16",
    "float16": "fp16",
}
# What else is said of a compiled model, where its device knows it.
_SETTINGS = ("PERFORMANCE_HINT", "NUM_STREAMS", "EXECUTION_MODE_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


class OpenVINOBackend:
    """OpenVINO's plugins for CPU, GPU and NPU."""

    name = NAME

    def probe(self) -> Availability:
        """Whether a recent OpenVINO is installed; it is not imported."""
        return ENGINE.probe()

    def devices(self) -> tuple[Device, ...]:
        """What OpenVINO sees of processors, graphics and NPUs; nothing when it does not load."""
        try:
            made = core()
            with engine_errors(NAME, "asking for the devices"):
                return list_devices(made)
        except (BackendUnavailable, SessionError):
            return ()

    def prepare(self, source: GraphSource, options: PrepareOptions) -> OpenVINOSession:
        """Load one component, from ``options.cache_dir`` if it has been compiled before.

        ``options.extra`` holds further OpenVINO properties by name, e.g. ``{"ENABLE_CPU_PINNING": False}``,
        and for a UNet ``SHARED_SAMPLE``: True promises that the first and the second half of the batch have
        the same ``sample``, as under guidance. What lies before the prompt is then computed once. For a graph
        that does not allow that, True is an error, and ``WHERE_POSSIBLE`` computes it twice.

        Raises:
            BackendUnavailable: OpenVINO is not there, or does not see the device.
            SessionError: OpenVINO refuses the graph, a shape or a property, executes on another device, or
                the device does not compute in the precision asked for.
        """
        check_options(source.component, options)
        made = core()
        with engine_errors(NAME, f"asking for the device {options.device}"):
            device = chosen_device(made, options.device)
            precision = chosen_precision(source, options.precision, device, precisions(made, device))
        check_shapes(source, device, options)
        extra = dict(options.extra)
        share = _flag(source, extra.pop(SHARED_SAMPLE, False))
        properties = properties_of(device, precision, options) | extra
        plan = Plan(source, options, device, properties, bool(share), must_share=share is True)
        compiled = compiled_model(made, plan)
        in_force = _read_back(compiled.model, device, from_cache=compiled.from_cache)
        if options.precision not in ("auto", in_force.precision):
            raise SessionError(
                f"{options.precision} was asked for, but OpenVINO computes in {in_force.precision}"
            )
        with engine_errors(NAME, f"reserving memory for {source.component}"):
            request = compiled.model.create_infer_request()
            prompt = None if compiled.prompt is None else Prompt(compiled.prompt, request)
        shared = _shares(compiled.model, options)
        return OpenVINOSession(
            source,
            in_force,
            compiled.model,
            request,
            prompt=prompt,
            shared_sample=shared,
            settle=compiled.settle,
        )


def _flag(source: GraphSource, value: object) -> bool | str:
    """The value of ``SHARED_SAMPLE``.

    Raises:
        SessionError: it is none of its values, or the component has no prompt.
    """
    known = isinstance(value, bool) or value == WHERE_POSSIBLE
    if not known or (value and source.component != "unet"):
        raise SessionError(
            f"{SHARED_SAMPLE} is True or False or {WHERE_POSSIBLE!r}, for a unet; "
            f"got {value!r} for {source.component}"
        )
    return value if isinstance(value, bool) else str(value)


def _shares(compiled: Any, options: PrepareOptions) -> bool:
    """Whether the model takes half of the latents; one from the cache does not tell otherwise."""
    asked = options.shapes.get("sample")
    if asked is None or not options.extra.get(SHARED_SAMPLE):
        return False
    taken = next(port for port in compiled.inputs if "sample" in port.get_names())
    return bool(2 * taken.partial_shape[0].get_length() == asked[0])


def _read_back(compiled: Any, device: str, *, from_cache: bool) -> InForce:
    """What the compiled model says of itself.

    Raises:
        SessionError: it executes elsewhere than on ``device``.
    """
    with engine_errors(NAME, "reading back its settings"):
        hint = compiled.get_property("INFERENCE_PRECISION_HINT")
        executed = [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]
        settings = _settings(compiled)
        threads = "INFERENCE_NUM_THREADS" if kind_of(device) == "CPU" else "COMPILATION_NUM_THREADS"
        count = int(str(settings.pop(threads, 0)))
    check_executed(device, executed)
    name = hint if isinstance(hint, str) else hint.get_type_name()
    return InForce(
        backend=NAME,
        version=version(),
        provider="+".join(executed),
        device=executed[0] if device not in executed and kind_of(device) == device else device,
        precision=_READ_BACK.get(name, name),
        threads=count,
        from_cache=from_cache,
        settings=settings,
    )


def _settings(compiled: Any) -> dict[str, object]:
    """The properties of ``_SETTINGS`` and the thread counts that this device knows, as plain values."""
    known = set(compiled.get_property("SUPPORTED_PROPERTIES"))
    found: Mapping[str, object] = {
        name: compiled.get_property(name)
        for name in (*_SETTINGS, "INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS")
        if name in known
    }
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in found.items()
    }

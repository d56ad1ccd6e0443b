"""Read a graph into OpenVINO, lower it, compile it; or take what was compiled before from the cache."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..errors import SessionError
from .base import GraphSource, PrepareOptions
from .compiled_cache import CompiledCache, cache_key
from .cpu import describe_cpu
from .engine import parse_version
from .errors_map import engine_errors, one_line
from .mapped_pages import releasing_pages, trim_heap
from .openvino_constants import share_constants
from .openvino_devices import CPU, HINT, kind_of
from .openvino_engine import NAME, version
from .openvino_gated import split_gated_linears
from .openvino_group_norm import MARKED_SINCE, normalize_channels_last
from .openvino_guidance import share_before_prompt
from .openvino_heads import fill_vectors
from .openvino_kernels import FloatKernels, float_kernels, may_have_kernels, read_in_floats
from .openvino_prompt import cut_prompt
from .openvino_skip import convolve_shared_skips_once
from .openvino_storage import keep_storage_type
from .openvino_symmetric import quantize_around_zero
from .openvino_timestep import cut_timestep
from .openvino_upsample import multiply_before_upsampling
from .session import check_port_names

# 2026.2.1 and 2026.3.1 write such entries of an ONNX file too, but refuse to read them back.
WEIGHTLESS_SINCE = (2026, 4)

# Raised when a lowering changes, or what is asked of the engine, so that old entries are not used.
CACHE_VERSION = 10

# Seconds until a compiled model is exported, which holds Python's lock for 0.2 s: by then the caller is
# running the model, which does not.
_HEAD_START = 0.05


@dataclass(frozen=True)
class Plan:
    """What is compiled, and for what.

    ``shared_sample`` says that both halves of the batch have the same ``sample``, as under guidance, and
    ``must_share`` that it is an error if the graph is not of the form that can use it.
    """

    source: GraphSource
    options: PrepareOptions
    device: str
    properties: dict[str, object]
    shared_sample: bool = False
    must_share: bool = False


@dataclass(frozen=True)
class Compiled:
    """A compiled model, that of its part which depends on the prompt alone, and where both are from.

    ``settle`` waits until both are in the cache, if they are being written there.
    """

    model: Any
    prompt: Any | None = None
    from_cache: bool = False
    settle: Callable[[], None] = lambda: None


def compiled_model(core: Any, plan: Plan) -> Compiled:
    """What is compiled, or was before.

    Raises:
        SessionError: OpenVINO refuses the graph, a shape or a property.
    """
    properties = plan.properties | _weightless(plan)
    if plan.options.cache_dir is None:
        return _compile(core, plan, properties)
    kept = CompiledCache(plan.options.cache_dir / NAME)
    key = _key(core, plan, properties)
    blob = kept.load(key)
    if blob is not None:
        try:
            compiled = _imported(core, plan, properties, blob)
        except SessionError:  # there is no room for what the entry points to
            raise
        except Exception as error:  # whatever the engine has against it, compiling again is right
            kept.remove(key, one_line(error))
        else:
            return compiled
    compiled = _compile(core, plan, properties)

    # Or the entry is in memory beside what runs, and peak memory is what int8 is for.
    at_once = may_have_kernels(plan.source.weights_path)

    def exported() -> list[bytes]:
        time.sleep(0 if at_once else _HEAD_START)
        blobs = [_exported(part) for part in (compiled.model, compiled.prompt) if part is not None]
        return _framed(blobs) if _may_have_prompt(plan) else blobs

    kept.store_later(key, exported)
    if at_once:
        kept.wait(key)
    trim_heap()
    return replace(compiled, settle=functools.partial(kept.wait, key))


def _imported(core: Any, plan: Plan, properties: dict[str, object], blob: bytes) -> Compiled:
    """What an entry of the cache holds, with the weights it points to."""
    weights = plan.source.weights_path
    parts = _taken_apart(blob) if _may_have_prompt(plan) else [blob]
    with contextlib.ExitStack() as stack:
        if "WEIGHTS_PATH" in properties and may_have_kernels(weights):
            model = core.read_model(plan.source.graph_path)
            kernels = stack.enter_context(_float_kernels(model, plan, whole=True))
            weights = weights if kernels is None else kernels.path
            properties = properties | {"WEIGHTS_PATH": str(weights)}
            del model  # which holds the other file
        # The engine maps the file once and keeps it, so it may be released meanwhile.
        stack.enter_context(releasing_pages(weights))
        model, *prompt = (core.import_model(part, plan.device, properties) for part in parts)
        return Compiled(model, prompt[0] if prompt else None, from_cache=True)


def _float_kernels(
    model: Any, plan: Plan, *, whole: bool = False
) -> contextlib.AbstractContextManager[FloatKernels | None]:
    """The file of a model's kernels in the type that the processor packs; nothing on other devices."""
    if kind_of(plan.device) != CPU:
        return contextlib.nullcontext()
    kind = "BF16" if plan.properties["INFERENCE_PRECISION_HINT"] == HINT["bf16"] else "F32"
    kept = plan.options.cache_dir
    return float_kernels(model, plan.source.weights_path, kind, kept and kept / NAME, whole=whole)


def _exported(compiled: Any) -> bytes:
    exported = compiled.export_model()
    return exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)


def _may_have_prompt(plan: Plan) -> bool:
    """Whether an entry of the cache can hold two models. Others, which may be large, are kept as they are."""
    return plan.source.component == "unet" and kind_of(plan.device) == CPU


def _framed(blobs: list[bytes]) -> list[bytes]:
    """Parts of an entry of one or two compiled models: the length of the first in 8 bytes, then both."""
    return [len(blobs[0]).to_bytes(8, "little"), *blobs]


def _taken_apart(blob: bytes) -> list[bytes]:
    """The compiled models of an entry that is made of what ``_framed`` gives.

    Raises:
        ValueError: it is not of that form.
    """
    end = 8 + int.from_bytes(blob[:8], "little")
    if not 8 < end <= len(blob):
        raise ValueError(f"an entry of {len(blob)} bytes whose first model ends at {end}")
    return [part for part in (blob[8:end], blob[end:]) if part]


def _weightless(plan: Plan) -> dict[str, object]:
    """Properties that keep weights out of the cache: the blob then points into ``weights.safetensors``.

    For Stable Diffusion 1.5 an entry has 70 MB in place of 1.7 GB, for each LoRA and size: 4 MB of program,
    and the three kernels that ``openvino_upsample`` rearranges. Constants made by a lowering are kept whole,
    but for those of ``openvino_mapped``. Only the processor's plugin is known to read such entries back.
    """
    if kind_of(plan.device) != CPU or parse_version(version()) < WEIGHTLESS_SINCE:
        return {}
    return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(plan.source.weights_path)}


def _key(core: Any, plan: Plan, properties: dict[str, object]) -> Any:
    """Everything a compiled model depends on. Where the weights lie is no part of that, what they are is."""
    cpu = describe_cpu()
    return cache_key(
        {
            "cache": CACHE_VERSION,
            "component": plan.source.component,
            "digest": plan.source.digest,
            "shapes": {name: list(shape) for name, shape in plan.options.shapes.items()},
            "properties": {name: value for name, value in properties.items() if name != "WEIGHTS_PATH"},
            "shared_sample": plan.shared_sample,
            "engine": version(),
            # A virtual machine often calls different processors by one name; the flags tell them apart.
            "device": [
                plan.device,
                core.get_property(plan.device, "FULL_DEVICE_NAME"),
                cpu.name,
                cpu.flags,
                cpu.threads,
            ],
        }
    )


def _compile(core: Any, plan: Plan, properties: dict[str, object]) -> Compiled:
    source, options = plan.source, plan.options
    if not source.graph_path.is_file():
        raise SessionError(f"the graph {source.graph_path} is not there; export the bundle again")
    with engine_errors(NAME, f"reading {source.component}"):
        model = core.read_model(source.graph_path)
    check_port_names(
        source.component, [port.any_name for port in model.inputs], [port.any_name for port in model.outputs]
    )
    if options.shapes:
        with engine_errors(NAME, f"fixing the shapes of {source.component}"):
            model.reshape({name: list(shape) for name, shape in options.shapes.items()})
    with contextlib.ExitStack() as stack:
        with engine_errors(NAME, f"lowering {source.component}"):
            kernels = stack.enter_context(_float_kernels(model, plan))
            prompt = lower(core, model, plan)
            if kernels is not None:
                read_in_floats(core, model, kernels)
                stack.enter_context(releasing_pages(kernels.path))
        # Only here, where ``model`` keeps the files mapped: see ``releasing_pages``.
        with engine_errors(NAME, f"compiling {source.component}"), releasing_pages(source.weights_path):
            if prompt is None:
                return Compiled(core.compile_model(model, plan.device, properties))
            # The engine compiles on one processor, most of the time.
            with ThreadPoolExecutor(1, "kiln-prompt") as other:
                part = other.submit(core.compile_model, prompt, plan.device, properties)
                return Compiled(core.compile_model(model, plan.device, properties), part.result())


def lower(core: Any, model: Any, plan: Plan) -> Any | None:
    """Everything that is rewritten before OpenVINO compiles a model, in this order; changes it in place.

    Returns:
        The model of what depends on the prompt alone, which is taken out last; None where it stays.

    Raises:
        SessionError: halves of the batch are to be shared, but the graph is not of the form that allows it.
    """
    if plan.source.component == "unet" and plan.properties["INFERENCE_PRECISION_HINT"] != HINT["fp32"]:
        cut_timestep(model)
    if plan.shared_sample and not share_before_prompt(model) and plan.must_share:
        raise SessionError("SHARED_SAMPLE needs a UNet with fixed shapes and an even batch")
    bf16 = plan.properties["INFERENCE_PRECISION_HINT"] == HINT["bf16"]
    if kind_of(plan.device) == CPU and not model.is_dynamic():  # measured on processors only
        quantize_around_zero(model)
        multiply_before_upsampling(model)
        if "avx512f" in describe_cpu().flags:
            fill_vectors(model)
        split_gated_linears(core, model, plan.source.weights_path)
        if bf16:
            convolve_shared_skips_once(model)
        if bf16 and parse_version(version()) >= MARKED_SINCE:
            normalize_channels_last(core, model)
        share_constants(model)
    keep_storage_type(model)
    if kind_of(plan.device) != CPU:
        return None
    return cut_prompt(model, HINT["bf16" if bf16 else "fp32"])

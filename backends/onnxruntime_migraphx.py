"""Run components with ONNX Runtime's MIGraphX provider on an AMD GPU, compiled for fixed shapes.

Every new shape is compiled again for minutes, so shapes have to be fixed. The graph is lowered to opset 17
without operators of ONNX Runtime's own. fp16 is typed into it; for bf16, which opset 17 does not have,
MIGraphX converts. Environment variables override the provider's options, so they are read, reported, and
refused where they contradict what was asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .engine import parse_version
from .feeds import check_options
from .onnxruntime_engine_cache import key_facts, prepare_cached
from .onnxruntime_gpus import Gpu, amd_gpus, choose
from .onnxruntime_session import OrtSession, Plan, open_session, require_fixed_shapes
from .onnxruntime_wheel import Needs
from .session import CheckedSession

NAME = "onnxruntime-migraphx"
PROVIDER = "MIGraphXExecutionProvider"
KIND = "rocm"
_ROCM = "install the ROCm that the wheel was built for; the wheel brings none of it; kiln doctor says which"
NEEDS = Needs(
    PROVIDER,
    "onnxruntime-migraphx",
    "rocm",
    "libonnxruntime_providers_migraphx.so",
    (("libamdhip64.so", _ROCM), ("libmigraphx_c.so", _ROCM)),
    ("/opt/rocm/lib", "/opt/rocm/lib/migraphx/lib"),
)

_PLAIN = ("static", "opset17")
_LOWERINGS = {"fp32": _PLAIN, "fp16": (*_PLAIN, "fp16"), "bf16": _PLAIN}
_BF16_SINCE = (6, 4, 2)  # of ROCm
# The provider's own conversions; only that to bf16 is used. fp16 and bf16 together switch each other off in
# silence, and so do int8 and fp8.
QUANTISERS = ("migraphx_fp16_enable", "migraphx_bf16_enable", "migraphx_fp8_enable", "migraphx_int8_enable")
_PREFIXES = ("ORT_MIGRAPHX_", "MIGRAPHX_")
# Where the provider would keep or find compiled models whatever the options say, not keyed by weights.
_CACHES = (
    "MODEL_CACHE_PATH",
    "LOAD_COMPILED_MODEL",
    "LOAD_COMPILE_PATH",
    "SAVE_COMPILED_MODEL",
    "SAVE_COMPILE_PATH",
)


class MIGraphXBackend:
    """ONNX Runtime on AMD."""

    name = NAME

    def probe(self) -> Availability:
        """Whether onnxruntime-migraphx, its ROCm and a GPU are here; the engine is not imported."""
        found = NEEDS.probe()
        if found.available:
            try:
                amd_gpus()
            except BackendUnavailable as error:
                return Availability(False, str(error), found.version)
        return found

    def devices(self) -> tuple[Device, ...]:
        """``rocm:0``, ``rocm:1``, ... as the kernel's driver lists them."""
        try:
            NEEDS.engine.load()
            gpus = amd_gpus() if self.probe().available else ()
        except BackendUnavailable:
            return ()
        return tuple(Device(f"{KIND}:{gpu.index}", gpu.name, precisions(gpu)) for gpu in gpus)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> CheckedSession:
        """Compile one component, or load what was compiled before from ``options.cache_dir``.

        ``options.extra`` holds further provider options, e.g. ``{"migraphx_exhaustive_tune": 1}``.

        Raises:
            BackendUnavailable: wheel, ROCm or the GPU asked for are not there.
            SessionError: a shape is left free, an environment variable contradicts what was asked, the graph
                or an option is refused or not in force, or any operator would run on the processor.
        """
        check_options(source.component, options)
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        module = NEEDS.engine.load()
        gpu = choose(NAME, KIND, amd_gpus(), options.device)
        precision = _resolve(source, options, gpu)
        require_fixed_shapes(NAME, source, options)
        asked = provider_options(options, precision, gpu.index, None)
        overrides = check_environment(os.environ, asked)
        facts = key_facts(module, source, options, gpu, _LOWERINGS[precision], {**asked, **overrides})

        def prepare(folder: Path | None) -> CheckedSession:
            plan = _plan(options, gpu, precision, overrides, folder)
            return OrtSession(source, open_session(module, source, options, plan))

        return prepare_cached(NAME, source, options, facts, prepare)


def precisions(gpu: Gpu) -> tuple[str, ...]:
    """What MIGraphX computes in, best first; bf16 from ROCm 6.4.2 on."""
    version = parse_version(gpu.driver)
    return ("fp16", "bf16", "fp32") if not version or version >= _BF16_SINCE else ("fp16", "fp32")


def check_environment(environment: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """The variables that MIGraphX and its provider read.

    Args:
        environment: as ``os.environ``.
        asked: the provider options that should be in force.

    Raises:
        SessionError: one of them contradicts what is asked for; the text says which to unset.
    """
    found = {
        name: value for name, value in sorted(environment.items()) if name.startswith(_PREFIXES) and value
    }
    for name, value in found.items():
        short = name.removeprefix(_PREFIXES[0])
        if short in _CACHES:
            raise SessionError(
                f"{name}={value} would let MIGraphX answer with a model of other weights, because its cache "
                f"does not know them: unset {name}"
            )
        option = f"migraphx_{short.lower()}"
        if name.startswith(_PREFIXES[0]) and option in asked and asked[option] != value.strip():
            raise SessionError(
                f"{name}={value} overrides {option}={asked[option]}, as asked for: unset {name}"
            )
    return found


def provider_options(
    options: PrepareOptions, precision: str, index: int, folder: Path | None
) -> dict[str, str]:
    """The options of the provider; an empty cache folder switches its cache off.

    Raises:
        SessionError: ``extra`` asks for one of the provider's own conversions.
    """
    named = [name for name in QUANTISERS if name in options.extra]
    if named:
        raise SessionError(f"{', '.join(named)} is not for callers: ask for a precision instead")
    given: dict[str, Any] = {
        "device_id": index,
        **dict.fromkeys(QUANTISERS, 0),
        "migraphx_bf16_enable": int(precision == "bf16"),
        "migraphx_arena_extend_strategy": "kSameAsRequested",
        "migraphx_exhaustive_tune": 0,
        "migraphx_model_cache_dir": "" if folder is None else folder,
    }
    return {name: str(value) for name, value in (given | dict(options.extra)).items()}


def _resolve(source: GraphSource, options: PrepareOptions, gpu: Gpu) -> str:
    possible = precisions(gpu)
    if options.precision == "auto":  # the VAE of SDXL gives NaN in fp16 (AMDMIGraphX's SDXL example)
        return "fp32" if source.component.startswith("vae") else possible[0]
    if options.precision not in possible:
        raise SessionError(
            f"MIGraphX does not compute in {options.precision} with ROCm {gpu.driver}; use auto or one of "
            f"{', '.join(possible)}"
        )
    return options.precision


def _plan(
    options: PrepareOptions, gpu: Gpu, precision: str, overrides: Mapping[str, str], folder: Path | None
) -> Plan:
    return Plan(
        NAME,
        PROVIDER,
        f"{KIND}:{gpu.index}",
        precision,
        provider_options(options, precision, gpu.index, folder),
        typed="fp32" if precision == "bf16" else precision,
        lowerings=_LOWERINGS[precision],
        settings={"gpu": gpu.arch, "rocm": gpu.driver, **overrides},
    )

"""AMD's libraries and packages: do they load, do they fit each other, what in the environment bends them."""

from __future__ import annotations

from .amd_kernels import rocm_version, torch_build
from .amd_topology import concerns, useful_gpus
from .finding import Finding, absent, failure, ok, warning
from .packages import wheel
from .system import System, version_tuple

HIP, MIGRAPHX_C = "libamdhip64", "libmigraphx_c"
# Variables that change what the engines do, whatever is asked of them on the command line.
_OVERRIDING = ("ORT_MIGRAPHX_", "MIGRAPHX_", "HIP_", "ROCR_", "HSA_", "AMD_SERIALIZE_", "MIOPEN_")
_EXPECTED = (
    "HIP_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "HIP_PATH",
    "HIP_PLATFORM",
)  # judged elsewhere
MIN_ROCM_BF16 = (6, 4, 2)


def check_libraries(system: System) -> list[Finding]:
    """D-AMD-LIB: the libraries that onnxruntime-migraphx was linked to load, and are of its ROCm."""
    found = wheel(system, "onnxruntime-migraphx", "onnxruntime-rocm")
    if found is None:
        return [absent("D-AMD-LIB", "onnxruntime-migraphx is not installed")]
    if not concerns(system):
        return [absent("D-AMD-LIB", f"{found.distribution.name} is installed, and there is no AMD GPU")]
    name, version = found.distribution.name, found.distribution.version
    if name == "onnxruntime-rocm":
        text = f"onnxruntime-rocm {version} has the ROCm provider, which ONNX Runtime gave up in 1.23"
        fix = ["pip uninstall -y onnxruntime-rocm", "pip install onnxruntime-migraphx"]
        return [failure("D-AMD-LIB", text, [str(found.capi)], fix)]
    if system.ask is None:
        return [absent("D-AMD-LIB", "libraries are not loaded in another root")]
    provider = "MIGraphXExecutionProvider"
    needed = [
        next(iter(found.sonames(provider, MIGRAPHX_C)), f"{MIGRAPHX_C}.so.3"),
        next(iter(found.sonames(provider, HIP)), f"{HIP}.so.7"),
    ]
    wants = found.rocm
    # The wheel looks there first, whatever /opt/rocm leads to.
    has = wants if wants and system.exists(f"/opt/rocm-{wants}/lib") else rocm_version(system)
    evidence = [
        f"{name} {version}, built for ROCm {wants or 'unknown'}",
        f"ROCm here: {has or 'none in /opt'}",
    ]
    failed = []
    for library in needed:
        answer = _load(system, library, has)
        evidence.append(answer or f"{library} loads")
        if answer:
            failed.append(library)
    if failed:
        text = f"{name} needs {' and '.join(failed)}: not to be loaded here"
        return [failure("D-AMD-LIB", text, evidence, _library_fix(failed, wants, has))]
    ours, theirs = version_tuple(has)[:2], version_tuple(wants)[:2]
    if ours and theirs and ours != theirs:
        text = f"{name} was built for ROCm {wants}, here is ROCm {has}"
        fix = [f"Install ROCm {wants} beside it: /opt/rocm-{wants} is searched first."]
        return [warning("D-AMD-LIB", text, evidence, fix)]
    return [ok("D-AMD-LIB", f"{' and '.join(needed)} load", *evidence)]


def _load(system: System, library: str, rocm: str) -> str:
    """Why a library does not load, empty if it does: by name, or where the wheel's search path leads."""
    assert system.ask is not None
    first = system.ask(("dlopen", library))
    if first.ok:
        return ""
    folders = [f"/opt/rocm-{rocm}/lib", f"/opt/rocm-{rocm}/lib/migraphx/lib", "/opt/rocm/lib"]
    for folder in folders if rocm else folders[-1:]:
        path = f"{folder}/{library}"
        if system.exists(path):
            again = system.ask(("dlopen", str(system.path(path))))
            if again.ok:
                return ""
            return again.text
    return first.text


def _library_fix(failed: list[str], wants: str, has: str) -> list[str]:
    wanted = f"ROCm {wants}" if wants else "ROCm 7"
    if not has:
        return [
            f"Install {wanted} by AMD's page 'Install AMD ROCm', then: sudo apt install migraphx.",
            "Or take torch with ROCm, which brings its own: docs/amd.md, section 2.",
        ]
    if any(name.startswith(MIGRAPHX_C) for name in failed):
        return ["sudo apt install migraphx"]
    return [f"Install {wanted}; ROCm {has} has other library versions."]


def check_torch(system: System) -> list[Finding]:
    """D-AMD-TORCH: torch beside an AMD GPU is a build for ROCm."""
    if not concerns(system):
        return [absent("D-AMD-TORCH", "there is no AMD GPU for torch")]
    build = torch_build(system)
    if build is None:
        return [absent("D-AMD-TORCH", "torch is not installed")]
    evidence = [f"torch {build.version}: {build.kind} ({build.path})"]
    if build.hip:
        return [ok("D-AMD-TORCH", f"torch {build.version} is built for ROCm {build.hip}", *evidence)]
    other = wheel(system, "onnxruntime-migraphx")
    if other is not None:
        evidence.append(f"the GPU is used by {other.distribution.name} {other.distribution.version}")
        return [
            ok("D-AMD-TORCH", f"torch {build.version} ({build.kind}) is used for the processor", *evidence)
        ]
    text = f"torch {build.version} is a {build.kind} build and cannot use the AMD GPU"
    return [warning("D-AMD-TORCH", text, evidence, _torch_fix())]


def check_engine(system: System) -> list[Finding]:
    """D-AMD-ENGINE: something is installed that uses the GPU."""
    if not useful_gpus(system) or all(not (gpu.card and gpu.card.backends) for gpu in useful_gpus(system)):
        return [absent("D-AMD-ENGINE", "there is no AMD GPU that an engine could use")]
    build, found = torch_build(system), wheel(system, "onnxruntime-migraphx")
    have = [f"torch {build.version}"] if build and build.hip else []
    have += [f"{found.distribution.name} {found.distribution.version}"] if found else []
    if have:
        return [ok("D-AMD-ENGINE", f"{' and '.join(have)} can use the AMD GPU")]
    text = "an AMD GPU, and no engine installed that uses it"
    return [warning("D-AMD-ENGINE", text, ["neither torch for ROCm nor onnxruntime-migraphx"], _torch_fix())]


def _torch_fix() -> list[str]:
    return [
        "pip uninstall -y torch",
        "Install torch by AMD's page 'Install PyTorch on ROCm' (docs/amd.md, section 2).",
        "kiln generate PROMPT --backend torch:rocm",
    ]


def check_environment(system: System) -> list[Finding]:
    """D-AMD-ENV: variables that override options, so that what is asked is not what runs."""
    if not concerns(system):
        return [absent("D-AMD-ENV", "there is no AMD GPU for variables to act on")]
    found = {k: v for k, v in sorted(system.environment.items()) if k.startswith(_OVERRIDING)}
    judged = {k: v for k, v in found.items() if k not in _EXPECTED}
    evidence = [f"{key}={value}" for key, value in found.items()]
    if not judged:
        return [ok("D-AMD-ENV", "no variable overrides the engines' options", *evidence)]
    text = f"variables override what the engines are asked: {', '.join(judged)}"
    if _on(judged, "ORT_MIGRAPHX_FP16_ENABLE") and _on(judged, "ORT_MIGRAPHX_BF16_ENABLE"):
        text = "ORT_MIGRAPHX_FP16_ENABLE and _BF16_ENABLE together switch both off"
    return [warning("D-AMD-ENV", text, evidence, [f"unset {' '.join(judged)}"])]


def _on(values: dict[str, str], name: str) -> bool:
    return values.get(name, "0") not in ("", "0")

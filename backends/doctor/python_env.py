"""The Python environment: its version, distributions that overwrite each other, empty packages."""

from __future__ import annotations

from .amd_topology import useful_gpus
from .container import container_kind
from .finding import Finding, absent, failure, ok, warning
from .nvidia import present as nvidia_present
from .packages import BACKENDS, EXPECTED, LIBRARIES, PLACEHOLDERS, Wheel, wheels
from .permission import container_fix
from .system import System, version_tuple

OLDEST = (3, 11)
NEWEST = (3, 14)  # the newest for which AMD's and Microsoft's packages of November 2026 exist


def check_python(system: System) -> list[Finding]:
    """D-PY: a Python for which the engines exist."""
    text = ".".join(map(str, system.python))
    if system.python[:2] < OLDEST:
        fix = ["sudo apt install python3.12 python3.12-venv", "python3.12 -m venv .venv"]
        return [failure("D-PY", f"Python {text} is too old; Kiln and current engines need 3.11", [], fix)]
    if system.python[:2] > NEWEST:
        fix = ["python3.14 -m venv .venv"]
        return [
            warning("D-PY", f"Python {text} is newer than the newest the engines exist for, 3.14", [], fix)
        ]
    return [ok("D-PY", f"Python {text}")]


def check_duplicates(system: System) -> list[Finding]:
    """D-ORT-DUP: at most one classic onnxruntime distribution, because they share one folder."""
    found = wheels(system)
    if not found:
        return [absent("D-ORT-DUP", "ONNX Runtime is not installed")]
    evidence = [f"{w.distribution.name} {w.distribution.version} in {w.distribution.folder}" for w in found]
    if len(found) == 1:
        return [ok("D-ORT-DUP", f"one ONNX Runtime: {found[0].distribution.name}", *evidence)]
    names = sorted({w.distribution.name for w in found})
    if len({w.distribution.folder for w in found}) == len(found):
        text = f"ONNX Runtime is on the search path {len(found)} times; {found[0].distribution.name} is used"
        fix = ["Leave one: unset PYTHONPATH, or a new environment: python3 -m venv .venv."]
        return [warning("D-ORT-DUP", text, evidence, fix)]
    evidence.append(f"the files that lie there are those of {found[0].owner}")
    keep = _wanted(system, names)
    fix = [f"pip uninstall -y {' '.join(names)}", f"pip install {keep}"]
    text = f"{' and '.join(names)} overwrite each other's files"
    return [failure("D-ORT-DUP", text, evidence, fix)]


def _wanted(system: System, names: list[str]) -> str:
    """Which of several distributions fits the machine."""
    if useful_gpus(system) and "onnxruntime-migraphx" in names:
        return "onnxruntime-migraphx"
    if nvidia_present(system) and "onnxruntime-gpu" in names:
        return "onnxruntime-gpu"
    return "onnxruntime" if "onnxruntime" in names else names[0]


def check_placeholders(system: System) -> list[Finding]:
    """D-PLACEHOLDER: packages that hold nothing but their name."""
    found = [
        d for d in system.distributions if version_tuple(d.version)[:3] == PLACEHOLDERS.get(d.name, "nothing")
    ]
    if not found:
        return [absent("D-PLACEHOLDER", "no empty package is installed")]
    evidence = [f"{d.name} {d.version} is a reserved name without contents" for d in found]
    names = " ".join(d.name for d in found)
    fix = [
        f"pip uninstall -y {names}",
        "For AMD: pip install onnxruntime-migraphx, see docs/amd.md, section 3.",
    ]
    return [warning("D-PLACEHOLDER", f"empty packages are installed: {names}", evidence, fix)]


def check_providers(system: System) -> list[Finding]:
    """D-EP: ONNX Runtime lists the providers that its distribution should bring, and their libraries load."""
    found = wheels(system)
    if not found:
        return [absent("D-EP", "ONNX Runtime is not installed")]
    if system.ask is None:
        return [absent("D-EP", "engines are not started in another root")]
    answer = system.ask(("onnxruntime-list",))
    name = found[0].distribution.name
    if not answer.ok:
        fix = [f"pip install --force-reinstall {name}"]
        return [failure("D-EP", f"{name} does not load: {answer.text or answer.status}", [], fix)]
    listed = [str(p) for p in _rows(answer.value.get("providers"))]
    expected = EXPECTED[name]
    evidence = [f"onnxruntime {answer.value.get('version')} lists {', '.join(listed)}"]
    missing = [p for p in expected if p not in listed]
    if missing and len({w.distribution.name for w in found}) > 1:
        return [absent("D-EP", "several distributions overwrite each other, see D-ORT-DUP", *evidence)]
    if missing:
        text = f"{name} should bring {' and '.join(missing)} and does not: its files were overwritten"
        fix = [f"pip uninstall -y {name}", f"pip install --no-cache-dir {name}"]
        return [failure("D-EP", text, [*evidence, f"the files are those of {found[0].owner}"], fix)]
    return [ok("D-EP", f"{name} lists what it should", *evidence), *_loadable(system, found[0], expected)]


def _loadable(system: System, found: Wheel, expected: tuple[str, ...]) -> list[Finding]:
    """D-EP-LOAD: a provider that is listed is compiled in; its library may still lack others."""
    assert system.ask is not None
    findings = []
    for provider in expected:
        if provider not in LIBRARIES:
            continue
        path = found.capi / LIBRARIES[provider]
        answer = system.ask(("dlopen-provider", str(path)))
        backend = BACKENDS.get(provider, provider)
        if answer.ok:
            findings.append(ok("D-EP-LOAD", f"{backend}: compiled in, and its library loads", str(path)))
            continue
        optional = provider == "TensorrtExecutionProvider" and not any(
            d.name.startswith("tensorrt") for d in system.distributions
        )
        if optional:
            findings.append(absent("D-EP-LOAD", f"{backend}: TensorRT is not installed", answer.text))
            continue
        text = f"{backend}: compiled in, but its library does not load"
        findings.append(
            failure("D-EP-LOAD", text, [str(path), answer.text], _load_fix(system, provider, found))
        )
    return findings


def _load_fix(system: System, provider: str, found: Wheel) -> list[str]:
    gpu = {"CUDA": nvidia_present(system), "MIGraphX": bool(useful_gpus(system))}
    if not gpu.get(provider.removesuffix("ExecutionProvider"), True):
        name = found.distribution.name
        if container_kind(system):
            amd = container_fix(["/dev/kfd", "/dev/dri"])
            passed = amd if provider.startswith("MIGraphX") else ["docker run --gpus all ..."]
            return [*passed, f"Without such a GPU: pip uninstall -y {name} && pip install onnxruntime."]
        return [f"pip uninstall -y {name}", "pip install onnxruntime"]
    if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        name, version = found.distribution.name, found.distribution.version
        return [f"pip install '{name}[cuda,cudnn]=={version}'"]
    if provider == "MIGraphXExecutionProvider":
        return [f"Install ROCm {found.rocm or '7'} and MIGraphX: docs/amd.md, section 3."]
    return [f"pip install --force-reinstall {found.distribution.name}"]


def _rows(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []

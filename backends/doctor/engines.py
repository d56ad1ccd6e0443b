"""Which engines and devices there are, by what the engines say of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .finding import Finding, Verdict, absent, failure, ok
from .packages import BACKENDS
from .system import Answer, Question, System

_NOT_ENGINES = ("AzureExecutionProvider",)  # sends the model to a server
_OPENVINO_HELPERS = ("AUTO", "MULTI", "HETERO", "BATCH")


@dataclass(frozen=True)
class Target:
    """An engine with one of its devices: how to ask for it in Kiln, and the question that runs it."""

    backend: str
    engine: str
    device: str
    question: Question

    @property
    def title(self) -> str:
        """``onnxruntime-cuda (onnxruntime 1.31.1, CUDAExecutionProvider)``."""
        return f"{self.backend} ({self.engine}, {self.device})"


def targets(system: System) -> list[Target]:
    """Every engine that is installed and answers, with each of its devices."""
    if system.ask is None:
        return []
    return [*_onnxruntime(system), *_openvino(system), *_torch(system)]


def _onnxruntime(system: System) -> Iterator[Target]:
    answer = _list(system, "onnxruntime-list", "onnxruntime")
    if answer is None:
        return
    engine = f"onnxruntime {answer.value.get('version')}"
    have_tensorrt = has_tensorrt(system)
    for provider in dict.fromkeys([*texts(answer.value, "providers"), *texts(answer.value, "plugins")]):
        if provider in _NOT_ENGINES or (provider.startswith("Tensorrt") and not have_tensorrt):
            continue
        yield Target(BACKENDS.get(provider, provider), engine, provider, ("onnxruntime-run", provider))


def has_tensorrt(system: System) -> bool:
    """Whether TensorRT is there, from a wheel or as a library of the system."""
    if any(found.name.startswith("tensorrt") for found in system.distributions):
        return True
    return system.ask is not None and system.ask(("dlopen", "libnvinfer.so.10")).ok


def _openvino(system: System) -> Iterator[Target]:
    answer = _list(system, "openvino-list", "openvino", "openvino-nightly")
    devices = answer.value.get("devices") if answer else None
    if answer is None or not isinstance(devices, Mapping):
        return
    engine = f"openvino {str(answer.value.get('version')).partition('-')[0]}"
    for device in devices:
        if str(device).partition(".")[0] not in _OPENVINO_HELPERS:
            yield Target(f"openvino:{device}", engine, str(device), ("openvino-run", str(device)))


def _torch(system: System) -> Iterator[Target]:
    answer = _list(system, "torch-list", "torch")
    if answer is None:
        return
    engine = f"torch {answer.value.get('version')}"
    gpus = answer.value.get("gpus")
    kind = "rocm" if answer.value.get("hip") else "cuda"
    for index, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        name = str(gpu.get("name", "")) if isinstance(gpu, Mapping) else ""
        where = f"torch:{kind}" + (f":{index}" if index else "")
        yield Target(where, engine, f"cuda:{index} {name}".rstrip(), ("torch-run", f"cuda:{index}"))
    yield Target("torch:cpu", engine, "cpu", ("torch-run", "cpu"))


def _list(system: System, verb: str, *distributions: str) -> Answer | None:
    """The answer of an engine that is installed and loads; check_loads reports one that does not."""
    if system.ask is None:
        return None
    if not _installed(system, verb, distributions):
        return None
    answer = system.ask((verb,))
    return answer if answer.ok else None


def _installed(system: System, verb: str, distributions: tuple[str, ...]) -> bool:
    if verb == "onnxruntime-list":
        return any(d.name.startswith("onnxruntime") for d in system.distributions)
    return system.distribution(*distributions) is not None


def check_loads(system: System) -> list[Finding]:
    """D-LOAD: openvino and torch, if installed, can be imported; of ONNX Runtime D-EP says it."""
    if system.ask is None:
        return [absent("D-LOAD", "engines are not started in another root")]
    findings = []
    for name in ("openvino", "torch"):
        found = system.distribution(name)
        if found is None:
            continue
        answer = system.ask((f"{name}-list",))
        if answer.ok:
            findings.append(ok("D-LOAD", f"{name} {found.version} can be imported"))
            continue
        fix = [f"pip install --force-reinstall --no-cache-dir {name}=={found.version.partition('+')[0]}"]
        text = f"{name} {found.version} is installed but cannot be imported"
        findings.append(failure("D-LOAD", text, [answer.text or answer.status], fix))
    return findings or [absent("D-LOAD", "neither openvino nor torch is installed")]


def texts(value: Mapping[str, object], key: str) -> list[str]:
    found = value.get(key)
    return [str(item) for item in found] if isinstance(found, list | tuple) else []


def check_openvino(system: System) -> list[Finding]:
    """D-OV: OpenVINO's devices, and what they compute in if nobody says: often not fp32."""
    answer = _list(system, "openvino-list", "openvino", "openvino-nightly")
    devices = answer.value.get("devices") if answer else None
    if not isinstance(devices, Mapping):
        return [absent("D-OV", "OpenVINO is not installed, or was not started")]
    evidence, rounded = [], []
    for device, facts in devices.items():
        default = str(facts.get("INFERENCE_PRECISION_HINT", "unknown"))
        can = ", ".join(texts(facts, "OPTIMIZATION_CAPABILITIES"))
        evidence.append(f"{device}: {facts.get('FULL_DEVICE_NAME')}; default {default}; can {can}")
        if default in ("bf16", "bfloat16", "f16", "float16"):
            rounded.append(f"{device} in {default}")
    text = f"OpenVINO sees {', '.join(map(str, devices))}"
    if rounded:
        text += f" and computes on {' and '.join(rounded)} by default; Kiln says so in every record"
        fix = ("kiln generate PROMPT --backend openvino --precision fp32",)
        return [Finding("D-OV", Verdict.OK, text, tuple(evidence), fix)]
    return [ok("D-OV", text, *evidence)]


def check_kiln(system: System) -> list[Finding]:
    """D-KILN: what ``kiln devices`` offers, which loads the engines through Kiln's own backends."""
    if system.ask is None:
        return [absent("D-KILN", "engines are not started in another root")]
    answer = system.ask(("kiln-devices",))
    rows = answer.value.get("rows") if answer.ok else None
    if not isinstance(rows, list):
        fix = ["kiln --debug devices"]
        return [failure("D-KILN", "listing Kiln's backends failed", [answer.text or answer.status], fix)]
    real = [row for row in rows if row["backend"] != "null"]
    usable = [f"{row['backend']}:{row['device']}" for row in real if row["available"]]
    others = [f"{row['backend']}: {row['reason']}" for row in real if not row["available"]]
    if usable:
        return [ok("D-KILN", f"Kiln can use {', '.join(usable)}", *others)]
    fix = ["pip install 'kiln-diffusion[cpu]'"]
    return [failure("D-KILN", "Kiln has no backend here that it can use", others, fix)]

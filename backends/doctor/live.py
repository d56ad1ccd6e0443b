"""Run the self-test on an engine's device, and tell what really happened.

Compiled in: the engine lists the provider. Loadable: its library loads. Working: it ran the network itself,
read back from the engine, with numpy's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .engines import Target, texts
from .finding import Finding, Verdict, failure, ok, warning
from .packages import CPU
from .selftest import Comparison
from .system import Answer, System


@dataclass(frozen=True)
class EngineRun:
    """What came of one target.

    ``works``: it ran there, the numbers are right in fp32 or in half precision, and Kiln has a backend for
    it. ``fp32`` and ``half`` are the cosine with numpy's result, or what happened in place of one.
    """

    target: Target
    works: bool
    fp32: str
    half: str
    findings: tuple[Finding, ...]


def run_target(system: System, target: Target) -> EngineRun:
    """Run the self-test on one target, a child process for each precision."""
    assert system.ask is not None
    full = system.ask((*target.question, "fp32"))
    live = _live(target, full, "fp32")
    half_only = full.status == "error" and target.device != CPU  # an NPU computes in fp16 only
    if live.verdict is Verdict.FAILURE and not half_only:
        return EngineRun(target, False, "-", "-", (live,))
    if target.device == CPU:  # ONNX Runtime has no half precision on a processor
        return _judged(system, target, [live, _numbers(target, "fp32", full)], _cosine(full), "-")
    half = system.ask((*target.question, "half"))
    started = _live(target, half, "half precision")
    failed = started.verdict is Verdict.FAILURE
    if half_only and failed:
        return EngineRun(target, False, "-", "-", (live,))
    if half_only:
        text = f"{target.title}: runs in half precision only"
        expected = target.device.startswith("NPU")
        fix = ["Update engine and driver; exact results need another backend."]
        live = (
            ok("D-EP-LIVE", text, *live.evidence)
            if expected
            else warning("D-EP-LIVE", text, live.evidence, fix)
        )
        return _judged(system, target, [live, _numbers(target, "half", half)], "-", _cosine(half))
    numbers = _numbers(target, "fp32", full)
    if failed:
        if half.status == "error":  # fp32 still works: it costs speed and memory
            started = warning("D-EP-LIVE", started.summary, started.evidence, [_FP32])
        return _judged(system, target, [live, numbers, started], _cosine(full), "fails")
    rounded = _numbers(target, "half", half)
    return _judged(system, target, [live, numbers, rounded], _cosine(full), _cosine(half))


_FP32 = "kiln generate PROMPT --precision fp32"


def _judged(system: System, target: Target, findings: list[Finding], fp32: str, half: str) -> EngineRun:
    """The run with its verdict: numbers that are right, by a backend that can be asked for."""
    works = any(f.id == "D-NUM" and f.verdict is Verdict.OK for f in findings)
    if works and target.backend.partition(":")[0] not in system.backends:
        findings.append(ok("D-EP-LIVE", f"{target.title}: works, but this Kiln has no backend for it"))
        works = False
    return EngineRun(target, works, fp32, half, tuple(findings))


def _live(target: Target, answer: Answer, what: str) -> Finding:
    """D-EP-LIVE: the engine ran the network, on the device that was asked for."""
    title = target.title
    if answer.status == "crash":
        text = f"{title}: the process died in {what}"
        return failure("D-EP-LIVE", text, [answer.text], _crash_fix(target))
    if answer.status == "timeout":
        fix = ["kiln doctor --timeout 600", "If it never ends, take another backend."]
        return failure("D-EP-LIVE", f"{title}: hangs in {what}", [answer.text], fix)
    if not answer.ok:
        return failure("D-EP-LIVE", f"{title}: refuses {what}", [answer.text], _error_fix(target))
    providers = texts(answer.value, "providers")
    found = answer.value.get("nodes")
    nodes = found if isinstance(found, Mapping) else {}
    evidence = [f"read back: {', '.join(providers)}"]
    if nodes:
        evidence.append("nodes ran on " + ", ".join(f"{name}: {count}" for name, count in nodes.items()))
    if not answer.value.get("on_provider"):
        text = f"{title}: compiled in, but fell back to {', '.join(providers) or 'nothing'} without an error"
        return failure("D-EP-LIVE", text, evidence, _error_fix(target))
    elsewhere = sum(int(count) for name, count in nodes.items() if name != target.device)
    if elsewhere:
        text = f"{title}: {elsewhere} nodes of a small network ran on the processor"
        return warning("D-EP-LIVE", text, evidence, ["Expect a slow run; update the engine and the driver."])
    return ok("D-EP-LIVE", f"{title}: runs", *evidence)


def _numbers(target: Target, precision: str, answer: Answer) -> Finding:
    """D-NUM: no NaN, and numpy's numbers."""
    row = answer.value.get("comparison")
    found = Comparison(**row) if isinstance(row, Mapping) else Comparison(False, False, 0.0, float("inf"))
    said = answer.value.get("precision")
    name = f"half precision ({said})" if precision == "half" and said else precision
    title = target.title
    if not found.shape_right:
        return failure("D-NUM", f"{title}: {name} gives another shape than numpy", [], _wrong_fix(target))
    if not found.finite:
        text = f"{title}: {name} gives NaN or infinity"
        return failure("D-NUM", text, ["an image would be black"], _wrong_fix(target))
    evidence = [f"cosine {found.cosine:.7f}, relative error {found.relative_l2:.1e} against numpy"]
    if not found.near(precision):
        return failure("D-NUM", f"{title}: {name} gives wrong numbers", evidence, _wrong_fix(target))
    return ok("D-NUM", f"{title}: {name} gives numpy's numbers", *evidence)


def _wrong_fix(target: Target) -> list[str]:
    if "migraphx" in target.backend:
        return ["kiln generate PROMPT --backend torch:rocm", f"Or: {_FP32}."]
    return [_FP32, "If that is wrong as well: update engine and driver, take another backend meanwhile."]


def _crash_fix(target: Target) -> list[str]:
    if "rocm" in target.backend or "migraphx" in target.backend:
        return [
            "sudo dmesg | grep -iE 'amdgpu|kfd' | tail",
            "See D-AMD-GFX, D-AMD-OVR and D-AMD-IGPU: kernels for another GPU end like this.",
        ]
    return ["Update the driver and the engine; take another backend meanwhile."]


def _error_fix(target: Target) -> list[str]:
    others = {
        "CUDAExecutionProvider": "See D-EP-LOAD and D-NV-DRV.",
        "TensorrtExecutionProvider": "See D-EP-LOAD and D-NV-TRT.",
        "MIGraphXExecutionProvider": "See D-EP-LOAD and D-AMD-LIB.",
        "WebGpuExecutionProvider": "It needs libvulkan.so.1 and a driver for Vulkan: vulkaninfo --summary.",
        "OpenVINOExecutionProvider": "Its plugin takes Intel's devices only; for others: --backend openvino.",
    }
    return [others.get(target.device, "See what kiln devices says."), "Take another backend meanwhile."]


def _cosine(answer: Answer) -> str:
    row = answer.value.get("comparison")
    if not isinstance(row, Mapping) or not row.get("finite"):
        return "NaN"
    return f"{float(row.get('cosine', 0)):.5f}"

"""All checks, in the order in which they are read: the environment, the devices, then what really runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from . import (
    amd_driver,
    amd_gpu,
    amd_software,
    container,
    engines,
    intel,
    memory,
    nvidia,
    processor,
    python_env,
    storage,
)
from .finding import Finding, Verdict, failure
from .live import EngineRun, run_target
from .system import System

Check = Callable[[System], list[Finding]]

CHECKS: tuple[Check, ...] = (
    python_env.check_python,
    python_env.check_duplicates,
    python_env.check_placeholders,
    processor.check_isa,
    processor.check_limits,
    memory.check_memory,
    storage.check_disk,
    storage.check_cache,
    storage.check_hub,
    container.check_container,
    container.check_wsl,
    amd_driver.check_driver,
    amd_driver.check_kfd,
    amd_driver.check_permission,
    amd_gpu.check_gfx,
    amd_gpu.check_several,
    amd_gpu.check_override,
    amd_gpu.check_memory,
    amd_software.check_engine,
    amd_software.check_libraries,
    amd_software.check_torch,
    amd_software.check_environment,
    nvidia.check_driver,
    nvidia.check_capability,
    nvidia.check_engine,
    nvidia.check_tensorrt,
    intel.check_gpu,
    intel.check_npu,
    python_env.check_providers,
    engines.check_loads,
    engines.check_openvino,
    engines.check_kiln,
)

EXIT_OK, EXIT_WARNING, EXIT_UNUSABLE = 0, 1, 2


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the engines that were run; ``live`` is whether any could be."""

    findings: tuple[Finding, ...]
    engines: tuple[EngineRun, ...]
    live: bool

    @property
    def usable(self) -> tuple[str, ...]:
        """The backends that ran with the right numbers, in the order they were found."""
        return tuple(run.target.backend for run in self.engines if run.works)

    @property
    def exit_code(self) -> int:
        """0 nothing to say, 1 something to mend, 2 no backend works."""
        if self.live and not self.usable:
            return EXIT_UNUSABLE
        bad = any(f.verdict in (Verdict.WARNING, Verdict.FAILURE) for f in self.findings)
        return EXIT_WARNING if bad else EXIT_OK

    def as_document(self) -> dict[str, object]:
        """For JSON."""
        rows = [
            {
                "backend": run.target.backend,
                "engine": run.target.engine,
                "device": run.target.device,
                "works": run.works,
                "cosine_fp32": run.fp32,
                "cosine_half": run.half,
            }
            for run in self.engines
        ]
        return {
            "exit_code": self.exit_code,
            "live": self.live,
            "usable": list(self.usable),
            "engines": rows,
            "findings": [asdict(finding) for finding in self.findings],
        }


def diagnose(
    system: System,
    progress: Callable[[str], None] = lambda text: None,
    checks: Sequence[Check] = CHECKS,
) -> Diagnosis:
    """Run all checks, then every engine. ``progress`` is told what is being looked at."""
    findings: list[Finding] = []
    for check in checks:
        progress((check.__doc__ or "").split(":")[0])
        findings += _guarded(check, system)
    runs = []
    for target in engines.targets(system):
        progress(target.title)
        runs.append(run_target(system, target))
        findings += runs[-1].findings
    return Diagnosis(tuple(findings), tuple(runs), system.ask is not None)


def _guarded(check: Check, system: System) -> list[Finding]:
    """A check that stumbles over what a machine holds is a finding; the others still run."""
    try:
        return check(system)
    except Exception as error:
        name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
        text = f"a check of the doctor itself failed: {name}"
        seen = [f"{type(error).__name__}: {error}"]
        return [
            failure("D-DOCTOR", text, seen, ["Please report this, with the output of: kiln doctor --json."])
        ]

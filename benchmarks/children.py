"""Run one thing in a fresh process and learn its time, its peak memory and what it imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import KilnError

HEAVY = ("diffusers", "optimum", "torch", "transformers")

# The child reports itself. VmHWM begins anew when a program is started, whereas the ru_maxrss that a
# parent is told of also covers the moment between fork and exec, when the child is still its parent.
_REPORT = """
def report(code):
    import json, sys
    peak = None
    try:
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    from importlib import metadata
    versions = {}
    for name in NAMES:
        if name.replace("-", ".") in sys.modules or name in sys.modules:
            versions[name] = metadata.version(name)
    heavy = sorted(name for name in HEAVY if name in sys.modules)
    print("\\n" + json.dumps({"code": code, "peak_rss_bytes": peak, "heavy": heavy, "versions": versions}))
"""

_KILN = """
import sys
code = 0
try:
    from kiln.cli import main
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
report(code)
"""

# What ``optimum-cli export openvino --weight-format fp16`` calls, without converting the tokenizer.
_OPTIMUM_INTEL = """
import sys
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
main_export(sys.argv[1], sys.argv[2], task="text-to-image", library_name="diffusers",
            ov_config=OVConfig(dtype=sys.argv[3]), local_files_only=True)
report(0)
"""

_VERSIONED = ("diffusers", "openvino", "optimum-intel", "torch", "transformers")


class ChildError(KilnError):
    """A measured process failed; the text ends with what it last wrote."""


@dataclass(frozen=True)
class ChildRun:
    """One finished process: wall seconds from start to exit, peak resident bytes, heavy imports, output."""

    seconds: float
    peak_rss_bytes: int
    heavy: tuple[str, ...]
    versions: Mapping[str, str]
    output: str


def run_kiln(*arguments: str | Path, cache: Path) -> ChildRun:
    """``kiln ARGUMENTS`` in a fresh interpreter, with ``cache`` as its cache.

    Raises:
        ChildError: it failed.
    """
    return run_script(sys.executable, _KILN, arguments, {"KILN_CACHE": str(cache)})


def run_optimum_intel(python: str, folder: Path, out: Path, dtype: str = "fp16") -> ChildRun:
    """optimum-intel's export of a diffusers folder, in the Python that has it.

    Raises:
        ChildError: it failed.
    """
    # Another environment: this one's search path must not reach into it.
    return run_script(python, _OPTIMUM_INTEL, (folder, out, dtype), {"PYTHONPATH": ""})


def run_script(
    python: str, script: str, arguments: Sequence[str | Path], environment: Mapping[str, str]
) -> ChildRun:
    """Run ``script``, which ends by calling ``report(code)``, and time it from outside.

    Raises:
        ChildError: it could not be started or failed.
    """
    prologue = f"HEAVY, NAMES = {HEAVY!r}, {_VERSIONED!r}\n"
    command = [python, "-W", "ignore", "-c", prologue + _REPORT + script, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise ChildError(f"cannot start {python}: {exc.strerror}") from exc
    seconds = time.perf_counter() - start
    *output, last = done.stdout.rstrip().splitlines() or [""]
    try:
        facts = json.loads(last)
        code, peak, heavy, versions = (facts[k] for k in ("code", "peak_rss_bytes", "heavy", "versions"))
    except (ValueError, KeyError, TypeError):
        code, peak, heavy, versions = done.returncode or "no report", 0, (), {}
    if code or done.returncode:
        raise ChildError(f"{' '.join(map(str, arguments))} failed ({code}): {done.stderr.strip()[-2000:]}")
    return ChildRun(seconds, peak, tuple(heavy), versions, "\n".join(output))

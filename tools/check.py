"""Run the gates that every change must pass: format, lint, types, tests.

    python tools/check.py                       all of them
    python tools/check.py lint types            some of them
    python tools/check.py tests -- -n 2 -k bake what follows -- goes to pytest

Needs the checkout installed in the running Python: pip install --no-deps -e .
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path = ROOT) -> bool:
    """Run ``python -m ARGUMENTS``; whether it ended well."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, check=False).returncode == 0


def show_package(folder: Path) -> None:
    """Make ``folder/kiln`` show the modules that a wheel would hold, and nothing else of the checkout.

    NOTE: type checkers do not follow the import hook of an editable install, and the checkout itself
    is named after the clone and also holds tests, environments and old builds.
    """
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        source = ROOT.joinpath(*package.split(".")[1:])
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for module in [*source.glob("*.py"), *source.glob("py.typed")]:
            (target / module.name).symlink_to(module)


def check_types() -> bool:
    """Type-check the package under the name it is installed by."""
    with tempfile.TemporaryDirectory() as name:
        show_package(Path(name))
        config, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache")
        return run("mypy", "--config-file", config, "--cache-dir", cache, "-p", "kiln", cwd=Path(name))


def check_tests(arguments: list[str]) -> bool:
    """Run pytest on this checkout, and on no other copy of the package."""
    spec = find_spec("kiln")
    where = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if where != ROOT:
        print(f"kiln is imported from {where}, not from {ROOT}: run pip install --no-deps -e . in it")
        return False
    return run("pytest", *arguments)


def main(arguments: list[str]) -> int:
    """Run the gates named, or all; a failed gate does not keep the next from running."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, rest = arguments[:split], arguments[split + 1 :]
    gates = {
        "format": lambda: run("ruff", "format", "--check", "."),
        "lint": lambda: run("ruff", "check", "."),
        "types": check_types,
        "tests": lambda: check_tests(rest),
    }
    unknown = sorted(set(names) - set(gates))
    if unknown:
        print(f"no gate named {', '.join(unknown)}; there are {', '.join(gates)}")
        return 2
    os.chdir(ROOT)
    report = []
    for name in names or gates:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        passed = gates[name]()
        report.append((name, passed, time.monotonic() - started))
    print("== " + ", ".join(f"{name} {'passed' if ok else 'FAILED'} in {s:.0f} s" for name, ok, s in report))
    return 0 if all(ok for _, ok, _ in report) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

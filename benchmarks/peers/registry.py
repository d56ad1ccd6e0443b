"""The projects that Kiln is compared with: what each needs, what it shares, and how its worker is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import UsageError

# A worker is a module of Kiln in an interpreter that does not have Kiln: the package is shown to it without
# putting the folder that holds it, and whatever else is installed there, on its search path.
_BOOTSTRAP = """
import runpy, sys, types
kiln = types.ModuleType("kiln")
kiln.__path__ = [sys.argv.pop(1)]
sys.modules["kiln"] = kiln
module = sys.argv.pop(1)
sys.argv[0] = module
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_ROOT = Path(__file__).resolve().parents[2]
# Finds modules without loading them; a package inside another is looked for in what is there of that one.
_MISSING = """
import importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(json.dumps([name for name in sys.argv[1:] if not there(name)]))
"""
_LOOKS_WITHIN_S = 120.0


@dataclass(frozen=True)
class Project:
    """One project: the worker that drives it, the packages and modules it needs, what it can share with Kiln.

    ``shares_noise`` says whether it starts from the noise of the seed, given or drawn by the same generator;
    else its pictures are its own, and not compared. ``gives_latents`` says whether it shows those after each
    step, in the scale of Kiln's. ``options`` go to the worker with the request.
    """

    worker: str
    install: str
    modules: tuple[str, ...]
    shares_noise: bool = True
    gives_latents: bool = True
    options: Mapping[str, object] = field(default_factory=dict)


_DIFFUSERS = Project(
    "torch_diffusers",
    "torch diffusers transformers accelerate",
    ("numpy", "torch", "diffusers", "transformers", "accelerate"),
)
PROJECTS: Mapping[str, Project] = {
    "diffusers": _DIFFUSERS,
    "diffusers-compile": replace(_DIFFUSERS, options={"compile": True}),
    "optimum-intel": Project(
        "optimum_intel",
        "optimum-intel[openvino] diffusers",
        ("numpy", "torch", "optimum.intel", "optimum.exporters.openvino", "openvino", "diffusers"),
    ),
    "optimum-onnx": Project(
        "optimum_onnx",
        "optimum-onnx[onnxruntime] diffusers",
        ("numpy", "torch", "optimum.onnxruntime", "optimum.exporters.onnx", "onnxruntime", "diffusers"),
    ),
    "openvino-genai": Project(
        "openvino_genai_pipeline",
        "openvino-genai optimum-intel[openvino] diffusers",
        (
            "numpy",
            "torch",
            "openvino_genai",
            "openvino_tokenizers",
            "optimum.exporters.openvino",
            "diffusers",
        ),
        gives_latents=False,
    ),
    # Its package has no numpy among its dependencies, and the worker writes pictures with it.
    "stable-diffusion.cpp": Project(
        "stable_diffusion_cpp",
        "stable-diffusion-cpp-python numpy",
        ("numpy", "PIL", "stable_diffusion_cpp"),
        gives_latents=False,
    ),
}


@dataclass(frozen=True)
class Peer:
    """A project in the Python that has it."""

    name: str
    python: str
    project: Project

    @property
    def shares_noise(self) -> bool:
        """Whether its pictures start from the same noise and can be compared."""
        return self.project.shares_noise

    @property
    def gives_latents(self) -> bool:
        """Whether its latents after each step can be compared."""
        return self.project.gives_latents

    @property
    def needs_folder(self) -> bool:
        """Whether it reads a diffusers folder: all do."""
        return True

    @property
    def environment(self) -> dict[str, str]:
        """Variables for its process: nothing of this Python's packages, and no hub is asked."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        return env | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def command(self, job: Path) -> list[str]:
        """How the worker is started on a job."""
        module = f"kiln.benchmarks.peers.workers.{self.project.worker}"
        return [self.python, "-W", "ignore", "-c", _BOOTSTRAP, str(_ROOT), module, str(job)]


def find_peer(name: str, python: str | None = None) -> Peer:
    """A project by name, with the Python that ``--peer NAME=PYTHON`` gives, or this one.

    Raises:
        UsageError: no such project, or the Python is not there.
    """
    project = PROJECTS.get(name)
    if project is None:
        raise UsageError(f"unknown peer {name!r}; expected one of {', '.join(PROJECTS)}, as NAME=PYTHON")
    found = shutil.which(python or sys.executable)
    if found is None:
        raise UsageError(
            f"--peer {name}: {python} is no program here; expected the Python of an environment that has: "
            f"pip install {project.install}"
        )
    return Peer(name, found, project)


def check_peer(peer: Peer) -> None:
    """Refuse a Python that lacks what the project needs, before anything is measured.

    Raises:
        UsageError: it does not run, or lacks a module; the text says what to install.
    """
    command = [peer.python, "-c", _MISSING, *peer.project.modules]
    said = f"--peer {peer.name}: {peer.python}"
    try:
        done = subprocess.run(
            command,
            env=peer.environment,
            capture_output=True,
            text=True,
            timeout=_LOOKS_WITHIN_S,
            check=False,
        )
        missing: list[str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{said} did not tell its packages within {_LOOKS_WITHIN_S:.0f} s") from None
    except (OSError, ValueError):
        raise UsageError(f"{said} does not run as a Python; expected that of a virtual environment") from None
    if missing:
        raise UsageError(f"{said} lacks {', '.join(missing)}; expected: pip install {peer.project.install}")

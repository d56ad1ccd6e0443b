"""A worker that computes nothing: it tells scripted times, memory and settings, and draws scripted pictures.

    python fake_worker.py JOB SCRIPT

Time is virtual: ``started_ns`` and all seconds come from the script, so that nothing depends on how busy the
machine is. SCRIPT is a JSON file; its ``seconds`` are those of each draw of this process, over and over.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WIRE = Path(__file__).parents[3] / "benchmarks/harness/wire.py"


def load_wire() -> Any:
    spec = importlib.util.spec_from_file_location("wire", WIRE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fake:
    def __init__(self, job: dict[str, Any], script: dict[str, Any]) -> None:
        self.workload, self.script = job["workload"], script
        self.drawn = 0
        self.now_ns = 1_000_000_000

    def load(self) -> dict[str, Any]:
        if "refuses" in self.script:
            raise ValueError(self.script["refuses"])
        return {
            "open": 0.1,
            "seconds": self.script.get("load", 2.0),
            "components": {"unet": self.script.get("load", 2.0)},
            "effective": self.script["effective"],
        }

    def draw(self, prompt: int, seed: int, save: str | None, latents: str | None) -> dict[str, Any]:
        self._misbehave()
        times = self.script["seconds"]
        seconds = times[self.drawn % len(times)]
        parts = self.script["shares"]
        steps = self.workload["steps"]
        answer = {
            "started_ns": self.now_ns,
            "seconds": seconds,
            "components": {name: share * seconds for name, share in parts.items()},
            "unet_steps": [parts["unet"] * seconds / steps] * steps,
            "effective": self.script["effective"],
        }
        self.drawn += 1
        self.now_ns += int(seconds * 1e9)
        if save:
            np.save(save, self._pictures(seed))
        if latents:
            shape = (steps, self.workload["batch"], 4, 8, 8)
            np.save(latents, np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
        return answer

    def memory(self) -> dict[str, Any]:
        found: dict[str, Any] = self.script["memory"]
        return found

    def _pictures(self, seed: int) -> np.ndarray:
        load = self.workload
        shape = (load["batch"], load["height"], load["width"], 3)
        seed += 1 if self.script.get("wrong_picture") else 0
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def _misbehave(self) -> None:
        if self.drawn == self.script.get("dies_at"):
            print("the engine says its last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.drawn == self.script.get("hangs_at"):
            time.sleep(600)
        if self.drawn == self.script.get("errs_at"):
            raise RuntimeError("the device is gone")
        if self.drawn == self.script.get("interrupts_at"):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(600)


def main() -> None:
    job, script = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    wire = load_wire()
    answers = wire.Answers()
    print("what an engine prints to standard output breaks no line")
    fake = Fake(job, script)
    answers.ready()
    answers.serve(
        {"load": fake.load, "draw": fake.draw, "memory": fake.memory, "convert": lambda: {"seconds": 3.0}}
    )


if __name__ == "__main__":
    main()

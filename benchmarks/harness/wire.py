"""How the harness talks with the process that it measures: one JSON object per line, over pipes.

This file is also run by the Pythons of other projects, so it needs the standard library and nothing else, and
no syntax newer than Python 3.10.

A worker is started with the path of a job: a JSON file with what ``harness/jobs.py`` describes. The harness
writes to the worker's standard input, and the worker answers each request with exactly one line whose
``kind`` is ``done`` or ``error``::

    {"do": "convert"}   peers only, in a process of its own, before all else
                        -> {"kind": "done", "seconds": 88.9}
    {"do": "load"}      -> {"kind": "done", "open": 0.1, "seconds": 2.7, "components": {"unet": 2.5, ...},
                            "effective": {"unet": {...record.Effective...}}}
    {"do": "draw", "prompt": 0, "seed": 1, "save": "x.npy" or null, "latents": "y.npy" or null}
                        -> {"kind": "done", "started_ns": 1, "seconds": 1.2, "components": {...},
                            "unet_steps": [...], "effective": {...}}
    {"do": "memory"}    -> {"kind": "done", "rss": {"value": 1, "method": "VmHWM"}, ...}
    {"do": "exit"}      -> nothing; the process ends

The first line comes unasked, when everything is imported: ``{"kind": "ready", "imports": 0.8, "facts":
{...}}``. ``save`` asks for the pixels, uint8 ``(batch, h, w, 3)``; ``latents`` for those after each step,
float32 ``(steps, batch, 4, h/8, w/8)``, of workers that can tell. An error is ``{"kind": "error", "type":
..., "text": ...}``, and the worker lives on unless it cannot. ``kind`` ``log`` may come at any time and is
shown with ``--verbose``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]
# Set by the harness just before it starts the process: time.monotonic_ns(), one clock for all of the machine.
STARTED = "KILN_BENCH_STARTED_NS"


class Answers:
    """The worker's side: takes standard output for itself, so that what an engine prints breaks no line."""

    def __init__(self) -> None:
        """Keep the pipe under another number, and let file 1 lead to standard error from now on."""
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def send(self, message: Message) -> None:
        """Write one line at once."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def ready(self, **facts: Any) -> None:
        """Say that everything is imported, and how long that took since the process was started."""
        started = int(os.environ.get(STARTED, 0)) or time.monotonic_ns()
        self.send({"kind": "ready", "imports": (time.monotonic_ns() - started) / 1e9, "facts": facts})

    def serve(self, handlers: dict[str, Callable[..., Message]]) -> None:
        """Answer requests until ``exit`` or the end of standard input; an exception becomes an error line."""
        for request in requests():
            name = request.pop("do", None)
            if name == "exit":
                return
            try:
                self.send({"kind": "done", **handlers[name](**request)})
            except Exception as exc:
                text = f"{exc}" if not isinstance(exc, KeyError) else f"KeyError: {exc}"
                self.send({"kind": "error", "type": type(exc).__name__, "text": text})


def requests() -> Iterator[Message]:
    """What the harness asks, line by line."""
    for line in sys.stdin:
        if line.strip():
            yield json.loads(line)


def peak_memory() -> Message:
    """Peaks of this process from /proc/self/status: VmHWM, and how RSS splits now; see proc(5).

    The kernel keeps no peak of the parts, so the harness asks often and keeps the highest.
    """
    found: Message = {}
    rows = {
        "VmHWM": ("rss", "VmHWM"),
        "RssAnon": ("anonymous", "RssAnon"),
        "RssFile": ("file_backed", "RssFile"),
    }
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in rows:
                    key, method = rows[name]
                    found[key] = {"value": int(rest.split()[0]) * 1024, "method": method}
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["rss"] = {
            "value": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "method": "ru_maxrss",
        }
    return found

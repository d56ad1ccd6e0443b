"""Put a question to a child process, and survive what happens to it: a signal, a hang, noise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from .child import MARK
from .system import Answer, Question

# The same search path as here; -P keeps out the current folder, where a file may be called like a module.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(sys.argv[2:])"
)
_TEXT_LIMIT = 400


def asker(timeout: float) -> Callable[[Question], Answer]:
    """A function that answers questions, each once, by children that get ``timeout`` seconds each."""
    known: dict[Question, Answer] = {}

    def ask(question: Question) -> Answer:
        if question not in known:
            known[question] = ask_child(question, timeout)
        return known[question]

    return ask


def ask_child(question: Question, timeout: float) -> Answer:
    """Start a child, wait, and turn what happened into an answer. Never raises for what the child does."""
    program = _START.format(module=__name__.removesuffix("children") + "child")
    return run_child(program, [json.dumps([path for path in sys.path if path]), *question], timeout)


def run_child(program: str, arguments: list[str], timeout: float) -> Answer:
    """Run Python source in a child; its answer is the last line of stdout that begins with ``MARK``."""
    command = [sys.executable, "-P", "-c", program, *arguments]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a hanging engine's own children must end with it
        )
    except OSError as error:
        return Answer("error", f"no child process could be started: {error.strerror}")
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return Answer("timeout", f"no answer within {timeout:g} s")
    except BaseException:
        _end(process)
        raise
    return _answer(out.decode(errors="replace"), err.decode(errors="replace"), process.returncode)


def _answer(out: str, err: str, code: int) -> Answer:
    for line in reversed(out.splitlines()):
        if line.startswith(MARK):
            # An engine that crashes while it is torn down, after its answer, has answered.
            found = json.loads(line.removeprefix(MARK))
            return Answer(found["status"], _short(found["text"]), found["value"])
    last = next((line.strip() for line in reversed(err.splitlines()) if line.strip()), "")
    if code < 0:
        with contextlib.suppress(ValueError):
            return Answer("crash", _short(f"killed by {signal.Signals(-code).name}. {last}".strip()))
    return Answer("crash", _short(f"ended with code {code} and no answer. {last}".strip()))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_LIMIT else line[: _TEXT_LIMIT - 3] + "..."

"""Say how a child process ended, in one line: the signal or status, what it last wrote, and what to do."""

from __future__ import annotations

import signal

_LINES = 3
_LINE_CHARS = 160

_CRASHED = (
    "the engine or its driver crashed: prepare again, and if it repeats, use another backend or precision"
)
_ADVICE = {
    signal.SIGABRT: _CRASHED,
    signal.SIGSEGV: _CRASHED,
    signal.SIGBUS: _CRASHED,
    signal.SIGFPE: _CRASHED,
    signal.SIGTRAP: _CRASHED,
    signal.SIGILL: "the engine was built for another processor: install a build for this one",
    signal.SIGKILL: "most likely the system ran out of memory: use a smaller size or batch, close other "
    "programs, and look for 'oom' in dmesg",
    signal.SIGTERM: "somebody ended it: start again",
}
# Beyond the last lines: what faulthandler prints under its first line, and interpreters at their end.
_NOISE = ("Extension modules:", "File ", "Current thread", "Thread 0x", "<no Python frame>", "Binary file ")


def describe_end(returncode: int | None) -> tuple[str, str]:
    """How a process ended, and what to do about it.

    Args:
        returncode: as ``subprocess`` has it, negative for a signal; None if it could not be ended.
    """
    if returncode is None:
        return "could not even be killed", "it waits in a driver: the machine may have to be restarted"
    if returncode >= 0:
        return f"exited with status {returncode}", "a library of the engine ended it: see what it wrote"
    try:
        number = signal.Signals(-returncode)
    except ValueError:
        return f"was ended by signal {-returncode}", _CRASHED
    meaning = signal.strsignal(number) or ""
    return f"was ended by {number.name} ({meaning.lower()})", _ADVICE.get(number, _CRASHED)


def last_words(output: bytes) -> str:
    """The last lines that say something, joined; empty if nothing was written."""
    lines = [" ".join(line.split()) for line in output.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    return " | ".join(
        line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 3] + "..." for line in lines[-_LINES:]
    )

"""Shows a running generation on a terminal: phases, seconds per step and the time that is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .events import Event, PhaseFinished, PhaseStarted, StepFinished, Warned

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class TerminalProgress:
    """Bars by rich where stderr is a terminal, a line per phase where it is not."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.phases: list[tuple[str, float]] = []
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._live = Progress(
                *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Take note of an event and show it."""
        if isinstance(event, PhaseFinished):
            self.phases.append((f"{event.phase} {event.detail}".strip(), event.seconds))
            if self.verbose:
                print(f"{event.phase:8} {event.detail:14} {event.seconds:7.2f} s", file=sys.stderr)
        elif isinstance(event, Warned) and not self.quiet:
            print(f"warning: {event.text}", file=sys.stderr)
        if self._live and isinstance(event, PhaseStarted):
            self._start(event)
        if self._live and self._task is not None and isinstance(event, StepFinished):
            note = f"{event.step}/{event.steps}  {event.seconds:.2f} s/it"
            self._live.update(self._task, total=event.steps, completed=event.step, note=note)

    def _start(self, event: PhaseStarted) -> None:
        if self._live is None:
            return
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(event.phase, total=None, note=event.detail)


def clock() -> float:
    """Seconds since this process was started, as the kernel counts them; 0 where it does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        import os

        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return 0.0

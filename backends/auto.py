"""``auto``: the backend chosen by what is there, and by what was measured on this machine.

1. ``registry.AUTO_ORDER`` is the documented order: graphics cards first, then processors, faster engines
   first. The first whose engine loads and has a device is taken,
2. unless it was measured here, for this network and size, that another one is faster. That is remembered.
3. It is measured when the run is long enough to repay it, see ``repays``, and when there is something to find
   out, see ``candidates.could_win``. ``tune=True`` measures all that work, ``tune=False`` takes the order.

A backend that fails when it prepares a network is passed over, and that is said; when none is left, every
reason is. A backend that the user names never comes here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError, BackendUnavailable
from . import registry
from .base import GraphSource, PrepareOptions, Session
from .candidates import Candidate, could_win
from .host_memory import available_bytes
from .tuning import HOPELESS, Clock, Measurement, measure
from .tuning_memory import machine_facts, recall, remember, summarise

# A candidate costs its loading and some steps: about 10 steps of the run, which are to be a quarter of it.
REPAID_STEPS = 40
# Loading another engine takes some 10 s, whatever the device. These are about half a minute of work, for a
# processor at 1 TFLOP/s and a card at 60; SD1.5 at 512x512 needs 32 TFLOP for 20 steps.
REPAID_TFLOP_CPU = 30.0
REPAID_TFLOP_CARD = 2000.0
# What an engine takes while it loads: weights as they are read, and as it computes with them. SD1.5 peaks at
# 7.7 GB in OpenVINO. Two engines are loaded at once.
_BYTES_PER_PARAMETER = 2 * 8
# SD1.5's UNet does 0.8 TFLOP for 860 million parameters and 64x64 latent cells. Other U-shaped networks are
# within a factor of two of that ratio (SDXL: 0.7 times), which is enough to tell short from long.
_FLOP_PER_PARAMETER_AND_CELL = 0.8e12 / (860e6 * 64 * 64)


@dataclass(frozen=True)
class Work:
    """What a request asks of the UNet.

    ``shapes`` are the inputs of one run, ``steps`` all runs of the request together; ``architecture`` and
    ``storage`` name the network apart from its weights, ``parameters`` counts these; ``guided`` says that
    the halves of a batch have the same latents.
    """

    source: GraphSource
    shapes: Mapping[str, tuple[int, ...]]
    steps: int
    parameters: int
    architecture: str
    storage: Mapping[str, Any]
    guided: bool = False

    @property
    def tflop(self) -> float:
        """Roughly, the floating-point operations of all steps, in 10^12."""
        rows, _, height, width = self.shapes["sample"]
        cells = rows * height * width
        return _FLOP_PER_PARAMETER_AND_CELL * self.parameters * cells * self.steps / 1e12

    def __str__(self) -> str:
        """``20 steps, 32 TFLOP``."""
        return f"{self.steps} step{'s' if self.steps != 1 else ''}, {self.tflop:.2g} TFLOP"


def repays(work: Work, contenders: int, *, on_cpu: bool = True) -> bool:
    """Whether a run is so long that measuring costs it about a quarter at most."""
    enough = REPAID_TFLOP_CPU if on_cpu else REPAID_TFLOP_CARD
    return work.steps >= REPAID_STEPS * (contenders - 1) and work.tflop >= enough


@dataclass(frozen=True)
class Chosen:
    """Why the current backend is the one, what the user should know, and the session if it was measured."""

    why: str
    warnings: tuple[str, ...] = ()
    session: Session | None = None


class Auto:
    """The candidates in the order to try, and which of them is in use."""

    def __init__(self, tune: bool | None = None, isolate: str = "auto") -> None:
        """Look for the first that works.

        Args:
            tune: measure always, never, or (None) when it repays.
            isolate: which candidates run in a child process, see ``isolation.policy``.

        Raises:
            BackendUnavailable: none works; the text gives every reason.
        """
        self._tune = tune
        self._reasons: dict[str, str] = {}
        self._documented = [Candidate.parse(entry, isolate) for entry in registry.AUTO_ORDER]
        self._order = list(self._documented)
        self._settled: tuple[Mapping[str, Any], str] | None = None
        self.current = self._first_that_works()

    def choose(
        self,
        work: Work,
        options: PrepareOptions,
        memory: Path | None,
        *,
        clock: Clock = time.perf_counter,
        now: Clock = time.time,
    ) -> Chosen:
        """Settle on a backend for ``work``: what was measured before, what is measured now, or the order.

        Args:
            work: the request.
            options: as the UNet will be prepared, but for the device.
            memory: the folder of remembered measurements, None for no cache.
            clock: seconds, for measuring.
            now: seconds since 1970.

        Raises:
            BackendUnavailable: all candidates failed when they were measured.
        """
        why_not = self._why_not(work, memory)
        if why_not and not (self._tune is None and memory is not None and memory.is_dir()):
            return self._unmeasured(why_not)
        question = self._question(work, options)
        if self._settled and self._settled[0] == question:
            return Chosen(self._settled[1])
        if memory is not None and not self._tune and (why := self._recalled(memory, question)):
            return Chosen(why)
        if why_not:
            return self._unmeasured(why_not)
        contenders = self._contenders(options.precision)
        if len(contenders) < 2:
            return self._unmeasured("no other could win")
        if not self._tune and not repays(work, len(contenders), on_cpu=self.current.on_cpu):
            return self._unmeasured(f"not measured, because the run is short ({work})")
        pairs = {c.label: (c.backend, c.device) for c in contenders}
        found = measure(pairs, work.source, options, clock=clock)
        return self._measured(found, question, memory, now())

    def go_on(self, error: BackendError) -> str:
        """Pass over the current backend, which failed; what to tell the user.

        Raises:
            BackendUnavailable: no other is left; the text gives every reason.
        """
        failed = self.current
        self._reasons[failed.label] = " ".join(str(error).split())
        self._settled = None
        try:
            self.current = self._first_that_works()
        except BackendUnavailable as none_left:
            raise none_left from error
        return f"{failed.label} failed, going on with {self.current.label}: {self._reasons[failed.label]}"

    def _why_not(self, work: Work, memory: Path | None) -> str:
        """Why nothing is to be measured, as far as that can be told without loading more engines."""
        if self._tune is False:
            return "measuring is switched off"
        if self._tune:
            return ""
        if memory is None:
            return "not measured, because without a cache it would be each time"
        if not repays(work, 2, on_cpu=self.current.on_cpu):
            return f"not measured, because the run is short ({work})"
        if not any(c.version for c in self._documented if c.label != self.current.label):
            return "no other is installed"
        left, need = available_bytes(), work.parameters * _BYTES_PER_PARAMETER
        if self.current.on_cpu and left is not None and left < need:
            return f"not measured, because two engines need {need / 1e9:.1f} GB, {left / 1e9:.1f} GB are free"
        return ""

    def _unmeasured(self, why: str) -> Chosen:
        self._order = list(self._documented)
        self.current = self._first_that_works()
        return Chosen(f"{self.current.label}: the first that works of the documented order; {why}")

    def _recalled(self, memory: Path, question: Mapping[str, Any]) -> str:
        """Take up what was measured before, and say so; empty if nothing was."""
        known = recall(memory, question)
        if known is None:
            return ""
        for label, fault in known.wrong.items():
            self._reasons[label] = self._reasons.get(label) or fault
        self._prefer(known.order)
        self.current = self._first_that_works()
        if self.current.label != known.order[0]:
            why = self._reasons[known.order[0]]
            return (
                f"{self.current.label}: {known.order[0]} does not work now ({why}); before: {known.summary}"
            )
        self._settled = (question, known.summary)
        return known.summary

    def _contenders(self, precision: str) -> list[Candidate]:
        """Who is measured, in the documented order."""
        working = [c for c in self._documented if not self._reason(c)]
        if self._tune:
            return working
        return [c for c in working if c is working[0] or could_win(c, working[0], precision)]

    def _measured(
        self, found: Measurement, question: Mapping[str, Any], memory: Path | None, now: float
    ) -> Chosen:
        out = [result for result in found.results if result.verdict not in ("", HOPELESS)]
        for result in out:
            self._reasons[result.label] = result.fault
        if not found.winner:
            raise self._none_works()
        if memory is not None:
            remember(memory, question, found, now)
        why = summarise(found, now)
        self._prefer(found.order)
        self.current = self._order[0]
        self._settled = (question, why)
        return Chosen(why, tuple(f"{r.label} is not used: {r.fault}" for r in out), found.session)

    def _question(self, work: Work, options: PrepareOptions) -> dict[str, Any]:
        """Everything that decides which backend is faster."""
        return {
            "machine": machine_facts(),
            "engines": {candidate.label: candidate.version for candidate in self._documented},
            "architecture": work.architecture,
            "storage": dict(work.storage),
            "shapes": {name: list(shape) for name, shape in work.shapes.items()},
            "precision": options.precision,
            "threads": options.threads,
        }

    def _prefer(self, labels: tuple[str, ...]) -> None:
        """Put these first, and the others after them in the documented order."""
        rank = {label: place for place, label in enumerate(labels)}
        self._order = sorted(self._documented, key=lambda candidate: rank.get(candidate.label, len(rank)))

    def _first_that_works(self) -> Candidate:
        for candidate in self._order:
            if not self._reason(candidate):
                return candidate
        raise self._none_works()

    def _reason(self, candidate: Candidate) -> str:
        """Why a candidate cannot be used, empty if it can; asked once."""
        if candidate.label not in self._reasons:
            self._reasons[candidate.label] = candidate.why_unusable()
        return self._reasons[candidate.label]

    def _none_works(self) -> BackendUnavailable:
        known = [(c.label, self._reasons.get(c.label, "")) for c in self._documented]
        reasons = "; ".join(f"{label}: {reason}" for label, reason in known if reason)
        return BackendUnavailable(f"no backend can be used here. {reasons}")

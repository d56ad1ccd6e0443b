"""Measure backends against each other on one component: which is fastest here, and does it compute the same.

Each is prepared once, run once to warm up, and then takes turns with the fastest so far, so that a busy
moment of the machine meets both alike. The slower one is closed before the next is loaded: two are in memory
at most. One that has no chance is dropped after a step, because its steps may take minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import BackendError
from .base import Backend, GraphSource, PrepareOptions, Session
from .feeds import contract_of

# Seconds of steps for each new candidate; a step that is begun is finished.
BUDGET_S = 10.0
ROUNDS = 4
# A step so many times slower than the best one is not run again: noise is smaller than that.
HOPELESS_FACTOR = 3.0
# Within this share of the best, the documented order decides and not the noise.
TIE = 0.05
# The difference between two outputs, relative to the larger, above which they do not compute the same.
# Rounding to bf16 gives 0.006 on the UNet of the bundled model and may give 0.03 (benchmarks/parity.py);
# forgotten weights or swapped inputs give 0.5 and more.
FAR = 0.25
_EXACTNESS = ("fp32", "fp16", "bf16")  # whom to believe, where two differ
_ANYTHING = 1e9  # stands for an infinite distance, which cannot be added up
_TIMESTEP = 500.0
# What becomes of a candidate that does not stay to the end.
FAILED, WRONG, HOPELESS = "failed", "wrong", "hopeless"

Clock = Callable[[], float]


@dataclass(frozen=True)
class Result:
    """What was found of one candidate.

    ``step_s`` holds the time of each timed step in seconds, without the warm-up ``first_s``. ``verdict`` is
    empty, or FAILED (the engine refused), WRONG (what it computes) or HOPELESS (slow); ``fault`` says why.
    """

    label: str
    precision: str = ""
    prepare_s: float = 0.0
    first_s: float = 0.0
    step_s: tuple[float, ...] = ()
    verdict: str = ""
    fault: str = ""

    @property
    def median_s(self) -> float:
        """Seconds a step; of one that was dropped after its first, that one."""
        return statistics.median(self.step_s) if self.step_s else self.first_s

    def __str__(self) -> str:
        """``openvino (bf16) 0.28 s``."""
        precision = f" ({self.precision})" if self.precision else ""
        return f"{self.label}{precision} {self.median_s:.2g} s"


@dataclass(frozen=True)
class Measurement:
    """All results in the order of the candidates, and the winner's label (empty if all failed) and session.

    ``session`` is None if the winner had been closed before a faster one turned out to be wrong.
    """

    results: tuple[Result, ...]
    winner: str
    session: Session | None

    @property
    def order(self) -> tuple[str, ...]:
        """The winner, and then by time those that are slower and right."""
        rest = [r for r in self.results if r.verdict in ("", HOPELESS) and r.label != self.winner]
        return (self.winner, *(r.label for r in sorted(rest, key=lambda r: r.median_s)))


@dataclass
class _Runner:
    label: str
    session: Session
    prepare_s: float
    first_s: float = 0.0
    output: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    step_s: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        return min([self.first_s, *self.step_s])

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s or [self.first_s])

    def result(self, verdict: str = "", fault: str = "") -> Result:
        precision = self.session.in_force.precision
        return Result(self.label, precision, self.prepare_s, self.first_s, tuple(self.step_s), verdict, fault)


def measure(
    candidates: Mapping[str, tuple[Backend, str]],
    source: GraphSource,
    options: PrepareOptions,
    *,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Run the candidates on ``source`` and choose.

    Never raises for a candidate that fails: that is its result. All sessions but the winner's are closed.

    Args:
        candidates: backend and device by label, in the documented order.
        source: the component, usually the UNet.
        options: shapes, precision and threads; the device is the candidate's.
        budget_s: seconds of steps that one candidate may take, beyond preparing and warming up.
        clock: seconds; another one for tests.
    """
    race = _Race(source, make_feeds(source.component, options.shapes), budget_s, clock)
    try:
        for label, (backend, device) in candidates.items():
            race.enter(label, backend, replace(options, device=device))
        return race.finish(list(candidates))
    except BaseException:
        race.close()
        raise


def make_feeds(component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Inputs of these shapes, the same each time: normal values, and the middle of the timesteps."""
    rng = np.random.default_rng(0)
    feeds = {}
    for port in contract_of(component).inputs:
        shape = shapes[port.name]
        values = np.full(shape, _TIMESTEP) if port.name == "timestep" else rng.standard_normal(shape)
        feeds[port.name] = np.asarray(values, np.dtype(port.dtype))
    return feeds


class _Race:
    """The fastest so far, which the next one is run against, and what is known of all others."""

    def __init__(
        self, source: GraphSource, feeds: dict[str, np.ndarray], budget_s: float, clock: Clock
    ) -> None:
        self._source, self._feeds, self._budget_s, self._clock = source, feeds, budget_s, clock
        self._fastest: _Runner | None = None
        self._results: dict[str, Result] = {}
        self._outputs: dict[str, np.ndarray] = {}  # of those that could be right

    def enter(self, label: str, backend: Backend, options: PrepareOptions) -> None:
        """Prepare one, warm it up and run it against the fastest so far; the slower one is closed."""
        start = self._clock()
        try:
            session = backend.prepare(self._source, options)
        except BackendError as error:
            prepare_s = self._clock() - start
            self._results[label] = Result(label, prepare_s=prepare_s, verdict=FAILED, fault=_line(error))
            return
        runner = _Runner(label, session, self._clock() - start)
        try:
            if self._warm_up(runner):
                self._fastest = self._match(self._fastest, runner) if self._fastest else runner
        except BaseException:
            if label not in self._results:
                session.close()
            raise

    def finish(self, labels: Sequence[str]) -> Measurement:
        """Look at the outputs, choose among those that are right, and close what is not chosen."""
        if self._fastest and not self._fastest.step_s and not self._timed_step(self._fastest):
            self._fastest = None
        if self._fastest:
            self._results[self._fastest.label] = self._fastest.result()
        self._judge()
        right = {x: r.median_s for x, r in self._results.items() if r.verdict in ("", HOPELESS)}
        best = min(right.values(), default=0.0)
        winner = next((x for x in labels if x in right and right[x] <= (1 + TIE) * best), "")
        session = None
        if self._fastest and self._fastest.label == winner:
            session, self._fastest = self._fastest.session, None
        self.close()
        return Measurement(tuple(self._results[x] for x in labels), winner, session)

    def close(self) -> None:
        """Close what is still open."""
        if self._fastest:
            self._fastest.session.close()
            self._fastest = None

    def _warm_up(self, runner: _Runner) -> bool:
        """The first run; False after dropping a candidate that failed or gave nothing to draw from."""
        start = self._clock()
        output = self._step(runner)
        if output is None:
            return False
        runner.first_s, runner.output = self._clock() - start, output
        if not np.isfinite(output).all():
            return self._drop(runner, WRONG, "its output is not finite")
        if output.min() == output.max():
            return self._drop(runner, WRONG, "its output is the same everywhere")
        self._outputs[runner.label] = output
        return True

    def _match(self, fastest: _Runner, other: _Runner) -> _Runner | None:
        """Let two take turns, forwards and backwards; gives the faster, None if both failed."""
        for number in range(ROUNDS):
            for one, against in ((other, fastest), (fastest, other)):
                # A first run may also do what later ones need not; it is judged only if it ate the budget.
                judged = bool(one.step_s) or one.first_s > self._budget_s
                if judged and one.best_s > HOPELESS_FACTOR * against.best_s:
                    self._drop(one, HOPELESS, f"{one.best_s:.2g} s a step")
                    return against
            if number and sum(other.step_s) >= self._budget_s:
                break
            for one, against in ((fastest, other), (other, fastest))[:: 1 if number % 2 == 0 else -1]:
                if not self._timed_step(one):
                    return against if against.label not in self._results else None
        # What comes later in the documented order has to be faster by more than noise.
        slower = fastest if other.median_s * (1 + TIE) < fastest.median_s else other
        self._drop(slower, "", "")
        return fastest if slower is other else other

    def _judge(self) -> None:
        """Mark those whose output is not like that of the most exact one, slow as that may be."""
        known = {x: self._results[x] for x in self._outputs if self._results[x].verdict != FAILED}
        if not known:
            return
        reference = _most_credible(known, self._outputs)
        for label, result in known.items():
            away = distance(self._outputs[label], self._outputs[reference])
            if not away <= FAR:
                what = f"its output is not that of {reference} ({away:.0%} away)"
                self._results[label] = replace(result, verdict=WRONG, fault=what)

    def _timed_step(self, runner: _Runner) -> bool:
        """One run on the clock; False after dropping a candidate that failed."""
        start = self._clock()
        if self._step(runner) is None:
            return False
        runner.step_s.append(self._clock() - start)
        return True

    def _step(self, runner: _Runner) -> np.ndarray | None:
        """One run's first output; None after dropping a candidate that failed."""
        try:
            return next(iter(runner.session.run(self._feeds).values()))
        except BackendError as error:
            self._drop(runner, FAILED, _line(error))
            return None

    def _drop(self, runner: _Runner, verdict: str, fault: str) -> bool:
        self._results[runner.label] = runner.result(verdict, fault)
        runner.session.close()
        return False


def _line(error: BackendError) -> str:
    return " ".join(str(error).split())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """``||one - other||`` over the larger of their norms, in float64; infinite where the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    a, b = one.astype(np.float64), other.astype(np.float64)
    larger = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / larger) if larger else 0.0


def _most_credible(results: Mapping[str, Result], outputs: Mapping[str, np.ndarray]) -> str:
    """The one of the most exact precision; among equals, the one nearest to all, and then the first."""

    def rank(result: Result) -> int:
        exact = result.precision in _EXACTNESS
        return _EXACTNESS.index(result.precision) if exact else len(_EXACTNESS)

    first = min(map(rank, results.values()))
    exact = [label for label, result in results.items() if rank(result) == first]
    return min(exact, key=lambda x: sum(min(distance(outputs[x], outputs[y]), _ANYTHING) for y in results))

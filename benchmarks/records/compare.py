"""Faster, slower, or not significant: two records of the same work, or why they cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from .bootstrap import interval, median_distribution, ratio_interval
from .facts import differing_facts, differing_machine, other_differences
from .record import Record, Sample
from .significance import mann_whitney_p, wilcoxon_p

Answer = Literal["faster", "slower", "not significant", "refused"]

SIGNIFICANCE = 0.05
# The floor where no A/A run has measured one: two runs of the same differ by less on any machine that the
# harness does not call noisy (``harness.noise.AA_NOISY``).
DEFAULT_FLOOR = 0.05
# With three against three the U test cannot fall below 0.1, with five pairs the signed-rank test not below
# 0.06.
_LEAST_EACH = 4
_LEAST_PAIRS = 6


@dataclass(frozen=True)
class Comparison:
    """What one record says against another.

    ``ratio`` is candidate to baseline, seconds per image, above 1 for slower: of the medians, or with
    ``paired`` the median of the ratios round by round. ``interval`` is its 95 % bootstrap interval,
    ``p_value`` that of Mann-Whitney's U test, or Wilcoxon's signed-rank test of the pairs. ``floor`` is the
    noise floor that the effect has to exceed, ``floor_measured`` whether an A/A run has shown it.
    ``reasons`` say why the answer is ``refused``, ``notes`` what to bear in mind, ``differences`` what else
    is not the same.
    """

    baseline: Record
    candidate: Record
    answer: Answer
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    paired: bool = False
    counts: tuple[int, int] = (0, 0)
    floor: float = DEFAULT_FLOOR
    floor_measured: bool = False
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def slower_than(self, limit: float) -> bool:
        """Whether the candidate is slower, and by more than ``limit`` (0.05 for 5 %)."""
        return self.answer == "slower" and self.ratio is not None and self.ratio - 1 > limit


def compare(
    baseline: Record, candidate: Record, *, across_models: bool = False, same_machine: bool = False
) -> Comparison:
    """Compare two records.

    It is faster or slower only if the 95 % interval of the ratio excludes 1, the test's p-value is below
    0.05, and the effect exceeds the noise floor: the larger one of the two records, ``DEFAULT_FLOOR`` where
    neither has any.

    Args:
        baseline: what the candidate is held against.
        candidate: the other.
        across_models: the models and adapters may differ, because they are what is compared.
        same_machine: refuse records of two machines, for a check whether a change has made it slower.

    Returns:
        ``refused``, with the reasons, if fixed facts differ, a record is invalid, or there are too few
        samples.
    """
    reasons = differing_facts(baseline.workload, candidate.workload, across_models=across_models)
    machines = differing_machine(baseline, candidate)
    if same_machine:
        reasons += [f"another machine: {text}" for text in machines]
    for name, record in (("baseline", baseline), ("candidate", candidate)):
        if record.verdict == "invalid":
            said = "; ".join(record.reasons) or "no reason is given"
            reasons.append(f"the {name} is invalid: {said}")
        if len(record.samples) < _LEAST_EACH:
            reasons.append(f"the {name} has {len(record.samples)} samples; expected {_LEAST_EACH} at least")
    differences = (*machines, *other_differences(baseline, candidate))
    if reasons:
        return Comparison(baseline, candidate, "refused", reasons=tuple(reasons), differences=differences)
    return _judge(baseline, candidate, differences)


def _judge(baseline: Record, candidate: Record, differences: tuple[str, ...]) -> Comparison:
    floors = [r.noise.floor for r in (baseline, candidate) if r.noise.floor is not None]
    floor = max(floors, default=DEFAULT_FLOOR)
    old, new = _seconds(baseline), _seconds(candidate)
    pairs = paired_rounds(baseline, candidate)
    if pairs:
        ratios = [b / a for a, b in pairs]
        ratio, spread = median(ratios), interval(median_distribution(ratios))
        p_value = wilcoxon_p([math.log(value) for value in ratios])
    else:
        ratio, spread = median(new) / median(old), ratio_interval(new, old)
        p_value = mann_whitney_p(new, old)
    answer: Answer = "not significant"
    # The same distance in both directions: 10 % slower is 1.1, and 10 % faster 1 / 1.1.
    if not spread[0] <= 1 <= spread[1] and p_value < SIGNIFICANCE and max(ratio, 1 / ratio) - 1 > floor:
        answer = "slower" if ratio > 1 else "faster"
    return Comparison(
        baseline,
        candidate,
        answer,
        ratio=ratio,
        interval=spread,
        p_value=p_value,
        paired=bool(pairs),
        counts=(len(pairs), len(pairs)) if pairs else (len(old), len(new)),
        floor=floor,
        floor_measured=bool(floors),
        notes=_notes(baseline, candidate),
        differences=differences,
    )


def paired_rounds(a: Record, b: Record) -> list[tuple[float, float]]:
    """Seconds per image of both, round by round, if they took turns in one run; else empty.

    A pair is the two batches of one index, which draw the same prompt. They took turns if both are of one run
    and in each round both started before the next round did; a round that only one has is left out. There
    must be six or more, and nine of ten samples must have a partner.
    """
    if a.run != b.run or a.id == b.id:
        return []
    mine, others = {s.index: s for s in a.samples}, {s.index: s for s in b.samples}
    shared = sorted(mine.keys() & others.keys())
    if len(shared) < max(_LEAST_PAIRS, math.ceil(0.9 * max(len(mine), len(others)))):
        return []
    rounds = [(mine[index], others[index]) for index in shared]
    if any(x.prompt != y.prompt for x, y in rounds) or not _took_turns(rounds):
        return []
    size = a.workload.batch, b.workload.batch
    return [(x.seconds / size[0], y.seconds / size[1]) for x, y in rounds]


def _took_turns(rounds: Sequence[tuple[Sample, Sample]]) -> bool:
    starts = [(min(x.started_ns, y.started_ns), max(x.started_ns, y.started_ns)) for x, y in rounds]
    return all(last < following for (_, last), (following, _) in pairwise(starts))


def _seconds(record: Record) -> list[float]:
    return [sample.seconds / record.workload.batch for sample in record.samples]


def _notes(baseline: Record, candidate: Record) -> tuple[str, ...]:
    found = []
    for name, record in (("baseline", baseline), ("candidate", candidate)):
        if record.verdict == "noisy":
            found.append(f"the {name} is noisy: {'; '.join(record.noise.reasons) or 'no reason is given'}")
    return tuple(found)

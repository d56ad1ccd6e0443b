"""What is said of samples: robust figures, none of them drawn at random, so that anyone computes the same
again.

Nothing here drops a sample: outliers are flagged and stay in every figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from .bootstrap import interval, median_distribution
from .record import Derived, Sample, Stats

# hyperfine's limit for |x - median| / MAD: ten standard deviations of a normal distribution (1.4826 MAD
# each). Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993), whose score this is, use 3.5 /
# 0.6745 = 5.2: that flags something in 9 % of runs of thirty normal samples and in 30 % of log-normal ones
# (sigma 0.3, simulated); this one in none of 5,000, and in 0.2 %.
OUTLIER_LIMIT = 14.826
# Where more than half of the samples are equal the MAD is 0; no clock tells less than this share apart.
_RESOLUTION = 1e-4
PERCENTILES = {"p90": (90, 10), "p95": (95, 20), "p99": (99, 100)}
# Below five samples even the interval from the least to the greatest covers the median in less than 93 of 100
# runs (1 - 2 / 2**n), so there is none of 95 %.
INTERVAL_LEAST = 5

# Two modes: found by simulation, see ``count_modes``.
MODES_LEAST = 10
_MODES_POINTS = 40
_MODES_SHARE = 0.15
_MODES_APART = 0.02


def stats_of(values: Sequence[float]) -> Stats | None:
    """Everything that a record says about samples; None if there are none.

    Percentiles are Hyndman and Fan's type 7 (numpy's and R's default); the standard deviation divides by
    ``n - 1``; ``mad`` is the median absolute deviation from the median, not scaled.

    Args:
        values: in the order in which they were measured, all finite.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        return None
    bad = [index for index, value in enumerate(numbers) if not math.isfinite(value)]
    if bad:
        raise ValueError(f"sample {bad[0]} is {numbers[bad[0]]}; expected finite numbers")
    count, median, mean = len(numbers), statistics.median(numbers), statistics.fmean(numbers)
    sd = statistics.stdev(numbers) if count > 1 else None
    array = np.asarray(numbers)
    tails = {
        name: _percentile(array, at) if count >= least else None for name, (at, least) in PERCENTILES.items()
    }
    return Stats(
        count=count,
        median=median,
        mean=mean,
        sd=sd,
        cv=sd / mean if sd is not None and mean else None,
        mad=mad_of(numbers),
        min=min(numbers),
        max=max(numbers),
        **tails,
        interval=interval(median_distribution(numbers)) if count >= INTERVAL_LEAST else None,
        outliers=outliers_of(numbers),
        modes=count_modes(numbers),
    )


def derive(samples: Sequence[Sample], batch: int) -> Derived:
    """The figures of a record, from its samples and nothing else.

    ``image`` and ``components`` are seconds per image, the batch divided out; ``unet_step`` is one call of
    the UNet, which computes the whole batch. A component's samples are those that name it.

    Args:
        samples: timed batches, warm-ups not among them.
        batch: images in each.

    Raises:
        ValueError: the batch is below 1, or a time is no finite number.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch}; expected 1 image or more")
    names = dict.fromkeys(name for sample in samples for name in sample.components)
    components = {
        name: stats_of([s.components[name] / batch for s in samples if name in s.components])
        for name in names
    }
    told = [sample for sample in samples if sample.components]
    whole = math.fsum(sample.seconds for sample in told)
    parts = math.fsum(seconds for sample in told for seconds in sample.components.values())
    return Derived(
        image=stats_of([sample.seconds / batch for sample in samples]),
        unet_step=stats_of([seconds for sample in samples for seconds in sample.unet_steps]),
        components={name: found for name, found in components.items() if found is not None},
        unattributed=1 - parts / whole if whole else None,
    )


def mad_of(values: Sequence[float]) -> float:
    """Median absolute deviation from the median: the spread that one outlier does not change."""
    median = statistics.median(values)
    return statistics.median(abs(value - median) for value in values)


def outliers_of(values: Sequence[float]) -> tuple[int, ...]:
    """Positions of the values whose modified Z-score is beyond ``OUTLIER_LIMIT``, on either side."""
    median = statistics.median(values)
    spread = max(mad_of(values), abs(median) * _RESOLUTION)
    if spread == 0:
        return tuple(index for index, value in enumerate(values) if value != median)
    return tuple(i for i, value in enumerate(values) if abs(value - median) / spread > OUTLIER_LIMIT)


def count_modes(values: Sequence[float]) -> int:
    """2 when the values fall into two groups with a gap between them, else 1.

    A gap counts when each side holds 15 % of the values and at least three, when it is wider than
    ``max(1.5, 60 / n)`` times the standard deviation within the groups, and when the means of the groups
    are 2 % of the median apart; of more than 40 values the 40 mid-quantiles are looked at, so that a few
    values in the valley hide nothing. Below ten values it is always 1.

    The limit was found by simulation: it is at or above the 99 % point of samples from normal, uniform,
    log-normal (sigma 0.5) and gamma (shape 2) distributions for 10 to 400 values. Two normal groups ten of
    their standard deviations apart are found in 19 of 20 runs from 15 values on, six apart from 100 on.
    """
    if len(values) < MODES_LEAST:
        return 1
    x = np.sort(np.asarray(values, np.float64))
    if x.size > _MODES_POINTS:
        x = np.quantile(x, (np.arange(_MODES_POINTS) + 0.5) / _MODES_POINTS)
    side = max(3, math.ceil(x.size * _MODES_SHARE))
    limit = max(1.5, 60 / x.size)
    for k in range(side, x.size - side + 1):
        low, high = x[:k], x[k:]
        apart = high.mean() - low.mean()
        within = math.sqrt((low.var() * low.size + high.var() * high.size) / (x.size - 2))
        if apart > _MODES_APART * abs(np.median(x)) and high[0] - low[-1] > limit * within:
            return 2
    return 1


def _percentile(values: np.ndarray, at: int) -> float:
    return float(np.percentile(values, at))

"""Order, warm-up and grouping, by values that are given."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from kiln.benchmarks.harness.measure import Floor, groups, is_stable, turns, warm_up
from kiln.benchmarks.records.record import Sample


def sample(seconds: float, index: int = 0) -> Sample:
    return Sample(index, 0, 0, seconds)


def test_turns_alternate_their_direction() -> None:
    left = Counter(a=4, b=4, c=2)

    def wants(lane: str) -> bool:
        return left[lane] > 0

    order = []
    for lane in turns("abc", wants):
        order.append(lane)
        left[lane] -= 1
    assert "".join(order) == "abccbaabba"


def test_nobody_who_is_done_gets_a_turn() -> None:
    assert list(turns("abc", lambda lane: False)) == []


@pytest.mark.parametrize(
    ("times", "stable"),
    [
        ((1.0,), False),
        ((1.0, 1.03), True),
        ((1.0, 1.04), False),
        ((9.0, 1.0, 1.0), True),
        ((1.0, 1.0, 9.0), False),
    ],
)
def test_stable_is_two_within_three_per_cent(times: tuple[float, ...], stable: bool) -> None:
    assert is_stable([sample(t) for t in times]) is stable


def test_warm_up_ends_when_it_is_stable() -> None:
    times = iter([5.0, 3.0, 2.0, 2.01, 2.0])
    warmups, stable = warm_up(lambda: sample(next(times)))
    assert [s.seconds for s in warmups] == [5.0, 3.0, 2.0, 2.01]
    assert stable


def test_warm_up_gives_up_after_ten() -> None:
    times = itertools.cycle([1.0, 2.0])
    warmups, stable = warm_up(lambda: sample(next(times)), [sample(3.0)])
    assert len(warmups) == 10
    assert not stable


def test_a_floor_is_of_both_number_and_time() -> None:
    floor = Floor(3, 10.0)
    assert not floor.reached([sample(100.0)] * 2)
    assert not floor.reached([sample(1.0)] * 9)
    assert floor.reached([sample(1.0)] * 10)


def test_all_that_fit_take_turns_and_nobody_is_left_out() -> None:
    assert groups([4, 4, 4], 12) == [[0, 1, 2]]
    assert groups([4, 4, 4], 11) == [[0, 1], [2]]
    assert groups([20, 4, 4], 10) == [[0], [1, 2]]
    assert groups([4, 4], None) == [[0, 1]]
    assert groups([], 10) == []

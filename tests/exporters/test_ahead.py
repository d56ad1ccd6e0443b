"""Jobs on several threads: their order, how far they run ahead, and what happens when one fails."""

from __future__ import annotations

import threading
import time

import pytest

from kiln.exporters import ahead
from kiln.exporters.ahead import in_order


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ahead, "_processors", lambda: request.param)
    return int(request.param)


@pytest.mark.usefixtures("threads")
def test_results_come_in_the_order_of_the_jobs() -> None:
    def job(number: int):
        return 1, lambda: time.sleep(0.02 * (number % 3 == 0)) or number

    assert list(in_order(map(job, range(20)), 100)) == list(range(20))
    assert list(in_order([], 100)) == []


def test_one_after_the_other_stays_in_the_thread_of_the_caller() -> None:
    drawn: list[int] = []

    def jobs():
        for number in range(5):
            drawn.append(number)
            yield 1, threading.get_ident

    results = in_order(jobs(), 100, together=False)
    assert next(results) == threading.get_ident()
    assert drawn == [0], "nothing is drawn before its turn"
    assert set(results) == {threading.get_ident()}
    assert threading.get_ident() not in set(in_order(jobs(), 100))


def test_jobs_run_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_processors", lambda: 2)
    meeting = threading.Barrier(2)
    jobs = [(1, lambda: meeting.wait(timeout=30))] * 2
    assert sorted(in_order(jobs, 100)) == [0, 1]


def test_no_more_is_drawn_than_may_wait(threads: int) -> None:
    drawn: list[int] = []

    def jobs():
        for number in range(50):
            drawn.append(number)
            yield 10, lambda: None

    taken = 0
    for _ in in_order(jobs(), 60):
        taken += 1
        assert len(drawn) - taken <= max(60 // 10, threads)
    assert taken == 50


def test_a_job_that_fails_ends_it(threads: int) -> None:
    begun: list[int] = []

    def job(number: int):
        def run() -> int:
            begun.append(number)
            if number == 3:
                raise ValueError("the third")
            return number

        return 1, run

    results = in_order(map(job, range(100)), 5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert max(begun) <= 3 + 5 + threads


def test_whoever_stops_taking_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    results = in_order(((1, lambda: 7) for _ in range(100)), 5)
    assert next(results) == 7
    results.close()
    assert threading.active_count() == before

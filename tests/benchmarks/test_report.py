"""Statistics against numpy, limits that decide the exit code, and facts about the machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks import parity, report
from kiln.benchmarks.machine import Machine, describe_machine, load_average
from kiln.benchmarks.records.bootstrap import ratio_interval
from kiln.benchmarks.report import Check, Report, Samples, ratio_check

VALUES = tuple(float(v) for v in np.random.default_rng(0).gamma(4, size=11))
MACHINE = Machine("cpu", (), 2, 2, None, "Linux 6", "3.11", "0", {}, None)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"low": parity.Threshold(2.0, True, "a test"), "high": parity.Threshold(2.0, False, "a test")}
    monkeypatch.setattr(report, "THRESHOLDS", table)


def test_median_and_spread() -> None:
    samples = Samples("x", "s", VALUES)
    assert samples.median == pytest.approx(np.median(VALUES))
    assert samples.mad == pytest.approx(np.median(np.abs(np.asarray(VALUES) - np.median(VALUES))))
    outlier = Samples("x", "s", (*VALUES[:-1], VALUES[-1] + 1e6))
    assert outlier.mad < 2 * samples.mad + 1
    assert samples.row()["values"] == list(VALUES)


def test_interval_of_a_ratio_is_scipys_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    above, below = VALUES, tuple(2 * v + 1 for v in VALUES)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    found = stats.bootstrap((above, below), ratio, method="percentile", rng=np.random.default_rng(5))
    expected = found.confidence_interval
    low, high = ratio_interval(above, below)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.03)
    planted = ratio_interval(tuple(1.2 * v for v in above), below)
    assert planted != pytest.approx((expected.low, expected.high), rel=0.03)


def test_interval_of_single_samples_is_the_ratio() -> None:
    assert ratio_interval((3.0,), (2.0,)) == (1.5, 1.5)


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("name", "value", "code"), [("low", 1.9, 0), ("low", 2.1, 1), ("high", 1.9, 1)])
def test_a_missed_limit_is_said_and_exits_with_1(
    name: str, value: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Report("test", {"work": tmp_path}, machine=MACHINE)
    made.samples.append(Samples("x", "s", VALUES))
    made.checks.append(Check(name, value))
    assert made.finish(tmp_path / "new/record.json") == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)
    record = json.loads((tmp_path / "new/record.json").read_text())
    assert record["passed"] is (code == 0)
    assert statistics.median(record["samples"][0]["values"]) == record["samples"][0]["median"]
    assert record["checks"][0]["limit"] == 2.0


@pytest.mark.usefixtures("limits")
def test_not_a_number_misses_every_limit() -> None:
    assert not Check("low", float("nan")).passed
    assert not Check("high", float("nan")).passed


@pytest.mark.usefixtures("limits")
def test_ratio_is_of_medians() -> None:
    check = ratio_check("low", Samples("a", "s", (1.0, 2.0, 90.0)), Samples("b", "s", (4.0, 4.0, 4.0)))
    assert check.value == 0.5
    assert "95 %" in str(check)


def test_machine_is_described(tmp_path: Path) -> None:
    found = describe_machine()
    assert found.threads >= 1
    assert found.versions["numpy"] == np.__version__
    assert found.memory_bytes is None or found.memory_bytes > 1 << 28
    assert describe_machine(tmp_path).memory_bytes is None
    load = load_average()
    assert load is None or load >= 0

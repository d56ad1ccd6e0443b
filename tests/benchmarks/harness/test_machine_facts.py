"""What is read off the machine, from folders that stand for /proc and /sys."""

from __future__ import annotations

import getpass
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.harness.energy import EnergyUse, Meter, Rapl, find_meter
from kiln.benchmarks.harness.environment import describe_environment
from kiln.benchmarks.harness.memory import PeakWatch, available_bytes, drop_page_cache, highest
from kiln.benchmarks.harness.noise import (
    Snapshot,
    aa_difference,
    aa_floor,
    judge_aa,
    judge_machine,
    judge_samples,
    snapshot,
)
from kiln.benchmarks.harness.noise_floor import machine_id, noise_floor, remember_floor
from kiln.benchmarks.records.record import Bytes, Memory, Sample

QUIET = Snapshot(0.0, 4, 0.1, 100.0, 0.0, 10.0, 7, 3000.0, 50.0)
GIB = 1 << 30


def after(**changes: object) -> Snapshot:
    """Ten seconds later on four processors, twenty of whose forty seconds were ours."""
    return replace(replace(QUIET, at=10.0, busy_s=120.0, own_s=30.0), **changes)  # type: ignore[arg-type]


def samples(*times: float) -> list[Sample]:
    return [Sample(i, 0, 0, t) for i, t in enumerate(times)]


def test_a_quiet_machine_is_clean() -> None:
    found = judge_machine(QUIET, after(), [3000.0] * 8)
    assert found.verdict == "clean"
    assert found.reasons == ()
    assert found.facts["others_share"] == 0.0


@pytest.mark.parametrize(
    ("later", "frequencies", "verdict", "reason"),
    [
        (after(busy_s=124.0), (), "noisy", "other processes took 10.0% of the processor time"),
        (after(busy_s=145.0), (), "invalid", "other processes took 62.5% of the processor time"),
        (after(steal_s=1.0), (), "noisy", "the hypervisor took 2.5% of the processor time"),
        (after(throttled=8), (), "noisy", "the processor was throttled by heat"),
        (after(), [3000.0] * 4 + [2000.0] * 4, "noisy", "the processor's clock fell from 3000 to 2000 MHz"),
        (after(gpus=({"throttle_reasons": 0x40},)), (), "noisy", "GPU 0 was throttled by heat or power"),
    ],
)
def test_what_disturbs_is_named(later: Snapshot, frequencies: list[float], verdict: str, reason: str) -> None:
    found = judge_machine(QUIET, later, frequencies)
    assert found.verdict == verdict
    assert reason in found.reasons


def test_a_machine_that_says_nothing_is_not_blamed() -> None:
    mute = Snapshot(0.0, 4, None, None, None, 0.0, None, None, None)
    assert judge_machine(mute, replace(mute, at=10.0)).verdict == "clean"


def test_proc_stat_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    hertz = os.sysconf("SC_CLK_TCK")
    columns = [n * hertz for n in (10, 1, 5, 1000, 50, 2, 3, 4)]
    (tmp_path / "proc/stat").write_text(f"cpu  {' '.join(map(str, columns))} 7 8\ncpu0 1 2 3\n")
    found = snapshot(0.0, tmp_path)
    assert (found.busy_s, found.steal_s) == (21.0, 4.0)


def test_drift_needs_thirds_that_do_not_overlap() -> None:
    assert judge_samples(samples(*[1.0, 1.1] * 6), 1) == []
    (found,) = judge_samples(samples(1.0, 1.0, 1.05, 1.05, 1.1, 1.1), 1)
    assert found == ("noisy", "the times drifted by +10.0% from the first third to the last")


def test_two_runs_of_the_same_are_compared_by_their_medians() -> None:
    assert aa_difference(samples(1.0, 1.0, 9.0), samples(1.0, 1.1, 1.1)) == pytest.approx(1 - 1 / 1.1)
    assert aa_difference(samples(1.0), []) is None
    assert judge_aa(0.04) == []
    assert [grade for grade, _ in judge_aa(0.06)] == ["noisy"]
    assert [grade for grade, _ in judge_aa(0.30)] == ["invalid"]


TRIALS = 300


def pairs(sigma: float, count: int) -> list[tuple[list[Sample], list[Sample]]]:
    """A/A pairs as machines have them: two runs of the same, log-normal times."""
    rng = np.random.default_rng(count)
    return [
        (samples(*np.exp(rng.normal(0, sigma, count))), samples(*np.exp(rng.normal(0, sigma, count))))
        for _ in range(TRIALS)
    ]


@pytest.mark.parametrize(("count", "sigma"), [(10, 0.01), (20, 0.03), (30, 0.03)])
def test_a_pair_that_agrees_by_luck_has_a_floor_all_the_same(count: int, sigma: float) -> None:
    """Twenty luckiest of 300 differ by next to nothing; what two runs usually differ by is still below."""
    found = pairs(sigma, count)
    differences = [aa_difference(*pair) or 0.0 for pair in found]
    usual = float(np.median(differences))
    lucky = sorted(range(TRIALS), key=differences.__getitem__)[:20]
    assert max(differences[i] for i in lucky) < 0.2 * usual
    assert min(aa_floor(*found[i]) or 0.0 for i in lucky) > usual


@pytest.mark.parametrize(("count", "sigma"), [(10, 0.01), (20, 0.03), (30, 0.03)])
def test_the_floor_of_a_pair_holds_for_other_pairs_of_the_same(count: int, sigma: float) -> None:
    found = pairs(sigma, count)
    floors = [aa_floor(*pair) or 0.0 for pair in found]
    next_one = [aa_difference(*pair) or 0.0 for pair in [*found[1:], found[0]]]
    held = sum(difference <= floor for floor, difference in zip(floors, next_one, strict=True))
    assert held >= 0.95 * TRIALS
    bare = [aa_difference(*pair) or 0.0 for pair in found]
    assert sum(d <= b for b, d in zip(bare, next_one, strict=True)) < 0.6 * TRIALS  # the companion


def test_a_floor_needs_samples_enough_for_an_interval() -> None:
    assert aa_floor(samples(1.0, 1.0, 1.0, 1.0), samples(1.0, 1.0, 1.0, 1.0, 1.0)) is None
    assert aa_floor(samples(*[1.0] * 5), samples(*[1.1] * 5)) == pytest.approx(0.1)
    assert aa_floor(samples(*[1.1] * 5), samples(*[1.0] * 5)) == pytest.approx(0.1)


def test_the_floor_is_remembered_by_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    one, two = machine_id({"cpu": "a"}), machine_id({"cpu": "b"})
    assert noise_floor(one) is None
    for floor in (0.2, 0.01, 0.02, 0.03, 0.01, 0.01):
        remember_floor(one, "quick@1", floor)
    assert noise_floor(one) == 0.03  # the first of six is forgotten
    assert noise_floor(two) is None


def test_a_floor_that_was_a_bare_difference_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    remember_floor("m", "quick@1", 0.02)
    path = tmp_path / "cache/bench/noise-floor.json"
    known = json.loads(path.read_text())
    del known["m"][0]["of"]
    path.write_text(json.dumps(known))
    assert noise_floor("m") is None


def test_a_damaged_memory_of_floors_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    remember_floor("m", "quick@1", 0.01)
    (tmp_path / "cache/bench/noise-floor.json").write_text("[1, 2")
    assert noise_floor("m") is None


def test_peaks_are_the_highest_seen_and_named(tmp_path: Path) -> None:
    status = tmp_path / "proc/7/status"
    status.parent.mkdir(parents=True)
    watch = PeakWatch(tmp_path)
    for rss, anonymous, mapped in ((100, 60, 40), (300, 90, 210), (300, 250, 50)):
        status.write_text(f"Name: x\nVmHWM:\t{rss} kB\nRssAnon:\t{anonymous} kB\nRssFile:\t{mapped} kB\n")
        watch(7)
    watch(8)  # gone
    found = watch.memory(
        {"rss": {"value": 200 << 10, "method": "VmHWM"}, "device": {"value": 5, "method": "own"}}
    )
    assert found.rss == Bytes(300 << 10, "VmHWM")
    assert found.anonymous == Bytes(250 << 10, "RssAnon, highest seen")
    assert found.file_backed == Bytes(210 << 10, "RssFile, highest seen")
    assert found.device == Bytes(5, "own")
    assert highest(found, Memory(rss=Bytes(GIB, "VmHWM"))).rss == Bytes(GIB, "VmHWM")


def test_what_is_free_is_capped_by_the_cgroup(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 1000 kB\n")
    assert available_bytes(tmp_path) == 1000 << 10
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("1024\n")
    assert available_bytes(tmp_path) == 1000 << 10
    (folder / "memory.max").write_text("5120\n")
    assert available_bytes(tmp_path) == 4096
    assert available_bytes(tmp_path / "nowhere") is None


def test_the_page_cache_of_named_files_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 16))
    assert drop_page_cache([path])
    assert not drop_page_cache([tmp_path / "missing"])


def test_rapl_counts_packages_and_wraps(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        zone = tmp_path / "sys/class/powercap" / name
        zone.mkdir(parents=True)
        (zone / "max_energy_range_uj").write_text("10000000\n")
        (zone / "energy_uj").write_text("9000000\n")
    rapl = Rapl(tmp_path)
    assert rapl.joules() == 0.0
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("9500000\n")
    (tmp_path / "sys/class/powercap/intel-rapl:0:0/energy_uj").write_text("9900000\n")
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").write_text("2000000\n")
    assert rapl.joules() == pytest.approx(0.5 + 3.0)
    meter = find_meter("CPU", tmp_path)
    assert meter is not None
    assert meter.method == "rapl"


def test_without_a_counter_there_is_no_energy(tmp_path: Path) -> None:
    assert find_meter("cpu", tmp_path) is None
    assert find_meter("none", tmp_path) is None
    use = EnergyUse(None)
    use.begin()
    use.end(1.0)
    assert use.per_image(1).method == "none"
    assert use.per_image(1).joules_per_image is None


def test_energy_is_of_the_timed_batches_and_net_of_idle() -> None:
    counter = iter([100.0, 160.0, 500.0, 580.0])
    use = EnergyUse(Meter("rapl", lambda: next(counter)), idle_watts=10.0)
    for seconds in (2.0, 4.0):
        use.begin()
        use.end(seconds)
    found = use.per_image(batch=2)
    assert found.joules_per_image == pytest.approx((60 + 80) / 4)
    assert found.net_joules_per_image == pytest.approx((140 - 10 * 6) / 4)


def test_the_environment_says_nothing_of_whose_it_is() -> None:
    found = describe_environment()
    text = json.dumps(found)
    assert found["cpu"]
    assert found["packages"]["numpy"]
    for secret in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert not secret or secret == "/" or secret not in text
    assert getpass.getuser() not in {str(value) for value in found.values()}


def test_the_environment_is_read_from_sys(tmp_path: Path) -> None:
    facts = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/intel_pstate/no_turbo": "1\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/fs/cgroup/memory.max": "4096\n",
        "proc/cpuinfo": "model name : X\nflags : avx2 hypervisor\n",
        ".dockerenv": "",
    }
    for name, text in facts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = describe_environment(tmp_path)
    assert found["governor"] == "performance"
    assert found["turbo"] is False
    assert found["transparent_hugepages"] == "madvise"
    assert found["cgroup_memory_bytes"] == 4096
    assert found["virtual"] is True
    assert found["container"] is True
    assert describe_environment(tmp_path / "nowhere")["governor"] is None

"""The scripts' command lines, how they take times apart, and what they say of a child that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks import children, export_cost, rebake_cost, startup, unet_step
from kiln.errors import UsageError

LINES = [
    (0.9, "load     text_encoder      0.20 s"),
    (1.0, "encode                     0.10 s"),
    (1.3, "load     unet              0.30 s"),
    (3.3, "denoise  batch 1 of 1      2.00 s"),
    (3.4, "load     vae_decoder       0.10 s"),
    (3.6, "decode                     0.20 s"),
    (3.7, "start to first import 0.40 s, all 3.65 s"),
]


def test_command_lines() -> None:
    export = export_cost.parser().parse_args(["work", "--repeat", "2"])
    assert (export.work, export.repeat, export.peer_python) == (Path("work"), 2, None)
    assert rebake_cost.parser().parse_args(["work"]).repeat >= 5
    step = unet_step.parser().parse_args(["bundle", "peer"])
    assert step.rounds >= 7
    assert (step.warmups, step.batch, step.size) == (2, 2, 512)
    assert startup.parser().parse_args([]).steps == 20


@pytest.mark.parametrize("module", [export_cost, rebake_cost])
def test_nothing_is_measured_zero_times(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        module.parser().parse_args(["work", "--repeat", "0"])  # type: ignore[attr-defined]
    assert stop.value.code == 2
    assert "1 or more" in capsys.readouterr().err


def test_times_of_a_generation_add_up() -> None:
    rows = startup.split(LINES, 3.8)
    run = startup.Run(3.8, rows)
    assert list(rows) == list(startup.ROWS)
    assert sum(rows.values()) == pytest.approx(3.8)
    assert run.before_first_step == pytest.approx(1.3)
    assert rows["open the bundle, backend, tokenizer"] == pytest.approx(0.3)
    assert rows["denoise"] == pytest.approx(2.0)
    assert rows["write the PNG, exit"] == pytest.approx(0.2)


def test_a_missing_phase_is_named() -> None:
    with pytest.raises(UsageError, match="decode"):
        startup.split([line for line in LINES if "decode  " not in line[1]], 3.8)


def test_copy_brings_every_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "unet").mkdir(parents=True)
    (source / "unet/weights").write_bytes(bytes(range(256)) * 64)
    assert rebake_cost.read_through(source) == rebake_cost.read_through(source / "unet/weights") == 256 * 64
    assert rebake_cost.copy_to_disk(source, tmp_path / "copy") > 0
    assert (tmp_path / "copy/unet/weights").read_bytes() == (source / "unet/weights").read_bytes()


def test_turns_alternate_and_warmups_are_not_kept() -> None:
    order: list[str] = []

    def step(name: str) -> unet_step.Step:
        def run(feeds: unet_step.Feeds) -> np.ndarray:
            order.append(name)
            return np.zeros(1)

        return run

    times = unet_step.interleaved({"a": step("a"), "b": step("b")}, {}, rounds=3, warmups=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_a_child_reports_its_peak_and_its_imports() -> None:
    small = children.run_script(sys.executable, "print('hello')\nreport(0)\n", (), {})
    large = children.run_script(sys.executable, "x = b'x' * (200 << 20)\ndel x\nreport(0)\n", (), {})
    assert small.output.strip() == "hello"
    assert small.heavy == ()
    assert small.seconds > 0
    assert 190 << 20 < large.peak_rss_bytes - small.peak_rss_bytes < 210 << 20


def test_a_heavy_import_is_seen() -> None:
    planted = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n"
    planted += "from importlib import metadata\nmetadata.version = lambda name: '0'\nreport(0)\n"
    assert children.run_script(sys.executable, planted, (), {}).heavy == ("torch",)


@pytest.mark.parametrize(
    "script", ["report(3)", "raise SystemExit('no disk')", "report(0)\nimport os\nos._exit(4)"]
)
def test_a_child_that_fails_is_an_error(script: str) -> None:
    with pytest.raises(children.ChildError, match="failed"):
        children.run_script(sys.executable, script + "\n", ("export",), {})


def test_kiln_is_run_in_a_child(tmp_path: Path) -> None:
    run = children.run_kiln("--version", cache=tmp_path)
    assert "kiln" in run.output
    assert run.heavy == ()
    with pytest.raises(children.ChildError, match="no model"):
        children.run_kiln("export", tmp_path / "missing", "-o", tmp_path / "out", cache=tmp_path)


def test_a_peer_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unet_step.main([str(tmp_path), str(tmp_path), "--json", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(children.ChildError, match="cannot start"):
        children.run_optimum_intel(str(tmp_path / "python"), tmp_path, tmp_path)

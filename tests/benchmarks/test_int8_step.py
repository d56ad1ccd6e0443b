"""The script that times int8: its command line, what it refuses, and how it counts kernels and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import kiln
from kiln.benchmarks import children, int8_step
from kiln.benchmarks.parity import THRESHOLDS
from kiln.bundle import open_bundle

EMOJI = Path(kiln.__file__).parent / "models/emoji"


def test_command_line() -> None:
    args = int8_step.parser().parse_args(["bundle", "peer", "--make-peer", "python", "folder"])
    assert (args.bundle, args.peer, args.make_peer) == (Path("bundle"), Path("peer"), ["python", "folder"])
    assert args.rounds >= 7
    assert (args.warmups, args.batch, args.size, args.float) == (2, 2, 512, None)


def test_a_bundle_that_is_not_int8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert int8_step.main([str(EMOJI), str(tmp_path), "--json", str(tmp_path / "x.json")]) == 2
    assert "is not of int8; make one with: kiln export --precision int8-full" in capsys.readouterr().err


def test_a_peer_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(children.ChildError, match="cannot start"):
        int8_step.make_peer(str(tmp_path / "python"), str(tmp_path), tmp_path / "peer")


def test_limits_have_their_rows() -> None:
    for name in ("int8_step_time_ratio", "int8_decode_time_ratio", "int8_size_ratio", "int8_peak_rss_gb"):
        assert THRESHOLDS[name].at_most
    for precision in ("int8", "int8_full"):
        assert not THRESHOLDS[f"{precision}_image_psnr_db"].at_most


def test_parity_of_the_bundle_is_checked(tmp_path: Path) -> None:
    folder = shutil.copytree(EMOJI, tmp_path / "b")
    manifest = json.loads((folder / "kiln.json").read_text())
    manifest |= {"storage": "int8-full", "parity": {"image_psnr_db": 99.0, "image_ssim": 0.1}}
    (folder / "kiln.json").write_text(json.dumps(manifest))
    good, bad = int8_step._parity_checks(open_bundle(folder))
    assert (good.threshold, good.passed) == ("int8_full_image_psnr_db", True)
    assert (bad.threshold, bad.passed) == ("int8_full_image_ssim", False)
    assert int8_step._parity_checks(open_bundle(EMOJI)) == []


def test_decoding_is_timed_in_turns() -> None:
    pytest.importorskip("openvino")
    line = ["b", "p", "--size", "64", "--rounds", "3", "--warmups", "1", "--precision", "fp32"]
    emoji = open_bundle(EMOJI)
    one, other = int8_step.decode_times({"int8": emoji, "floats": emoji}, int8_step.parser().parse_args(line))
    assert (one.name, other.name, one.unit) == ("decoding, int8", "decoding, floats", "s")
    assert [len(samples.values) for samples in (one, other)] == [3, 3]
    assert min(*one.values, *other.values) > 0


def test_sizes_are_those_of_the_files() -> None:
    files = [path for path in EMOJI.rglob("*") if path.is_file() and path.name != "kiln.json"]
    listed = open_bundle(EMOJI).manifest["files"]
    assert int8_step._size(open_bundle(EMOJI)) == sum(
        path.stat().st_size for path in files if path.relative_to(EMOJI).as_posix() in listed
    )

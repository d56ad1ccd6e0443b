"""``kiln export`` and ``kiln bake``: options that concern int8 alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
FULL_ONLY = [
    ["--calibration", "c.json"],
    ["--recalibrate"],
    ["--calibration-prompt", "a red apple"],
    ["--most-kept", "0"],
]
BOTH = [["--no-gate"], ["--min-parity", "30"]]


@pytest.mark.parametrize("given", FULL_ONLY + BOTH, ids=lambda given: str(given[0]))
def test_what_would_be_ignored_is_refused(run_command: Run, given: list[str]) -> None:
    needed = "int8-full" if given in FULL_ONLY else "int8"
    for arguments, stored in (
        (["export", "emoji", "-o", "made"], "auto"),
        (["export", "emoji", "-o", "made", "--precision", "fp16"], "fp16"),
        (["bake", "emoji", "-o", "made", "--lora", "emoji-kiln"], "fp16"),
    ):
        result = run_command(*arguments, *given)
        assert result.exit_code == 2, result.output
        assert f"{given[0]} is for {needed}, and the precision of this bundle is {stored}" in result.output
    assert not Path("made").exists()


@pytest.mark.parametrize("given", FULL_ONLY, ids=lambda given: str(given[0]))
def test_int8_weights_alone_are_not_calibrated(run_command: Run, given: list[str]) -> None:
    result = run_command("export", "emoji", "-o", "made", "--precision", "int8", *given)
    assert result.exit_code == 2
    assert f"{given[0]} is for int8-full, and the precision of this bundle is int8" in result.output


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan", "much"])
def test_a_share_lies_between_0_and_1(run_command: Run, share: str) -> None:
    result = run_command("export", "emoji", "-o", "made", "--precision", "int8-full", "--most-kept", share)
    assert result.exit_code == 2, result.output
    assert "--most-kept" in result.output

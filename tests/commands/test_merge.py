"""``kiln merge``: what it prints, writes and refuses, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.resolve import bundled_models

Run = Callable[..., Result]


@pytest.fixture
def run(run_command: Run) -> Run:
    """Runs a command on the bundled model."""
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    return run_command


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def unet(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read("unet", name).astype(np.float64) for name in checkpoint.tensors("unet")}


def test_a_merge_of_bundles_is_a_folder_that_exports(run: Run) -> None:
    """A quarter of the way from the bundled model to the one with an adapter inside."""
    done(run("bake", "emoji", "-o", "styled", "--lora", "emoji-kiln"))
    result = done(run("merge", "emoji", "styled", "-o", "merged", "--alpha", 0.25, "--precision", "fp32"))
    assert result.stdout == "merged\n"
    assert "unet: 326 tensors merged" in result.stderr
    first, second, merged = unet(bundled_models()["emoji"]), unet(Path("styled")), unet(Path("merged"))
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    for name, value in merged.items():
        assert np.allclose(value, 0.75 * first[name] + 0.25 * second[name], atol=1e-6), name
    back = done(
        run(
            "merge",
            "emoji",
            "styled",
            "emoji",
            "-o",
            "back",
            "--method",
            "add-difference",
            "--precision",
            "fp32",
            "--json",
        )
    )
    report = json.loads(back.stdout)
    assert report["merged"]["unet"] == 326
    found = unet(Path("back"))
    assert max(float(np.abs(found[name] - second[name]).max()) for name in found) < 1e-6
    done(run("export", "merged", "-o", "bundle", "--precision", "fp16"))
    assert (Path("bundle") / "kiln.json").is_file()


def test_block_weights_of_one_leave_the_others(run: Run) -> None:
    done(run("bake", "emoji", "-o", "styled", "--lora", "emoji-kiln"))
    numbers = ",".join("1" if number == 12 else "0" for number in range(25))
    done(run("merge", "emoji", "styled", "-o", "merged", "--block-weights", numbers))
    first, second, merged = unet(bundled_models()["emoji"]), unet(Path("styled")), unet(Path("merged"))
    for name, value in merged.items():
        assert np.array_equal(value, (second if name.startswith("mid_block") else first)[name]), name


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["emoji", "no-such-model", "-o", "out"], 2, ["'no-such-model'"]),
        (["emoji", "-o", "out"], 2, ["takes A and B", "1 checkpoints"]),
        (["emoji", "emoji", "-o", "out", "--method", "average"], 2, ["'average'", "weighted-sum"]),
        (["emoji", "emoji", "-o", "out", "--method", "add-difference"], 2, ["A and B and C"]),
        (["emoji", "emoji", "-o", "out", "--alpha", "nan"], 2, ["alpha nan"]),
        (["emoji", "emoji", "-o", "out", "--block-weights", "1,2"], 2, ["2 block weights", "25"]),
        (["emoji", "emoji", "-o", "out", "--precision", "int8"], 2, ["'int8'"]),
        (["emoji", "emoji", "-o", "out.safetensors"], 2, ["-o FOLDER"]),
        (["emoji", "notes.txt", "-o", "out"], 1, ["notes.txt", "a text file"]),
        (["emoji", "emoji", "-o", "mine"], 1, ["mine exists"]),
    ],
)
def test_what_is_refused(run: Run, words: list[str], code: int, says: list[str]) -> None:
    """One line on stderr with all of ``says``, nothing on stdout, and nothing written."""
    Path("notes.txt").write_text("some text that is no checkpoint at all")
    Path("mine").mkdir()
    (Path("mine") / "file").write_text("mine")
    result = run("merge", *words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    assert line.startswith("error: ")
    assert [text for text in says if text not in line] == []
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "notes.txt"]

"""What the command line refuses: one line that says why, the exit code, and nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import Result

from kiln.backends.registry import names
from kiln.exporters.resolve import bundled_models

Run = Callable[..., Result]

GENERATE_MODULES = """
import json, sys
from kiln.backends.registry import names
from kiln.cli import main
try:
    main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code or 0
print()
print(json.dumps([code, sorted(set(json.loads(sys.argv[1])) & set(sys.modules))]))
"""


@pytest.fixture
def emoji() -> None:
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")


def assert_refused(result: Result, code: int, *says: str) -> None:
    """One line on stderr with all of ``says``, nothing on stdout, and nothing written."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    assert line.startswith("error: ")
    assert [text for text in says if text not in line] == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sampler", "euler_b"], ["'euler_b'", "euler, euler_a, ddim, dpmpp_2m"]),
        (["--schedule", "linear"], ["'linear'", "karras"]),
        (["-W", "65"], ["width 65", "multiple of 8", "nearest is 64"]),
        (["-H", "100000"], ["height 100000", "4096"]),
        (["--steps", "0"], ["steps 0", "from 1 to 1000"]),
        (["--cfg-scale", "nan"], ["cfg_scale nan", "0 to 100"]),
        (["-s", "-1"], ["seed -1"]),
        (["-b", "0"], ["count 0"]),
        (["--batch-size", "65"], ["batch_size 65", "1 to 64"]),
        (["--rng", "mps"], ["'mps'", "cpu, cuda"]),
        (["--lora", "style.safetensors:strong"], ["'style.safetensors:strong'", "FILE:STRENGTH"]),
        (["--lora", "style.safetensors:nan"], ["nan", "finite"]),
        (["-m", "no-such-model"], ["'no-such-model'", "bundled model"]),
        (["-o", "apple.jpg"], [".jpg", "NAME.png or a folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_a_wrong_request_is_a_usage_error(run_command: Run, words: list[str], says: list[str]) -> None:
    assert_refused(run_command("generate", "red apple", *words), 2, *says)


@pytest.mark.usefixtures("emoji")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backend", "tensorrt"], ["'tensorrt'", "openvino", "torch"]),
        (["--precision", "int8"], ["'int8'", "auto, fp32, bf16, fp16"]),
        (["--backend", "null", "-W", "8"], ["8x64", "too small", "at least"]),
    ],
)
def test_what_only_the_pipeline_knows_is_a_usage_error(
    run_command: Run, words: list[str], says: list[str]
) -> None:
    assert_refused(run_command("generate", "red apple", *words, "-o", "apple.png"), 2, *says)


def test_a_tag_in_the_prompt_needs_a_folder(run_command: Run, tmp_path: Path) -> None:
    assert_refused(run_command("generate", "red apple <lora:x:1>"), 2, "<lora:x:1>", "--lora-dir FOLDER")
    (tmp_path / "y.safetensors").touch()
    refused = run_command("generate", "red apple <lora:x:1>", "--lora-dir", tmp_path)
    assert_refused(refused, 2, "x.safetensors", "its adapters: y")
    (tmp_path / "x.safetensors").touch()
    refused = run_command("generate", "red apple <lora:x:strong>", "--lora-dir", tmp_path)
    assert_refused(refused, 2, "no number", "<lora:name:0.8>")


@pytest.mark.usefixtures("emoji")
def test_an_adapter_that_is_not_there_fails(run_command: Run) -> None:
    assert_refused(
        run_command("generate", "red apple", "--lora", "style.safetensors"), 1, "style.safetensors"
    )


@pytest.mark.parametrize("command", ["export", "bake"])
def test_a_missing_model_is_a_usage_error(run_command: Run, command: str) -> None:
    assert_refused(run_command(command, "no-such-model", "-o", "out"), 2, "'no-such-model'")


def test_inspecting_what_is_not_there_is_a_usage_error(run_command: Run) -> None:
    assert_refused(run_command("inspect", "no-such-file"), 2, "no-such-file")


@pytest.mark.usefixtures("emoji")
def test_an_unknown_storage_type_is_a_usage_error(run_command: Run) -> None:
    assert_refused(
        run_command("export", "emoji", "-o", "out", "--precision", "int4"), 2, "'int4'", "fp32, fp16, bf16"
    )


@pytest.mark.parametrize("command", ["export", "inspect"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a text, not weights", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"\xff\xff\xff\xff\0\0\0\0{}", "header"),
        (b"", "empty"),
    ],
)
def test_what_is_no_checkpoint_fails(
    run_command: Run, tmp_path: Path, command: str, content: bytes, says: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    words = ["-o", "out"] if command == "export" else []
    assert_refused(run_command(command, path, *words), 1, "model.safetensors", says)


@pytest.mark.usefixtures("emoji")
def test_an_adapter_of_another_model_fails(run_command: Run, tmp_path: Path) -> None:
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_{name}.weight": np.zeros((4, 4), np.float32) for name in "AB"}
    safetensors.numpy.save_file(tensors, tmp_path / "flux.safetensors")
    refused = run_command("bake", "emoji", "-o", "out", "--lora", tmp_path / "flux.safetensors")
    assert_refused(refused, 1, "flux.safetensors", "FLUX")


@pytest.mark.parametrize("words", [["generate"], ["draw"], ["generate", "x", "--fast"], ["export", "emoji"]])
def test_what_click_refuses_is_a_usage_error(run_command: Run, words: list[str]) -> None:
    result = run_command(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_debug_shows_where_an_error_was_raised(run_command: Run) -> None:
    result = run_command("--debug", "generate", "red apple", "-W", "65")
    assert type(result.exception).__name__ == "UsageError"


@pytest.mark.usefixtures("emoji")
def test_images_are_named_and_reported(run_command: Run) -> None:
    common = ["generate", "Red, apple!", "--backend", "null", "--steps", "1", "-s", "7"]
    assert run_command(*common).stdout == "red-apple-7.png\n"
    assert run_command(*common, "-o", "a.png").stdout == "a.png\n"
    assert run_command(*common, "-o", "a.png", "-b", "2").stdout == "a-7.png\na-8.png\n"
    (row,) = map(json.loads, run_command(*common, "-o", "new/folder", "--json").stdout.splitlines())
    assert (row["path"], row["seed"]) == ("new/folder/red-apple-7.png", 7)
    assert row["in_force"]["unet"]["backend"] == "null"
    assert "Seed: 7" in row["parameters"]
    assert all(Path(name).is_file() for name in ("a.png", "a-7.png", "a-8.png", row["path"]))


@pytest.mark.usefixtures("emoji")
def test_inspect_prints_text_and_json(run_command: Run) -> None:
    text, report = (
        run_command("inspect", "emoji").stdout,
        json.loads(run_command("inspect", "emoji", "--json").stdout),
    )
    assert report["kind"] == "bundle"
    for fact in (report["name"], report["components"]["unet"]["class"], "MB"):
        assert fact in text


def test_devices_lists_every_backend(run_command: Run) -> None:
    rows = json.loads(run_command("devices", "--json").stdout)
    assert {row["backend"] for row in rows} == set(names())
    assert {"null", "onnxruntime", "openvino", "torch"} <= {
        row["backend"] for row in rows if row["available"]
    }
    assert all(row["reason"] for row in rows if not row["available"])


def modules_loaded(names: list[str], *words: str) -> list[str]:
    """Which packages a command loads in a fresh interpreter."""
    command = [sys.executable, "-c", GENERATE_MODULES, json.dumps(names), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return list(found)


@pytest.mark.usefixtures("emoji")
def test_a_picture_needs_no_onnx_either(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="no engine: install the cpu extra")
    target = tmp_path / "apple.png"
    words = ["generate", "red apple", "--steps", "1", "--backend", "openvino", "-o", str(target)]
    assert modules_loaded(["torch", "diffusers", "transformers", "onnx", "onnxruntime"], *words) == []
    assert target.stat().st_size > 0


def test_a_package_that_is_loaded_is_found() -> None:
    assert modules_loaded(["click", "torch"], "--help") == ["click"]

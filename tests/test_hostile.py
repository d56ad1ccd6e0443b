"""Input that is wrong: one line that says so, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import save_file

from kiln.cli import main

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def check(result: Result, pattern: str, code: int = 1) -> None:
    """One line on stderr that begins with ``error:`` and says what is wrong; no traceback."""
    import re

    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture
def out(tmp_path: Path, tiny_bundle: Path, kiln_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing may be left behind; a cache of its own, with the tiny model's graphs."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copytree(kiln_cache / "graphs", tmp_path / "cache/graphs")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    return folder


def clean(out: Path) -> None:
    assert os.listdir(out) == []
    bundles = out.parent / "cache/bundles"
    left = [p.name for p in bundles.iterdir() if not p.name.endswith(".lock")] if bundles.exists() else []
    assert left == []


def truncated(path: Path, sd1: Path) -> None:
    path.write_bytes((sd1 / "unet" / WEIGHTS).read_bytes()[:-1000])


def text(path: Path, sd1: Path) -> None:
    path.write_text("These are not the weights.\n")


def pointer(path: Path, sd1: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4265380512\n")


def long_header(path: Path, sd1: Path) -> None:
    path.write_bytes((90_000_000).to_bytes(8, "little") + b'{"a":')


def empty(path: Path, sd1: Path) -> None:
    path.write_bytes(b"")


FILES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated": (truncated, "is truncated"),
    "text": (text, "is a text file; expected a safetensors file"),
    "git-LFS pointer": (pointer, "a git-LFS pointer.*git lfs pull"),
    "long header": (long_header, "is truncated: the header needs 90000000 bytes"),
    "empty": (empty, "empty"),
}


@pytest.mark.parametrize("command", ["export", "inspect", "generate"])
@pytest.mark.parametrize("case", FILES)
def test_a_broken_model_file(tiny_sd1: Path, out: Path, case: str, command: str) -> None:
    make, pattern = FILES[case]
    path = out.parent / "model.safetensors"
    make(path, tiny_sd1)
    arguments = {
        "export": ("export", path, "-o", out / "b"),
        "inspect": ("inspect", path),
        "generate": ("generate", "an apple", "-m", path, "-o", out / "apple.png", "-q"),
    }
    check(run(*arguments[command]), pattern)
    clean(out)


@pytest.mark.parametrize("command", ["export", "bake", "inspect", "generate"])
@pytest.mark.parametrize("case", FILES)
def test_a_broken_adapter(tiny_sd1: Path, tiny_bundle: Path, out: Path, case: str, command: str) -> None:
    make, pattern = FILES[case]
    path = out.parent / "style.safetensors"
    make(path, tiny_sd1)
    arguments = {
        "export": ("export", tiny_bundle, "-o", out / "b", "--lora", path),
        "bake": ("bake", tiny_bundle, "-o", out / "b", "--lora", path),
        "inspect": ("inspect", path),
        "generate": ("generate", "an apple", "-m", tiny_bundle, "--lora", path, "-o", out / "a.png", "-q"),
    }
    check(run(*arguments[command]), pattern)
    clean(out)


def copy_of(sd1: Path, out: Path) -> Path:
    return Path(shutil.copytree(sd1, out.parent / "model"))


def test_a_missing_shard(tiny_sd1: Path, out: Path) -> None:
    folder = copy_of(tiny_sd1, out) / "unet"
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    index = {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for command in (("export", folder.parent, "-o", out / "b"), ("inspect", folder.parent)):
        check(run(*command), "00002-of-00002")
    clean(out)


def test_a_folder_without_unet(tiny_sd1: Path, out: Path) -> None:
    folder = copy_of(tiny_sd1, out)
    shutil.rmtree(folder / "unet")
    for command in (("export", folder, "-o", out / "b"), ("inspect", folder)):
        check(run(*command), "holds no unet")
    clean(out)


def test_a_truncated_file_in_a_folder(tiny_sd1: Path, out: Path) -> None:
    folder = copy_of(tiny_sd1, out)
    path = folder / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    check(run("export", folder, "-o", out / "b"), f"{WEIGHTS}: is truncated")
    clean(out)


def test_an_adapter_of_flux(tiny_bundle: Path, out: Path) -> None:
    path = out.parent / "flux.safetensors"
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{stem}.lora_down.weight": np.ones((4, 3072), np.float32),
            f"{stem}.lora_up.weight": np.ones((9216, 4), np.float32),
        },
        path,
    )
    check(run("bake", tiny_bundle, "-o", out / "b", "--lora", path), "FLUX")
    check(run("export", tiny_bundle, "-o", out / "b", "--lora", f"{path}:0.5"), "FLUX")
    check(run("generate", "x", "-m", tiny_bundle, "--lora", path, "-o", out / "x.png", "-q"), "FLUX")
    clean(out)


LYING: dict[str, tuple[dict[str, object], str]] = {
    "NaN": ({"lora_up.weight": np.nan}, "holds NaN or infinity"),
    "infinite alpha": ({"alpha": np.inf}, "expected a finite number"),
    "giant rank": ({"lora_down.weight": 2000, "lora_up.weight": 2000}, "rank 2000; expected 1 to 1024"),
    "two families": ({"hada_w1_a": 1.0}, "expected one family in a module"),
    "a key without a layer": ({}, "none of its 2 tensors matches"),
}


@pytest.mark.parametrize("command", ["export", "bake", "generate"])
@pytest.mark.parametrize("case", LYING)
def test_an_adapter_that_lies(tiny_bundle: Path, out: Path, case: str, command: str) -> None:
    parts, pattern = LYING[case]
    with safe_open(tiny_bundle / "unet/weights.safetensors", "np") as weights:
        shape = weights.get_slice("time_embedding.linear_1.weight").get_shape()
    rank = next((value for value in parts.values() if isinstance(value, int)), 4)
    tensors = {
        "lora_down.weight": np.ones((rank, shape[1]), np.float32),
        "lora_up.weight": np.ones((shape[0], rank), np.float32),
    }
    for name, value in parts.items():
        if isinstance(value, float):
            tensors[name] = np.full(tensors[name].shape if name in tensors else (), value, np.float32)
    if "hada_w1_a" in parts:
        sides = (("a", (shape[0], 4)), ("b", (4, shape[1])))
        tensors |= {f"hada_w{n}_{side}": np.ones(size, np.float32) for n in (1, 2) for side, size in sides}
    stem = "lora_unet_time_embedding_linear_1" if parts else "lora_unet_nowhere"
    path = out.parent / "lies.safetensors"
    save_file({f"{stem}.{name}": value for name, value in tensors.items()}, path)
    arguments = {
        "export": ("export", tiny_bundle, "-o", out / "b", "--lora", path),
        "bake": ("bake", tiny_bundle, "-o", out / "b", "--lora", path),
        "generate": ("generate", "x", "-m", tiny_bundle, "--lora", path, "-o", out / "x.png", "-q"),
    }
    check(run(*arguments[command]), pattern)
    clean(out)


@pytest.mark.parametrize("option", ["-W", "-H"])
def test_a_size_that_is_no_multiple_of_8(tiny_bundle: Path, out: Path, option: str) -> None:
    command = ("generate", "an apple", "-m", tiny_bundle, option, 513, "-o", out / "a.png", "-q")
    check(run(*command), "513", code=2)
    clean(out)


def test_names_that_do_not_exist(tiny_bundle: Path, out: Path) -> None:
    check(run("export", "no-such-model", "-o", out / "b"), "no model 'no-such-model'", code=2)
    check(run("inspect", out.parent / "none.safetensors"), "no model", code=2)
    check(run("bake", tiny_bundle, "-o", out / "b", "--lora", "none.safetensors"), "none.safetensors")
    check(run("generate", "x", "-m", tiny_bundle, "--lora", "none.safetensors", "-q"), "none.safetensors")
    check(run("bake", out, "-o", out / "b"), "is not a bundle")
    clean(out)


def test_a_damaged_bundle(tiny_bundle: Path, out: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, out.parent / "b"))
    with (folder / "unet/weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    for command in (
        ("generate", "x", "-m", folder, "-o", out / "x.png", "-q"),
        ("bake", folder, "-o", out / "b"),
        ("export", folder, "-o", out / "b"),
        ("inspect", folder),
    ):
        check(run(*command), r"unet/weights.safetensors is damaged")
    clean(out)


def test_a_target_below_a_file(tiny_bundle: Path, out: Path) -> None:
    (out.parent / "file").write_text("mine")
    check(run("export", tiny_bundle, "-o", out.parent / "file/b"), "cannot write")
    assert (out.parent / "file").read_text() == "mine"
    clean(out)


def test_a_cache_that_cannot_be_written(tiny_sd1: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "file").write_text("mine")
    monkeypatch.setenv("KILN_CACHE", str(out.parent / "file"))
    command = ("generate", "x", "-m", tiny_sd1, "-o", out / "x.png", "-q")
    check(run(*command), "cannot write the cache.*KILN_CACHE")
    assert os.listdir(out) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 4 MiB, where this machine lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not done or done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny_bundle: Path, small_disk: Path) -> None:
    check(run("export", tiny_bundle, "-o", small_disk / "deep/b"), "the disk is full; free some space")
    assert [p for p in small_disk.rglob("*") if p.name != "deep"] == []


def test_the_command_itself_prints_one_line(tiny_sd1: Path, out: Path) -> None:
    path = out.parent / "model.safetensors"
    text(path, tiny_sd1)
    done = subprocess.run(
        [sys.executable, "-m", "kiln.cli", "export", str(path), "-o", str(out / "b")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    clean(out)

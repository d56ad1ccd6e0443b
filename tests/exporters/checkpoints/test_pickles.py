"""Checkpoints in pickles: read by torch's restricted loader, and nothing in them runs."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch

from kiln.errors import CheckpointError
from kiln.exporters.checkpoints import open_checkpoint

Modules = dict[str, torch.nn.Module]
Shapes = dict[str, tuple[int, ...]]
EMOJI = Path(__file__).parents[4] / "shared" / "data" / "emoji-model"
SHIPPED = Path(__file__).parents[3] / "exporters" / "data" / "sd1"


@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt(files: Any, modules: Modules, tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(
        {"state_dict": files.ldm_state(modules), "epoch": 3}, path, _use_new_zipfile_serialization=zipped
    )
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules)
        assert checkpoint.layout == "pickle"


def test_bfloat16_from_ckpt(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({name: tensor.bfloat16() for name, tensor in files.ldm_state(modules).items()}, path)
    with open_checkpoint(path) as checkpoint:
        files.check_equal(checkpoint, modules, ml_dtypes.bfloat16)


class Bomb:
    """What a hostile pickle does: runs a function when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": Bomb(tmp_path / "exploded")}}, path)
    with pytest.raises(CheckpointError, match="refuses to read it safely"):
        open_checkpoint(path)
    assert not (tmp_path / "exploded").exists()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="refuses to read it safely"):
        open_checkpoint(path)


def test_ckpt_without_torch(
    files: Any, modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(files.ldm_state(modules), path)
    original = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(CheckpointError, match=r"pip install 'kiln-diffusion\[export\]'"):
        open_checkpoint(path)


def test_pickle_named_safetensors(files: Any, modules: Modules, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(files.ldm_state(modules), path)
    with pytest.raises(CheckpointError, match="zip archive"):
        open_checkpoint(path)

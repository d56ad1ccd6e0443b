"""Exports of int8 that are told how, or refused: limits, what is kept, damaged weights; on the tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kiln.errors import CheckpointError, ParityError
from kiln.exporters.export import ExportSpec, export
from kiln.exporters.quantization.produce import Int8Options

pytest.importorskip("torch")
pytest.importorskip("openvino", reason="no engine to calibrate with: install the cpu extra")
pytestmark = pytest.mark.usefixtures("small_int8")

QUICK = Int8Options(prompts=("red apple",), steps=2, min_parity=0.0)


def test_what_is_too_far_off_is_not_published(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, min_parity=200.0)
    with pytest.raises(ParityError, match="--min-parity asks for 200 dB"):
        export(ExportSpec(tiny_sd1, tmp_path / "b", storage="int8", int8=options))
    assert list(tmp_path.iterdir()) == []
    quiet = dataclasses.replace(options, gate=False)
    assert export(ExportSpec(tiny_sd1, tmp_path / "b", storage="int8", int8=quiet)).int8 == {}


def test_how_much_is_kept_can_be_said(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    def kept(share: float) -> tuple[list[str], float]:
        options = dataclasses.replace(QUICK, gate=False, recalibrate=True, most_kept=share)
        folder = tmp_path / f"kept-{share}"
        export(ExportSpec(tiny_sd1, folder, storage="int8-full", int8=options))
        made = json.loads((folder / "calibration.json").read_text())
        return made["kept"], made["facts"]["kept_share"]

    nothing, none = kept(0.0)
    some, share = kept(0.3)
    assert (nothing, none) == ([], 0)
    assert some
    assert 0 < share <= 0.3


def test_a_weight_with_nan_is_refused(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["down_blocks.1.resnets.0.conv1.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="holds NaN or infinity and cannot be int8"):
        export(
            ExportSpec(folder, tmp_path / "b", storage="int8", int8=dataclasses.replace(QUICK, gate=False))
        )

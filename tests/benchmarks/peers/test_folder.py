"""The folder for other projects holds the bundle's weights, and diffusers opens it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from kiln.benchmarks.peers.folder import write_folder
from kiln.bundle import open_bundle


def test_same_tensors(tiny_bundle: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    folder = write_folder(bundle, tmp_path / "model")
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        expected = load_file(tiny_sd1 / f"{file}.safetensors")
        found = load_file(folder / f"{file}.safetensors")
        expected.pop("text_model.embeddings.position_ids", None)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape
            assert np.array_equal(found[name], tensor.astype(found[name].dtype)), name


def test_written_once(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    folder = write_folder(bundle, tmp_path / "model")
    (folder / "made-before").touch()
    write_folder(bundle, folder)
    assert (folder / "made-before").exists()
    (folder / "made-of.json").write_text("{}")  # of another bundle
    write_folder(bundle, folder)
    assert not (folder / "made-before").exists()
    assert (folder / "model_index.json").exists()

"""``kiln inspect`` tells bundles, checkpoints, single networks and adapters apart, in values for JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from kiln.bundle import open_bundle
from kiln.errors import AdapterError, BundleError, CheckpointError, UsageError
from kiln.exporters.inspection import inspect_path
from kiln.exporters.resolve import bundled_models

ADAPTERS = Path(__file__).resolve().parents[3] / "shared" / "data" / "adapters"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def emoji() -> Path:
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    return bundled_models()["emoji"]


def report_of(path: Path) -> dict[str, Any]:
    """The report, which must survive JSON unchanged."""
    report = inspect_path(path)
    assert json.loads(json.dumps(report)) == report
    return report


def test_a_bundle(emoji: Path) -> None:
    report = report_of(emoji)
    assert (report["kind"], report["family"], report["adapters"]) == ("bundle", "sd1", [])
    assert list(report["components"]) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for component, row in report["components"].items():
        # The oracle is the safetensors package.
        tensors = safetensors.numpy.load_file(emoji / component / "weights.safetensors")
        assert row["tensors"] == len(tensors) == sum(row["storage"].values())
        assert row["parameters"] == sum(tensor.size for tensor in tensors.values())
        assert row["size_bytes"] == sum(f.stat().st_size for f in (emoji / component).iterdir())
    files = [f for f in emoji.rglob("*") if f.is_file() and f.name != "kiln.json"]
    assert report["size_bytes"] == sum(f.stat().st_size for f in files)


def test_the_adapters_inside_a_bundle(emoji: Path, tmp_path: Path) -> None:
    shutil.copytree(emoji, tmp_path / "copy")
    manifest = json.loads((emoji / "kiln.json").read_text())
    rows = [
        {"name": name, "sha256": "0" * 64, "unet_strength": 0.8, "text_encoder_strength": 0.5}
        for name in ("style", "style")
    ]
    (tmp_path / "copy/kiln.json").write_text(json.dumps(manifest | {"adapters": rows}))
    assert report_of(tmp_path / "copy")["adapters"] == rows


def test_a_damaged_bundle_is_refused(emoji: Path, tmp_path: Path) -> None:
    shutil.copytree(emoji, tmp_path / "copy")
    weights = tmp_path / "copy/vae_decoder/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        inspect_path(tmp_path / "copy")


def test_the_weights_of_one_network(emoji: Path, tmp_path: Path) -> None:
    report = report_of(emoji / "unet/weights.safetensors")
    assert (report["kind"], report["family"], list(report["networks"])) == ("checkpoint", "sd1", ["unet"])
    assert report["networks"]["unet"]["parameters"] == report_of(emoji)["components"]["unet"]["parameters"]
    report = report_of(emoji / "text_encoder/weights.safetensors")
    assert (report["kind"], list(report["networks"])) == ("weights", ["text_encoder"])


def test_a_diffusers_folder(emoji: Path, tmp_path: Path) -> None:
    bundle = open_bundle(emoji)
    names = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    for network, stem in names.items():
        (tmp_path / network).mkdir()
        shutil.copy(bundle.source(network).weights_path, tmp_path / network / f"{stem}.safetensors")
        (tmp_path / network / "config.json").write_text(json.dumps(bundle.config(network)))
    shutil.copytree(emoji / "tokenizer", tmp_path / "tokenizer")
    report = report_of(tmp_path)
    assert (report["kind"], report["layout"], report["family"]) == ("checkpoint", "diffusers", "sd1")
    rows = report_of(emoji)["components"]
    for network in names:
        kept = ("class", "tensors", "parameters", "storage")
        assert [report["networks"][network][k] for k in kept] == [rows[network][k] for k in kept]


@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="the real adapter files are not part of the repository")
@pytest.mark.parametrize(
    ("name", "formats", "modules"),
    [
        ("lora_disney.safetensors", {"LoRA": 192}, {"text_encoder": 48, "unet": 144}),
        ("smart_falcon_4_lokr.safetensors", {"LoKr": 350}, {"text_encoder": 72, "unet": 278}),
        ("sd-pokemon-model-lora_pytorch_lora_weights.safetensors", {"LoRA": 128}, {"unet": 128}),
        ("peft_sd15_text_encoder", {"LoRA": 24}, {"text_encoder": 24}),
    ],
)
def test_real_adapters(name: str, formats: dict[str, int], modules: dict[str, int]) -> None:
    report = report_of(ADAPTERS / name)
    assert (report["kind"], report["family"]) == ("adapter", "sd1")
    assert (report["formats"], report["modules"]) == (formats, modules)


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_{name}.weight": np.zeros((4, 4), np.float32) for name in "AB"}
    safetensors.numpy.save_file(tensors, tmp_path / "flux.safetensors")
    report = report_of(tmp_path / "flux.safetensors")
    assert (report["kind"], report["what"]) == ("other", "a FLUX LoRA")


def test_an_adapter_that_contradicts_itself_is_called_an_adapter(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    names = ("lora_down", "lora_A")
    tensors = {f"{stem}.{name}.weight": np.zeros((2, 2), np.float32) for name in names}
    safetensors.numpy.save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(AdapterError, match="name the same parameter"):
        inspect_path(tmp_path / "twice.safetensors")


def test_a_checkpoint_of_another_family_is_named(tmp_path: Path) -> None:
    key = "double_blocks.0.img_attn.norm.key_norm.scale"
    safetensors.numpy.save_file({key: np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="FLUX"):
        inspect_path(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a text, not weights", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "header"),
        (b"", "empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as refused:
        inspect_path(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_folder_and_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"no bundle.*no diffusers folder.*no adapter"):
        inspect_path(tmp_path / "folder")
    with pytest.raises(UsageError, match="no file or folder"):
        inspect_path(tmp_path / "nothing")

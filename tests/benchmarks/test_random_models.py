"""A random model opens as a checkpoint, a random LoRA fits it; checked on shrunken shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks import random_models
from kiln.components import NETWORKS
from kiln.errors import StorageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake
from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.parts import shipped_config

# SD1's widths -> small ones; the text's width stays, because the family is recognised by it.
UNET = {320: 32, 640: 64, 960: 96, 1280: 128, 1920: 192, 2560: 256, 5120: 512, 10240: 1024}
VAE = {128: 8, 256: 16, 512: 32}
FULL = {network: random_models.weight_shapes(network) for network in NETWORKS}


def shrink(network: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if network == "text_encoder":
        return tuple({49408: 640, 3072: 96}.get(size, size) for size in shape)
    return tuple((UNET if network == "unet" else VAE).get(size, size) for size in shape)


def small_shapes(network: str) -> dict[str, tuple[int, ...]]:
    kept = {n: s for n, s in FULL[network].items() if not n.startswith("text_model.encoder.layers.1")}
    return {n: shrink(network, n, s) for n, s in kept.items() if "layers." not in n or "layers.0." in n}


def small_config(network: str) -> dict[str, object]:
    config = shipped_config(network)
    if network == "text_encoder":
        return {**config, "num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 640}
    table = UNET if network == "unet" else VAE
    return {**config, "block_out_channels": [table[width] for width in config["block_out_channels"]]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_models, "weight_shapes", small_shapes)
    monkeypatch.setattr(random_models, "shipped_config", small_config)


def test_full_size_is_stable_diffusion() -> None:
    counts = {network: sum(int(np.prod(s)) for s in shapes.values()) for network, shapes in FULL.items()}
    # The parameter counts of runwayml/stable-diffusion-v1-5 as its diffusers modules report them.
    assert counts == {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert len(random_models.lora_layers("unet")) == 192  # as in every LoRA of kohya-ss/sd-scripts
    assert len(random_models.lora_layers("text_encoder")) == 72


@pytest.mark.usefixtures("small")
def test_a_random_model_opens_as_a_checkpoint(tmp_path: Path) -> None:
    folder = random_models.write_random_model(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.family.name == "sd1"
        for network in NETWORKS:
            infos = checkpoint.tensors(network)
            assert {n: i.shape for n, i in infos.items()} == small_shapes(network)
            assert {i.dtype for i in infos.values()} == {"F16"}
            for name in infos:
                values = checkpoint.read(network, name)
                assert np.isfinite(values).all()
                assert values.std() > 0, f"{name} is constant, an engine could fold it away"
        norm = checkpoint.read("unet", "conv_norm_out.weight").astype(np.float32)
        assert norm.mean() == pytest.approx(1, abs=0.05)
        kernel = checkpoint.read("unet", "conv_in.weight").astype(np.float32)
        assert kernel.std() == pytest.approx((4 * 9) ** -0.5, rel=0.1)


@pytest.mark.usefixtures("small")
def test_transformers_and_safetensors_read_the_header(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    folder = random_models.write_random_model(tmp_path / "model")
    with safetensors.safe_open(folder / "text_encoder/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        name = next(iter(small_shapes("text_encoder")))
        assert tuple(file.get_tensor(name).shape) == small_shapes("text_encoder")[name]


@pytest.mark.usefixtures("small")
def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> bytes:
        folder = random_models.write_random_model(tmp_path / name, seed=seed)
        return (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()

    assert written("a", 1) == written("b", 1)
    assert written("c", 2) != written("d", 1)


@pytest.mark.usefixtures("small")
def test_a_random_lora_matches_every_layer(tmp_path: Path) -> None:
    path = random_models.random_lora(tmp_path / "lora.safetensors", rank=4)
    targets = {network: small_shapes(network) for network in NETWORKS}
    with plan_bake(targets, [AdapterRef(path, 1.0, 1.0)]) as plan:
        (report,) = plan.reports
        assert report.unmatched_keys == ()
        layers = {n: len(random_models.lora_layers(n)) for n in ("unet", "text_encoder")}
        assert dict(report.matched_modules) == layers
        name = "mid_block.attentions.0.proj_in.weight"
        before = np.zeros(targets["unet"][name], np.float32)
        assert np.isfinite(plan.bake("unet", name, before)).all()
        assert plan.bake("unet", name, before).any()


@pytest.mark.usefixtures("small")
def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StorageError, match="not empty"):
        random_models.write_random_model(tmp_path)
    assert random_models.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("small")
def test_a_file_in_another_order_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered: Callable[..., list[tuple[str, tuple[int, ...]]]] = random_models._in_file_order
    monkeypatch.setattr(random_models, "_in_file_order", lambda shapes: ordered(shapes)[::-1])
    with pytest.raises(StorageError, match="belongs"):
        random_models.write_random_model(tmp_path / "model")


def test_the_index_is_that_of_a_pipeline() -> None:
    folder = random_models.shipped_folder(random_models.FAMILIES["sd1"])
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"

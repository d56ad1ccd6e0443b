"""Two checkpoints to a LoRA: what it restores, against torch's SVD and the extraction of lycoris-lora."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from kiln.errors import AdapterError, CheckpointError, StorageError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.lora_tools.extract import ExtractSpec, extract
from kiln.exporters.lora_tools.factors import Budget


def is_norm(name):
    return "norm" in name


def perturbed(tiny, select=lambda network, name: True, rank=3, noise=0.0, seed=0):
    """The tiny model with a change of low rank, and noise, on the selected tensors."""
    rng = np.random.default_rng(seed)
    tuned = {network: dict(tensors) for network, tensors in tiny.tensors.items()}
    for network, tensors in tuned.items():
        for name, value in tensors.items():
            if value.dtype != np.float32 or not select(network, name):
                continue
            if value.ndim == 1:
                change = rng.normal(size=value.shape)
            else:
                flat = value.reshape(len(value), -1)
                change = (
                    rng.normal(size=(len(flat), rank)) @ rng.normal(size=(rank, flat.shape[1]))
                ).reshape(value.shape)
            change = change + noise * rng.normal(size=value.shape)
            tensors[name] = (value + 0.01 * change).astype(np.float32)
    return tuned


@pytest.fixture(scope="module")
def models(tiny, tiny_folder):
    """The base, and the same with a change of rank 3 and some noise on every tensor."""
    return tiny_folder(), tiny_folder(perturbed(tiny, noise=0.2))


def run(models, output, budget, conv=None, **options):
    base, tuned = models
    return extract(ExtractSpec(tuned, base, output, budget, conv, **options))


def energy_by_tensor(tiny, tuned, weights):
    """What is kept of each tensor's difference, and of all."""
    lost = total = 0.0
    found = {}
    for (network, name), value in weights.items():
        if value.dtype != np.float32:
            continue
        wanted = tuned[network][name].astype(np.float64) - tiny.tensors[network][name]
        rest = tuned[network][name].astype(np.float64) - value
        lost, total = lost + float((rest**2).sum()), total + float((wanted**2).sum())
        if (wanted**2).sum():
            found[f"{network}.{name}"] = 1 - float((rest**2).sum()) / float((wanted**2).sum())
    return found, 1 - lost / total


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("budget", "conv"),
    [
        (Budget(rank=4), None),
        (Budget(rank=4), Budget(rank=2)),
        (Budget(energy=0.95), Budget(energy=0.95)),
        (Budget(energy=0.7), Budget(rank=3)),
    ],
)
def test_baking_restores_the_energy_that_is_stated(tiny, models, baked, tmp_path, budget, conv, precision):
    report = run(models, tmp_path / "out.safetensors", budget, conv, precision=precision)
    tuned = perturbed(tiny, noise=0.2)
    found, total = energy_by_tensor(tiny, tuned, baked(tiny, AdapterRef(report.output)))
    assert report.energy == pytest.approx(total, abs=1e-5)
    for one in report.modules:
        assert found[f"{one.network}.{one.module}.weight"] == pytest.approx(one.energy, abs=1e-4)
        wanted = conv if ".conv" in one.module and "shortcut" not in one.module else budget
        if wanted.energy:
            assert one.energy >= wanted.energy - 1e-4
        else:
            assert one.rank <= wanted.rank
    assert set(report.left_out) == {"norms", "biases", "embeddings"} | (
        {"convolutions"} if conv is None else set()
    )
    kept = report.energy * 1
    assert kept <= 1 - report.left_out_energy + 1e-9


def test_everything_together_is_the_tuned_model(tiny, tiny_folder, baked, worst, tmp_path):
    """Of a change of rank 3 nothing is lost: with norms and biases it is the tuned model itself."""
    tuned = perturbed(tiny, lambda network, name: "embedding." not in name or "time_embedding" in name)
    models = tiny_folder(), tiny_folder(tuned)
    options = {"precision": "fp32", "differences": True}
    report = run(models, tmp_path / "out.safetensors", Budget(rank=4), Budget(rank=4), **options)
    assert report.left_out == {}
    assert report.energy == pytest.approx(1, abs=1e-6)
    actual = baked(tiny, AdapterRef(report.output))
    expected = {(n, k): v for n, tensors in tuned.items() for k, v in tensors.items()}
    expected = {k: v for k, v in expected.items() if v.dtype == np.float32}
    assert worst({k: actual[k] for k in expected}, expected) < 2e-6
    other = baked(tiny, AdapterRef(report.output, 1.01))
    assert worst({k: other[k] for k in expected}, expected) > 2e-5, "another strength is not seen"


def test_the_factors_are_those_of_lycoris(tiny, models, tmp_path):
    import torch
    from lycoris.utils import extract_conv, extract_linear

    run(models, tmp_path / "out.safetensors", Budget(rank=4), Budget(rank=4), precision="fp32")
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    tuned = perturbed(tiny, noise=0.2)
    for path in (
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.resnets.2.conv1",
    ):
        name = f"{path}.weight"
        change = torch.from_numpy(tuned["unet"][name] - tiny.tensors["unet"][name])
        theirs = (extract_conv if change.ndim == 4 else extract_linear)(change, "fixed", 4)
        down, up = theirs[0][0], theirs[0][1]
        stem = f"lora_unet_{path.replace('.', '_')}"
        mine = [torch.from_numpy(found[f"{stem}.lora_{part}.weight"]) for part in ("down", "up")]
        assert [m.shape for m in mine] == [down.shape, up.shape]
        product, expected = mine[1].flatten(1) @ mine[0].flatten(1), up.flatten(1) @ down.flatten(1)
        assert float(torch.linalg.norm(product - expected) / torch.linalg.norm(expected)) < 1e-4
        assert float(torch.linalg.norm(1.01 * product - expected) / torch.linalg.norm(expected)) > 5e-3


def test_diffusers_opens_it(tiny, models, baked, fused, worst, limit, tmp_path):
    report = run(models, tmp_path / "out.safetensors", Budget(rank=4), Budget(rank=2))

    def opened(path):
        pipeline = tiny.pipeline()
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora()
        return fused(pipeline)

    expected = baked(tiny, AdapterRef(report.output))
    assert limit.holds(worst(opened(report.output), expected))
    tensors = safetensors.numpy.load_file(report.output)
    wrong = {k: v[::-1].copy() if "lora_up" in k else v for k, v in tensors.items()}
    safetensors.numpy.save_file(wrong, tmp_path / "wrong.safetensors")
    assert not limit.holds(worst(opened(tmp_path / "wrong.safetensors"), expected)), "swapped rows"


def test_a_wrong_base_is_seen(tiny, tiny_folder, models, baked, tmp_path):
    other = tiny_folder(perturbed(tiny, seed=5))
    report = run((other, models[1]), tmp_path / "out.safetensors", Budget(rank=4))
    _, total = energy_by_tensor(tiny, perturbed(tiny, noise=0.2), baked(tiny, AdapterRef(report.output)))
    assert abs(report.energy - total) > 0.05


def test_only_what_differs_is_stored(tiny, tiny_folder, tmp_path):
    tuned = perturbed(tiny, lambda network, name: name.endswith("attn2.to_k.weight"))
    models = tiny_folder(), tiny_folder(tuned)
    report = run(models, tmp_path / "out.safetensors", Budget(rank=4))
    assert {one.module.rsplit(".", 1)[-1] for one in report.modules} == {"to_k"}
    assert len(report.modules) == 16
    assert report.identical == sum(len(t) for t in tiny.tensors.values()) - 16
    assert report.vae_differs is None
    with safe_open(report.output, "numpy") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata["kiln_recipe"])["budget"] == {"rank": 4}
    assert str(report.output.parent) not in json.dumps(metadata)


def test_what_cannot_be_extracted_is_refused(tiny, tiny_folder, models, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match="the same UNet and text encoder"):
        run((models[0], models[0]), out, Budget(rank=4))
    only_conv = tiny_folder(perturbed(tiny, lambda network, name: name.endswith("conv1.weight")))
    with pytest.raises(AdapterError, match=r"differ only in \d+ convolutions.*--conv-rank"):
        run((models[0], only_conv), out, Budget(rank=4))
    broken = {network: dict(tensors) for network, tensors in tiny.tensors.items()}
    broken["unet"]["conv_in.weight"] = broken["unet"]["conv_in.weight"] * np.nan
    with pytest.raises(CheckpointError, match=r"'conv_in.weight' differs by NaN"):
        run((models[0], tiny_folder(broken)), out, Budget(rank=4))
    del broken["text_encoder"]["text_model.final_layer_norm.bias"]
    with pytest.raises(CheckpointError, match=r"text_encoder lacks 1 tensors.*final_layer_norm.bias"):
        run((models[0], tiny_folder(broken)), out, Budget(rank=4))
    with pytest.raises(UsageError, match="'fp8'"):
        run(models, out, Budget(rank=4), precision="fp8")
    out.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        run(models, out, Budget(rank=4))
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]

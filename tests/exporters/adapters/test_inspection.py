"""What is said of an adapter without its base model."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.adapters.inspection import inspect_adapter


def of_unet(network, module):
    return network == "unet" and ".attn" in module


@pytest.mark.parametrize(
    ("dialect", "alphas"),
    [
        ("kohya", {2.0: 128}),
        ("kohya, LDM names", {2.0: 128}),
        ("diffusers", {}),
        ("diffusers, peft suffixes", {}),
        ("diffusers attention processors", {}),
    ],
)
def test_the_dialect_ranks_and_alphas(make_lora, spell, save, dialect, alphas):
    path = save(spell(dialect, make_lora(of_unet)), metadata={"ss_network_dim": "4"})
    found = inspect_adapter(path)
    assert found.kind == "adapter"
    assert found.formats == {"LoRA": 128}
    assert found.dialects == {dialect: 128}
    assert found.modules == {"unet": 128}
    assert found.ranks == {4: 128}
    assert found.alphas == alphas
    assert found.dtypes == {"F32": 256 + sum(alphas.values())}
    assert found.family is None
    assert "24 features" in found.family_reason
    assert found.metadata == {"ss_network_dim": "4"}
    assert found.size_bytes == path.stat().st_size


def test_another_kind_is_named(save):
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    found = inspect_adapter(save({key: np.zeros((4, 9), np.float32)}))
    assert found.kind == "a FLUX LoRA"
    assert found.family is None
    assert key in found.family_reason


@pytest.mark.parametrize(
    ("name", "formats", "dialect", "ranks"),
    [
        ("sd-pokemon-model-lora_pytorch_lora_weights.safetensors", {"LoRA": 128}, "diffusers", {4: 128}),
        ("attn_procs_sd1.safetensors", {"LoRA": 128}, "diffusers attention processors", {4: 128}),
        ("analog_svd_rank4.safetensors", {"LoRA": 192}, "cloneofsimo", {4: 192}),
        ("smart_falcon_16_lokr.safetensors", {"LoKr": 350}, "kohya", {16: 350}),
        ("peft_sd15_text_encoder", {"LoRA": 24}, "peft", {8: 24}),
    ],
)
def test_real_files(shared, name, formats, dialect, ranks):
    found = inspect_adapter(shared / "adapters" / name)
    assert (found.kind, found.family) == ("adapter", "sd1")
    assert found.formats == formats
    assert set(found.dialects) == {dialect}
    assert found.ranks == ranks


def test_a_parameter_under_two_names_is_refused(save):
    tensors = {f"unet.x.lora_{name}.weight": np.zeros((2, 2), np.float32) for name in ("A", "down")}
    with pytest.raises(AdapterError, match="name the same parameter"):
        inspect_adapter(save(tensors))

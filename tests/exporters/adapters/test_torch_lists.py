"""The flat lists of matrices that cloneofsimo/lora saved with torch: [up 0, down 0, up 1, down 1, ...]."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.open import open_adapter
from kiln.exporters.adapters.plan import plan_bake

torch = pytest.importorskip("torch")


def saved(path, content):
    torch.save(content, path)
    return path


def attention(network, module):
    return ".attn" in module or ".self_attn." in module


UNET_NAMES, CLIP_NAMES = ("to_q", "to_k", "to_v", "to_out.0"), ("k_proj", "v_proj", "q_proj", "out_proj")
GROUPS = ("down_blocks", "up_blocks", "mid_block")


def place(factors):
    """Where its trainer met a layer: down blocks, up blocks, the middle; in CLIP k, v, q, out."""
    names = UNET_NAMES if factors.network == "unet" else CLIP_NAMES
    name = next(name for name in names if factors.module.endswith(f".{name}"))
    block = factors.module.removesuffix(f".{name}")
    group = GROUPS.index(block.split(".")[0]) if factors.network == "unet" else 0
    return group, block, names.index(name)


def in_order(factors, network):
    return sorted((f for f in factors if f.network == network), key=place)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_list_is_applied_in_the_order_of_its_layers(
    tiny, make_lora, spell, save, tmp_path, network, legacy
):
    factors = in_order(make_lora(attention, alpha=None), network)
    pairs = [torch.from_numpy(matrix.copy()) for f in factors for matrix in (f.up, f.down)]
    path = tmp_path / "list.pt"
    torch.save(pairs, path, _use_new_zipfile_serialization=not legacy)
    other = save(spell("diffusers, peft suffixes", factors))
    with (
        plan_bake(tiny.shapes, [AdapterRef(path)]) as plan,
        plan_bake(tiny.shapes, [AdapterRef(other)]) as same,
    ):
        assert plan.reports[0].matched_modules == {network: len(factors)}
        assert plan.reports[0].unmatched_keys == ()
        for factor in factors:
            name, weight = f"{factor.module}.weight", tiny.tensors[network][f"{factor.module}.weight"]
            np.testing.assert_array_equal(plan.bake(network, name, weight), same.bake(network, name, weight))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is a list, but not one of pairs"),
        ([torch.ones(4, 2)], "is a list, but not one of pairs"),
        ([torch.ones(4, 2), "text"], "is a list, but not one of pairs"),
        ([torch.ones(4), torch.ones(4)], "is a list, but not one of pairs"),
        ({}, "holds no tensors"),
        ({"step": 3}, "holds no tensors"),
        (torch.ones(3), "holds no tensors"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(tmp_path, content, message):
    with pytest.raises(AdapterError, match=message):
        open_adapter(saved(tmp_path / "other.pt", content))


def test_a_list_of_another_number_of_layers_matches_nothing(tiny, tmp_path):
    path = saved(
        tmp_path / "short.pt", [torch.ones(16, 2), torch.ones(2, 16), torch.ones(32, 2), torch.ones(2, 32)]
    )
    with pytest.raises(AdapterError, match="none of its 4 tensors matches"):
        plan_bake(tiny.shapes, [AdapterRef(path)])

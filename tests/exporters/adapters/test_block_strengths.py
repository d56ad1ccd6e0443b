"""Block strengths: the lists, the presets, which tensor lies in which block, and what is baked with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kiln.errors import AdapterError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.block_strengths import (
    BLOCKS,
    LISTS,
    PRESETS,
    BlockStrengths,
    read_presets,
    unet_blocks,
)
from kiln.exporters.adapters.plan import plan_bake


def unet_names(family: str) -> list[str]:
    """Tensor names of diffusers' own UNet of a family, small but of the full topology."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 32),
        "transformer_layers_per_block": (1, 2, 10),
    }
    settings = sdxl if family == "sdxl" else {"block_out_channels": (32, 32, 32, 32)}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=16, attention_head_dim=8, **settings)
    return list(unet.state_dict())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("conv_in.weight", "IN00"),
        ("down_blocks.0.resnets.0.conv1.weight", "IN01"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight", "IN02"),
        ("down_blocks.0.downsamplers.0.conv.weight", "IN03"),
        ("down_blocks.2.attentions.1.proj_in.weight", "IN08"),
        ("down_blocks.3.resnets.1.conv2.bias", "IN11"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", "M00"),
        ("mid_block.resnets.1.norm1.weight", "M00"),
        ("up_blocks.0.resnets.2.conv_shortcut.weight", "OUT02"),
        ("up_blocks.0.upsamplers.0.conv.weight", "OUT02"),
        ("up_blocks.1.attentions.0.proj_out.weight", "OUT03"),
        ("up_blocks.1.upsamplers.0.conv.weight", "OUT05"),
        ("up_blocks.3.attentions.2.norm.weight", "OUT11"),
        ("time_embedding.linear_1.weight", None),
        ("conv_out.weight", None),
        ("conv_norm_out.bias", None),
    ],
)
def test_blocks_of_sd1_are_those_of_the_extension(name: str, block: str | None) -> None:
    names = unet_names("sd1")
    assert name in names
    assert unet_blocks(names).get(name) == block


def test_the_lists_name_the_blocks_that_a_lora_has() -> None:
    """17 and 12 are the blocks with attention; 26 and 20 are all blocks."""
    for family, few, all_blocks in (("sd1", 17, 26), ("sdxl", 12, 20)):
        blocks = unet_blocks(unet_names(family))
        attending = {block for name, block in blocks.items() if ".attentions." in name}
        assert {"BASE", *attending} == set(LISTS[few]), family
        assert {"BASE", *blocks.values()} == set(LISTS[all_blocks]), family
    assert [len(names) for names in LISTS.values()] == list(LISTS)


def test_a_unet_with_more_blocks_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"IN13.*OUT11"):
        unet_blocks([f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in (0, 4) for j in (0, 1)])


def test_lists_and_presets() -> None:
    for name, text in PRESETS.items():
        found, typed = BlockStrengths.parse(name), BlockStrengths.parse(text)
        assert found.factors == typed.factors
        assert (found.typed, found.listed) == (name, LISTS[17])
    ins = BlockStrengths.parse(" INS ").by_name()
    assert [block for block, factor in ins.items() if factor] == ["BASE", "IN01", "IN02", "IN04"]
    own = BlockStrengths.parse(",".join(str(i / 10) for i in range(12))).by_name()
    assert (own["BASE"], own["IN04"], own["M00"], own["OUT05"], own["OUT06"]) == (0, 0.1, 0.5, 1.1, 0)
    whole = BlockStrengths.parse(",".join(map(str, range(26))))
    assert whole.factors == tuple(range(26))
    assert whole.factor(None) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,1,1", "3 block strengths; expected 12 .* 17 .* 20 .* 26"),
        (",".join("1" * 18), "18 block strengths"),
        ("INNS", "no preset 'INNS'.*NONE, ALL, INS.*12, 17, 20, 26 numbers"),
        ("", "no preset ''"),
        (",".join(["1"] * 16 + ["nan"]), "'nan'.*not a finite number"),
        (",".join(["1"] * 16 + [""]), "''.*not a finite number"),
        (",".join(["1"] * 16 + ["R"]), "'R': random"),
        (",".join(["1"] * 16 + ["X+0.1"]), "random and inherited"),
        ("12", "no preset '12'"),
    ],
)
def test_what_is_no_list_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        BlockStrengths.parse(text)


def test_a_file_of_presets(tmp_path: Path) -> None:
    path = tmp_path / "lbwpresets.txt"
    path.write_text(
        "\ufeff# mine\nFACE: 1,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0,0\n\nALL:" + ",".join("2" * 26) + "\n"
    )
    presets = read_presets(path)
    assert BlockStrengths.parse("FACE", presets).factor("M00") == 1
    assert BlockStrengths.parse("ALL", presets).factor("IN00") == 2
    assert BlockStrengths.parse("INS", presets) == BlockStrengths.parse("INS")
    path.write_text("FACE:1,0\n")
    with pytest.raises(UsageError, match="2 block strengths in the preset 'FACE'"):
        BlockStrengths.parse("FACE", read_presets(path))
    path.write_text("ALL:1\nFACE\n")
    with pytest.raises(UsageError, match=r"line 2 is 'FACE'; expected NAME:1,0,0"):
        read_presets(path)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UsageError, match="cannot be read"):
        read_presets(path)
    with pytest.raises(UsageError, match="No such file"):
        read_presets(tmp_path / "none.txt")


LAYERS = {
    "BASE": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
    "IN00": ("unet", "conv_in"),
    "IN01": ("unet", "down_blocks.0.resnets.0.conv1"),
    "M00": ("unet", "mid_block.resnets.0.conv1"),
    "OUT11": ("unet", "up_blocks.3.resnets.2.conv1"),
    None: ("unet", "time_embedding.linear_1"),
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA whose change is all ones, on one layer of each of some blocks."""
    tensors = {}
    for network, path in LAYERS.values():
        stem = f"lora_{'te' if network == 'text_encoder' else 'unet'}_{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = np.ones((1, 4), np.float32)
        tensors[f"{stem}.lora_up.weight"] = np.ones((4, 1), np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def baked(ref: AdapterRef) -> dict[str | None, float]:
    """The change of each layer's weight."""
    targets: dict[str, dict[str, tuple[int, ...]]] = {"unet": {}, "text_encoder": {}}
    targets["unet"]["down_blocks.0.resnets.1.conv1.weight"] = (4, 4)  # two layers per block, as in SD1
    for network, path in LAYERS.values():
        targets[network][f"{path}.weight"] = (4, 4)
    with plan_bake(targets, [ref]) as plan:
        return {
            block: float(plan.bake(network, f"{path}.weight", np.zeros((4, 4), np.float32)).mean())
            for block, (network, path) in LAYERS.items()
        }


def test_the_strength_is_multiplied_block_by_block(lora: Path) -> None:
    factors = dict.fromkeys(BLOCKS, 0.0) | {"BASE": 0.5, "IN00": 2, "M00": -1, "OUT11": 0.25}
    blocks = BlockStrengths.parse(",".join(map(str, factors.values())))
    expected = {"BASE": 0.2, "IN00": 1.6, "IN01": 0, "M00": -0.8, "OUT11": 0.2, None: 0.8}
    found = baked(AdapterRef(lora, 0.8, 0.4, blocks=blocks))
    assert found == pytest.approx(expected)
    shifted = BlockStrengths.parse(",".join(map(str, [*[*factors.values()][1:], 0])))
    assert baked(AdapterRef(lora, 0.8, 0.4, blocks=shifted)) != pytest.approx(expected)


def test_a_tensor_at_strength_zero_is_not_touched(lora: Path) -> None:
    path = LAYERS["IN01"][1]
    targets = {"unet": {f"{path}.weight": (4, 4)}}
    with plan_bake(targets, [AdapterRef(lora, blocks=BlockStrengths.parse("OUTALL"))]) as plan:
        assert not plan.is_touched("unet", f"{path}.weight")
    with plan_bake(targets, [AdapterRef(lora, 0.0, blocks=BlockStrengths.parse("ALL"))]) as plan:
        assert not plan.is_touched("unet", f"{path}.weight")


def test_blocks_that_a_short_list_does_not_name_are_said(lora: Path) -> None:
    targets = {"unet": {f"{path}.weight": (4, 4) for network, path in LAYERS.values() if network == "unet"}}
    with plan_bake(targets, [AdapterRef(lora, blocks=BlockStrengths.parse("ALL"))]) as plan:
        (warning,) = plan.reports[0].warnings
        assert re.search("17 block strengths say nothing of IN00, so 1 changes", warning)
    with plan_bake(targets, [AdapterRef(lora, blocks=BlockStrengths.parse(",".join("1" * 26)))]) as plan:
        assert plan.reports[0].warnings == ()

"""What a dialect cannot say is named, and no output takes the place of another."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from kiln.errors import AdapterError, StorageError, UsageError
from kiln.exporters.lora_tools.convert import ConvertSpec, convert

DOWN, UP = np.zeros((2, 8), np.float32), np.zeros((8, 2), np.float32)
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PLAIN = {f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP}
OTHER = STEM.replace("attn1", "attn2")


def convert_to(path, output, to, **options):
    return convert(ConvertSpec(path, output, to, **options))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{OTHER}.hada_w{n}_{side}": value for n in "12" for side, value in (("a", UP), ("b", DOWN))},
         ["attn2.to_q (LoHa)", "only LoRA"]),
        ({f"{OTHER}.diff": np.zeros((8, 8), np.float32)}, ["attn2.to_q (full difference)"]),
        ({f"{STEM}.diff_b": np.zeros(8, np.float32)}, ["attn1.to_q", "diff_b"]),
        ({f"{STEM}.dora_scale": np.ones((1, 8), np.float32)}, ["attn1.to_q", "for each input"]),
        ({f"{OTHER}.lora_down.weight": DOWN, f"{OTHER}.lora_up.weight": UP,
          f"{STEM}.dora_scale": np.ones((8, 1), np.float32)},
         ["attn2.to_q", "no DoRA while others are"]),
        ({"bundle_emb.x.string_to_param.*": np.zeros((1, 8), np.float32)}, ["bundle_emb.x", "to no layer"]),
        ({"lora_unet_middle_nowhere.lora_down.weight": DOWN, "lora_unet_middle_nowhere.lora_up.weight": UP},
         ["middle_nowhere", "--model"]),
        ({f"{OTHER}.lora_down.weight": DOWN}, ["attn2", "lora_up"]),
        ({f"{OTHER}.lora_up.weight": UP}, ["attn2", "lora_down"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_a_dialect_cannot_say_is_named(save, tmp_path, more, says, to):
    path = save(PLAIN | more)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    with pytest.raises(AdapterError) as refused:
        convert_to(path, out, to)
    assert [text for text in says if text not in str(refused.value)] == []
    assert not out.exists()


def test_outputs_are_not_replaced_and_named_rightly(save, tmp_path):
    path = save(PLAIN)
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(StorageError, match=r"exists.*--overwrite"):
        convert_to(path, out, "diffusers")
    assert out.read_text() == "mine"
    convert_to(path, out, "diffusers", overwrite=True)
    assert len(safetensors.numpy.load_file(out)) == 2
    with pytest.raises(UsageError, match=r"'gguf'.*kohya, diffusers, peft, safetensors"):
        convert_to(path, out, "gguf")
    with pytest.raises(UsageError, match="a folder"):
        convert_to(path, out, "peft")
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        convert_to(path, tmp_path / "out.pt", "kohya")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not a folder that Kiln wrote"):
        convert_to(path, tmp_path / "mine", "peft", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "mine", "out.safetensors"]

"""What is said of an adapter: its layers, its training, and what a model would take of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.errors import AdapterError, UsageError
from kiln.exporters.lora_tools.describe import describe
from kiln.exporters.lora_tools.training import printable, read_training

FEW = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def test_layers_by_kind_in_either_spelling(make_lora, spell, save):
    factors = make_lora(lambda network, module: True, rank=3, alpha=1.5)
    counts = []
    for dialect in ("kohya", "kohya, LDM names"):
        (found,) = describe(save(spell(dialect, factors)))
        assert found.scales == {0.5: len(factors)}
        assert found.inspection.ranks == {3: len(factors)}
        assert sum(found.kinds.values()) == len(factors)
        counts.append(dict(found.kinds))
    assert counts[0]["self-attention"] == counts[1]["self-attention"] == 64
    assert counts[0]["cross-attention"] == counts[1]["cross-attention"] == 64
    assert counts[0]["feed-forward"] == 32
    assert counts[0]["projections into attention"] == 32
    assert counts[0]["up and down sampling"] == 6
    assert counts[0]["text encoder attention"] == 8
    assert counts[0]["text encoder feed-forward"] == 4
    assert counts[0] == counts[1]


def test_a_model_takes_what_it_has(tiny, tiny_folder, make_lora, spell, save):
    tensors = spell("kohya", make_lora(lambda network, module: ".attn1.to_q" in module))
    stray = {"lora_unet_down_blocks_9_nothing.lora_down.weight": np.zeros((1, 4), np.float32),
             "lora_unet_down_blocks_9_nothing.lora_up.weight": np.zeros((4, 1), np.float32)}  # fmt: skip
    (found,) = describe(save(tensors | stray), str(tiny_folder()))
    assert found.fit is not None
    assert found.fit.refused is None
    assert found.fit.applied == {"unet": 16}
    assert found.fit.applied_keys == len(tensors)
    assert found.fit.reasons == dict.fromkeys(stray, "the model has no such layer")
    wrong = {key: np.concatenate([v, v], axis=-1) if "lora_down" in key else v for key, v in tensors.items()}
    (found,) = describe(save(wrong), str(tiny_folder()))
    assert found.fit is not None
    assert "does not fit" in str(found.fit.refused)
    assert found.fit.applied == {}


def test_the_training_of_kohya_is_read():
    tags = {"10_cat": {"cat": 5, "grass": 2}, "2_dog": {"dog": 3, "grass": 4}}
    found = read_training({
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 5}, "1_more": {}}),
        "modelspec.trigger_phrase": "sks cat,  in the grass",
        "ss_num_train_images": "8",
        "ss_learning_rate": "0.0001",
        "ss_vae_name": "None",
    })  # fmt: skip
    assert found.trigger_words == ("sks cat", "in the grass")
    assert found.concepts == ("10_cat", "2_dog", "1_more")
    assert list(found.tags.items()) == [("grass", 6), ("cat", 5), ("dog", 3)]
    assert found.tag_count == 3
    assert found.facts == {"images": "8", "learning_rate": "0.0001"}
    assert found.unreadable == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FEW
@given(
    value=JSON | st.text(),
    field=st.sampled_from(["ss_tag_frequency", "ss_dataset_dirs", "modelspec.trigger_phrase"]),
)
def test_no_metadata_is_an_error_or_moves_the_cursor(value, field):
    text = value if isinstance(value, str) else json.dumps(value)
    found = read_training({field: text, "ss_training_comment": text})
    shown = [*found.trigger_words, *found.concepts, *found.tags, *found.facts.values()]
    assert all(part.isprintable() for part in shown)
    if field != "modelspec.trigger_phrase" and not isinstance(value, (dict, str)) and text != "null":
        assert found.unreadable == (field,)


def test_a_deep_or_huge_field_is_named():
    assert read_training({"ss_tag_frequency": "[" * 200_000}).unreadable == ("ss_tag_frequency",)
    assert read_training({"ss_tag_frequency": '{"a": 3}'}).unreadable == ("ss_tag_frequency",)
    assert printable("\x1b[31mred\x07\n" * 2) == "[31mred [31mred"
    assert printable("x" * 400) == "x" * 300 + "..."


def test_a_folder_of_peft_folders_gives_one_for_each_network(make_lora, spell, save, tmp_path):
    from kiln.exporters.lora_tools.convert import ConvertSpec, convert

    path = save(spell("kohya", make_lora(lambda n, m: m.endswith(("to_q", "q_proj")))))
    convert(ConvertSpec(path, tmp_path / "peft", "peft"))
    found = describe(tmp_path / "peft")
    assert [one.inspection.dialects for one in found] == [{"peft": 32}, {"peft": 2}]


def test_what_is_not_there_or_no_adapter(tmp_path):
    with pytest.raises(UsageError, match="no file or folder"):
        describe(tmp_path / "nothing.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(AdapterError, match="is empty"):
        describe(tmp_path / "empty.safetensors")
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    safetensors.numpy.save_file({key: np.zeros((4, 9))}, tmp_path / "flux.safetensors")
    (found,) = describe(tmp_path / "flux.safetensors")
    assert found.as_dict()["kind"] == "a FLUX LoRA"

"""Which embeddings fit a model, what their rows are called, and the files of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kiln.errors import AdapterError, CheckpointError
from kiln.exporters.embeddings.base import Embedding
from kiln.exporters.embeddings.plan import plan_tokens, tables_of
from kiln.exporters.embeddings.tokenizers import known_tokens, ordinary_tokens, with_tokens

SD1 = {"text_encoder": (49408, 768)}
SD2 = {"text_encoder": (49408, 1024)}
SDXL = {"text_encoder": (49408, 768), "text_encoder_2": (49408, 1280)}


def embedding(token: str, count: int = 1, seed: int = 0, **widths: int) -> Embedding:
    rng = np.random.default_rng(seed)
    widths = widths or {"text_encoder": 768}
    vectors = {n: rng.normal(size=(count, width)).astype(np.float32) for n, width in widths.items()}
    return Embedding(token, vectors, f"{token}.pt", "00")


def test_rows_follow_the_table() -> None:
    plan = plan_tokens([embedding("a", 3), embedding("<b>", seed=1)], SD1, {})
    assert plan.rows == 4
    assert plan.added == {"a": 49408, "a_1": 49409, "a_2": 49410, "<b>": 49411}
    assert plan.vectors("text_encoder").shape == (4, 768)
    both = plan_tokens([embedding("a", 2, text_encoder=768, text_encoder_2=1280)], SDXL, {})
    assert [both.vectors(network).shape for network in SDXL] == [(2, 768), (2, 1280)]
    assert plan_tokens([], SD1, {}).rows == 0


def test_the_same_twice_is_once() -> None:
    assert plan_tokens([embedding("a"), embedding("a")], SD1, {}).rows == 1
    with pytest.raises(AdapterError, match="'a' is a token already"):
        plan_tokens([embedding("a"), embedding("a", seed=1)], SD1, {})


@pytest.mark.parametrize(
    ("widths", "tables", "says"),
    [
        (
            {"text_encoder": 1024},
            SD1,
            "is for SD2: its vectors are 1024 wide; this model is SD1, .* reads 768",
        ),
        ({"text_encoder": 768}, SD2, "is for SD1: .*this model is SD2"),
        ({"text_encoder": 768, "text_encoder_2": 1280}, SD1, "is for SDXL: .*768 and 1280 wide"),
        ({"text_encoder": 768}, SDXL, "is for SD1: .*this model is SDXL.* reads 768 and 1280"),
        ({"text_encoder_2": 1280}, SDXL, "SDXL's second text encoder"),
        ({"text_encoder": 320}, SD1, r"no family that Kiln knows \(320 wide\)"),
    ],
)
def test_another_family_is_refused(
    widths: dict[str, int], tables: dict[str, tuple[int, int]], says: str
) -> None:
    with pytest.raises(AdapterError, match=says):
        plan_tokens([embedding("toy", **widths)], tables, {})


def test_names_that_are_taken_are_refused() -> None:
    with pytest.raises(AdapterError, match="'<Toy>' is a token already; give one of them another"):
        plan_tokens([embedding("<toy>")], SD1, {"<Toy>": 49408})
    with pytest.raises(AdapterError, match="'a_1' is a token already"):
        plan_tokens([embedding("a", 3), embedding("a_1", seed=1)], SD1, {})
    with pytest.raises(AdapterError, match=r"'a_1'.*further vector of 'a'"):
        plan_tokens([embedding("a"), embedding("a_1", seed=1)], SD1, {})
    with pytest.raises(AdapterError, match=r"20001 vectors; expected at most"):
        plan_tokens([embedding("a", 20_001)], SD1, {})


def test_a_model_without_a_text_encoder() -> None:
    assert tables_of({"unet": {"conv_in.weight": (1, 2, 3, 3)}}) == {}
    with pytest.raises(AdapterError, match="no text encoder"):
        plan_tokens([embedding("a")], {}, {})


@pytest.mark.parametrize("kind", ["listed", "beside"])
def test_tokenizer_files_are_read_by_transformers(tmp_path: Path, kind: str) -> None:
    """Of the two ways to store added tokens, that which the tokenizer has."""
    transformers = pytest.importorskip("transformers")
    from kiln.exporters.families import FAMILIES
    from kiln.exporters.parts import shipped_folder

    source = shipped_folder(FAMILIES["sd1"]) / "tokenizer"
    transformers.CLIPTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    if kind == "beside":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / name).write_bytes((source / name).read_bytes())
    tokens = {"<toy>": 49408, "<toy>_1": 49409, "Easy Toy": 49410}
    before = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    changed = with_tokens(files, tokens)
    assert list(changed) == [{"listed": "tokenizer_config.json", "beside": "added_tokens.json"}[kind]]
    for name, data in changed.items():
        (tmp_path / name).write_bytes(data)
    after = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert {
        t: i for t, i in after.added_tokens_encoder.items() if t not in before.added_tokens_encoder
    } == tokens
    assert after("a <toy>, Easy Toy").input_ids == [49406, 320, 49408, 267, 49410, 49407]
    assert after("an apple").input_ids == before("an apple").input_ids
    assert (after.pad_token, after.eos_token) == (before.pad_token, before.eos_token)
    assert ordinary_tokens(tmp_path) == {"<toy>": (49408, 49409), "Easy Toy": (49410,)}
    assert known_tokens(tmp_path).items() >= tokens.items()


def test_a_broken_tokenizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="holds a list"):
        known_tokens(tmp_path)
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        known_tokens(tmp_path)

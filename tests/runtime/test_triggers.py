"""Where a prompt names a token of textual inversion, and what then stands there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kiln.exporters.families import FAMILIES
from kiln.exporters.parts import shipped_folder
from kiln.runtime.tokenizer import ClipTokenizer, names_in

FOLDER = shipped_folder(FAMILIES["sd1"]) / "tokenizer"
EMBEDDINGS = {
    "easynegative": (50000, 50001),
    "easynegativeV2": (50002, 50003, 50004),
    "<toy>": (50005,),
    "by bad-artist": (50006,),
    "bad_prompt_2": (50007, 50008),
    "style1": (50009,),
    "画风": (50010,),
    "[v]": (50011,),
}


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.open(FOLDER, EMBEDDINGS)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("easynegative", ["easynegative"]),
        ("EasyNegative, ugly", ["easynegative"]),
        ("(EASYNEGATIVE:1.2)", ["easynegative"]),
        ("easynegativeV2 easynegative", ["easynegativeV2", "easynegative"]),
        ("easynegatives", []),
        ("uneasynegative", []),
        ("easynegative-v2", ["easynegative"]),
        ("easynegative2", ["easynegative"]),
        ("a <toy>, and <TOY>.", ["<toy>"]),
        ("x<toy>y", ["<toy>"]),
        ("<toys>", []),
        ("by  bad-artist", ["by bad-artist"]),
        ("by\nbad-artist", ["by bad-artist"]),
        ("bybad-artist", []),
        ("bad_prompt_2", ["bad_prompt_2"]),
        ("bad_prompt_23", []),
        ("bad_prompt_2.", ["bad_prompt_2"]),
        ("style1 style12 style 1", ["style1"]),
        ("a 画风 b画风c", ["画风"]),
        ("a [V] dog", ["[v]"]),
        ("an apple", []),
        ("", []),
    ],
)
def test_names_are_words(tokenizer: ClipTokenizer, prompt: str, names: list[str]) -> None:
    assert list(tokenizer.embeddings_in(prompt)) == names
    ids = tokenizer.tokenize(prompt)
    assert {i for i in ids if i >= 50000} == {number for name in names for number in EMBEDDINGS[name]}
    assert all(names_in(prompt, name) for name in names)


def test_what_stands_around_a_name_is_what_it_was(tokenizer: ClipTokenizer) -> None:
    plain = ClipTokenizer.open(FOLDER)
    for prompt in ("red apple, it's 20 😀", "<|endoftext|> x <|startoftext|>", "ßÅ ﬁ"):
        assert tokenizer.tokenize(prompt) == plain.tokenize(prompt)
    a, b = plain.tokenize("a red"), plain.tokenize(", apple")
    assert tokenizer.tokenize("a red easynegative, apple") == [*a, 50000, 50001, *b]


def test_all_vectors_are_repeated_and_cut_at_the_end(tokenizer: ClipTokenizer) -> None:
    encoded = tokenizer.encode(["word " * 73 + "easynegativeV2 apple"])
    assert encoded.input_ids.shape == (1, 77)
    np.testing.assert_array_equal(encoded.input_ids[0, 74:], [50002, 50003, 49407])
    assert "apple" in encoded.truncated[0]


def test_words_that_are_in_the_vocabulary_may_be_names() -> None:
    """A file called castle.pt: the word then means its vectors, and a longer word does not."""
    tokenizer = ClipTokenizer.open(FOLDER, {"castle": (50000,)})
    assert tokenizer.tokenize("castle castles") == [50000, *ClipTokenizer.open(FOLDER).tokenize("castles")]


def test_added_tokens_of_an_embedding_are_no_longer_literal(tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(FOLDER, tmp_path / "t")
    (tmp_path / "t/added_tokens.json").write_text(json.dumps({"flora": 49408, "flora_1": 49409}))
    literal = ClipTokenizer.open(tmp_path / "t")
    ours = ClipTokenizer.open(tmp_path / "t", {"flora": (49408, 49409)})
    assert literal.tokenize("floral")[0] == 49408
    assert ours.tokenize("floral") == ClipTokenizer.open(FOLDER).tokenize("floral")
    assert ours.tokenize("flora") == [49408, 49409]
    assert ours.decode([49408, 49409]) == "flora flora_1"

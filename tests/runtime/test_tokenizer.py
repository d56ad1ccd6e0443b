"""Ids against transformers' CLIPTokenizer, on the tokenizers of SD1 and of the bundled model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln.errors import BundleError, UsageError
from kiln.runtime.tokenizer import ClipTokenizer

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FOLDERS = {"sd1": DATA / "tokenizer", "emoji": DATA / "emoji-model" / "tokenizer"}
PROMPTS = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "A PHOTO, (masterpiece:1.3), [low]; 8k!! <lora:x:1>... #1 #2 50% @home",
    "it's they're we've I'm he'll she'd IT'S 'til rock'n'roll '\u017f",
    "emoji 😀 👩‍👩‍👧 🇫🇷 ❤️ 1️⃣ \ufe0f",
    "naïve café Ångström ÀÉÎÕÜ ß ẞ ŁÓDŹ cafe\u0301",
    "日本語のテキスト、漢字 中文 한국어 ไทย हिन्दी العربية עברית",
    "Σίσυφος ΟΔΥΣΣΕΥΣ ΣΑΣ İstanbul ǅ ﬁ ﬃ Ⅷ ² ½ ①",
    "a\tb\nc\r\nd\x00e\x7ff\u200bg\u00a0h\u2028i\u3000j\ufeffk\ufffdl",
    "<|startoftext|>cat<|endoftext|> dog <|STARTOFTEXT|> <|\u017ftartoftext|> !<|endoftext|>! <|endof",
    "a\u0345b \u0345 .\u0345.",
    "1234567890 3.14 2,000 a1b2 x²",
    "_underscored-name__ -- --- ~`^ \\ / | {} =+ «quoted» “smart” \u2018single\u2019 — … ™ © ¿",
    "word " * 100,
    "supercalifragilisticexpialidocious" * 8,
    "!" * 200,
    "\U0001f9ff" * 60,
]
TEXT = st.one_of(
    st.text(max_size=120),
    st.text(st.sampled_from("aeiou stlr'SM,.!?<|>()[]{}0123456789\n\té漢😀\u200d\u0301"), max_size=200),
)


def need(folder):
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"{folder.name} of the shared sample data is not here")
    return folder


@pytest.fixture(scope="module", params=list(FOLDERS))
def pair(request):
    folder = need(FOLDERS[request.param])
    return ClipTokenizer.open(folder), transformers.CLIPTokenizer.from_pretrained(folder)


def oracle_ids(oracle, prompts, max_length=None):
    encoded = oracle(
        prompts, padding="max_length", truncation=True, max_length=max_length or oracle.model_max_length
    )
    return np.array(encoded.input_ids)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_transformers(pair, prompt):
    ours, oracle = pair
    expected = oracle_ids(oracle, [prompt])
    actual = ours.encode([prompt]).input_ids
    assert actual.shape == expected.shape
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected)
    assert ours.tokenize(prompt) == oracle.encode(prompt, add_special_tokens=False)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT)
def test_ids_of_any_text(pair, text):
    ours, oracle = pair
    assert ours.tokenize(text) == oracle.encode(text, add_special_tokens=False)


def test_batch_and_planted_errors(pair):
    ours, oracle = pair
    ids = ours.encode(PROMPTS).input_ids
    expected = oracle_ids(oracle, PROMPTS)
    np.testing.assert_array_equal(ids, expected)
    assert (ids[::-1] != expected).any()
    assert (ours.encode([p + " cat" for p in PROMPTS]).input_ids != expected).any()
    assert (ours.encode([p.replace("ß", "ss") for p in PROMPTS]).input_ids != expected).any()


def test_truncated_text_is_told(pair):
    ours, _ = pair
    ids, cut = ours.encode(["a cat", "cat " * 74 + "dog, bird über", "dog " * 75])
    assert cut[0] == cut[2] == ""
    assert cut[1].replace(" ", "") == ",birdüber"
    assert ids.shape == (3, 77)
    assert ids[1, -1] == ids[0, -1]


def test_no_prompts(pair):
    ours, _ = pair
    assert ours.encode([]).input_ids.shape == (0, 77)


def copied(folder, tmp_path, **config):
    target = tmp_path / "tokenizer"
    shutil.copytree(need(folder), target)
    target.chmod(0o755)
    for file in target.iterdir():
        file.chmod(0o644)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_shorter_window(tmp_path):
    """The window is the config's, as of models with fewer positions."""
    folder = copied(FOLDERS["emoji"], tmp_path, model_max_length=32)
    oracle = transformers.CLIPTokenizer.from_pretrained(folder)
    ids, cut = ClipTokenizer.open(folder).encode(PROMPTS)
    assert ids.shape == (len(PROMPTS), 32)
    np.testing.assert_array_equal(ids, oracle_ids(oracle, PROMPTS))
    assert cut[PROMPTS.index("word " * 100)] != ""


def test_padding_with_an_exclamation_mark(tmp_path):
    """SD2 says so in special_tokens_map.json only; transformers then takes every ``!`` in a prompt for it."""
    folder = copied(FOLDERS["sd1"], tmp_path)
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    oracle = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = ClipTokenizer.open(folder)
    np.testing.assert_array_equal(ours.encode(PROMPTS).input_ids, oracle_ids(oracle, PROMPTS))
    assert ours.encode([""]).input_ids[0, -1] == 0


def test_added_tokens(tmp_path):
    """Tokens of a textual inversion, the longer one first."""
    config = {
        "content": "",
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "single_word": False,
        "special": False,
    }
    added = {str(49408 + i): config | {"content": name} for i, name in enumerate(["<toy>", "<toy>_1"])}
    folder = copied(FOLDERS["sd1"], tmp_path, added_tokens_decoder=added)
    oracle = transformers.CLIPTokenizer.from_pretrained(folder)
    prompts = ["a <toy> and <toy>_1, <toy>_12<toy><Toy>", "<toy", *PROMPTS]
    np.testing.assert_array_equal(
        ClipTokenizer.open(folder).encode(prompts).input_ids, oracle_ids(oracle, prompts)
    )


def test_broken_folders(tmp_path):
    folder = copied(FOLDERS["emoji"], tmp_path)
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(BundleError, match="is not a CLIP tokenizer"):
        ClipTokenizer.open(folder)
    (folder / "merges.txt").write_text("#version: 0.2\nzz qq\n")
    with pytest.raises(BundleError, match="do not fit"):
        ClipTokenizer.open(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(BundleError, match=r"merges\.txt"):
        ClipTokenizer.open(folder)
    (folder / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BundleError, match="not JSON"):
        ClipTokenizer.open(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    with pytest.raises(BundleError, match="is not a CLIP tokenizer"):
        ClipTokenizer.open(folder)
    with pytest.raises(BundleError, match=r"vocab\.json"):
        ClipTokenizer.open(tmp_path / "nowhere")


def test_text_that_is_not_unicode(pair):
    with pytest.raises(UsageError, match="not valid Unicode"):
        pair[0].encode(["caf\udce9"])

"""A1111's infotext: what Kiln writes, what sd-parsers reads of it, and what Kiln reads of real images."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.runtime.images import read_parameters, save_png
from kiln.runtime.infotext import build_infotext, build_parameters, parse_infotext

IMAGES = Path(__file__).parents[2].parent / "shared" / "data" / "images"
MADE = {
    "prompt": "a cat, (masterpiece:1.2)\nsecond line",
    "negative_prompt": "blurry",
    "steps": 20,
    "sampler": "DPM++ 2M",
    "schedule": "Karras",
    "cfg_scale": 7.0,
    "seed": 42,
    "width": 512,
    "height": 768,
    "model_hash": "0123456789",
    "model": "my model",
    "rng": "CPU",
    "lora_hashes": {"style: a, b": "abcdef0123456789", "other": "0" * 64},
}


def test_written_text():
    assert build_parameters(**MADE) == (
        "a cat, (masterpiece:1.2)\nsecond line\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, "
        "Model hash: 0123456789, Model: my model, RNG: CPU, "
        'Lora hashes: "style a b: abcdef012345, other: 000000000000", Version: kiln 0.1.0'
    )


def test_what_is_not_there_is_not_written():
    text = build_parameters(
        **MADE | {"negative_prompt": "", "lora_hashes": {}, "model_hash": None, "cfg_scale": 6.5}
    )
    assert "Negative" not in text
    assert "Lora" not in text
    assert "Model hash" not in text
    assert "CFG scale: 6.5," in text


def test_other_keys_stand_before_the_version():
    text = build_infotext("x", "", {"Zebra": 1, "Steps": 2, "Emphasis": "No norm", "Sampler": "Euler"})
    assert text == "x\nSteps: 2, Sampler: Euler, Zebra: 1, Emphasis: No norm, Version: kiln 0.1.0"


def test_round_trip():
    parsed = parse_infotext(build_parameters(**MADE))
    assert parsed.prompt == MADE["prompt"]
    assert parsed.negative_prompt == "blurry"
    assert parsed.size == (512, 768)
    assert parsed.sampler_and_schedule == ("DPM++ 2M", "Karras")
    assert parsed.fields["Lora hashes"] == "style a b: abcdef012345, other: 000000000000"
    assert list(parsed.fields)[:3] == ["Steps", "Sampler", "Schedule type"]


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), max_size=60))
def test_any_value_survives(value):
    parsed = parse_infotext(
        build_infotext("p", "n", {"Steps": 1, "Sampler": "Euler", "Seed": 3, "Model": value})
    )
    assert parsed.fields["Model"] == value
    assert (parsed.prompt, parsed.negative_prompt) == ("p", "n")


def test_sd_parsers_reads_the_same(tmp_path):
    sd_parsers = pytest.importorskip("sd_parsers")
    text = build_parameters(**MADE)
    path = tmp_path / "made.png"
    save_png(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8), path, text)
    assert read_parameters(path) == text
    info = sd_parsers.ParserManager().parse(str(path))
    (sampler,) = info.samplers
    ours = parse_infotext(text)
    assert info.generator.name == "AUTOMATIC1111"
    assert info.full_prompt == ours.prompt
    assert info.full_negative_prompt == ours.negative_prompt
    assert sampler.name == ours.fields["Sampler"]
    assert sampler.model.name == ours.fields["Model"]
    assert sampler.model.hash == ours.fields["Model hash"]
    assert sampler.parameters == {"cfg_scale": "7", "seed": "42", "steps": "20", "scheduler": "Karras"}
    assert info.metadata["Size"] == "512x768"
    assert info.metadata["RNG"] == "CPU"
    assert info.metadata["Version"] == "kiln 0.1.0"


@pytest.mark.parametrize(
    "name", ["automatic1111_cropped.png", "automatic1111_cropped.jpg", "a1111_with_loras.png"]
)
def test_real_images_as_sd_parsers_reads_them(name):
    sd_parsers = pytest.importorskip("sd_parsers")
    if not (IMAGES / name).is_file():
        pytest.skip("the shared sample images are not here")
    ours = parse_infotext(read_parameters(IMAGES / name))
    info = sd_parsers.ParserManager().parse(str(IMAGES / name))
    (sampler,) = info.samplers
    assert ours.prompt == info.full_prompt
    assert ours.negative_prompt == info.full_negative_prompt
    assert ours.fields["Sampler"] == sampler.name
    assert ours.fields["Model"] == sampler.model.name
    assert ours.fields["Model hash"] == sampler.model.hash
    assert ours.fields["Size"] == info.metadata["Size"]
    for key, theirs in (("Steps", "steps"), ("CFG scale", "cfg_scale"), ("Seed", "seed")):
        assert ours.fields[key] == sampler.parameters[theirs]
    if name == "a1111_with_loras.png":  # sd-parsers tears the quoted value apart
        assert ours.fields["Lora hashes"] == "MechanicalBird: bff1857da586, st4rw4ar5at4t: 8b01a54f429d"


def test_planted_difference_is_seen():
    right = parse_infotext(build_parameters(**MADE))
    for change in ({"seed": 43}, {"negative_prompt": "sharp"}, {"sampler": "Euler"}, {"lora_hashes": {}}):
        assert parse_infotext(build_parameters(**MADE | change)) != right


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "fields"),
    [
        ("just a prompt", "just a prompt", "", {}),
        ("", "", "", {}),
        ("a: b, c: d\nand more: yes", "a: b, c: d\nand more: yes", "", {}),
        ("Steps: 3, Sampler: Euler, Seed: 1", "", "", {"Steps": "3", "Sampler": "Euler", "Seed": "1"}),
        (
            "p\r\nNegative prompt: n1\r\nn2\r\nSteps: 3, Sampler: Euler, Seed: 1\r\nTemplate: q",
            "p",
            "n1\nn2",
            {"Steps": "3", "Sampler": "Euler", "Seed": "1"},
        ),
        (
            'p\nSteps: 3, Sampler: Euler, X: 1, Empty: "", Bare: , '
            'Hashes: {"model": "ab", "lora:a": "cd"}, Seed: 5',
            "p",
            "",
            {
                "Steps": "3", "Sampler": "Euler", "X": "1", "Empty": "", "Bare": "", "Seed": "5",
                "Hashes": '{"model": "ab", "lora:a": "cd"}',
            },
        ),
        (
            'p\nSteps: 3, Seed: 1, Sampler: euler_a karras, Version: stable-diffusion.cpp, '
            'SDCPP: {"a": {"b": [1, 2]}}',
            "p",
            "",
            {
                "Steps": "3", "Seed": "1", "Sampler": "euler_a karras", "Version": "stable-diffusion.cpp",
                "SDCPP": '{"a": {"b": [1, 2]}}',
            },
        ),
        (
            'p\nSteps: 3, Seed: 1, Sampler: Euler, Broken: "no \\q end", Hashes: {oops',
            "p",
            "",
            {"Steps": "3", "Seed": "1", "Sampler": "Euler", "Broken": '"no \\q end"', "Hashes": "{oops"},
        ),
    ],
)  # fmt: skip
def test_texts_of_others(text, prompt, negative, fields):
    parsed = parse_infotext(text)
    assert (parsed.prompt, parsed.negative_prompt, dict(parsed.fields)) == (prompt, negative, fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Sampler": "DPM++ 2M Karras"}, ("DPM++ 2M", "Karras")),
        ({"Sampler": "euler_a karras"}, ("euler_a", "Karras")),
        ({"Sampler": "Euler a"}, ("Euler a", "")),
        ({"Sampler": "Euler a", "Schedule type": "Normal"}, ("Euler a", "Normal")),
        ({}, ("", "")),
    ],
)
def test_schedule_of_older_files(fields, expected):
    text = build_infotext("p", "", {"Steps": 1, "Seed": 1, **fields})
    assert parse_infotext(text).sampler_and_schedule == expected


@given(st.text(max_size=300))
def test_parsing_never_fails(text):
    parse_infotext(text)
    parse_infotext(f"{text}\nSteps: 1, Sampler: {text}, Seed: {json.dumps(text)}, Size: {text}").size  # noqa: B018

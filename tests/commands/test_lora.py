"""``kiln lora``: what the commands print, write and refuse, on the bundled model and its adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from kiln.cli import main
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake
from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.resolve import bundled_adapters, bundled_models

Run = Callable[..., Result]
NAMES = ("emoji-kiln", "emoji-flat")


@pytest.fixture
def run(run_command: Run) -> Run:
    """Runs ``kiln lora`` on the bundled model and its adapters."""
    if "emoji" not in bundled_models() or any(name not in bundled_adapters() for name in NAMES):
        pytest.skip("the bundled model and its adapters are not in this checkout")
    return lambda *words: run_command("lora", *words)


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def baked(*refs: AdapterRef) -> dict[str, np.ndarray]:
    """The weights of the bundled model's UNet that the adapters change."""
    with open_checkpoint(bundled_models()["emoji"]) as model:
        shapes = {n: {k: i.shape for k, i in model.tensors(n).items()} for n in ("unet", "text_encoder")}
        with plan_bake(shapes, refs) as plan:
            touched = [name for name in shapes["unet"] if plan.is_touched("unet", name)]
            return {name: plan.bake("unet", name, model.read("unet", name)) for name in touched}


def distance(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    assert one.keys() == two.keys()
    assert one
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def test_inspect_says_what_it_is_and_what_a_model_takes(run: Run) -> None:
    printed = done(run("inspect", "emoji-kiln", "--model", "emoji")).stdout
    for words in ("family", "its attn2.to_k reads 256 features", "kohya", "cross-attention", "not_applied"):
        assert words in printed
    report = json.loads(done(run("inspect", "emoji-kiln", "--model", "emoji", "--json")).stdout)
    assert report["fit"]["refused"] is None
    assert report["fit"]["applied"] == report["modules"] == {"unet": 106}
    assert report["ranks"] == {"4": 106}
    assert report["training"]["base_model_version"] == "sd_v1"


def test_inspect_prints_no_control_characters(run: Run) -> None:
    tensors = safetensors.numpy.load_file(bundled_adapters()["emoji-kiln"])
    evil = {"modelspec.trigger_phrase": "a\x1b]0;owned\x07b", "ss_training_comment": "\x1b[2Jx",
            "ss_tag_frequency": json.dumps({"1_\x1b[31m": {"\x1b[0mtag": 3}})}  # fmt: skip
    safetensors.numpy.save_file(tensors | {"\x1b[2Jkey": np.zeros(1, np.float32)}, "evil.safetensors", evil)
    for words in ((), ("--model", "emoji"), ("--json",)):
        printed = done(run("inspect", "evil.safetensors", *words)).output
        assert "\x1b" not in printed
        assert "\x07" not in printed
    assert "tag (3)" in run("inspect", "evil.safetensors").stdout


def test_merge_bakes_as_both(run: Run) -> None:
    result = done(run("merge", "emoji-kiln:0.8", "emoji-flat:-0.5", "-o", "both.safetensors"))
    assert result.stdout == "both.safetensors\n"
    assert "106 layers, 106 of them exact; stored in fp32" in result.stderr
    files = bundled_adapters()
    both = baked(AdapterRef(files["emoji-kiln"], 0.8), AdapterRef(files["emoji-flat"], -0.5))
    assert distance(baked(AdapterRef(Path("both.safetensors"))), both) < 1e-6
    assert distance(baked(AdapterRef(files["emoji-kiln"], 0.8)), both) > 1e-4
    report = json.loads(
        done(
            run("merge", "emoji-kiln:0.8", "emoji-flat", "-o", "cut.safetensors", "--rank", 6, "--json")
        ).stdout
    )
    assert report["ranks"] == {"6": 106}
    assert 0.5 < report["energy"] < 1


def test_convert_there_and_back(run: Run) -> None:
    assert "106 modules in the unet, 212 tensors" in done(
        run("convert", "emoji-flat", "-o", "d.safetensors", "--to", "diffusers")
    ).stderr  # fmt: skip
    done(run("convert", "d.safetensors", "-o", "peft", "--to", "peft"))
    done(run("convert", "peft", "-o", "back.safetensors", "--to", "kohya"))
    first = safetensors.numpy.load_file(bundled_adapters()["emoji-flat"])
    back = safetensors.numpy.load_file("back.safetensors")
    assert first.keys() == back.keys()
    assert all(np.array_equal(first[key], back[key]) for key in first)


def test_extract_gives_the_adapter_that_was_baked(run: Run) -> None:
    """The bundled model and the same with an adapter inside: extracting gives its change back."""
    baking = ["bake", "emoji", "-o", "styled", "--lora", "emoji-kiln:0.8"]
    baked_bundle = CliRunner().invoke(main, baking)
    assert baked_bundle.exit_code == 0, baked_bundle.output
    result = done(
        run("extract", "styled", "emoji", "-o", "x.safetensors", "--rank", 4, "--conv-rank", 4, "--json")
    )
    report = json.loads(result.stdout)
    assert len(report["modules"]) == 106
    assert report["vae_differs"] is False
    # The bundle stores fp16, so that a part of the difference is rounding, of full rank.
    assert 0.9 < report["energy"] <= 1
    wanted = baked(AdapterRef(bundled_adapters()["emoji-kiln"], 0.8))
    plain = baked(AdapterRef(bundled_adapters()["emoji-kiln"], 1e-12))
    found = baked(AdapterRef(Path("x.safetensors")))
    rest = sum(float(((found[k] - wanted[k]) ** 2).sum()) for k in wanted)
    assert rest / sum(float(((wanted[k] - plain[k]) ** 2).sum()) for k in wanted) < 0.1
    assert "of the difference kept" in done(
        run("extract", "styled", "emoji", "-o", "e.safetensors", "--energy", 0.9)
    ).stderr  # fmt: skip


LORA = "lora.safetensors"
REFUSED = [
    (["inspect", "nothing.safetensors"], 2, ["nothing.safetensors"]),
    (["inspect", LORA, "--model", "no-such-model"], 2, ["'no-such-model'"]),
    (["merge", LORA, "nothing.safetensors:0.5", "-o", "out.safetensors"], 2, ["nothing.safetensors"]),
    (["merge", f"{LORA}:strong", "-o", "out.safetensors"], 2, ["strong", "FILE:STRENGTH"]),
    (["merge", LORA, "-o", "out.safetensors", "--rank", "0"], 2, ["rank 0", "1 to 1024"]),
    (["merge", LORA, "-o", "out.safetensors", "--precision", "int8"], 2, ["'int8'", "fp16"]),
    (["merge", LORA, "-o", "."], 1, ["is a folder"]),
    (["convert", LORA, "-o", "out.safetensors", "--to", "gguf"], 2, ["'gguf'", "diffusers, peft"]),
    (["convert", LORA, "-o", "out.bin", "--to", "kohya"], 2, ["out.bin", ".safetensors"]),
    (["convert", "notes.txt", "-o", "out.safetensors", "--to", "kohya"], 1, ["notes.txt", "a text file"]),
    (["convert", LORA, "-o", LORA, "--to", "kohya"], 1, ["exists", "--overwrite"]),
    (["extract", "emoji", "emoji", "-o", "out.safetensors"], 2, ["--rank N", "--energy 0.95"]),
    (
        ["extract", "emoji", "emoji", "-o", "out.safetensors", "--rank", "4", "--energy", "0.5"],
        2,
        ["either a rank"],
    ),
    (["extract", "emoji", "emoji", "-o", "out.safetensors", "--rank", "4"], 1, ["nothing to extract"]),
    (["extract", "emoji", LORA, "-o", "out.safetensors", "--rank", "4"], 1, [LORA, "adapter"]),
    (["extract", "emoji", "nothing", "-o", "out.safetensors", "--rank", "4"], 2, ["'nothing'"]),
]


@pytest.mark.parametrize(
    ("words", "code", "says"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_is_refused(run: Run, words: list[str], code: int, says: list[str]) -> None:
    """One line on stderr with all of ``says``, nothing on stdout, and nothing written."""
    Path(LORA).write_bytes(bundled_adapters()["emoji-kiln"].read_bytes())
    Path("notes.txt").write_text("some text that is no adapter at all")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    result = run(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    assert line.startswith("error: ")
    assert [text for text in says if text not in line] == []
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_no_torch_is_loaded(run: Run) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom functools import partial\nfrom kiln.cli import main\n"
        "main = partial(main, standalone_mode=False)\n"
        "main(['lora', 'merge', 'emoji-kiln', 'emoji-flat:0.5', '-o', 'm.safetensors'])\n"
        "main(['lora', 'convert', 'emoji-kiln', '-o', 'c.safetensors', '--to', 'diffusers'])\n"
        "main(['lora', 'inspect', 'm.safetensors', '--model', 'emoji'])\n"
        "print(sorted({'torch', 'diffusers', 'peft', 'onnxruntime', 'openvino'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"

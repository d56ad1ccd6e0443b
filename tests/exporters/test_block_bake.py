"""Block strengths end to end: in the bundle's weights, in its manifest, and in what ``inspect`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from kiln.bundle import open_bundle
from kiln.cli import main
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.block_strengths import BLOCKS, BlockStrengths
from kiln.exporters.export import bake


@pytest.fixture
def lora(tiny_sd1: Path, write_lora: Callable[..., Path], tmp_path: Path) -> Path:
    return write_lora(tmp_path / "style.safetensors", tiny_sd1, 1)


def changed(bundle: Path, base: Path) -> set[str]:
    """Tensors that differ from those of the base."""
    found = set()
    for component in ("unet", "text_encoder"):
        ours, theirs = (load_file(b / component / "weights.safetensors") for b in (bundle, base))
        assert ours.keys() == theirs.keys()
        found |= {f"{component}.{name}" for name in ours if ours[name].tobytes() != theirs[name].tobytes()}
    return found


def test_only_the_named_blocks_change(tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    bake(open_bundle(tiny_bundle), tmp_path / "all", (AdapterRef(lora, 0.5),))
    ref = AdapterRef.parse(f"{lora}:0.5:lbw=0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,0,1")
    bake(open_bundle(tiny_bundle), tmp_path / "some", (ref,))
    whole, some = changed(tmp_path / "all", tiny_bundle), changed(tmp_path / "some", tiny_bundle)
    assert any(name.startswith("text_encoder.") for name in whole)
    assert some == {n for n in whole if n.startswith(("unet.mid_block.", "unet.up_blocks.3.attentions.2."))}
    assert some
    ours, theirs = (load_file(tmp_path / b / "unet/weights.safetensors") for b in ("some", "all"))
    assert all((ours[n[5:]] == theirs[n[5:]]).all() for n in some)


@pytest.mark.parametrize("spelling", ["0.7:lbw=NONE", "0:lbw=ALL", "lbw=" + ",".join("0" * 26)])
def test_strength_zero_everywhere_is_the_same_to_the_byte(
    tiny_bundle: Path, lora: Path, tmp_path: Path, spelling: str
) -> None:
    bake(open_bundle(tiny_bundle), tmp_path / "baked", (AdapterRef.parse(f"{lora}:{spelling}"),))
    for component in open_bundle(tiny_bundle).components:
        for file in ("model.onnx", "weights.safetensors", "config.json"):
            name = f"{component}/{file}"
            assert (tmp_path / "baked" / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


def test_the_manifest_and_inspect_say_the_blocks(tiny_bundle: Path, lora: Path, tmp_path: Path) -> None:
    refs = (AdapterRef(lora, 0.5, blocks=BlockStrengths.parse("INS")), AdapterRef(lora, 0.25, rank=1))
    bake(open_bundle(tiny_bundle), tmp_path / "baked", refs)
    first, second = open_bundle(tmp_path / "baked").adapters
    assert (first.lbw, first.rank, second.lbw, second.blocks, second.rank) == ("INS", None, None, None, 1)
    assert first.blocks is not None
    assert [b for b in BLOCKS if first.blocks[b]] == ["BASE", "IN01", "IN02", "IN04"]
    said = CliRunner().invoke(main, ["inspect", str(tmp_path / "baked")])
    assert "blocks" in said.stdout, said.output
    assert "BASE 1, IN00 0, IN01-IN02 1, IN03 0, IN04 1, IN05-OUT11 0" in said.stdout
    as_json = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "baked"), "--json"]).stdout)
    assert as_json["adapters"][0]["blocks"] == dict(first.blocks)
    assert "blocks" not in as_json["adapters"][1]


def test_a_prompts_tag_is_baked_and_remembered_as_typed(
    tiny_bundle: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    prompt = "red apple <lora:style:0.5:lbw=OUTALL>"
    words = ["generate", prompt, "-m", tiny_bundle, "--lora-dir", lora.parent, "--steps", "1"]
    words += ["--backend", "null", "-o", tmp_path / "out.png", "-s", "1", "-q"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exit_code and "flat" in result.output:
        pytest.skip("the null backend draws nothing here")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as image:
        assert image.text["parameters"].startswith(f"{prompt}\n")  # type: ignore[attr-defined]
    (made,) = (tmp_path / "cache/bundles").glob("*/kiln.json")
    assert json.loads(made.read_text())["adapters"][0]["lbw"] == "OUTALL"

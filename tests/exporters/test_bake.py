"""Baking: another adapter is another weights file beside the same graph, made from the unbaked weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import Bundle, open_bundle
from kiln.components import COMPONENTS
from kiln.errors import AdapterError, BundleError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.export import ExportSpec, bake, export

LIMIT = THRESHOLDS["baked_weight_relative_l2"]
NAMES = [f"{c}/{name}" for c in COMPONENTS for name in ("model.onnx", "weights.safetensors")]


@pytest.fixture(scope="module")
def loras(
    tiny_sd1: Path, write_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return (
        write_lora(folder / "a.safetensors", tiny_sd1, 1),
        write_lora(folder / "b.safetensors", tiny_sd1, 2, ("unet",)),
    )


def same(one: Path, other: Path) -> list[str]:
    """Graphs and weights that are equal byte for byte."""
    return [name for name in NAMES if (one / name).read_bytes() == (other / name).read_bytes()]


def weights(bundle: Path) -> dict[str, np.ndarray]:
    return {
        f"{component}.{name}": tensor
        for component in ("unet", "text_encoder")
        for name, tensor in load_file(bundle / component / "weights.safetensors").items()
    }


def test_strength_zero_changes_no_byte(
    tiny_bundle: Path, tiny_sd1: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    bake(open_bundle(tiny_bundle), tmp_path / "baked", (AdapterRef(loras[0], 0.0),))
    export(ExportSpec(tiny_sd1, tmp_path / "exported", (AdapterRef(loras[0], 0.0),)))
    assert same(tmp_path / "baked", tiny_bundle) == same(tmp_path / "exported", tiny_bundle) == NAMES
    bake(open_bundle(tiny_bundle), tmp_path / "half", (AdapterRef(loras[0], 0.0, 1.0),))
    assert set(NAMES) - set(same(tmp_path / "half", tiny_bundle)) == {"text_encoder/weights.safetensors"}


def test_baking_is_exporting(
    tiny_bundle: Path, tiny_sd1: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    refs = (AdapterRef(loras[0], 0.75, 0.5), AdapterRef(loras[1], -0.3))
    report = bake(open_bundle(tiny_bundle), tmp_path / "baked", refs)
    export(ExportSpec(tiny_sd1, tmp_path / "exported", refs))
    assert same(tmp_path / "baked", tmp_path / "exported") == NAMES
    changed = {"unet/weights.safetensors", "text_encoder/weights.safetensors"}
    assert set(NAMES) - set(same(tmp_path / "baked", tiny_bundle)) == changed
    assert [dict(r.matched_modules).keys() for r in report.adapters] == [
        {"unet", "text_encoder"},
        {"unet"},
    ]
    opened = open_bundle(tmp_path / "baked", verify="full")
    assert [(a.name, a.unet_strength, a.text_encoder_strength) for a in opened.adapters] == [
        ("a", 0.75, 0.5),
        ("b", -0.3, -0.3),
    ]


def test_a_baked_bundle_is_baked_anew_from_its_source(
    tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = AdapterRef(loras[0]), AdapterRef(loras[1])
    bake(open_bundle(tiny_bundle), tmp_path / "a", (a,))
    bake(open_bundle(tmp_path / "a"), tmp_path / "b", (b,))
    bake(open_bundle(tiny_bundle), tmp_path / "b2", (b,))
    assert same(tmp_path / "b", tmp_path / "b2") == NAMES
    bake(open_bundle(tmp_path / "b"), tmp_path / "none", ())
    assert same(tmp_path / "none", tiny_bundle) == NAMES


def test_two_strengths_add_up(tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    base = open_bundle(tiny_bundle)
    bake(base, tmp_path / "twice", (AdapterRef(loras[0], 0.3), AdapterRef(loras[0], 0.5)))
    bake(base, tmp_path / "once", (AdapterRef(loras[0], 0.8),))
    bake(base, tmp_path / "wrong", (AdapterRef(loras[0], 0.808),))
    twice, once, wrong = (weights(tmp_path / name) for name in ("twice", "once", "wrong"))
    assert twice.keys() == once.keys()
    changed = [name for name, value in weights(tiny_bundle).items() if not np.array_equal(value, once[name])]
    assert changed
    for name in once:
        assert LIMIT.holds(relative_l2(twice[name], once[name]))
    assert not any(LIMIT.holds(relative_l2(wrong[name], once[name])) for name in changed)


def test_two_adapters_add_up(tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    base, (a, b) = open_bundle(tiny_bundle), (AdapterRef(path) for path in loras)
    for name, refs in {"a": (a,), "b": (b,), "ab": (a, b), "ba": (b, a)}.items():
        bake(base, tmp_path / name, refs)
    before, only_a, only_b, both, turned = (
        weights(p) for p in (tiny_bundle, *(tmp_path / name for name in ("a", "b", "ab", "ba")))
    )
    for name, value in before.items():
        expected = only_a[name].astype(np.float64) + only_b[name] - value
        assert LIMIT.holds(relative_l2(both[name], expected))
        assert LIMIT.holds(relative_l2(turned[name], expected))


@pytest.fixture
def movable(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "movable"))


def test_without_its_source_a_baked_bundle_cannot_be_unbaked(
    movable: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = (AdapterRef(path) for path in loras)
    export(ExportSpec(movable, tmp_path / "a", (a,)))
    config = movable / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("1000", "999"))
    with pytest.raises(BundleError, match=r"cannot be unbaked.*has changed.*kiln export"):
        bake(open_bundle(tmp_path / "a"), tmp_path / "b", (b,))
    shutil.rmtree(movable)
    with pytest.raises(BundleError, match=r"cannot be unbaked.*is gone.*kiln export"):
        bake(open_bundle(tmp_path / "a"), tmp_path / "b", (b,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_without_its_source_a_plain_bundle_is_its_own(
    movable: Path, tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = (AdapterRef(path) for path in loras)
    export(ExportSpec(movable, tmp_path / "plain"))
    shutil.rmtree(movable)
    bake(open_bundle(tmp_path / "plain"), tmp_path / "a", (a,))
    bake(open_bundle(tiny_bundle), tmp_path / "expected", (a,))
    assert same(tmp_path / "a", tmp_path / "expected") == NAMES
    # The plain bundle is what the baked one remembers.
    bake(open_bundle(tmp_path / "a"), tmp_path / "b", (b,))
    bake(open_bundle(tiny_bundle), tmp_path / "expected-b", (b,))
    assert same(tmp_path / "b", tmp_path / "expected-b") == NAMES


def test_a_companion_that_is_gone_is_said(
    tiny_sd1: Path, movable: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    export(ExportSpec(tiny_sd1, tmp_path / "a", (AdapterRef(loras[0]),), vae=movable))
    shutil.rmtree(movable)
    with pytest.raises(BundleError, match=r"cannot be unbaked.*is gone"):
        bake(open_bundle(tmp_path / "a"), tmp_path / "b", ())


def test_an_unknown_source_is_said(tiny_sd1: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    export(ExportSpec(tiny_sd1, tmp_path / "a", (AdapterRef(loras[0]),), remember_source=False))
    with pytest.raises(BundleError, match=r"cannot be unbaked.*is not known"):
        bake(open_bundle(tmp_path / "a"), tmp_path / "b", ())


def test_storage_is_kept(tiny_sd1: Path, tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    refs = (AdapterRef(loras[0]),)
    export(ExportSpec(tiny_sd1, tmp_path / "fp16", storage="fp16"))
    bake(open_bundle(tmp_path / "fp16"), tmp_path / "baked", refs)
    export(ExportSpec(tiny_sd1, tmp_path / "exported", refs, storage="fp16"))
    assert same(tmp_path / "baked", tmp_path / "exported") == NAMES


def test_a_base_in_another_layout_is_not_copied(
    tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """An older Kiln may have ordered the tensors otherwise; the graph of this one would misread them."""
    base = open_bundle(tiny_bundle)
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    save_file(
        load_file(tiny_bundle / "vae_decoder/weights.safetensors"),
        other / "vae_decoder/weights.safetensors",
        {"format": "pt"},
    )
    bake(Bundle(other, base.manifest), tmp_path / "b", ())
    assert same(tmp_path / "b", tiny_bundle) == NAMES


def test_a_failed_bake_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "no.safetensors").write_text("hello, I am a text")
    with pytest.raises(AdapterError, match="a text file"):
        bake(open_bundle(tiny_bundle), tmp_path / "out/b", (AdapterRef(tmp_path / "no.safetensors"),))
    assert [p.name for p in tmp_path.iterdir()] == ["no.safetensors"]


def test_the_manifest_says_what_each_adapter_did(
    tiny_bundle: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """And names no folder of the machine: a bundle is given to others."""
    adapters = (AdapterRef(loras[0], 0.5), AdapterRef(loras[1], 1e4))
    report = bake(open_bundle(tiny_bundle), tmp_path / "baked", adapters)
    applied = open_bundle(tmp_path / "baked").manifest["applied"]
    assert [row["matched_modules"] for row in applied] == [dict(a.matched_modules) for a in report.adapters]
    assert all(row["changes"] and row["unmatched"] == {} for row in applied)
    assert applied[0]["warnings"] == []
    assert "times their own length" in applied[1]["warnings"][0]
    assert str(loras[0].parent) not in json.dumps(applied)

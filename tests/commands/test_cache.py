"""``kiln cache``: what it shows and removes, on a cache of the tests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from kiln import cache_store
from kiln.cache_locks import LOCK_NAME, claim
from kiln.commands.cache import cache
from kiln.errors import UsageError
from kiln.exporters.resolve import bundled_adapters, bundled_models, locate_adapter, resolve_model
from kiln.runtime.pipeline import Pipeline
from kiln.runtime.request import Request
from kiln.runtime.settings import Settings

MB = 1_000_000
KEY, OTHER = "a" * 64, "b" * 24


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiled model used now, a bundle of 2 MB used 40 days ago, and a graph."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KILN_CACHE", str(folder))
    monkeypatch.setenv("KILN_CACHE_LIMIT", "10MB")
    facts = {
        "bundle": "emoji",
        "component": "unet",
        "engine": "2026.4.1",
        "shapes": {"sample": [2, 4, 16, 16]},
    }
    make(folder / "compiled/openvino" / KEY, MB, 0, "facts.json", facts)
    bundle = {"name": "castle", "adapters": [{"name": "style"}]}
    make(folder / "bundles" / OTHER, 2 * MB, 40 * 86400 + 60, "kiln.json", bundle)
    (folder / "graphs").mkdir()
    (folder / "graphs/unet-8999421c5919e034.onnx.xz").write_bytes(bytes(300))
    return folder


def make(entry: Path, size: int, age_s: float, name: str, facts: dict[str, Any]) -> None:
    entry.mkdir(parents=True)
    (entry / name).write_text(json.dumps(facts))
    (entry / "weights").write_bytes(bytes(size - (entry / name).stat().st_size))
    (entry / LOCK_NAME).touch()
    os.utime(entry / LOCK_NAME, (time.time() - age_s,) * 2)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cache, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def rows(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_list(root: Path) -> None:
    lines = run("list").stdout.splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines[:3]] == ["graphs", "compiled", "bundles"]
    assert lines[0].split(maxsplit=5)[-1].endswith("unet of the architecture 8999421c5919e034")
    assert lines[1].endswith("emoji unet · openvino 2026.4.1 · 2x4x16x16")
    assert "1.0 MB" in lines[1]
    assert lines[2].endswith("castle + style")
    assert "40 d ago" in lines[2]
    assert lines[3] == f"3.0 MB in 3 entries, limit 10.0 MB: {root}"


def test_list_as_json(root: Path) -> None:
    report = rows("list")
    assert report["folder"] == str(root)
    assert report["size_bytes"] == 3 * MB + 300
    assert report["limit_bytes"] == 10 * MB
    assert [entry["kind"] for entry in report["entries"]] == ["graphs", "compiled", "bundles"]
    compiled = report["entries"][1]
    assert compiled["facts"]["shapes"] == {"sample": [2, 4, 16, 16]}
    assert compiled["size_bytes"] == MB
    assert not compiled["in_use"]
    assert time.strptime(compiled["last_used"], "%Y-%m-%dT%H:%M:%SZ")


def test_list_of_one_kind_and_what_is_in_use(root: Path) -> None:
    with claim(root / "bundles" / OTHER) or pytest.fail("no claim"):
        [line, total] = run("list", "--kind", "bundles").stdout.splitlines()
        assert "in use" in line
        assert total.startswith("3.0 MB in 3 entries")
        assert rows("list", "--kind", "bundles")["entries"][0]["in_use"]


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setenv("KILN_CACHE_LIMIT", "none")
    assert run("list").stdout == f"0 B in 0 entries, no limit: {tmp_path / 'nothing'}\n"
    assert run("prune", "--all").stdout == "freed 0 B in 0 entries; 0 B left\n"
    assert not (tmp_path / "nothing").exists()  # looking makes nothing


def test_looking_changes_nothing(root: Path) -> None:
    def state() -> list[tuple[str, float]]:
        return sorted((str(path), path.stat().st_mtime) for path in root.rglob("*"))

    before = state()
    run("list")
    rows("prune", "--all", "--dry-run")
    assert state() == before


def test_prune_without_options_keeps_what_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("prune").stdout == "freed 0 B in 0 entries; 3.0 MB left\n"
    monkeypatch.setenv("KILN_CACHE_LIMIT", "1.5MB")
    removed, total = run("prune").stdout.splitlines()
    assert removed.startswith("removed bundles")
    assert total == "freed 2.0 MB in 1 entries; 1.0 MB left"


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["--all"], {"bundles", "compiled", "graphs"}),
        (["--older-than", "30d"], {"bundles"}),
        (["--older-than", "41d"], set()),
        (["--limit", "1.5MB"], {"bundles"}),
        (["--limit", "0"], {"bundles", "compiled", "graphs"}),
        (["--limit", "none"], set()),
        (["--kind", "compiled", "--all"], {"compiled"}),
        (["--kind", "compiled", "--kind", "graphs", "--limit", "0"], {"compiled", "graphs"}),
        (["--kind", "compiled", "--older-than", "1d"], set()),
        (["--older-than", "30d", "--limit", "500kB"], {"bundles", "compiled"}),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_prune(root: Path, options: list[str], kinds: set[str], dry_run: bool) -> None:
    report = rows("prune", *options, *(["--dry-run"] if dry_run else []))
    assert {entry["kind"] for entry in report["removed"]} == kinds
    sizes = {"bundles": 2 * MB, "compiled": MB, "graphs": 300}
    assert report["freed_bytes"] == sum(sizes[kind] for kind in kinds)
    assert report["dry_run"] == dry_run
    left = {entry.kind for entry in cache_store.entries()}
    assert left == (set(sizes) if dry_run else set(sizes) - kinds)


def test_what_is_in_use_is_kept_and_named(root: Path) -> None:
    with claim(root / "bundles" / OTHER) or pytest.fail("no claim"):
        result = run("prune", "--all")
    assert "kept, in use: bundles 2.0 MB castle + style" in result.stderr
    assert result.stdout.splitlines()[-1] == "freed 1.0 MB in 2 entries; 2.0 MB left"
    assert (root / "bundles" / OTHER / "weights").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--all", "--limit", "1GB"], "--all leaves nothing"),
        (["--all", "--older-than", "1d"], "--all leaves nothing"),
        (["--kind", "graphs"], "--kind says where to look"),
        (["--limit", "5"], "'5' is no size"),
        (["--older-than", "old"], "'old' is no age"),
    ],
)
def test_options_that_make_no_sense(root: Path, options: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        run("prune", *options)
    assert len(cache_store.entries()) == 3


def test_an_unknown_kind_is_refused(root: Path) -> None:
    assert CliRunner().invoke(cache, ["list", "--kind", "images"]).exit_code == 2


def test_every_command_has_help_and_an_example() -> None:
    for command in (cache, *cache.commands.values()):
        assert isinstance(command, click.Command)
        assert "Example:" in (command.help or "")


def test_after_a_real_run_all_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a generation leaves in the cache is listed with names, and is there again after it is removed."""
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    pytest.importorskip("openvino", reason="no engine: install the cpu extra")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    monkeypatch.setenv("KILN_CACHE_LIMIT", "none")

    def draw() -> dict[str, bool]:
        bundle = resolve_model("emoji").bundle
        with Pipeline.open(bundle, Settings("openvino")) as pipeline:
            [ready] = [e for e in pipeline.generate(Request("x", seed=1, steps=1)) if hasattr(e, "record")]
        return {name: found.from_cache for name, found in ready.record.in_force.items()}

    assert set(draw().values()) == {False}
    named = {entry["belongs_to"].split(" · ")[0] for entry in rows("list")["entries"]}
    assert named >= {"emoji text_encoder", "emoji unet", "emoji vae_decoder"}
    assert set(draw().values()) == {True}
    run("prune", "--all")
    assert cache_store.entries() == []
    assert set(draw().values()) == {False}


def test_a_model_that_runs_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached bundle is in use as long as somebody holds it, and made anew after it went."""
    if "emoji" not in bundled_models() or not bundled_adapters():
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    refs = (locate_adapter(sorted(bundled_adapters())[0]),)
    made = resolve_model("emoji", refs)
    assert made.made
    assert rows("prune", "--all")["in_use"][0]["kind"] == "bundles"
    again = resolve_model("emoji", refs)
    assert not again.made
    del made, again
    [gone] = rows("prune", "--kind", "bundles", "--all")["removed"]
    assert gone["belongs_to"].startswith("emoji + ")
    assert resolve_model("emoji", refs).made


def test_a_damaged_cached_model_is_made_again_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if "emoji" not in bundled_models() or not bundled_adapters():
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    refs = (locate_adapter(sorted(bundled_adapters())[0]),)
    path = resolve_model("emoji", refs).bundle.path
    (path / "unet/config.json").write_text("{}")
    assert resolve_model("emoji", refs).made
    assert "a cached model is thrown away and made again" in caplog.text
    assert not resolve_model("emoji", refs).made


def test_a_limit_of_nothing_leaves_no_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "emoji" not in bundled_models() or not bundled_adapters():
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    monkeypatch.setenv("KILN_CACHE_LIMIT", "0")
    resolved = resolve_model("emoji", (locate_adapter(sorted(bundled_adapters())[0]),))
    assert resolved.bundle.path.exists()
    path = resolved.bundle.path
    del resolved
    assert not path.exists()

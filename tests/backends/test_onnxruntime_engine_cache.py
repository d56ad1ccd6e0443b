"""Engines that keep files, TensorRT and MIGraphX, on a stand-in: each bundle gets an engine of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource

pytest.importorskip("onnxruntime")

COMPILING = ("onnxruntime-tensorrt", "onnxruntime-migraphx")
LONGER = {"sample": (2, 4, 8, 12), "timestep": (), "encoder_hidden_states": (2, 9, 32)}


@pytest.mark.parametrize(
    ("provider", "options"),
    [
        ("TensorrtExecutionProvider", {"trt_engine_cache_enable": "1", "trt_engine_cache_path": "{folder}"}),
        ("MIGraphXExecutionProvider", {"migraphx_model_cache_dir": "{folder}"}),
    ],
)
def test_the_engines_own_cache_gives_the_first_lora_again(
    fake: Any,
    source: GraphSource,
    other: GraphSource,
    raw: Any,
    toy: Any,
    tmp_path: Path,
    provider: str,
    options: dict[str, str],
) -> None:
    """That the stand-in is as blind as the engines; otherwise those of the adapters would show nothing."""
    given = {key: value.format(folder=tmp_path) for key, value in options.items()}
    first = raw(source, provider, given).run(["out_sample"], toy.FEEDS)[0]
    assert np.array_equal(raw(other, provider, given).run(["out_sample"], toy.FEEDS)[0], first)
    assert len(fake.compiled) == 1


@pytest.mark.parametrize("name", COMPILING)
def test_second_time_from_the_cache(
    fake: Any, source: GraphSource, toy: Any, tmp_path: Path, name: str
) -> None:
    backend, options = registry.get_backend(name), replace(toy.FIXED, cache_dir=tmp_path / "cache")
    first, second = (backend.prepare(source, options) for _ in range(2))
    assert (first.in_force.from_cache, second.in_force.from_cache) == (False, True)
    assert len(fake.compiled) == 1
    assert replace(second.in_force, from_cache=False) == first.in_force
    assert str(tmp_path) not in str(first.in_force)
    assert np.array_equal(first.run(toy.FEEDS)["out_sample"], second.run(toy.FEEDS)["out_sample"])
    assert {path.suffix for path in (tmp_path / "cache" / name).glob("*/engine/*")} <= {".engine", ".mxr"}


@pytest.mark.parametrize("name", COMPILING)
@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp16"},
        {"shapes": LONGER},
        {"extra": {"device_id": "0", "trt_builder_optimization_level": "5", "migraphx_exhaustive_tune": "1"}},
    ],
    ids=["precision", "shapes", "option"],
)
def test_other_options_never_share_an_entry(
    fake: Any, source: GraphSource, toy: Any, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    if "extra" in change:
        mine = "trt_" if "tensorrt" in name else "migraphx_"
        change = {"extra": {k: v for k, v in change["extra"].items() if k.startswith(mine)}}
    backend, options = registry.get_backend(name), replace(toy.FIXED, cache_dir=tmp_path)
    backend.prepare(source, options)
    assert not backend.prepare(source, replace(options, **change)).in_force.from_cache
    assert backend.prepare(source, options).in_force.from_cache


@pytest.mark.parametrize("name", COMPILING)
def test_a_damaged_entry_is_made_again(
    fake: Any, source: GraphSource, toy: Any, tmp_path: Path, name: str
) -> None:
    backend, options = registry.get_backend(name), replace(toy.FIXED, cache_dir=tmp_path)
    expected = backend.prepare(source, options).run(toy.FEEDS)["out_sample"]
    [file] = [path for path in tmp_path.rglob("*") if path.suffix in (".engine", ".mxr")]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    session = backend.prepare(source, options)
    assert not session.in_force.from_cache
    assert np.array_equal(session.run(toy.FEEDS)["out_sample"], expected)


@pytest.mark.parametrize("name", COMPILING)
def test_nothing_is_kept_without_a_folder(
    fake: Any, source: GraphSource, toy: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not registry.get_backend(name).prepare(source, toy.FIXED).in_force.from_cache
    assert list(tmp_path.glob("*.*")) == []

"""What every backend that keeps compiled models promises of them, run once for each registered backend."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import Backend, PrepareOptions

FP32 = PrepareOptions(precision="fp32", threads=1)
# Backends that keep one file for a compiled model, and those that give the engine a folder for its own files.
CACHING = {"openvino"}
ENGINE_CACHING = {"onnxruntime-tensorrt", "onnxruntime-migraphx"}

Feeds = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def keeps_compiled(backend: Backend) -> None:
    """Skips the backends that keep no compiled models."""
    if backend.name not in CACHING:
        pytest.skip("keeps no compiled models")


def test_second_time_from_the_cache(
    backend: Backend, case: Any, feeds: Feeds, toy: Any, tmp_path: Path
) -> None:
    inputs = feeds()
    for options in (
        replace(FP32, cache_dir=tmp_path / "cache"),
        replace(toy.FIXED, cache_dir=tmp_path / "cache"),
    ):
        first, second = (backend.prepare(case.source, options) for _ in range(2))
        assert not first.in_force.from_cache
        assert second.in_force.from_cache == (backend.name in CACHING | ENGINE_CACHING)
        assert np.array_equal(first.run(inputs)["out_sample"], second.run(inputs)["out_sample"])
        assert replace(second.in_force, from_cache=False) == first.in_force


@pytest.mark.usefixtures("keeps_compiled")
def test_other_weights_never_share_a_cache_entry(
    backend: Backend, graph_case: Any, feeds: Feeds, weights: Any, write: Any, tmp_path: Path
) -> None:
    """Same graph bytes, same file names and sizes: only the digest tells the two apart."""
    options = replace(FP32, cache_dir=tmp_path / "cache")
    first = backend.prepare(graph_case.source, options).run(feeds())["out_sample"]
    weights["conv.bias"][0] += 1
    source = write(graph_case.source.graph_path.parent, weights, digest="other")
    session = backend.prepare(source, options)
    assert not session.in_force.from_cache
    assert np.allclose(session.run(feeds())["out_sample"][:, 0] - first[:, 0], 1, atol=1e-3)


@pytest.mark.usefixtures("keeps_compiled")
def test_cache_entry_outlives_a_move(backend: Backend, graph_case: Any, feeds: Feeds, tmp_path: Path) -> None:
    """An entry may point into the weights, but must find them where the bundle is now."""
    options = replace(FP32, cache_dir=tmp_path / "cache")
    before = backend.prepare(graph_case.source, options).run(feeds())["out_sample"]
    moved = graph_case.source.graph_path.parent.rename(tmp_path / "moved")
    source = replace(
        graph_case.source, graph_path=moved / "model.onnx", weights_path=moved / "weights.safetensors"
    )
    session = backend.prepare(source, options)
    assert session.in_force.from_cache
    assert np.array_equal(session.run(feeds())["out_sample"], before)


@pytest.mark.usefixtures("keeps_compiled")
@pytest.mark.parametrize("change", [{"threads": 2}, {"precision": "bf16"}, {"shapes": {"timestep": ()}}])
def test_other_options_never_share_a_cache_entry(
    backend: Backend, graph_case: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    if change.get("precision", "fp32") not in backend.devices()[0].precisions:
        pytest.skip(f"this device has no {change['precision']}")
    options = replace(FP32, cache_dir=tmp_path)
    backend.prepare(graph_case.source, options)
    assert not backend.prepare(graph_case.source, replace(options, **change)).in_force.from_cache
    assert backend.prepare(graph_case.source, options).in_force.from_cache


@pytest.mark.usefixtures("keeps_compiled")
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "no checksum", "no blob", "foreign"])
def test_damaged_cache_entry(
    backend: Backend,
    graph_case: Any,
    feeds: Feeds,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = replace(FP32, cache_dir=tmp_path)
    first = backend.prepare(graph_case.source, options)
    before = first.run(feeds())["out_sample"]
    first.close()  # which waits until the entry is written
    [entry] = (tmp_path / backend.name).iterdir()
    _damage(entry, damage)
    with caplog.at_level(logging.WARNING):
        session = backend.prepare(graph_case.source, options)
    assert not session.in_force.from_cache
    assert "thrown away" in caplog.text
    assert np.array_equal(session.run(feeds())["out_sample"], before)
    assert backend.prepare(graph_case.source, options).in_force.from_cache


def _damage(entry: Path, damage: str) -> None:
    blob, checksum = entry / "model.blob", entry / "model.blob.sha256"
    data = bytearray(blob.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "truncated":
        del data[-10:]
    elif damage == "emptied":
        data.clear()
    elif damage == "foreign":  # undamaged by its checksum, but nothing that the engine reads
        data = bytearray(b"not a compiled model")
        checksum.write_text(hashlib.sha256(data).hexdigest())
    blob.write_bytes(data)
    if damage == "no checksum":
        checksum.unlink()
    elif damage == "no blob":
        blob.unlink()

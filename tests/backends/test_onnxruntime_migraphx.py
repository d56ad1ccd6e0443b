"""What only MIGraphX does, on a stand-in for its engine: its environment, and its own conversions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource
from kiln.errors import SessionError

pytest.importorskip("onnxruntime")

PROVIDER = "MIGraphXExecutionProvider"
MIGRAPHX = "onnxruntime-migraphx"


def test_environment_really_overrides(
    fake: Any, source: GraphSource, raw: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the stand-in as in the provider: what is reported says 0, and fp16 is computed."""
    session = raw(source, PROVIDER, {"migraphx_fp16_enable": "0"})
    plain = session.run(["out_sample"], toy.FEEDS)[0]
    monkeypatch.setenv("ORT_MIGRAPHX_FP16_ENABLE", "1")
    assert not np.array_equal(session.run(["out_sample"], toy.FEEDS)[0], plain)
    assert session.get_provider_options()[PROVIDER]["migraphx_fp16_enable"] == "0"
    monkeypatch.setenv("ORT_MIGRAPHX_BF16_ENABLE", "1")  # both: neither
    assert np.array_equal(session.run(["out_sample"], toy.FEEDS)[0], plain)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ORT_MIGRAPHX_FP16_ENABLE", "1", "overrides migraphx_fp16_enable=0"),
        ("ORT_MIGRAPHX_BF16_ENABLE", "1", "overrides migraphx_bf16_enable=0"),
        ("ORT_MIGRAPHX_INT8_ENABLE", "1", "overrides migraphx_int8_enable=0"),
        ("ORT_MIGRAPHX_EXHAUSTIVE_TUNE", "1", "overrides migraphx_exhaustive_tune=0"),
        ("ORT_MIGRAPHX_MODEL_CACHE_PATH", "/somewhere", "model of other weights"),
    ],
)
def test_environment_that_contradicts(
    fake: Any,
    source: GraphSource,
    toy: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    told: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SessionError, match=f"{told}.*unset {name}"):
        registry.get_backend(MIGRAPHX).prepare(source, toy.FIXED)


def test_environment_that_agrees_is_reported(
    fake: Any, source: GraphSource, toy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend, options = registry.get_backend(MIGRAPHX), replace(toy.FIXED, cache_dir=tmp_path)
    backend.prepare(source, options)
    monkeypatch.setenv("ORT_MIGRAPHX_FP16_ENABLE", "0")
    monkeypatch.setenv("MIGRAPHX_DISABLE_MLIR", "1")
    found = backend.prepare(source, options).in_force
    assert found.settings["MIGRAPHX_DISABLE_MLIR"] == "1"
    assert found.settings["ORT_MIGRAPHX_FP16_ENABLE"] == "0"
    assert not found.from_cache  # it changes what is compiled


def test_bf16_is_migraphx_own_conversion(fake: Any, source: GraphSource, toy: Any) -> None:
    found = registry.get_backend(MIGRAPHX).prepare(source, replace(toy.FIXED, precision="bf16")).in_force
    assert (found.precision, found.settings["migraphx_bf16_enable"]) == ("bf16", "1")
    assert found.settings["migraphx_fp16_enable"] == "0"


def test_quantisers_are_not_for_callers(fake: Any, source: GraphSource, toy: Any) -> None:
    with pytest.raises(SessionError, match="migraphx_int8_enable is not for callers"):
        registry.get_backend(MIGRAPHX).prepare(source, replace(toy.FIXED, extra={"migraphx_int8_enable": 1}))

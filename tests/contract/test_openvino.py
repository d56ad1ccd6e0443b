"""What only OpenVINO does: precisions, properties, its converter left alone, its cache kept small."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import cpu, openvino_backend, openvino_compile, openvino_devices, registry
from kiln.backends.base import PrepareOptions
from kiln.backends.engine import parse_version
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

BACKEND = registry.get_backend("openvino")
FP32 = PrepareOptions(precision="fp32", threads=1)

pytestmark = pytest.mark.skipif(
    bool(registry.why_unusable(BACKEND)), reason=registry.why_unusable(BACKEND) or "there"
)


def test_auto_is_bf16_exactly_where_the_processor_has_it(graph_case: Any) -> None:
    has_bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu.describe_cpu().flags))
    precision = BACKEND.prepare(graph_case.source, PrepareOptions()).in_force.precision
    assert precision == ("bf16" if has_bf16 else "fp32")


def test_bf16_computes_in_bf16(graph_case: Any, feeds: Any) -> None:
    if "bf16" not in BACKEND.devices()[0].precisions:
        pytest.skip("this processor has no bf16")
    session = BACKEND.prepare(graph_case.source, replace(FP32, precision="bf16"))
    assert session.in_force.precision == "bf16"
    error = relative_l2(session.run(feeds())["out_sample"], graph_case.expected(feeds()))
    assert not THRESHOLDS["component_relative_l2"].holds(error)
    assert THRESHOLDS["component_bf16_relative_l2"].holds(error)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_that_the_processor_lacks(
    graph_case: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_backend, "precisions", lambda core, device: ("fp32",))
    with pytest.raises(
        SessionError, match=f"does not compute in {precision} on this processor; use auto or one of fp32"
    ):
        BACKEND.prepare(graph_case.source, replace(FP32, precision=precision))
    assert BACKEND.prepare(graph_case.source, PrepareOptions()).in_force.precision == "fp32"


def test_a_precision_that_is_not_honoured_is_an_error(graph_case: Any) -> None:
    with pytest.raises(SessionError, match="fp32 was asked for, but OpenVINO computes in"):
        BACKEND.prepare(graph_case.source, replace(FP32, extra={"INFERENCE_PRECISION_HINT": "bf16"}))


@pytest.mark.parametrize("device", ["GPU.7", "HETERO:GPU,CPU", "AUTO:CPU", "TPU"])
def test_a_device_that_is_not_there(graph_case: Any, device: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"asked for the device .*, but OpenVINO sees .*CPU"):
        BACKEND.prepare(graph_case.source, replace(FP32, device=device))
    assert BACKEND.prepare(graph_case.source, replace(FP32, device="cpu")).in_force.device == "CPU"


def test_properties_pass_through_and_are_in_the_key(graph_case: Any, tmp_path: Path) -> None:
    options = replace(FP32, cache_dir=tmp_path)
    BACKEND.prepare(graph_case.source, options)
    other = replace(options, extra={"ENABLE_CPU_PINNING": False})
    assert not BACKEND.prepare(graph_case.source, other).in_force.from_cache
    assert BACKEND.prepare(graph_case.source, other).in_force.from_cache


def test_container_quota_limits_the_threads(graph_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_devices, "threads_are_limited", lambda: True)
    monkeypatch.setattr(openvino_devices, "usable_cores", lambda: 1)
    assert BACKEND.prepare(graph_case.source, PrepareOptions()).in_force.threads == 1


weightless = pytest.mark.skipif(
    parse_version(BACKEND.probe().version) < openvino_compile.WEIGHTLESS_SINCE,
    reason="this OpenVINO keeps weights in its compiled models",
)


@weightless
def test_cache_holds_no_weights(graph_case: Any, weights: Any, write: Any, tmp_path: Path) -> None:
    """A matrix of 4 MB adds next to nothing to the entry, and the entry still gives the right numbers."""
    rng = np.random.default_rng(5)
    weights["context.in.weight"] = (rng.standard_normal((32, 65536)) / 100).astype(np.float16)
    weights["context.out.weight"] = (rng.standard_normal((65536, 4)) / 100).astype(np.float16)
    source = write(tmp_path / "large", weights, digest="large")
    options = replace(FP32, cache_dir=tmp_path / "cache")
    BACKEND.prepare(source, options).close()  # which waits until the entry is written
    [blob] = (tmp_path / "cache").rglob("model.blob")
    assert source.weights_path.stat().st_size > 4_000_000
    assert blob.stat().st_size < 100_000


def test_nobody_waits_for_the_export(
    graph_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for a model has it before it is exported; a second is much even for a busy machine."""
    told = []
    exported = openvino_compile._exported

    def telling(compiled: Any) -> bytes:
        told.append("exported")
        return exported(compiled)

    monkeypatch.setattr(openvino_compile, "_exported", telling)
    monkeypatch.setattr(openvino_compile, "_HEAD_START", 1.0)
    session = BACKEND.prepare(graph_case.source, replace(FP32, cache_dir=tmp_path))
    told.append("prepared")
    session.close()
    assert told == ["prepared", "exported"]


@weightless
def test_cached_model_reads_the_weights_file(
    graph_case: Any, feeds: Any, weights: Any, write: Any, tmp_path: Path
) -> None:
    """That the entry points into the file and not at something kept: other bytes give other numbers.

    The digest is falsely the same here, which a bundle never allows.
    """
    rng = np.random.default_rng(6)
    weights["context.in.weight"] = (rng.standard_normal((32, 4096)) / 10).astype(np.float16)
    weights["context.out.weight"] = (rng.standard_normal((4096, 4)) / 10).astype(np.float16)
    options = replace(FP32, cache_dir=tmp_path / "cache")
    source = write(tmp_path / "a", weights, digest="same")
    first = BACKEND.prepare(source, options).run(feeds())["out_sample"]
    weights["context.out.weight"] *= np.float16(-1)
    session = BACKEND.prepare(write(tmp_path / "b", weights, digest="same"), options)
    assert session.in_force.from_cache
    assert not np.allclose(session.run(feeds())["out_sample"], first)


def test_import_leaves_converter_and_telemetry_alone() -> None:
    code = """
import sys
from kiln.backends.registry import get_backend
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "socket.connect" else None)
assert get_backend("openvino").devices()
assert not [name for name in sys.modules if name.startswith(("openvino_telemetry", "openvino.tools.ovc"))]
assert not opened
import openvino
from openvino import convert_model
assert callable(convert_model)
import openvino.tools.ovc
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

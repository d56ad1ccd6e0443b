"""What all providers' adapters do, on a stand-in for their engine: no such hardware is here.

Each behaviour of the stand-in that an adapter has to cope with is shown first without the adapter.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

pytest.importorskip("onnxruntime")

LIMIT = THRESHOLDS["component_relative_l2"]
ALL = (
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-migraphx",
    "onnxruntime-webgpu",
    "onnxruntime-openvino",
)
COMPILING = ("onnxruntime-tensorrt", "onnxruntime-migraphx")
NVIDIA = ("onnxruntime-cuda", "onnxruntime-tensorrt")
PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-migraphx": "MIGraphXExecutionProvider",
    "onnxruntime-webgpu": "WebGpuExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
}


@pytest.mark.parametrize("name", ALL)
def test_computes_and_says_where(fake: Any, source: GraphSource, toy: Any, name: str) -> None:
    backend = registry.get_backend(name)
    session = backend.prepare(source, toy.FIXED)
    found = session.in_force
    assert (found.backend, found.provider, found.precision, found.threads) == (
        name,
        PROVIDERS[name],
        "fp32",
        1,
    )
    assert found.device == backend.devices()[0].id
    assert found.settings["nodes"].keys() == {PROVIDERS[name]}
    assert LIMIT.holds(relative_l2(session.run(toy.FEEDS)["out_sample"], toy.expected(toy.FEEDS)))


@pytest.mark.parametrize("name", ALL)
def test_an_operator_that_stays_on_the_processor_is_an_error(
    fake: Any, source: GraphSource, toy: Any, name: str
) -> None:
    """Matrix products are no arithmetic with shapes."""
    fake.providers[PROVIDERS[name]].lacks = frozenset(["MatMul", "Unsqueeze", "Squeeze", "Reshape"])
    fake.providers["CUDAExecutionProvider"].lacks = frozenset(["MatMul"])
    with pytest.raises(
        SessionError, match=r"cannot run all of this graph: 2 MatMul.* on CPUExecutionProvider"
    ):
        registry.get_backend(name).prepare(source, toy.FIXED)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"onnxruntime-migraphx"}))
def test_arithmetic_with_shapes_may_stay(fake: Any, source: GraphSource, toy: Any, name: str) -> None:
    for provider in fake.providers.values():
        provider.lacks = frozenset(["Unsqueeze", "Reshape", "Cast"])
    nodes = registry.get_backend(name).prepare(source, toy.FIXED).in_force.settings["nodes"]
    assert nodes["CPUExecutionProvider"] >= 1


def test_migraphx_has_to_run_everything(fake: Any, source: GraphSource, toy: Any) -> None:
    fake.providers["MIGraphXExecutionProvider"].lacks = frozenset(["Unsqueeze", "Reshape", "Cast"])
    with pytest.raises(SessionError, match="cannot run all of this graph"):
        registry.get_backend("onnxruntime-migraphx").prepare(source, toy.FIXED)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"onnxruntime-openvino"}))
def test_a_library_that_does_not_load(
    fake: Any, source: GraphSource, raw: Any, toy: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = fake.providers[PROVIDERS[name]]
    provider.missing = "Failed to load library x.so with error: libneeded.so.3: cannot open"
    assert raw(source, provider.name).get_providers() == ["CPUExecutionProvider"]  # in silence
    with pytest.raises(BackendUnavailable, match=r"left out|libneeded") as caught:
        registry.get_backend(name).prepare(source, toy.FIXED)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [*NVIDIA, "onnxruntime-migraphx"])
def test_an_unknown_option(fake: Any, source: GraphSource, raw: Any, toy: Any, name: str) -> None:
    assert raw(source, PROVIDERS[name], {"no_such": "1"}).get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(SessionError, match='Unknown provider option: "no_such"'):
        registry.get_backend(name).prepare(source, replace(toy.FIXED, extra={"no_such": 1}))


def test_an_option_that_webgpu_would_ignore(fake: Any, source: GraphSource, raw: Any, toy: Any) -> None:
    assert (
        "WebGpuExecutionProvider" in raw(source, "WebGpuExecutionProvider", {"no_such": "1"}).get_providers()
    )
    with pytest.raises(SessionError, match=r"WebGPU has no option no_such; it has .*preferredLayout"):
        registry.get_backend("onnxruntime-webgpu").prepare(source, replace(toy.FIXED, extra={"no_such": 1}))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("onnxruntime-cuda", "use_tf32"),
        ("onnxruntime-tensorrt", "trt_builder_optimization_level"),
        ("onnxruntime-migraphx", "migraphx_exhaustive_tune"),
    ],
)
def test_an_option_that_the_provider_drops(
    fake: Any, source: GraphSource, toy: Any, name: str, option: str
) -> None:
    fake.providers[PROVIDERS[name]].drops = frozenset([option])
    with pytest.raises(SessionError, match=f"dropped the option {option}="):
        registry.get_backend(name).prepare(source, toy.FIXED)


@pytest.mark.parametrize("name", [*COMPILING, "onnxruntime-webgpu"])
def test_free_shapes_are_refused(fake: Any, source: GraphSource, toy: Any, name: str) -> None:
    options = replace(toy.FIXED, shapes={k: v for k, v in toy.SHAPES.items() if k != "timestep"})
    with pytest.raises(SessionError, match="needs fixed shapes for this; the shape of timestep is missing"):
        registry.get_backend(name).prepare(source, options)


@pytest.mark.parametrize("name", [*NVIDIA, "onnxruntime-migraphx", "onnxruntime-webgpu"])
def test_fp16_is_typed_into_the_graph(fake: Any, source: GraphSource, toy: Any, name: str) -> None:
    session = registry.get_backend(name).prepare(source, replace(toy.FIXED, precision="fp16"))
    assert session.in_force.precision == "fp16"
    assert all("fp16" not in key or value == "0" for key, value in session.in_force.settings.items())
    error = relative_l2(session.run(toy.FEEDS)["out_sample"], toy.expected(toy.FEEDS))
    assert 1e-5 < error < THRESHOLDS["component_bf16_relative_l2"].limit


@pytest.mark.parametrize("name", ALL)
def test_another_bundle_never_gets_the_first_ones_result(
    fake: Any, source: GraphSource, other: GraphSource, toy: Any, tmp_path: Path, name: str
) -> None:
    backend, options = registry.get_backend(name), replace(toy.FIXED, cache_dir=tmp_path / "cache")
    first = backend.prepare(source, options).run(toy.FEEDS)["out_sample"]
    second = backend.prepare(other, options)
    assert not second.in_force.from_cache
    assert np.allclose(second.run(toy.FEEDS)["out_sample"][:, 0] - first[:, 0], 1, atol=1e-3)


def test_sessions_are_freed(fake: Any, source: GraphSource, toy: Any) -> None:

    make: Callable[[str], Any] = lambda name: registry.get_backend(name).prepare(source, toy.FIXED)  # noqa: E731
    for name in ALL:
        session = make(name)
        native = weakref.ref(fake.sessions.pop())
        session.close()
        gc.collect()
        assert native() is None

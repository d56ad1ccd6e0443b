"""What only CUDA and TensorRT do, on a stand-in for their engine: graphs, TF32, devices and types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

pytest.importorskip("onnxruntime")

LIMIT = THRESHOLDS["component_relative_l2"]
NVIDIA = ("onnxruntime-cuda", "onnxruntime-tensorrt")
UNET = {"sample": (2, 4, 8, 12), "timestep": (), "encoder_hidden_states": (2, 7, 32)}


def test_a_cuda_graph_needs_fixed_buffers(fake: Any, source: GraphSource, raw: Any, toy: Any) -> None:
    """Passing arrays, the third run gives the second's result; through the binding it does not."""
    twice = {name: array * 2 for name, array in toy.FEEDS.items()}
    plain = raw(source, "CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    runs = [plain.run(["out_sample"], feeds)[0] for feeds in (toy.FEEDS, toy.FEEDS, twice)]
    assert np.array_equal(runs[2], runs[0])
    session = registry.get_backend("onnxruntime-cuda").prepare(source, toy.FIXED)
    assert session.in_force.settings["enable_cuda_graph"] == "1"
    for _ in range(3):
        for feeds in (toy.FEEDS, twice):
            expected = toy.expected(feeds)
            assert LIMIT.holds(relative_l2(session.run(feeds)["out_sample"], expected))


@pytest.mark.parametrize(
    ("component", "shapes", "expected"),
    [
        ("unet", UNET, {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}),
        ("unet", {}, {"enable_cuda_graph": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
        (
            "vae_decoder",
            {"latent_sample": (1, 4, 8, 8)},
            {"enable_cuda_graph": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        ),
    ],
)
def test_what_pays_only_for_many_runs(component: str, shapes: Any, expected: dict[str, str]) -> None:
    from kiln.backends.onnxruntime_cuda import provider_options

    source = GraphSource(component, Path("x"), Path("x"), {}, "")
    found = provider_options(source, PrepareOptions(shapes=shapes), 0)
    assert {name: found[name] for name in expected} == expected
    assert (found["use_tf32"], found["arena_extend_strategy"]) == ("0", "kSameAsRequested")


def test_fp32_is_not_tf32(fake: Any, source: GraphSource, toy: Any) -> None:
    with pytest.raises(SessionError, match="fp32 was asked for, but use_tf32 is on"):
        registry.get_backend("onnxruntime-cuda").prepare(source, replace(toy.FIXED, extra={"use_tf32": "1"}))


@pytest.mark.parametrize("name", NVIDIA)
def test_devices_and_what_they_compute_in(fake: Any, source: GraphSource, toy: Any, name: str) -> None:
    backend = registry.get_backend(name)
    assert [(d.id, d.precisions) for d in backend.devices()] == [
        ("cuda:0", ("fp16", "bf16", "fp32")),
        ("cuda:1", ("fp32",)),  # a Pascal: no fast fp16
    ]
    assert backend.prepare(source, replace(toy.FIXED, device="cuda:1")).in_force.settings["device_id"] == "1"
    with pytest.raises(BackendUnavailable, match=r"no device 'cuda:2'; it has: cuda:0, cuda:1"):
        backend.prepare(source, replace(toy.FIXED, device="cuda:2"))
    with pytest.raises(SessionError, match="does not compute in fp16 on Old; use auto or one of fp32"):
        backend.prepare(source, replace(toy.FIXED, device="cuda:1", precision="fp16"))


def test_cuda_in_fp16_needs_fixed_shapes(fake: Any, source: GraphSource, toy: Any) -> None:
    backend = registry.get_backend("onnxruntime-cuda")
    with pytest.raises(SessionError, match="needs fixed shapes"):
        backend.prepare(source, replace(toy.FIXED, shapes={}, precision="fp16"))
    assert (
        backend.prepare(source, replace(toy.FIXED, shapes={}, precision="auto")).in_force.precision == "fp32"
    )
    assert backend.prepare(source, replace(toy.FIXED, precision="auto")).in_force.precision == "fp16"


@pytest.mark.parametrize("option", ["trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"])
def test_what_tensorrt_11_dropped(fake: Any, source: GraphSource, toy: Any, option: str) -> None:
    with pytest.raises(SessionError, match=f"{option} has gone with TensorRT 11"):
        registry.get_backend("onnxruntime-tensorrt").prepare(source, replace(toy.FIXED, extra={option: 1}))

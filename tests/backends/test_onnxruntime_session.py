"""Making sessions with the real ONNX Runtime, on the processor; what falls back in silence there."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.onnxruntime_binding import BoundSession
from kiln.backends.onnxruntime_precision import graph_precision
from kiln.backends.onnxruntime_readback import (
    CPU,
    INDEX_OPERATORS,
    check_options,
    check_placement,
)
from kiln.backends.onnxruntime_session import OrtSession, Plan, lowered, open_session
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

ort = pytest.importorskip("onnxruntime")


LIMIT = THRESHOLDS["component_relative_l2"]
STATIC = ("static", "opset17")
BACKEND = registry.get_backend("onnxruntime")

absent = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA"
)


@absent
def test_the_real_library_falls_back_in_silence(source: GraphSource) -> None:
    """Asked for CUDA, a build without it computes on the processor and raises nothing."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        native = ort.InferenceSession(
            str(source.graph_path), providers=["CUDAExecutionProvider"], enable_fallback=0
        )
    assert native.get_providers() == [CPU]


@absent
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "MIGraphXExecutionProvider"])
def test_a_provider_that_is_left_out_is_an_error(source: GraphSource, toy: Any, provider: str) -> None:
    plan = Plan("onnxruntime-x", provider, "x:0")
    told = rf"left out {provider} and would run on {CPU}: this build has only .*{CPU}.*uninstall all of them"
    with pytest.raises(BackendUnavailable, match=told):
        open_session(ort, source, toy.FIXED, plan)


def test_shapes_are_fixed_in_the_graph(source: GraphSource, toy: Any) -> None:
    native = open_session(ort, source, toy.FIXED, Plan("onnxruntime", CPU, "cpu")).native
    assert {port.name: tuple(port.shape) for port in native.get_inputs()} == toy.SHAPES
    assert native.get_outputs()[0].shape == [2, 4, 8, 12]


def test_axes_that_contradict(source: GraphSource, toy: Any) -> None:
    options = replace(toy.FIXED, shapes=toy.SHAPES | {"encoder_hidden_states": (1, 7, 32)})
    with pytest.raises(SessionError, match="batch_size is fixed to 2 and, for encoder_hidden_states, to 1"):
        BACKEND.prepare(source, options)


def test_lowered_bytes_find_their_weights(
    source: GraphSource, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph comes as bytes, the weights from the bundle's folder, wherever the process stands."""
    monkeypatch.chdir(tmp_path)
    opened = open_session(ort, source, toy.FIXED, Plan("onnxruntime", CPU, "cpu", lowerings=STATIC))
    assert LIMIT.holds(
        relative_l2(OrtSession(source, opened).run(toy.FEEDS)["out_sample"], toy.expected(toy.FEEDS))
    )


def test_other_weights_give_another_result(
    source: GraphSource, other: GraphSource, toy: Any, tmp_path: Path
) -> None:
    options = replace(toy.FIXED, cache_dir=tmp_path / "cache")
    first, second = (BACKEND.prepare(s, options).run(toy.FEEDS)["out_sample"] for s in (source, other))
    assert np.allclose(second[:, 0] - first[:, 0], 1, atol=1e-3)
    assert np.array_equal(second[:, 1:], first[:, 1:])


# Inputs and outputs that stay where they are.


@pytest.fixture
def bound(source: GraphSource, toy: Any) -> BoundSession:
    """On the processor, where the real library can show that buffers are used again."""
    opened = open_session(ort, source, toy.FIXED, Plan("onnxruntime", CPU, "cpu", lowerings=STATIC))
    return BoundSession(ort, source, opened, "cpu", 0)


def test_bound(toy: Any, bound: BoundSession) -> None:
    twice = {name: array * 2 for name, array in toy.FEEDS.items()}
    kept = bound.run(toy.FEEDS)["out_sample"]
    copy = kept.copy()
    assert LIMIT.holds(relative_l2(kept, toy.expected(toy.FEEDS)))
    assert LIMIT.holds(relative_l2(bound.run(twice)["out_sample"], toy.expected(twice)))
    assert np.array_equal(kept, copy)  # the caller's, not the buffer


def test_bound_buffers_stay_at_their_address(toy: Any, bound: BoundSession) -> None:
    def addresses() -> list[int]:
        return [value.data_ptr() for value in (*bound._inputs.values(), *bound._outputs.values())]

    before = addresses()
    bound.run(toy.FEEDS)
    bound.run({name: array + 1 for name, array in toy.FEEDS.items()})
    assert addresses() == before
    assert len(set(before)) == 4


def test_bound_with_free_shapes(source: GraphSource, toy: Any) -> None:
    free = PrepareOptions(threads=1)
    session = BoundSession(
        ort, source, open_session(ort, source, free, Plan("onnxruntime", CPU, "cpu")), "cpu", 0
    )
    for sizes in ({}, {"batch": 1, "height": 16}, {"length": 13}):
        feeds = toy.make_feeds(**sizes)
        assert LIMIT.holds(relative_l2(session.run(feeds)["out_sample"], toy.expected(feeds)))


def test_bound_is_closed(toy: Any, bound: BoundSession) -> None:
    bound.run(toy.FEEDS)
    bound.close()
    with pytest.raises(SessionError, match="closed"):
        bound.run(toy.FEEDS)


# What is read back.


def session_with(*parts: tuple[str, list[str]], options: dict[str, str] | None = None) -> Any:
    made = [
        SimpleNamespace(
            ep_name=name, get_nodes=lambda types=types: [SimpleNamespace(op_type=t) for t in types]
        )
        for name, types in parts
    ]
    return SimpleNamespace(
        get_provider_graph_assignment_info=lambda: made,
        get_provider_options=lambda: {"X": options or {}},
    )


def test_placement() -> None:
    native = session_with(("X", ["Conv", "MatMul"]), (CPU, ["Shape", "Gather"]))
    assert check_placement(native, "X", INDEX_OPERATORS) == {CPU: 2, "X": 2}
    with pytest.raises(SessionError, match="X cannot run all of this graph: 1 Shape, 1 Gather on CPU"):
        check_placement(native, "X", ())


def test_placement_names_the_most_frequent() -> None:
    native = session_with(("X", ["Conv"]), ("Y", ["Resize"] * 3), (CPU, [*"abcdefg", "Conv", "Conv"]))
    with pytest.raises(SessionError, match=r"3 Resize on Y; 2 Conv, 1 a, 1 b, 1 c, 1 d and 3 more on CPU"):
        check_placement(native, "X", INDEX_OPERATORS)


def test_placement_unknown() -> None:
    with pytest.raises(SessionError, match="does not say which provider got which node"):
        check_placement(session_with(), "X", INDEX_OPERATORS)


def test_the_real_assignment_is_recorded(source: GraphSource, toy: Any) -> None:
    native = open_session(ort, source, toy.FIXED, Plan("onnxruntime", CPU, "cpu")).native
    assert sum(check_placement(native, CPU, ()).values()) >= 5


@pytest.mark.parametrize(
    ("asked", "reported"),
    [("1", "True"), ("1", "true"), ("0", "False"), ("0", "0"), ("kSameAsRequested", "kSameAsRequested")],
)
def test_options_in_force(asked: str, reported: str) -> None:
    assert check_options(session_with(options={"a": reported}), "X", {"a": asked}) == {"a": reported}


@pytest.mark.parametrize(("asked", "reported"), [("1", "0"), ("0", "True"), ("HEURISTIC", "EXHAUSTIVE")])
def test_options_that_are_not_in_force(asked: str, reported: str) -> None:
    with pytest.raises(SessionError, match=f"a={reported} in force, {asked} was asked for"):
        check_options(session_with(options={"a": reported}), "X", {"a": asked})


# Types.


@pytest.mark.parametrize(
    ("names", "precision"),
    [
        (("static",), "fp32"),
        (STATIC, "fp32"),
        ((*STATIC, "fp16"), "fp16"),
        (("static", "opset22", "bf16"), "bf16"),
    ],
)
def test_the_type_of_a_graph(source: GraphSource, toy: Any, names: tuple[str, ...], precision: str) -> None:
    """Weights are stored in fp16 in all of them."""
    model = lowered(source, toy.FIXED, names)
    assert model is not None
    assert graph_precision(model) == precision


def test_a_lowering_that_does_not_do_what_it_says(source: GraphSource, toy: Any) -> None:
    plan = Plan("onnxruntime-x", CPU, "cpu", "fp16", lowerings=STATIC)
    with pytest.raises(SessionError, match="typed fp32 after the lowerings static, opset17; fp16 was asked"):
        open_session(ort, source, toy.FIXED, plan)

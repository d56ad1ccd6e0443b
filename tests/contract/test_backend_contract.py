"""What every backend promises of its sessions, run once for each registered backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import Backend, PrepareOptions
from kiln.errors import BackendUnavailable, SessionError

FP32 = PrepareOptions(precision="fp32", threads=1)

Feeds = Callable[..., dict[str, np.ndarray]]
Check = Callable[[dict[str, np.ndarray], np.ndarray], None]


def test_probe_and_devices(backend: Backend) -> None:
    found = backend.probe()
    assert found.available
    assert found.version
    assert not found.reason
    devices = backend.devices()
    assert devices
    for device in devices:
        assert device.id
        assert device.name
        assert device.precisions


@pytest.mark.parametrize("fixed", [True, False], ids=["static", "dynamic"])
def test_values(
    backend: Backend,
    case: Any,
    feeds: Feeds,
    toy: Any,
    check: Check,
    fixed: bool,
    request: pytest.FixtureRequest,
) -> None:
    if not fixed:
        request.getfixturevalue("free_shapes")
    inputs = feeds()
    session = backend.prepare(case.source, toy.FIXED if fixed else FP32)
    check(session.run(inputs), case.expected(inputs))


@pytest.mark.usefixtures("reads_graphs")
def test_a_wrong_weight_is_seen(
    backend: Backend, graph_case: Any, feeds: Feeds, check: Check, weights: Any, write: Any
) -> None:
    """The check above fails on a planted error."""
    weights["conv.weight"] = weights["conv.weight"] * np.float16(1.01)
    source = write(graph_case.source.graph_path.parent.parent / "wrong", weights, digest="wrong")
    with pytest.raises(AssertionError):
        check(backend.prepare(source, FP32).run(feeds()), graph_case.expected(feeds()))


@pytest.mark.usefixtures("free_shapes")
def test_dynamic_shapes_may_change(backend: Backend, case: Any, feeds: Feeds, check: Check) -> None:
    session = backend.prepare(case.source, FP32)
    for sizes in ({}, {"batch": 1, "height": 16, "width": 8}, {"length": 13}):
        inputs = feeds(**sizes)
        check(session.run(inputs), case.expected(inputs))


def test_static_shapes_refuse_others(backend: Backend, case: Any, feeds: Feeds, toy: Any) -> None:
    session = backend.prepare(case.source, toy.FIXED)
    with pytest.raises(SessionError, match=r"sample: float32 \[2, 4, 8, 12\]; got float32 \[2, 4, 16, 12\]"):
        session.run(feeds(height=16))


@pytest.mark.usefixtures("free_shapes")
def test_one_input_fixed_and_the_others_free(backend: Backend, case: Any, feeds: Feeds, check: Check) -> None:
    session = backend.prepare(case.source, replace(FP32, shapes={"sample": (2, 4, 8, 12)}))
    for length in (7, 13):
        inputs = feeds(length=length)
        check(session.run(inputs), case.expected(inputs))


def test_outputs_are_the_callers(backend: Backend, case: Any, feeds: Feeds, toy: Any, computes: bool) -> None:
    session = backend.prepare(case.source, toy.FIXED)
    first = session.run(feeds())["out_sample"]
    kept = first.copy()
    second = session.run({name: array * 2 for name, array in feeds().items()})["out_sample"]
    assert np.array_equal(first, kept)
    assert np.array_equal(first, second) != computes
    first[:] = 0  # writable, and nobody else's
    assert np.array_equal(session.run(feeds())["out_sample"], kept)


def test_inputs_of_any_layout(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, FP32)
    plain = feeds()
    odd = dict(plain, sample=np.asfortranarray(plain["sample"]), timestep=np.float32(plain["timestep"]))
    odd["encoder_hidden_states"] = plain["encoder_hidden_states"].copy()
    odd["encoder_hidden_states"].flags.writeable = False
    assert np.array_equal(session.run(odd)["out_sample"], session.run(plain)["out_sample"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: f.pop("timestep"), "takes exactly"),
        (lambda f: f.update(prompt=f["timestep"]), "takes exactly"),
        (lambda f: f.update(sample=f["sample"].astype(np.float64)), "takes sample: float32 .*; got float64"),
        (lambda f: f.update(sample=f["sample"][0]), r"takes sample: float32 .*; got float32 \[4, 8, 12\]"),
        (lambda f: f.update(timestep=np.ones(2, np.float32)), r"timestep: float32 scalar; got float32 \[2\]"),
        (
            lambda f: f.update(sample=f["sample"][:1]),
            "batch_size is 1 in sample but 2 in encoder_hidden_states",
        ),
        (lambda f: f.update(sample=f["sample"][:, :, :0]), "takes sample"),
    ],
    ids=["missing", "unknown", "dtype", "rank", "scalar", "batches", "empty"],
)
def test_wrong_feeds(backend: Backend, case: Any, feeds: Feeds, change: Any, told: str) -> None:
    session = backend.prepare(case.source, FP32)
    wrong = feeds()
    change(wrong)
    with pytest.raises(SessionError, match=told):
        session.run(wrong)
    session.run(feeds())  # a refused run leaves the session usable


def test_closed(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, FP32)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(feeds())


def test_in_force(backend: Backend, case: Any) -> None:
    found = backend.prepare(case.source, FP32).in_force
    assert found.backend == backend.name
    assert found.version.startswith(backend.probe().version)
    assert found.device in {device.id for device in backend.devices()}
    assert (found.precision, found.threads, found.from_cache) == ("fp32", 1, False)
    assert found.provider


def test_auto_precision_is_one_of_the_devices(backend: Backend, case: Any) -> None:
    found = backend.prepare(case.source, PrepareOptions()).in_force
    assert found.precision in backend.devices()[0].precisions
    assert found.threads >= 1


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ({"device": "tpu"}, BackendUnavailable, "tpu"),
        ({"precision": "int3"}, SessionError, "int3"),
        ({"threads": -1}, SessionError, "-1 threads"),
        ({"shapes": {"latents": (1, 4, 8, 8)}}, SessionError, "has no input 'latents'"),
        ({"shapes": {"sample": (1, 4, 8)}}, SessionError, r"\(1, 4, 8\) does not fit"),
        ({"shapes": {"sample": (1, 4, 8, 0)}}, SessionError, "does not fit"),
        ({"extra": {"NO_SUCH_OPTION": 1}}, SessionError, "NO_SUCH_OPTION"),
    ],
    ids=["device", "precision", "threads", "input", "rank", "zero", "extra"],
)
def test_wrong_options(backend: Backend, case: Any, wrong: dict[str, Any], error: Any, told: str) -> None:
    with pytest.raises(error, match=told) as caught:
        backend.prepare(case.source, replace(FP32, **wrong))
    assert "\n" not in str(caught.value)


def test_unknown_component(backend: Backend, case: Any) -> None:
    with pytest.raises(SessionError, match="no component 'safety_checker'"):
        backend.prepare(replace(case.source, component="safety_checker"), FP32)


@pytest.mark.usefixtures("reads_files")
def test_missing_and_truncated_files(backend: Backend, case: Any) -> None:
    weights = case.source.weights_path
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) - 64])
    with pytest.raises(SessionError, match="failed while") as caught:
        backend.prepare(case.source, FP32)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    weights.unlink()
    with pytest.raises(SessionError):
        backend.prepare(case.source, FP32)


@pytest.mark.usefixtures("reads_graphs")
def test_another_graph_is_refused(backend: Backend, graph_case: Any) -> None:
    with pytest.raises(SessionError, match=r"the graph of vae_decoder has the inputs .*expected"):
        backend.prepare(replace(graph_case.source, component="vae_decoder"), FP32)


@pytest.mark.usefixtures("reads_graphs")
def test_no_graph(backend: Backend, graph_case: Any) -> None:
    graph_case.source.graph_path.unlink()
    with pytest.raises(SessionError, match="is not there"):
        backend.prepare(graph_case.source, FP32)

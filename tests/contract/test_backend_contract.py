"""What every backend promises, run once for each registered backend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import Backend, PrepareOptions
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS
from kiln.errors import BackendUnavailable, SessionError

FP32 = PrepareOptions(precision="fp32", threads=1)
LIMIT = THRESHOLDS["component_relative_l2"]
# Backends that compute nothing, that build modules instead of reading graphs, that keep compiled models.
WITHOUT_VALUES = {"null"}
FROM_MODULES = {"torch"}
CACHING = {"openvino"}
# Backends that compile for one shape: they are given every shape, and tests of free shapes are not for them.
STATIC_ONLY = {"onnxruntime-tensorrt", "onnxruntime-migraphx", "onnxruntime-webgpu"}
# Of these, whose cache is a folder of the engine's own files.
ENGINE_CACHING = {"onnxruntime-tensorrt", "onnxruntime-migraphx"}

Feeds = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(params=[*registry.names(), "onnxruntime in a child process"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each registered backend; one that is not there is skipped with its own reason."""
    name, _, isolated = request.param.partition(" ")
    found = registry.get_backend(name)
    reason = registry.why_unusable(found)
    if reason:
        pytest.skip(reason)
    if isolated:
        return request.getfixturevalue("isolated_onnxruntime")
    return _WithShapes(found, shapes_of(request.getfixturevalue("feeds")())) if name in STATIC_ONLY else found


class _WithShapes:
    """A backend for fixed shapes only, given those of the default inputs where a test gives none."""

    def __init__(self, inner: Backend, shapes: dict[str, tuple[int, ...]]) -> None:
        self.name, self.probe, self.devices = inner.name, inner.probe, inner.devices
        self._inner, self._shapes = inner, shapes

    def prepare(self, source: Any, options: PrepareOptions) -> Any:
        return self._inner.prepare(source, replace(options, shapes=options.shapes or self._shapes))


@pytest.fixture
def free_shapes(backend: Backend) -> None:
    """Skips the backends that take fixed shapes only."""
    if backend.name in STATIC_ONLY:
        pytest.skip("takes fixed shapes only")


@pytest.fixture
def case(backend: Backend, request: pytest.FixtureRequest) -> Any:
    """A component that this backend can run, with what it should give."""
    return request.getfixturevalue("module_case" if backend.name in FROM_MODULES else "graph_case")


@pytest.fixture
def reads_files(backend: Backend) -> None:
    """Skips the backends that read no weights."""
    if backend.name in WITHOUT_VALUES:
        pytest.skip("reads no files")


def shapes_of(feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


def check(outputs: dict[str, np.ndarray], expected: np.ndarray, *, values: bool) -> None:
    """Names, dtype, shape, finite, values: in this order."""
    ports = CONTRACTS["unet"].outputs
    assert list(outputs) == [port.name for port in ports]
    actual = outputs["out_sample"]
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    if values:
        assert LIMIT.holds(relative_l2(actual, expected))


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
def test_values(backend: Backend, case: Any, feeds: Feeds, fixed: bool) -> None:
    if not fixed and backend.name in STATIC_ONLY:
        pytest.skip("takes fixed shapes only")
    inputs = feeds()
    session = backend.prepare(case.source, replace(FP32, shapes=shapes_of(inputs) if fixed else {}))
    check(session.run(inputs), case.expected(inputs), values=backend.name not in WITHOUT_VALUES)


def test_a_wrong_weight_is_seen(
    backend: Backend, graph_case: Any, feeds: Feeds, weights: Any, write: Any
) -> None:
    """The check above fails on a planted error."""
    if backend.name in WITHOUT_VALUES | FROM_MODULES:
        pytest.skip("does not run this graph")
    weights["conv.weight"] = weights["conv.weight"] * np.float16(1.01)
    source = write(graph_case.source.graph_path.parent.parent / "wrong", weights, digest="wrong")
    with pytest.raises(AssertionError):
        check(backend.prepare(source, FP32).run(feeds()), graph_case.expected(feeds()), values=True)


@pytest.mark.usefixtures("free_shapes")
def test_dynamic_shapes_may_change(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, FP32)
    for sizes in ({}, {"batch": 1, "height": 16, "width": 8}, {"length": 13}):
        inputs = feeds(**sizes)
        check(session.run(inputs), case.expected(inputs), values=backend.name not in WITHOUT_VALUES)


def test_static_shapes_refuse_others(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, replace(FP32, shapes=shapes_of(feeds())))
    with pytest.raises(SessionError, match=r"sample: float32 \[2, 4, 8, 12\]; got float32 \[2, 4, 16, 12\]"):
        session.run(feeds(height=16))


@pytest.mark.usefixtures("free_shapes")
def test_one_input_fixed_and_the_others_free(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, replace(FP32, shapes={"sample": (2, 4, 8, 12)}))
    for length in (7, 13):
        inputs = feeds(length=length)
        check(session.run(inputs), case.expected(inputs), values=backend.name not in WITHOUT_VALUES)


def test_outputs_are_the_callers(backend: Backend, case: Any, feeds: Feeds) -> None:
    session = backend.prepare(case.source, replace(FP32, shapes=shapes_of(feeds())))
    first = session.run(feeds())["out_sample"]
    kept = first.copy()
    second = session.run({name: array * 2 for name, array in feeds().items()})["out_sample"]
    assert np.array_equal(first, kept)
    assert backend.name in WITHOUT_VALUES or not np.array_equal(first, second)
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


def test_another_graph_is_refused(backend: Backend, graph_case: Any) -> None:
    if backend.name in WITHOUT_VALUES | FROM_MODULES:
        pytest.skip("reads no graph")
    with pytest.raises(SessionError, match=r"the graph of vae_decoder has the inputs .*expected"):
        backend.prepare(replace(graph_case.source, component="vae_decoder"), FP32)


def test_no_graph(backend: Backend, graph_case: Any) -> None:
    if backend.name in WITHOUT_VALUES | FROM_MODULES:
        pytest.skip("reads no graph")
    graph_case.source.graph_path.unlink()
    with pytest.raises(SessionError, match="is not there"):
        backend.prepare(graph_case.source, FP32)


def test_second_time_from_the_cache(backend: Backend, case: Any, feeds: Feeds, tmp_path: Path) -> None:
    inputs = feeds()
    for options in (
        replace(FP32, cache_dir=tmp_path / "cache"),
        replace(FP32, cache_dir=tmp_path / "cache", shapes=shapes_of(inputs)),
    ):
        first, second = (backend.prepare(case.source, options) for _ in range(2))
        assert not first.in_force.from_cache
        assert second.in_force.from_cache == (backend.name in CACHING | ENGINE_CACHING)
        assert np.array_equal(first.run(inputs)["out_sample"], second.run(inputs)["out_sample"])
        assert replace(second.in_force, from_cache=False) == first.in_force


def test_other_weights_never_share_a_cache_entry(
    backend: Backend, graph_case: Any, feeds: Feeds, weights: Any, write: Any, tmp_path: Path
) -> None:
    """Same graph bytes, same file names and sizes: only the digest tells the two apart."""
    if backend.name not in CACHING:
        pytest.skip("keeps no compiled models")
    options = replace(FP32, cache_dir=tmp_path / "cache")
    first = backend.prepare(graph_case.source, options).run(feeds())["out_sample"]
    weights["conv.bias"][0] += 1
    source = write(graph_case.source.graph_path.parent, weights, digest="other")
    session = backend.prepare(source, options)
    assert not session.in_force.from_cache
    assert np.allclose(session.run(feeds())["out_sample"][:, 0] - first[:, 0], 1, atol=1e-3)


def test_cache_entry_outlives_a_move(backend: Backend, graph_case: Any, feeds: Feeds, tmp_path: Path) -> None:
    """An entry may point into the weights, but must find them where the bundle is now."""
    if backend.name not in CACHING:
        pytest.skip("keeps no compiled models")
    options = replace(FP32, cache_dir=tmp_path / "cache")
    before = backend.prepare(graph_case.source, options).run(feeds())["out_sample"]
    moved = graph_case.source.graph_path.parent.rename(tmp_path / "moved")
    source = replace(
        graph_case.source, graph_path=moved / "model.onnx", weights_path=moved / "weights.safetensors"
    )
    session = backend.prepare(source, options)
    assert session.in_force.from_cache
    assert np.array_equal(session.run(feeds())["out_sample"], before)


@pytest.mark.parametrize("change", [{"threads": 2}, {"precision": "bf16"}, {"shapes": {"timestep": ()}}])
def test_other_options_never_share_a_cache_entry(
    backend: Backend, graph_case: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    if backend.name not in CACHING:
        pytest.skip("keeps no compiled models")
    if change.get("precision", "fp32") not in backend.devices()[0].precisions:
        pytest.skip(f"this device has no {change['precision']}")
    options = replace(FP32, cache_dir=tmp_path)
    backend.prepare(graph_case.source, options)
    assert not backend.prepare(graph_case.source, replace(options, **change)).in_force.from_cache
    assert backend.prepare(graph_case.source, options).in_force.from_cache


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "no checksum", "no blob", "foreign"])
def test_damaged_cache_entry(
    backend: Backend,
    graph_case: Any,
    feeds: Feeds,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if backend.name not in CACHING:
        pytest.skip("keeps no compiled models")
    options = replace(FP32, cache_dir=tmp_path)
    before = backend.prepare(graph_case.source, options).run(feeds())["out_sample"]
    [entry] = (tmp_path / backend.name).iterdir()
    _damage(entry, damage)
    with caplog.at_level(logging.WARNING):
        session = backend.prepare(graph_case.source, options)
    assert not session.in_force.from_cache
    assert "thrown away" in caplog.text
    assert np.array_equal(session.run(feeds())["out_sample"], before)
    assert backend.prepare(graph_case.source, options).in_force.from_cache


def _damage(entry: Path, damage: str) -> None:
    import hashlib

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

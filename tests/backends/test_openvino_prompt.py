"""What depends on the prompt alone, against the model left whole; and that another prompt is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile, openvino_prompt
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.openvino_backend import SHARED_SAMPLE
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]
PROMPT = "encoder_hidden_states"


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: Any) -> str:
    if request.param not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    return str(request.param)


@pytest.fixture
def unet(fp16_bundle: Path) -> GraphSource:
    return open_bundle(fp16_bundle).source("unet")


def feeds_of(unet: GraphSource, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents that are always the same, twice, and text states by a seed."""
    half = np.random.default_rng(9).standard_normal((1, 4, 16, 16)).astype(np.float32)
    width = int(unet.config["cross_attention_dim"])  # type: ignore[call-overload]
    return {
        "sample": np.concatenate([half, half]),
        "timestep": np.array(481.0, np.float32),
        PROMPT: np.random.default_rng(seed).standard_normal((2, 77, width)).astype(np.float32),
    }


def prepare(unet: GraphSource, precision: str, **more: Any) -> Any:
    shapes = {name: value.shape for name, value in feeds_of(unet).items()}
    return BACKEND.prepare(unet, replace(PrepareOptions(shapes, precision=precision, threads=1), **more))


def whole(unet: GraphSource, precision: str, **more: Any) -> Any:
    """A session of the model as it was before anything is taken out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_compile, "cut_prompt", lambda model, kind: None)
        session = prepare(unet, precision, **more)
    assert session._prompt is None
    return session


@pytest.mark.parametrize("shared", [False, True])
def test_no_bit_changes_whatever_the_prompt(
    unet: GraphSource, tmp_path: Path, precision: str, shared: bool
) -> None:
    """Prompts one after the other, the first one again, and the same from the cache."""
    extra = {SHARED_SAMPLE: shared}
    reference = whole(unet, precision, extra=extra)
    expected = {seed: reference.run(feeds_of(unet, seed))["out_sample"] for seed in (0, 1)}
    assert not LIMIT.holds(relative_l2(expected[0], expected[1]))
    for cached in (False, True):
        session = prepare(unet, precision, extra=extra, cache_dir=tmp_path)
        assert session.in_force.from_cache == cached
        assert session.in_force.precision == precision
        assert session._prompt is not None
        for seed in (0, 0, 1, 0):
            assert np.array_equal(session.run(feeds_of(unet, seed))["out_sample"], expected[seed])


def test_a_part_that_is_not_run_again_is_found(unet: GraphSource, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(unet, "fp32").run(feeds_of(unet, 1))["out_sample"]
    session = prepare(unet, "fp32")
    session.run(feeds_of(unet, 0))
    update = session._prompt.update
    monkeypatch.setattr(session._prompt, "update", lambda states: None)
    assert not LIMIT.holds(relative_l2(session.run(feeds_of(unet, 1))["out_sample"], expected))
    monkeypatch.setattr(session._prompt, "update", update)
    assert np.array_equal(session.run(feeds_of(unet, 1))["out_sample"], expected)


def test_states_that_change_in_place_are_noticed(unet: GraphSource) -> None:
    session = prepare(unet, "fp32")
    feeds = feeds_of(unet)
    first = session.run(feeds)["out_sample"]
    feeds[PROMPT][1, 76] *= -1  # the last token of the second prompt
    changed = session.run(feeds)["out_sample"]
    assert np.array_equal(changed, whole(unet, "fp32").run(feeds)["out_sample"])
    assert np.array_equal(changed[0], first[0])
    assert not np.array_equal(changed[1], first[1])


def test_the_part_runs_once_for_each_prompt(unet: GraphSource) -> None:
    session = prepare(unet, "fp32")
    runs: list[np.ndarray] = []
    request = session._prompt._request

    class Counting:
        def infer(self, given: Any, **how: Any) -> Any:
            runs.append(given[PROMPT].copy())
            return request.infer(given, **how)

    session._prompt._request = Counting()
    first, second = feeds_of(unet, 0), feeds_of(unet, 1)
    for feeds in (first, first, second, second, first):
        session.run(feeds | {"timestep": np.array(len(runs), np.float32)})
    assert [np.array_equal(states, first[PROMPT]) for states in runs] == [True, False, True]
    assert len(runs) == 3


def test_a_run_that_failed_is_done_again(unet: GraphSource) -> None:
    session = prepare(unet, "fp32")
    feeds = feeds_of(unet)
    expected = session.run(feeds)["out_sample"]
    request = session._prompt._request

    class Failing:
        def infer(self, given: Any, **how: Any) -> Any:
            request.infer(given, **how)
            raise RuntimeError("planted")

    session._prompt._request = Failing()
    with pytest.raises(RuntimeError, match="planted"):
        session._prompt.update(feeds_of(unet, 1)[PROMPT])
    session._prompt._request = request
    assert np.array_equal(session.run(feeds)["out_sample"], expected)


def test_free_shapes_leave_the_model_whole(unet: GraphSource) -> None:
    session = BACKEND.prepare(unet, PrepareOptions(precision="fp32", threads=1))
    assert session._prompt is None  # type: ignore[attr-defined]
    expected = whole(unet, "fp32").run(feeds_of(unet))["out_sample"]
    assert LIMIT.holds(relative_l2(session.run(feeds_of(unet))["out_sample"], expected))


def test_every_cross_attention_is_handed_over(unet: GraphSource) -> None:
    ov = pytest.importorskip("openvino")
    model = ov.Core().read_model(unet.graph_path)
    model.reshape({name: list(value.shape) for name, value in feeds_of(unet).items()})
    attentions = sum(op.get_type_name() == "ScaledDotProductAttention" for op in model.get_ordered_ops())
    part = openvino_prompt.cut_prompt(model, "f32")
    products = [op for op in part.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert len(products) == len(part.outputs) == attentions  # two for every second one
    assert [port.any_name for port in part.inputs] == [PROMPT]
    handed = {port.any_name: port.get_element_type() for port in part.outputs}
    given = {
        port.any_name: port.get_element_type()
        for port in model.inputs
        if port.any_name.startswith(openvino_prompt.HANDED)
    }
    assert handed == given
    assert PROMPT not in {port.any_name for port in model.inputs}
    assert openvino_prompt.cut_prompt(model, "f32") is None


def attention(quantized: bool) -> Any:
    """One cross-attention of OpenVINO's operators, whose keys may be quantized behind their projection."""
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    rng = np.random.default_rng(3)
    sample = ops.parameter([1, 2, 5, 4], np.float32, name="sample")
    states = ops.parameter([1, 7, 6], np.float32, name=PROMPT)
    for node, name in ((sample, "sample"), (states, PROMPT)):
        node.output(0).get_tensor().set_names({name})
    heads = []
    for _ in range(2):
        product = ops.matmul(
            states, ops.constant(rng.standard_normal((6, 8)).astype(np.float32)), False, False
        )
        if quantized and not heads:
            low, high = (ops.constant(np.array(edge, np.float32)) for edge in (-5.12, 5.08))
            product = ops.fake_quantize(product, low, high, low, high, 256)
        apart = ops.reshape(product, ops.constant(np.array([1, 7, 2, 4], np.int64)), False)
        heads.append(ops.transpose(apart, ops.constant(np.array([0, 2, 1, 3], np.int64))))
        heads[-1].output(0).get_tensor().set_names({f"a_{len(heads)}"})  # before the part's in the alphabet
    mask = ops.constant(np.array(0, np.float32))
    out = ops.scaled_dot_product_attention(sample, *heads, mask, causal=False)
    return ov.Model([out], [sample, states], "attention")


@pytest.mark.parametrize("quantized", [False, True])
def test_quantizing_keys_stays_with_the_attention(quantized: bool) -> None:
    """And the two models together compute what torch does."""
    ov = pytest.importorskip("openvino")
    torch = pytest.importorskip("torch")
    model = attention(quantized)
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    rng = np.random.default_rng(4)
    sample, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 2, 5, 4), (1, 7, 6)))
    part = openvino_prompt.cut_prompt(model, "f32")
    counts = [
        sum(op.get_type_name() == "FakeQuantize" for op in found.get_ordered_ops()) for found in (model, part)
    ]
    assert counts == [int(quantized), 0]
    core = ov.Core()
    handed = core.compile_model(part, "CPU", properties)({PROMPT: states})
    given = {openvino_prompt.handed_name(port): value for port, value in handed.items()}
    actual = core.compile_model(model, "CPU", properties)({"sample": sample, **given})[0]

    weights = np.random.default_rng(3)
    key, value = (states @ weights.standard_normal((6, 8)).astype(np.float32) for _ in range(2))
    if quantized:
        key = np.clip(np.rint(key / np.float32(0.04)), -128, 127) * np.float32(0.04)
    key, value = (
        torch.from_numpy(np.ascontiguousarray(x.reshape(1, 7, 2, 4).transpose(0, 2, 1, 3)))
        for x in (key, value)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(torch.from_numpy(sample), key, value).numpy()
    assert actual.shape == expected.shape
    assert LIMIT.holds(relative_l2(actual, expected))
    unscaled = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(sample), key, value, scale=1.0
    )
    assert not LIMIT.holds(relative_l2(actual, unscaled.numpy()))


def test_an_entry_of_another_form_is_compiled_again(unet: GraphSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first model ends at"):
        openvino_compile._taken_apart(b"\xff" * 40)
    blobs = [b"main", b"prompt"]
    assert openvino_compile._taken_apart(b"".join(openvino_compile._framed(blobs))) == blobs
    assert openvino_compile._taken_apart(b"".join(openvino_compile._framed(blobs[:1]))) == blobs[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_compile, "_framed", lambda blobs: blobs[:1])  # as it was before
        prepare(unet, "fp32", cache_dir=tmp_path).close()
    session = prepare(unet, "fp32", cache_dir=tmp_path)
    assert not session.in_force.from_cache
    assert prepare(unet, "fp32", cache_dir=tmp_path).in_force.from_cache

"""A shared skip connection that is convolved once, against diffusers, torch and the model left whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.openvino_backend import SHARED_SAMPLE
from kiln.backends.openvino_guidance import share_before_prompt
from kiln.backends.openvino_skip import convolve_shared_skips_once
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]
CHANNELS, SHARED, GROUPS, SIDE = 8, 4, 6, 5


@pytest.fixture
def unet(tiny_bundle: Path) -> GraphSource:
    return open_bundle(tiny_bundle).source("unet")


def feeds_of(unet: GraphSource) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width = int(unet.config["cross_attention_dim"])  # type: ignore[call-overload]
    return {
        "sample": rng.standard_normal((1, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(481.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, width)).astype(np.float32),
    }


def shared_model(unet: GraphSource) -> Any:
    """The UNet for a guided batch, of which half is computed once where it can be."""
    import openvino

    model = openvino.Core().read_model(unet.graph_path)
    shapes = {name: list(value.shape) for name, value in feeds_of(unet).items()}
    model.reshape(shapes | {"sample": [2, 4, 16, 16]})
    assert convolve_shared_skips_once(model) == 0  # nothing is shared yet
    assert share_before_prompt(model)
    return model


def run(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(feeds)[0])


def kinds(model: Any) -> list[str]:
    return [op.get_type_name() for op in model.get_ordered_ops()]


def test_the_unet_equals_diffusers(unet: GraphSource, tiny_sd1: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    feeds, model = feeds_of(unet), shared_model(unet)
    before = kinds(model)
    assert convolve_shared_skips_once(model) == 1
    # The block's two convolutions of these channels, and the normalization before one of them.
    assert kinds(model).count("Convolution") == before.count("Convolution") + 2
    assert kinds(model).count("GroupNormalization") == before.count("GroupNormalization") + 1
    module = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").eval()
    twice = feeds | {"sample": np.concatenate([feeds["sample"]] * 2)}
    with torch.no_grad():
        expected = module(*(torch.from_numpy(value) for value in twice.values())).sample.numpy()
    actual = run(model, feeds)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))
    assert not LIMIT.holds(relative_l2(actual[::-1], expected))  # the halves are not mixed up


@pytest.mark.parametrize(("precision", "expected"), [("bf16", [1]), ("fp32", [])])
def test_it_is_done_in_bf16_alone(
    unet: GraphSource, monkeypatch: pytest.MonkeyPatch, precision: str, expected: list[int]
) -> None:
    if precision not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    feeds = feeds_of(unet) | {"sample": np.concatenate([feeds_of(unet)["sample"]] * 2)}
    options = PrepareOptions({name: v.shape for name, v in feeds.items()}, precision="fp32", threads=1)
    reference = BACKEND.prepare(unet, options).run(feeds)["out_sample"]
    done: list[int] = []
    monkeypatch.setattr(
        openvino_compile,
        "convolve_shared_skips_once",
        lambda model: done.append(convolve_shared_skips_once(model)),
    )
    shared = BACKEND.prepare(unet, replace(options, precision=precision, extra={SHARED_SAMPLE: True}))
    actual = shared.run(feeds)["out_sample"]
    assert done == expected
    assert THRESHOLDS["component_bf16_relative_l2"].holds(relative_l2(actual, reference))
    assert np.array_equal(actual, reference) == (precision == "fp32")


def block(kernel: np.ndarray, *, groups: int = GROUPS, scale: Any = None, more: str = "") -> Any:
    """A model: ``cat(h, s twice)``, normalized, SiLU, quantized if ``scale`` is given, convolved."""
    import openvino
    from openvino import opset13 as ops

    ours = ops.parameter([2, CHANNELS, SIDE, SIDE], np.float32, name="h")
    shared = ops.parameter([1, SHARED, SIDE, SIDE], np.float32, name="s")
    twice = [shared, shared] if more != "two tensors" else [shared, ops.relu(shared)]
    both = ops.concat([ours, ops.concat(twice, 0)], 1)
    size = CHANNELS + SHARED
    gamma, beta = (ops.constant(np.linspace(low, low + 1, size, dtype=np.float32)) for low in (0.5, -0.5))
    normal = ops.group_normalization(both, gamma, beta, groups, 1e-5)
    active: Any = ops.multiply(normal, ops.sigmoid(normal))
    weight: Any = ops.constant(kernel)
    if scale is not None:
        limits = [ops.constant(np.float32(v)) for v in (-0.3, 3.0)] * 2
        active = ops.fake_quantize(active, *limits, 256)
        weight = ops.multiply(ops.convert(weight, np.float32), ops.constant(scale))
    out = ops.convolution(active, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    results = [out, ops.relu(active)] if more == "another reader" else [out]
    return openvino.Model(results, [ours, shared], "block")


def values() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Inputs, an int8 kernel and its scales."""
    rng = np.random.default_rng(0)
    feeds = {
        "h": rng.standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32),
        "s": rng.standard_normal((1, SHARED, SIDE, SIDE)).astype(np.float32),
    }
    kernel = rng.integers(-127, 128, (3, CHANNELS + SHARED, 3, 3)).astype(np.int8)
    return feeds, kernel, rng.uniform(0.01, 0.02, (3, 1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_block_equals_torch(quantized: bool) -> None:
    torch = pytest.importorskip("torch")
    feeds, integers, scale = values()
    kernel = integers * scale
    model = block(integers, scale=scale) if quantized else block(kernel)
    assert convolve_shared_skips_once(model) == 1
    assert kinds(model).count("Convolution") == 2
    both = torch.from_numpy(np.concatenate([feeds["h"], np.concatenate([feeds["s"]] * 2)], axis=1))
    gamma, beta = (torch.linspace(low, low + 1, CHANNELS + SHARED) for low in (0.5, -0.5))
    active = torch.nn.functional.silu(torch.nn.functional.group_norm(both, GROUPS, gamma, beta, 1e-5))
    if quantized:
        step = 3.3 / 255
        active = torch.round((active.clamp(-0.3, 3.0) + 0.3) / step) * step - 0.3
    expected = torch.nn.functional.conv2d(active, torch.from_numpy(kernel), padding=1).numpy()
    limit = THRESHOLDS["component_bf16_relative_l2"] if quantized else LIMIT  # a value on an edge may round
    assert limit.holds(relative_l2(run(model, feeds), expected))
    swapped = feeds | {"h": feeds["h"][:, ::-1].copy()}
    assert not limit.holds(relative_l2(run(model, swapped), expected))


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 4},  # of three channels: one lies in both parts
        {"more": "two tensors"},
        {"more": "another reader"},
    ],
)
def test_others_are_left_alone(change: dict[str, Any]) -> None:
    _, integers, scale = values()
    model = block(integers * scale, **change)
    before = kinds(model)
    assert convolve_shared_skips_once(model) == 0
    assert kinds(model) == before

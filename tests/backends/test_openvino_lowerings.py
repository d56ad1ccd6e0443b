"""OpenVINO's lowerings against torch, diffusers, and bit for bit against the model that was not lowered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile, openvino_guidance, openvino_storage, openvino_upsample
from kiln.backends.base import GraphSource, PrepareOptions, Session
from kiln.backends.openvino_backend import SHARED_SAMPLE, WHERE_POSSIBLE
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle
from kiln.errors import SessionError

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]


@pytest.fixture
def unet(tiny_bundle: Path) -> GraphSource:
    """The UNet of the tiny SD1."""
    return open_bundle(tiny_bundle).source("unet")


@pytest.fixture
def half_unet(fp16_bundle: Path) -> GraphSource:
    """The same UNet with weights stored in fp16."""
    return open_bundle(fp16_bundle).source("unet")


@pytest.fixture(scope="module")
def sharing(tiny_bundle: Path) -> Session:
    """The UNet for a guided batch of ``feeds_of``, which computes once what the halves share."""
    unet = open_bundle(tiny_bundle).source("unet")
    return BACKEND.prepare(unet, options_of(feeds_of(unet), extra={SHARED_SAMPLE: True}))


def feeds_of(unet: GraphSource, latents: int = 1) -> dict[str, np.ndarray]:
    """A guided batch: the same latents with two prompts each."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((latents, 4, 16, 16)).astype(np.float32)
    width = int(unet.config["cross_attention_dim"])  # type: ignore[call-overload]
    return {
        "sample": np.concatenate([half, half]),
        "timestep": np.array(481.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((2 * latents, 77, width)).astype(np.float32),
    }


def options_of(feeds: dict[str, np.ndarray], **more: Any) -> PrepareOptions:
    shapes = {name: value.shape for name, value in feeds.items()}
    return replace(PrepareOptions(shapes, precision="fp32", threads=1), **more)


def diffusers_output(tiny_sd1: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").eval()
    with torch.no_grad():
        out: np.ndarray = module(*(torch.from_numpy(value) for value in feeds.values())).sample.numpy()
    return out


def test_the_lowered_unet_equals_diffusers(unet: GraphSource, sharing: Session, tiny_sd1: Path) -> None:
    feeds = feeds_of(unet)
    expected = diffusers_output(tiny_sd1, feeds)
    actual = sharing.run(feeds)["out_sample"]
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))
    assert not LIMIT.holds(relative_l2(actual[::-1], expected))  # the halves are not mixed up


@pytest.mark.parametrize(("latents", "precision"), [(1, "bf16"), (2, "fp32")])
def test_sharing_changes_no_bit(
    unet: GraphSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latents: int, precision: str
) -> None:
    """By itself: in bf16 a skip connection that is convolved once changes the order of a sum."""
    if precision not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    if precision == "bf16":
        monkeypatch.setattr(openvino_compile, "convolve_shared_skips_once", lambda model: 0)
    feeds = feeds_of(unet, latents)
    options = options_of(feeds, precision=precision, extra={SHARED_SAMPLE: True}, cache_dir=tmp_path)
    shared = [BACKEND.prepare(unet, options) for _ in range(2)]
    assert [session.in_force.from_cache for session in shared] == [False, True]
    # One cache, two models: without the promise another one is compiled.
    plain = BACKEND.prepare(unet, replace(options, extra={}))
    assert not plain.in_force.from_cache
    expected = plain.run(feeds)["out_sample"]
    for session in shared:
        assert np.array_equal(session.run(feeds)["out_sample"], expected)


def test_different_halves_are_refused(unet: GraphSource, sharing: Session) -> None:
    feeds = feeds_of(unet)
    wrong = feeds | {"sample": feeds["sample"] * np.array([1, 2], np.float32).reshape(2, 1, 1, 1)}
    with pytest.raises(SessionError, match="halves of sample differ"):
        sharing.run(wrong)
    with pytest.raises(SessionError, match=r"takes sample: float32 \[2, 4, 16, 16\]; got float32 \[1, 4"):
        sharing.run(feeds | {"sample": feeds["sample"][:1]})
    sharing.run(feeds)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extra": {SHARED_SAMPLE: "yes"}}, "SHARED_SAMPLE is True or False"),
        ({"extra": {SHARED_SAMPLE: True}, "shapes": {}}, "fixed shapes and an even batch"),
        ({"extra": {SHARED_SAMPLE: True}, "shapes": {"sample": (1, 4, 16, 16)}}, "fixed shapes"),
    ],
)
def test_sharing_that_cannot_be(unet: GraphSource, change: dict[str, Any], told: str) -> None:
    with pytest.raises(SessionError, match=told):
        BACKEND.prepare(unet, options_of(feeds_of(unet), **change))
    vae = open_bundle(unet.graph_path.parent.parent).source("vae_decoder")
    with pytest.raises(SessionError, match="for a unet"):
        BACKEND.prepare(vae, PrepareOptions(extra={SHARED_SAMPLE: True}))


def test_sharing_where_possible(unet: GraphSource) -> None:
    """With halves it is the same as asking for it; an odd batch is computed as it is."""
    feeds = feeds_of(unet)
    plain = BACKEND.prepare(unet, options_of(feeds)).run(feeds)["out_sample"]
    shared = BACKEND.prepare(unet, options_of(feeds, extra={SHARED_SAMPLE: WHERE_POSSIBLE}))
    assert np.array_equal(shared.run(feeds)["out_sample"], plain)
    differing = np.arange(feeds["sample"].size, dtype=np.float32).reshape(feeds["sample"].shape)
    with pytest.raises(SessionError, match="halves of sample differ"):
        shared.run(feeds | {"sample": differing})
    one = {name: array[:1] if array.ndim else array for name, array in feeds.items()}
    single = BACKEND.prepare(unet, options_of(one, extra={SHARED_SAMPLE: WHERE_POSSIBLE})).run(one)
    assert single["out_sample"].shape == (1, 4, 16, 16)


def test_what_lies_before_the_prompt_has_half_the_batch(unet: GraphSource) -> None:
    model = static_model(unet)
    assert openvino_guidance.share_before_prompt(model)
    convolutions = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
    batches = [op.output(0).get_shape()[0] for op in convolutions]
    assert batches[:3] == [1, 1, 1]  # conv_in and the first residual block
    assert set(batches[4:]) == {2}
    assert not openvino_guidance.share_before_prompt(model)  # an odd batch now


def static_model(unet: GraphSource) -> Any:
    ov = pytest.importorskip("openvino")
    model = ov.Core().read_model(unet.graph_path)
    model.reshape({name: list(value.shape) for name, value in feeds_of(unet).items()})
    return model


def upsampled(kernel: np.ndarray, side: int, **change: Any) -> Any:
    """A model of OpenVINO: nearest upsampling by two, then a convolution."""
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    image = ops.parameter([2, kernel.shape[1], side, side + 1], np.float32, name="x")
    sizes = ops.constant(np.array([2 * side, 2 * side + 2], np.int64))
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} | change.get("how", {})
    axes = ops.constant(np.array([2, 3], np.int64))
    large = ops.interpolate(image, sizes, "nearest", "sizes", axes=axes, **how)
    pads = change.get("pads", [1, 1])
    out = ops.convolution(large, openvino_storage.weight(kernel), [1, 1], pads, pads, [1, 1])
    return ov.Model([out], [image], "upsampled")


def kernel_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((5, 3, 3, 3)).astype(np.float16)


def run_model(model: Any, image: np.ndarray) -> np.ndarray:
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([image])[0])


@pytest.mark.parametrize("side", [1, 2, 5])
def test_multiplying_before_upsampling_equals_torch(side: int) -> None:
    torch = pytest.importorskip("torch")
    kernel = kernel_of()
    image = np.random.default_rng(1).standard_normal((2, 3, side, side + 1)).astype(np.float32)
    large = torch.nn.functional.interpolate(torch.from_numpy(image), scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.conv2d(large, torch.from_numpy(kernel).float(), padding=1).numpy()
    model = upsampled(kernel, side)
    assert openvino_upsample.multiply_before_upsampling(model) == 1
    assert not {op.get_type_name() for op in model.get_ordered_ops()} & {"Interpolate", "Convolution"}
    actual = run_model(model, image)
    assert actual.shape == expected.shape
    assert LIMIT.holds(relative_l2(actual, expected))
    swapped = kernel[:, :, ::-1].copy()  # rows of the kernel in the wrong order
    wrong = upsampled(swapped, side)
    openvino_upsample.multiply_before_upsampling(wrong)
    assert not LIMIT.holds(relative_l2(run_model(wrong, image), expected))


@pytest.mark.parametrize(
    "change",
    [
        {"how": {"coordinate_transformation_mode": "half_pixel"}},
        {"how": {"nearest_mode": "ceil"}},
        {"pads": [0, 0]},
    ],
)
def test_other_upsampling_is_left_alone(change: dict[str, Any]) -> None:
    assert openvino_upsample.multiply_before_upsampling(upsampled(kernel_of(), 4, **change)) == 0


def test_products_that_need_much_memory_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 * 4 * 5 pixels, 9 taps, 5 channels, 4 bytes
    monkeypatch.setattr(openvino_upsample, "LARGEST", 7199)
    assert openvino_upsample.multiply_before_upsampling(upsampled(kernel_of(), 4)) == 0
    monkeypatch.setattr(openvino_upsample, "LARGEST", 7200)
    assert openvino_upsample.multiply_before_upsampling(upsampled(kernel_of(), 4)) == 1


def test_the_unet_has_three_upsamplings(unet: GraphSource) -> None:
    assert openvino_upsample.multiply_before_upsampling(static_model(unet)) == 3


def test_the_mark_changes_no_bit(half_unet: GraphSource, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = feeds_of(half_unet)
    marked = BACKEND.prepare(half_unet, options_of(feeds)).run(feeds)["out_sample"]
    monkeypatch.setattr(openvino_compile, "keep_storage_type", lambda model: 0)
    assert np.array_equal(marked, BACKEND.prepare(half_unet, options_of(feeds)).run(feeds)["out_sample"])


def test_every_stored_weight_is_marked_and_nothing_else(half_unet: GraphSource) -> None:
    model = static_model(half_unet)
    count = openvino_storage.keep_storage_type(model)
    marked = [op for op in model.get_ordered_ops() if openvino_storage.MARK in op.get_rt_info()]
    assert len(marked) == count > 600
    for op in marked:
        assert op.get_type_name() == "Convert"
        assert op.input_value(0).get_node().get_type_name() == "Constant"

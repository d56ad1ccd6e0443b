"""Group normalization with channels last against torch's, and what is lost where sums are rounded to bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile, openvino_group_norm
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
GROUPS, CHANNELS, SIDE, EPS = 4, 32, 8, 1e-5
LIMITS = {"f32": THRESHOLDS["component_relative_l2"], "bf16": THRESHOLDS["component_bf16_relative_l2"]}


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images too, which are left alone elsewhere."""
    monkeypatch.setattr(openvino_group_norm, "LEAST", 0)


@pytest.fixture(params=["f32", "bf16"])
def hint(request: Any) -> str:
    if request.param == "bf16" and "bf16" not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    return str(request.param)


@pytest.fixture
def unet(tiny_bundle: Path) -> GraphSource:
    return open_bundle(tiny_bundle).source("unet")


def values(shifted: bool) -> dict[str, np.ndarray]:
    """An image whose mean is 16 times its deviation, in numbers that bf16 has: an error is not its own."""
    rng = np.random.default_rng(0)
    image = np.round(64 + 4 * rng.standard_normal((2, CHANNELS, SIDE, SIDE + 1)))
    shift = (
        np.round(16 * rng.standard_normal((2, CHANNELS, 1, 1))) if shifted else np.zeros((2, CHANNELS, 1, 1))
    )
    return {
        "image": image.astype(np.float32),
        "shift": shift.astype(np.float32),
        "gamma": rng.uniform(0.5, 1.5, CHANNELS).astype(np.float16),
        "beta": rng.standard_normal(CHANNELS).astype(np.float16),
    }


def expected_of(given: dict[str, np.ndarray]) -> np.ndarray:
    """What torch makes of it in float64."""
    torch = pytest.importorskip("torch")
    image, shift, gamma, beta = (torch.from_numpy(v.astype(np.float64)) for v in given.values())
    normal: np.ndarray = torch.nn.functional.group_norm(image + shift, GROUPS, gamma, beta, EPS).numpy()
    return normal.astype(np.float32)


def model_of(given: dict[str, np.ndarray], *, shifted: bool, groups: int = GROUPS) -> Any:
    """The layer between two convolutions that change nothing, as OpenVINO leaves a graph's end in float32."""
    import openvino
    from openvino import opset13 as ops

    image = ops.parameter(list(given["image"].shape), np.float32, name="image")
    shift = ops.parameter(list(given["shift"].shape), np.float32, name="shift")
    kernel = np.eye(CHANNELS, dtype=np.float32).reshape(CHANNELS, CHANNELS, 1, 1)

    def same(node: Any) -> Any:
        return ops.convolution(node, ops.constant(kernel), [1, 1], [0, 0], [0, 0], [1, 1])

    def stored(name: str) -> Any:
        return ops.convert(ops.constant(given[name]), np.float32)

    before = ops.add(same(image), shift) if shifted else same(image)
    normal = ops.group_normalization(before, stored("gamma"), stored("beta"), groups, EPS)
    return openvino.Model([same(normal)], [image, *([shift] if shifted else [])], "normal")


def run(model: Any, given: dict[str, np.ndarray], hint: str) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return np.array(compiled({port.any_name: given[port.any_name] for port in compiled.inputs})[0])


def lowered(model: Any) -> Any:
    import openvino

    assert openvino_group_norm.normalize_channels_last(openvino.Core(), model) == 1
    assert "GroupNormalization" not in kinds(model)
    return model


def kinds(model: Any) -> list[str]:
    return [op.get_type_name() for op in model.get_ordered_ops()]


@pytest.mark.parametrize("shifted", [False, True])
def test_it_equals_torch(hint: str, shifted: bool) -> None:
    given = values(shifted)
    expected = expected_of(given)
    actual = run(lowered(model_of(given, shifted=shifted)), given, hint)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert LIMITS[hint].holds(relative_l2(actual, expected))
    wrong = run(lowered(model_of(given, shifted=shifted, groups=2 * GROUPS)), given, hint)
    assert not LIMITS[hint].holds(relative_l2(wrong, expected))


@pytest.mark.parametrize("shifted", [False, True])
def test_sums_without_the_mark_are_found(monkeypatch: pytest.MonkeyPatch, shifted: bool) -> None:
    if "bf16" not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    given = values(shifted)
    monkeypatch.setattr(openvino_group_norm, "_MARK", "")
    openvino_group_norm._marked_sums.cache_clear()
    actual = run(lowered(model_of(given, shifted=shifted)), given, "bf16")
    openvino_group_norm._marked_sums.cache_clear()
    assert not LIMITS["bf16"].holds(relative_l2(actual, expected_of(given)))


@pytest.mark.parametrize("shifted", [False, True])
def test_nothing_is_turned_between_convolutions(shifted: bool) -> None:
    if "bf16" not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    given = values(shifted)
    plain, changed = (
        turned(model, given)
        for model in (model_of(given, shifted=shifted), lowered(model_of(given, shifted=shifted)))
    )
    assert plain >= 2
    assert changed == 0


def turned(model: Any, given: dict[str, np.ndarray]) -> int:
    """How often a whole image is copied between the first convolution and the last."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    ops = compiled.get_runtime_model().get_ordered_ops()
    layers = [op.get_rt_info()["layerType"].astype(str) for op in ops]
    first, last = (
        find("Convolution") for find in (layers.index, lambda x: len(layers) - 1 - layers[::-1].index(x))
    )
    between = zip(ops[first:last], layers[first:last], strict=True)
    size = given["image"].size
    return sum(kind == "Reorder" and np.prod(list(op.output(0).get_shape())) == size for op, kind in between)


def test_a_shift_that_something_else_reads_stays(hint: str) -> None:
    """Then it has to be added anyway."""
    import openvino
    from openvino import opset13 as ops

    given = values(True)
    model = model_of(given, shifted=True)
    added = next(op for op in model.get_ordered_ops() if op.get_type_name() == "Add")
    both = openvino.Model(
        [*(r.input_value(0) for r in model.get_results()), ops.relu(added).output(0)],
        model.get_parameters(),
        "b",
    )
    plain = kinds(lowered(model_of(given, shifted=False))).count("Add")
    assert kinds(lowered(both)).count("Add") == plain + 1
    assert LIMITS[hint].holds(relative_l2(run(both, given, hint), expected_of(given)))


def test_every_one_of_the_unet_is_rewritten(unet: GraphSource) -> None:
    import openvino

    core = openvino.Core()
    model = core.read_model(unet.graph_path)
    assert openvino_group_norm.normalize_channels_last(core, model) == 0  # shapes are open
    model.reshape({"sample": [2, 4, 16, 16], "timestep": [], "encoder_hidden_states": [2, 77, 32]})
    count = kinds(model).count("GroupNormalization")
    assert openvino_group_norm.normalize_channels_last(core, model) == count > 20
    assert "GroupNormalization" not in kinds(model)


def test_small_images_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    both = 2 * CHANNELS * SIDE * (SIDE + 1)
    for least, count in ((both, 1), (both + 1, 0)):
        monkeypatch.setattr(openvino_group_norm, "LEAST", least)
        model = model_of(values(False), shifted=False)
        assert openvino_group_norm.normalize_channels_last(openvino.Core(), model) == count


def test_smaller_images_are_worth_it_where_the_model_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino
    from openvino import opset13 as ops

    both = 2 * CHANNELS * SIDE * (SIDE + 1)
    monkeypatch.setattr(openvino_group_norm, "LEAST", both + 1)
    bounds = [ops.constant(np.array(bound, np.float32)) for bound in (-2, 2, -2, 2)]
    for least, count in ((both, 1), (both + 1, 0)):
        monkeypatch.setattr(openvino_group_norm, "LEAST_INT8", least)
        plain = model_of(values(False), shifted=False)
        quantized = ops.fake_quantize(plain.output(0).get_node().input_value(0), *bounds, 256)
        model = openvino.Model([quantized], plain.get_parameters(), "quantized")
        assert openvino_group_norm.normalize_channels_last(openvino.Core(), model) == count
        assert openvino_group_norm.normalize_channels_last(openvino.Core(), plain) == 0


@pytest.mark.parametrize(
    ("since", "precision", "left"),
    [((2026, 4), "bf16", False), ((9999,), "bf16", True), ((2026, 4), "fp32", True)],
)
def test_only_bf16_and_engines_with_the_mark(
    unet: GraphSource, monkeypatch: pytest.MonkeyPatch, since: tuple[int, ...], precision: str, left: bool
) -> None:
    if precision not in BACKEND.devices()[0].precisions:
        pytest.skip("a processor without bf16")
    seen: list[int] = []
    real = openvino_group_norm.normalize_channels_last
    monkeypatch.setattr(openvino_compile, "normalize_channels_last", lambda *a: seen.append(real(*a)))
    monkeypatch.setattr(openvino_compile, "MARKED_SINCE", since)
    shapes = {"sample": (2, 4, 16, 16), "timestep": (), "encoder_hidden_states": (2, 77, 32)}
    BACKEND.prepare(unet, PrepareOptions(shapes, precision=precision, threads=1)).close()
    assert bool(seen) != left

"""The self-test's network: numpy's result against torch, ONNX Runtime and onnx's own evaluator."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.backends.doctor import selftest
from kiln.benchmarks.parity import THRESHOLDS, relative_l2

LIMIT = THRESHOLDS["component_relative_l2"]
HALF = THRESHOLDS["component_bf16_relative_l2"]


def by_reference_evaluator() -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    (result,) = ReferenceEvaluator(selftest.onnx_model()).run(None, {"sample": selftest.sample()})
    return np.asarray(result)


def by_onnxruntime() -> np.ndarray:
    module = pytest.importorskip("onnxruntime")
    session = module.InferenceSession(selftest.onnx_model(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"sample": selftest.sample()})
    return np.asarray(result)


def by_torch() -> np.ndarray:
    torch = pytest.importorskip("torch")
    return selftest.torch_output(torch, "cpu", torch.float32)


@pytest.mark.parametrize("oracle", [by_reference_evaluator, by_onnxruntime, by_torch])
def test_numpy_agrees_with(oracle: object) -> None:
    assert callable(oracle)
    result = oracle()
    assert result.shape == selftest.expected().shape == (1, 4, 24, 24)
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert LIMIT.holds(relative_l2(result, selftest.expected()))
    assert selftest.compare(result).near("fp32")


def test_half_precision_passes_its_floor_and_differs() -> None:
    torch = pytest.importorskip("torch")
    result = selftest.torch_output(torch, "cpu", torch.bfloat16)
    found = selftest.compare(result)
    assert found.relative_l2 > 1e-4
    assert HALF.holds(found.relative_l2)
    assert found.near("half")
    assert not found.near("fp32")


def test_every_part_of_the_network_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel that leaves out one tensor's work must be seen, whichever it is.
    original = selftest.weights()
    right = selftest.expected()
    for name in original:
        planted = original | {name: np.zeros_like(original[name])}
        monkeypatch.setattr(selftest, "weights", lambda planted=planted: planted)
        wrong = selftest.expected()
        monkeypatch.setattr(selftest, "weights", lambda: original)
        assert not selftest.compare(wrong.astype(np.float32)).near("half"), name
    assert selftest.compare(right.astype(np.float32)).near("fp32")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_swapped_neighbours_are_found(axis: int) -> None:
    wrong = selftest.expected().copy()
    a, b = (np.take(wrong, [i], axis) for i in (0, 2))
    index = [slice(None)] * 4
    for place, values in ((0, b), (2, a)):
        index[axis] = slice(place, place + 1)
        wrong[tuple(index)] = values
    assert not selftest.compare(wrong).near("half")


def test_a_scaled_result_is_found_although_its_cosine_is_1() -> None:
    found = selftest.compare(selftest.expected() * 1.01)
    assert found.cosine > 1 - 1e-9
    assert found.relative_l2 == pytest.approx(0.01)
    assert not found.near("fp32")
    assert selftest.compare(selftest.expected()).near("fp32")


def test_nan_and_another_shape() -> None:
    result = selftest.expected().copy()
    assert not selftest.compare(result[:, :3]).shape_right
    result[0, 0, 0, 0] = np.nan
    found = selftest.compare(result)
    assert found.shape_right
    assert not found.finite


def test_the_graph_is_the_same_every_time_and_of_a_version_that_all_engines_have() -> None:
    import onnx

    assert selftest.onnx_model() == selftest.onnx_model()
    for half in (False, True):
        model = onnx.load_from_string(selftest.onnx_model(half))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        assert model.ir_version <= 8

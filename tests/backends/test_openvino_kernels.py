"""int8 kernels of convolutions in floats lie in a file: which, what it holds, what is computed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile, openvino_kernels
from kiln.backends.base import GraphSource
from kiln.backends.engine import parse_version
from kiln.backends.openvino_kernels import float_kernels, kernels_in_floats, may_have_kernels, read_in_floats
from kiln.backends.openvino_mapped import stored_tensors
from kiln.backends.openvino_storage import MARK
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import SessionError

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
weightless = pytest.mark.skipif(
    parse_version(BACKEND.probe().version) < openvino_compile.WEIGHTLESS_SINCE,
    reason="this OpenVINO keeps weights in its compiled models",
)
LIMIT = THRESHOLDS["component_relative_l2"]
CHANNELS, OUT, SIDE = 8, 16, 6
KINDS = ("BF16", "F32")


def tensors() -> dict[str, np.ndarray]:
    """Three int8 weights with scales: of a convolution in floats, of one in uint8, of a matrix product."""
    rng = np.random.default_rng(0)
    shapes = {"float": (OUT, CHANNELS, 3, 3), "quantized": (OUT, CHANNELS, 3, 3), "matrix": (SIDE, SIDE)}
    made: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        made[name] = rng.integers(-127, 128, shape).astype(np.int8)
        made[f"{name}.scale"] = (0.01 + rng.random(shape[0]) / 100).astype(np.float32)
    return made


def graph_of(given: dict[str, np.ndarray]) -> Any:
    """Both convolutions of one image, their sum, and its product with the matrix."""
    from onnx import TensorProto, helper, numpy_helper

    ranges = {"x_scale": np.array(0.03, np.float32), "x_zero": np.array(120, np.uint8)}
    rows: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], "q", {}),
        ("DequantizeLinear", ["q", "x_scale", "x_zero"], "d", {}),
        *(
            ("DequantizeLinear", [n, f"{n}.scale"], f"{n}.f", {"axis": 0})
            for n in given
            if f"{n}.scale" in given
        ),
        ("Conv", ["x", "float.f"], "one", {"pads": [1, 1, 1, 1]}),
        ("Conv", ["d", "quantized.f"], "other", {"pads": [1, 1, 1, 1]}),
        ("Add", ["one", "other"], "sum", {}),
        ("Transpose", ["matrix.f"], "turned", {"perm": [1, 0]}),
        ("MatMul", ["sum", "turned"], "y", {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **facts) for op, inputs, output, facts in rows],
        "kernels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (given | ranges).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture
def core() -> Any:
    return pytest.importorskip("openvino").Core()


@pytest.fixture
def model(core: Any) -> Any:
    return core.read_model(graph_of(tensors()).SerializeToString())


def image() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32)


def computed(core: Any, model: Any, hint: str = "f32") -> np.ndarray:
    properties = {"INFERENCE_PRECISION_HINT": hint, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core.compile_model(model, "CPU", properties)
    return np.array(compiled([image()])[0])


def reference(given: dict[str, np.ndarray]) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    out: np.ndarray = ReferenceEvaluator(graph_of(given)).run(None, {"x": image()})[0]
    return out


def test_only_convolutions_in_floats_are_meant(model: Any, weights: Path) -> None:
    stored = stored_tensors(weights)
    assert may_have_kernels(weights)
    assert kernels_in_floats(model, stored) == ("float",)
    assert kernels_in_floats(model, {k: v for k, v in stored.items() if k != "float.scale"}) == ()
    assert kernels_in_floats(model, {"float": replace(stored["float"], dtype="F16")}) == ()


def test_a_file_without_int8_kernels(core: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    given = tensors()
    save_file({name: given[name] for name in ("matrix", "matrix.scale")}, tmp_path / "matrix.safetensors")
    assert not may_have_kernels(tmp_path / "matrix.safetensors")
    assert not may_have_kernels(tmp_path / "none.safetensors")
    model = core.read_model(graph_of(given).SerializeToString())
    with float_kernels(model, tmp_path / "matrix.safetensors", "BF16", tmp_path / "room") as made:
        assert made is None
    assert not (tmp_path / "room").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_what_numpy_rounds_to(
    model: Any, weights: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ml_dtypes

    monkeypatch.setattr(openvino_kernels, "_BLOCK", 100)  # less than two rows
    given = tensors()
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "BF16" else np.float32)
    expected = (given["float"] * given["float.scale"].reshape(-1, 1, 1, 1)).astype(dtype)
    with float_kernels(model, weights, kind, tmp_path / "room", whole=True) as made:
        assert made is not None
        place = made.placed["float"]
        raw = made.path.read_bytes()
        assert place.offset >= weights.stat().st_size
        assert raw[place.offset :] == expected.tobytes()
        for name, tensor in stored_tensors(weights).items():  # at their own places, but for the kernel
            there = raw[tensor.offset : tensor.offset + tensor.nbytes]
            assert there == (bytes(tensor.nbytes) if name == "float" else given[name].tobytes())
    assert list((tmp_path / "room").iterdir()) == []


@pytest.mark.parametrize(
    ("side", "before", "after", "meant"),
    [(1, False, False, True), (1, True, False, False), (1, False, True, False), (3, True, True, True)],
)
def test_what_becomes_a_product_is_left_alone(
    core: Any, weights: Path, side: int, before: bool, after: bool, meant: bool
) -> None:
    """A convolution of one tap beside a transposition, which OpenVINO computes as a product with int8."""
    from openvino import Model
    from openvino import opset13 as ops

    kernel = ops.constant(np.ones((OUT, CHANNELS, side, side), np.int8), name="float")
    product = ops.multiply(ops.convert(kernel, "f32"), np.ones((OUT, 1, 1, 1), np.float32))
    shape = [2, SIDE, SIDE, CHANNELS] if before else [2, CHANNELS, SIDE, SIDE]
    x = ops.parameter(shape, np.float32, name="x")
    given = ops.transpose(x, np.array([0, 3, 1, 2])) if before else ops.relu(x)
    y = ops.convolution(given, product, [1, 1], [0, 0], [0, 0], [1, 1])
    y = ops.add(y, np.ones((1, OUT, 1, 1), np.float32))
    model = Model([ops.transpose(y, np.array([0, 2, 3, 1])) if after else ops.relu(y)], [x], "one tap")
    assert kernels_in_floats(model, stored_tensors(weights)) == (("float",) if meant else ())
    compiled = core.compile_model(model, "CPU", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    kinds = {
        op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()
    }
    assert ("FullyConnected" in kinds) != meant


@pytest.fixture(params=KINDS)
def lowered(request: Any, core: Any, model: Any, weights: Path) -> Any:
    with float_kernels(model, weights, request.param, None) as made:
        assert made is not None
        assert read_in_floats(core, model, made) == 1
        assert read_in_floats(core, model, made) == 0
    model.validate_nodes_and_infer_types()
    return request.param, model


def test_no_convolution_in_floats_reads_int8(lowered: Any) -> None:
    kind, model = lowered
    kernels = [
        op.input_value(1).get_node() for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"
    ]
    (made,) = (node for node in kernels if node.get_type_name() != "Multiply")  # that of the one in uint8
    assert len(kernels) == 2
    if kind == "BF16":
        assert made.get_type_name() == "Convert"
        assert MARK in made.get_rt_info()
        made = made.input_value(0).get_node()
    assert made.get_type_name() == "Constant"
    assert made.get_element_type().to_string() == kind.lower()


def test_the_lowered_graph_equals_onnx(core: Any, lowered: Any) -> None:
    kind, model = lowered
    limit = LIMIT if kind == "F32" else THRESHOLDS["component_bf16_relative_l2"]
    expected, actual = reference(tensors()), computed(core, model)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert limit.holds(relative_l2(actual, expected))
    wrong = tensors()
    wrong["float.scale"] = np.roll(wrong["float.scale"], 1)
    assert not limit.holds(relative_l2(actual, reference(wrong)))


@pytest.mark.parametrize(("kind", "hint"), [("BF16", "bf16"), ("F32", "f32")])
def test_no_bit_changes(core: Any, weights: Path, kind: str, hint: str) -> None:
    """OpenVINO makes the same products of int8 kernels and their scales, and rounds them in the same way."""
    if hint == "bf16" and "bf16" not in BACKEND.devices()[0].precisions:
        pytest.skip("this processor has no bf16")
    plain, lowered = (core.read_model(graph_of(tensors()).SerializeToString()) for _ in range(2))
    expected = computed(core, plain, hint)
    with float_kernels(lowered, weights, kind, None) as made:
        assert made is not None
        assert read_in_floats(core, lowered, made) == 1
    actual = computed(core, lowered, hint)
    assert np.array_equal(actual, expected)
    wrong = tensors()
    wrong["float.scale"][0] *= 1.01
    other = core.read_model(graph_of(wrong).SerializeToString())
    assert not np.array_equal(actual, computed(core, other, hint))


def toy_int8(toy: Any, folder: Path) -> tuple[GraphSource, dict[str, np.ndarray]]:
    """The hand-made graph with an int8 kernel, and its weights with the kernel in float32."""
    import onnx

    plain = toy.make_weights()
    kernel = plain["conv.weight"].astype(np.float32)
    scale = np.abs(kernel).max(axis=(1, 2, 3)) / 127
    values = np.rint(kernel / scale.reshape(-1, 1, 1, 1)).astype(np.int8)
    source = toy.write_graph(
        folder, plain | {"conv.weight": values, "conv.weight.scale": scale}, digest="int8"
    )
    model = onnx.load(source.graph_path, load_external_data=False)
    (cast,) = (node for node in model.graph.node if list(node.input) == ["conv.weight"])
    cast.CopyFrom(
        onnx.helper.make_node(
            "DequantizeLinear", ["conv.weight", "conv.weight.scale"], list(cast.output), axis=0
        )
    )
    source.graph_path.write_bytes(model.SerializeToString())
    return source, plain | {"conv.weight": values * scale.reshape(-1, 1, 1, 1)}


def test_first_and_from_the_cache(toy: Any, tmp_path: Path) -> None:
    source, weights = toy_int8(toy, tmp_path / "graph")
    options = replace(toy.FIXED, cache_dir=tmp_path / "cache")
    expected = toy.numpy_unet(weights, toy.FEEDS)
    outputs = []
    for cached in (False, True):
        session = BACKEND.prepare(source, options)
        assert session.in_force.from_cache == cached
        outputs.append(session.run(toy.FEEDS)["out_sample"])
        assert LIMIT.holds(relative_l2(outputs[-1], expected))
    assert np.array_equal(*outputs)
    assert not list((tmp_path / "cache").rglob(".kernels-*"))


@weightless
def test_an_entry_holds_no_kernel(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It points behind the end of the bundle's file, which is no use without the one that is made."""
    source, _ = toy_int8(toy, tmp_path / "graph")
    options = replace(toy.FIXED, cache_dir=tmp_path / "cache")
    BACKEND.prepare(source, options)
    monkeypatch.setattr(openvino_compile, "may_have_kernels", lambda weights: False)
    assert not BACKEND.prepare(source, options).in_force.from_cache
    assert "thrown away and made again" in caplog.text


def test_a_folder_that_cannot_be_written_to(
    toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that cannot be used stops no run; the system's folder for temporary files takes its place."""
    source, weights = toy_int8(toy, tmp_path / "graph")
    (tmp_path / "file").touch()
    session = BACKEND.prepare(source, replace(toy.FIXED, cache_dir=tmp_path / "file"))
    assert LIMIT.holds(relative_l2(session.run(toy.FEEDS)["out_sample"], toy.numpy_unet(weights, toy.FEEDS)))
    assert "kernels are written to the system's temporary folder" in caplog.text


def test_a_full_disk_says_what_is_missing(
    model: Any, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openvino_kernels, "_write", full)
    told = r"need 0.0 GB .*: no space left on device; free it, or let KILN_CACHE"
    with pytest.raises(SessionError, match=told), float_kernels(model, weights, "BF16", tmp_path / "room"):
        pass
    assert list((tmp_path / "room").iterdir()) == []


def test_a_full_disk_keeps_the_entry(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = toy_int8(toy, tmp_path / "graph")
    options = replace(toy.FIXED, cache_dir=tmp_path / "cache")
    BACKEND.prepare(source, options)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(openvino_kernels, "_write", full)
        with pytest.raises(SessionError, match="no space left on device"):
            BACKEND.prepare(source, options)
    assert BACKEND.prepare(source, options).in_force.from_cache


def test_other_devices_are_left_alone(toy: Any, tmp_path: Path) -> None:
    source, _ = toy_int8(toy, tmp_path / "graph")
    plan = openvino_compile.Plan(source, toy.FIXED, "GPU", {"INFERENCE_PRECISION_HINT": "f16"})
    made = openvino_compile._float_kernels(None, plan)
    assert isinstance(made, nullcontext)

"""Values of attentions in whole vectors: against diffusers' attention and, in int8, ONNX's own reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kiln.backends import openvino_compile, openvino_heads
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.cpu import describe_cpu
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]
BATCH, TOKENS, HEADS, CHANNELS = 2, 7, 3, 10
WIDTH = HEADS * CHANNELS
NAMES = ("to_q", "to_k", "to_v", "to_out.0")
Row = tuple[str, list[str], list[str], dict[str, Any]]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over few tokens too, which is left alone elsewhere."""
    monkeypatch.setattr(openvino_heads, "LEAST", 0)


def tokens() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)


def weights(int8: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {"bias": rng.standard_normal(WIDTH).astype(np.float32)}
    for name in NAMES:
        made[name] = (rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
    if int8:
        for name in NAMES:
            scale = np.abs(made[name]).max(axis=1) / 127
            made[name] = np.rint(made[name] / scale[:, None]).astype(np.int8)
            made[f"{name}.scale"] = scale.astype(np.float32)
        made |= {"step": np.array(0.02, np.float32), "zero": np.array(120, np.uint8)}
    return made


def graph_of(int8: bool, **change: Any) -> Any:
    """An attention over its own tokens as Kiln exports it; in int8 what goes into products is of uint8."""
    from onnx import TensorProto, helper

    order = change.get("order", [0, 2, 1, 3])

    def product(source: str, name: str, out: str) -> list[Row]:
        rows: list[Row] = []
        matrix, given = name, source
        if int8:
            matrix, given = f"{name}.float", f"{source}.{name}.float"
            rows += [
                ("DequantizeLinear", [name, f"{name}.scale"], [matrix], {"axis": 0}),
                ("QuantizeLinear", [source, "step", "zero"], [f"{source}.{name}.u8"], {}),
                ("DequantizeLinear", [f"{source}.{name}.u8", "step", "zero"], [given], {}),
            ]
        return [
            *rows,
            ("Transpose", [matrix], [f"{name}.turned"], {"perm": [1, 0]}),
            ("MatMul", [given, f"{name}.turned"], [out], {}),
        ]

    rows: list[Row] = []
    if change.get("flat"):  # tokens of all images one below the other
        rows += [("Reshape", ["x", "flat"], ["x.flat"], {})]
    for name, kind in zip(NAMES, "qkv", strict=False):
        rows += product("x.flat" if change.get("flat") else "x", name, kind)
        rows += [
            ("Reshape", [kind, "split"], [f"{kind}.split"], {}),
            ("Transpose", [f"{kind}.split"], [f"{kind}.heads"], {"perm": [0, 2, 1, 3]}),
        ]
    rows += [
        ("Attention", ["q.heads", "k.heads", "v.heads"], ["a"], {}),
        ("Transpose", ["a"], ["a.turned"], {"perm": order}),
        ("Reshape", ["a.turned", "join"], ["joined"], {}),
        *product("joined", "to_out.0", "out"),
        ("Add", ["out", "bias"], ["y"], {}),
    ]
    if change.get("read_twice"):
        rows += [("Add", ["y", "v"], ["z"], {})]
    given = weights(int8) | {
        "split": np.array([BATCH, TOKENS, HEADS, CHANNELS]),
        "flat": np.array([BATCH * TOKENS, WIDTH]),
        "join": np.array([BATCH, TOKENS, WIDTH]),
    }
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, **facts) for op, inputs, outputs, facts in rows],
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, TOKENS, WIDTH])],
        [helper.make_tensor_value_info("z" if change.get("read_twice") else "y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in given.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def model_of(int8: bool = False, **change: Any) -> Any:
    ov = pytest.importorskip("openvino")
    return ov.Core().read_model(graph_of(int8, **change).SerializeToString())


def expected_of(int8: bool) -> np.ndarray:
    if int8:
        from onnx.reference import ReferenceEvaluator

        out: np.ndarray = ReferenceEvaluator(graph_of(True)).run(None, {"x": tokens()})[0]
        return out
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("diffusers.models.attention_processor")
    layer = processors.Attention(WIDTH, heads=HEADS, dim_head=CHANNELS).eval()
    given = weights(False)
    state = {f"{name}.weight": torch.from_numpy(given[name]) for name in NAMES}
    layer.load_state_dict(state | {"to_out.0.bias": torch.from_numpy(given["bias"])})
    with torch.no_grad():
        of_torch: np.ndarray = layer(torch.from_numpy(tokens())).numpy()
    return of_torch


def run_model(model: Any) -> np.ndarray:
    ov = pytest.importorskip("openvino")
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return np.array(ov.Core().compile_model(model, "CPU", properties)([tokens()])[0])


def value_shapes(model: Any) -> list[list[int]]:
    return [
        list(op.input_value(2).get_shape())
        for op in model.get_ordered_ops()
        if op.get_type_name() == "ScaledDotProductAttention"
    ]


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
def test_values_in_whole_vectors_equal_the_oracle(int8: bool) -> None:
    expected, model = expected_of(int8), model_of(int8)
    assert openvino_heads.fill_vectors(model) == 1
    model.validate_nodes_and_infer_types()
    assert value_shapes(model) == [[BATCH, HEADS, TOKENS, 16]]
    actual = run_model(model)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))
    assert openvino_heads.fill_vectors(model) == 0


@pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])
def test_zeros_in_the_wrong_place_are_found(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = openvino_heads._with_zeros

    def behind_all_heads(array: np.ndarray, axis: int, heads: int, wide: int) -> np.ndarray:
        return real(array, axis, 1 if axis else heads, wide * heads if axis else wide)

    monkeypatch.setattr(openvino_heads, "_with_zeros", behind_all_heads)
    model = model_of(int8)
    assert openvino_heads.fill_vectors(model) == 1
    assert not LIMIT.holds(relative_l2(run_model(model), expected_of(int8)))


@pytest.mark.parametrize("change", [{"order": [0, 1, 2, 3]}, {"read_twice": True}, {"flat": True}])
def test_other_attentions_are_left_alone(change: dict[str, Any]) -> None:
    assert openvino_heads.fill_vectors(model_of(**change)) == 0


def test_few_keys_whole_vectors_and_open_shapes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_heads, "LEAST", TOKENS + 1)
    assert openvino_heads.fill_vectors(model_of()) == 0
    monkeypatch.setattr(openvino_heads, "LEAST", TOKENS)
    monkeypatch.setattr(openvino_heads, "VECTOR", CHANNELS // 2)
    assert openvino_heads.fill_vectors(model_of()) == 0
    monkeypatch.setattr(openvino_heads, "VECTOR", CHANNELS - 1)
    model = model_of()
    model.reshape([BATCH, -1, WIDTH])
    assert openvino_heads.fill_vectors(model) == 0
    model.reshape([BATCH, TOKENS, WIDTH])
    assert openvino_heads.fill_vectors(model) == 1


@pytest.fixture
def unet(tiny_bundle: Path) -> GraphSource:
    return open_bundle(tiny_bundle).source("unet")


@pytest.mark.parametrize("wide", [True, False], ids=["avx512", "none"])
def test_only_processors_with_such_vectors(
    unet: GraphSource, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    """All attentions of a UNet over its own tokens are rewritten, and it computes what it did before."""
    seen: list[int] = []
    real = openvino_heads.fill_vectors
    monkeypatch.setattr(openvino_compile, "fill_vectors", lambda model: seen.append(real(model)))
    flags = ("avx2", "avx512f") if wide else ("avx2",)
    monkeypatch.setattr(openvino_compile, "describe_cpu", lambda: replace(describe_cpu(), flags=flags))
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(481, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32)).astype(np.float32),
    }
    options = PrepareOptions({n: v.shape for n, v in feeds.items()}, precision="fp32", threads=1)
    found = BACKEND.prepare(unet, options).run(feeds)["out_sample"]
    assert len(seen) == wide
    monkeypatch.setattr(openvino_compile, "fill_vectors", lambda model: 0)
    assert LIMIT.holds(relative_l2(found, BACKEND.prepare(unet, options).run(feeds)["out_sample"]))
    if wide:
        graph = onnx.load(unet.graph_path, load_external_data=False).graph
        assert seen == [sum(node.op_type == "Attention" for node in graph.node)]

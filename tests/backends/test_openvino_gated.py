"""Gated linear layers as two products: against diffusers' GEGLU, and where their weights come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile, openvino_gated, openvino_mapped
from kiln.backends.base import PrepareOptions
from kiln.backends.registry import get_backend, why_unusable
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
LIMIT = THRESHOLDS["component_relative_l2"]
WIDTH, INNER = 6, 8
KINDS = ["float16", "bfloat16", "float32"]


def core() -> Any:
    return pytest.importorskip("openvino").Core()


def geglu(folder: Path, kind: str) -> tuple[Any, Path]:
    """diffusers' layer with seeded weights, and the file of its weights in a type."""
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("diffusers.models.activations")
    safetensors = pytest.importorskip("safetensors.torch")
    layer = activations.GEGLU(WIDTH, INNER)
    made = torch.Generator().manual_seed(0)
    state = {
        "proj.weight": torch.randn(2 * INNER, WIDTH, generator=made),
        "proj.bias": torch.randn(2 * INNER, generator=made),
    }
    state = {name: values.to(getattr(torch, kind)) for name, values in state.items()}
    layer.load_state_dict({name: values.float() for name, values in state.items()})
    safetensors.save_file({"before": torch.zeros(3), **state}, folder / "weights.safetensors")
    return layer, folder / "weights.safetensors"


def split_model(**change: Any) -> Any:
    """What an ONNX graph of the layer becomes in OpenVINO; its constants hold zeros, only names are real."""
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    tokens = ops.parameter([2, 5, WIDTH], np.float32, name="x")
    matrix = ops.constant(np.zeros((2 * INNER, WIDTH), np.float16), name=change.get("weight", "proj.weight"))
    bias = ops.convert(ops.constant(np.zeros(2 * INNER, np.float16), name="proj.bias"), "f32")
    turned = ops.transpose(ops.convert(matrix, "f32"), ops.constant(np.array([1, 0], np.int64)))
    both = ops.add(ops.matmul(tokens, turned, False, False), bias)
    axis = ops.constant(np.array(change.get("axis", -1), np.int64))
    value, gate = ops.split(both, axis, change.get("parts", 2)).outputs()[:2]
    out = ops.multiply(value, change.get("activation", lambda x: ops.gelu(x, "erf"))(gate))
    return ov.Model([out], [tokens], "gated")


def run_model(model: Any, tokens: np.ndarray) -> np.ndarray:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([tokens])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_two_products_equal_diffusers(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    layer, weights = geglu(tmp_path, kind)
    tokens = np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(tokens)).numpy()
    model = split_model()
    assert openvino_gated.split_gated_linears(core(), model, weights) == 1
    assert "Split" not in {op.get_type_name() for op in model.get_ordered_ops()}
    actual = run_model(model, tokens)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_row_is_found(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    layer, weights = geglu(tmp_path, kind)
    tokens = np.random.default_rng(1).standard_normal((2, 5, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(tokens)).numpy()

    def one_off(core: Any, path: Path, stored: Any, wanted: Any) -> list[Any]:
        moved = [replace(r, start=abs(r.start - 1), stop=abs(r.start - 1) + INNER) for r in wanted]
        return openvino_mapped.mapped_rows(core, path, stored, moved)

    monkeypatch.setattr(openvino_gated, "mapped_rows", one_off)
    model = split_model()
    openvino_gated.split_gated_linears(core(), model, weights)
    assert not LIMIT.holds(relative_l2(run_model(model, tokens), expected))


def tanh(gate: Any) -> Any:
    from openvino import opset13 as ops

    return ops.tanh(gate)


@pytest.mark.parametrize(
    "change", [{"activation": tanh}, {"weight": "another"}, {"axis": 1, "parts": 5}, {"parts": 4}]
)
def test_what_is_not_gated_is_left_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    _, weights = geglu(tmp_path, "float16")
    assert openvino_gated.split_gated_linears(core(), split_model(**change), weights) == 0


def test_a_file_that_is_not_safetensors_has_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 64)
    assert openvino_mapped.stored_tensors(tmp_path / "weights.safetensors") == {}
    assert openvino_gated.split_gated_linears(core(), split_model(), tmp_path / "absent") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    _, weights = geglu(tmp_path, kind)
    stored = openvino_mapped.stored_tensors(weights)
    wanted = [openvino_mapped.Rows("proj.weight", 3, 7), openvino_mapped.Rows("proj.bias", 15, 16)]
    for rows, constant in zip(
        wanted, openvino_mapped.mapped_rows(core(), weights, stored, wanted), strict=True
    ):
        expected = safetensors.load_file(weights)[rows.name][rows.start : rows.stop].contiguous()
        assert tuple(constant.output(0).get_shape()) == tuple(expected.shape)
        got = np.ascontiguousarray(constant.get_data())
        if kind == "bfloat16":  # numpy has no such type: compare the bits
            assert got.view(np.uint16).tolist() == expected.view(torch.uint16).numpy().tolist()
        else:
            assert np.array_equal(got, expected.numpy())


def test_every_gated_layer_of_the_unet_is_split_and_stays_out_of_the_cache(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    unet = open_bundle(tiny_bundle).source("unet")
    made = core()
    model = made.read_model(unet.graph_path)
    blocks = sum(op.get_type_name() == "Gelu" for op in model.get_ordered_ops())
    assert openvino_gated.split_gated_linears(made, model, unet.weights_path) == blocks > 0
    if not openvino_compile._weightless(plan_of(unet)):
        pytest.skip("an OpenVINO that keeps weights in its cache")
    width = int(unet.config["cross_attention_dim"])  # type: ignore[call-overload]
    shapes = {"sample": (2, 4, 16, 16), "timestep": (), "encoder_hidden_states": (2, 77, width)}
    # Closed, because the entry of the cache is written in another thread.
    BACKEND.prepare(unet, PrepareOptions(shapes, precision="fp32", threads=1, cache_dir=tmp_path)).close()
    blob = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    stored = openvino_mapped.stored_tensors(unet.weights_path)
    file = unet.weights_path.read_bytes()
    gated = [name for name in stored if name.endswith("ff.net.0.proj.weight")]
    assert len(gated) == blocks
    for name in gated:
        start = stored[name].offset
        assert file[start : start + 256] not in blob
    # A kernel that is rearranged has to be kept, so the search would find what is there.
    kernel = next(name for name in stored if name.endswith("upsamplers.0.conv.weight"))
    place = stored[kernel]
    taps = np.frombuffer(file, np.float32, int(np.prod(place.shape)), place.offset).reshape(place.shape)
    assert np.ascontiguousarray(taps[0, :, 0, 0]).tobytes() in blob


def plan_of(unet: Any) -> openvino_compile.Plan:
    return openvino_compile.Plan(unet, PrepareOptions(), "CPU", {})

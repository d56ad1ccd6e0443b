"""A tiny graph with the ports of the UNet, made by hand, whose weights lie in a safetensors file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from kiln.backends.base import GraphSource, PrepareOptions

CHANNELS, HIDDEN, INNER = 4, 32, 64


def make_feeds(batch: int = 2, height: int = 8, width: int = 12, length: int = 7) -> dict[str, np.ndarray]:
    """Inputs of the UNet contract."""
    rng = np.random.default_rng(batch + height)
    return {
        "sample": rng.standard_normal((batch, CHANNELS, height, width)).astype(np.float32),
        "timestep": np.array(12.25, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, length, HIDDEN)).astype(np.float32),
    }


def make_weights() -> dict[str, np.ndarray]:
    """Weights of the hand-made graph, in fp16 precision."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv.weight": (CHANNELS, CHANNELS, 3, 3),
        "conv.bias": (CHANNELS,),
        "time.weight": (CHANNELS, 1, 1),
        "context.in.weight": (HIDDEN, INNER),
        "context.out.weight": (INNER, CHANNELS),
    }
    return {k: (rng.standard_normal(v) / 4).astype(np.float16) for k, v in shapes.items()}


def numpy_unet(weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the hand-made graph computes, in float64: convolution + time + mean of a small network."""
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    padded = np.pad(feeds["sample"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    out = np.einsum("bchwij,ocij->bohw", windows, w["conv.weight"]) + w["conv.bias"][:, None, None]
    inner = np.maximum(feeds["encoder_hidden_states"].astype(np.float64) @ w["context.in.weight"], 0)
    context = (inner @ w["context.out.weight"]).mean(axis=1)
    return out + w["time.weight"] * float(feeds["timestep"]) + context[:, :, None, None]


def write_graph(folder: Path, weights: dict[str, np.ndarray], *, digest: str) -> GraphSource:
    """Write ``model.onnx`` and the ``weights.safetensors`` that it points into."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "weights.safetensors"
    save_file(weights, path)
    initializers = [_external(name, weights[name], *_span(path, name)) for name in weights]
    nodes = [helper.make_node("Cast", [name], [f"{name}.f"], to=TensorProto.FLOAT) for name in weights]
    nodes += [
        helper.make_node("Conv", ["sample", "conv.weight.f", "conv.bias.f"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["time.weight.f", "timestep"], ["time"]),
        helper.make_node("MatMul", ["encoder_hidden_states", "context.in.weight.f"], ["inner"]),
        helper.make_node("Relu", ["inner"], ["active"]),
        helper.make_node("MatMul", ["active", "context.out.weight.f"], ["tokens"]),
        helper.make_node("ReduceMean", ["tokens", "token_axis"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "pixel_axes"], ["context"]),
        helper.make_node("Add", ["conv", "time"], ["timed"]),
        helper.make_node("Add", ["timed", "context"], ["out_sample"]),
    ]
    initializers.append(helper.make_tensor("token_axis", TensorProto.INT64, [1], [1]))
    initializers.append(helper.make_tensor("pixel_axes", TensorProto.INT64, [2], [2, 3]))
    f32, image = TensorProto.FLOAT, ["batch_size", CHANNELS, "latent_height", "latent_width"]
    inputs = [
        helper.make_tensor_value_info("sample", f32, image),
        helper.make_tensor_value_info("timestep", f32, []),
        helper.make_tensor_value_info(
            "encoder_hidden_states", f32, ["batch_size", "sequence_length", HIDDEN]
        ),
    ]
    outputs = [helper.make_tensor_value_info("out_sample", f32, image)]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return GraphSource("unet", folder / "model.onnx", path, {"out_channels": CHANNELS}, digest)


def _span(path: Path, name: str) -> tuple[int, int]:
    """Absolute offset and length of a tensor, from the header of the safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    first, last = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + first, last - first


def _external(name: str, array: np.ndarray, offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.safetensors"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


FEEDS = make_feeds()
SHAPES = {name: array.shape for name, array in FEEDS.items()}
FIXED = PrepareOptions(shapes=SHAPES, precision="fp32", threads=1)


def expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the graph gives with ``make_weights()``."""
    return numpy_unet(make_weights(), feeds)

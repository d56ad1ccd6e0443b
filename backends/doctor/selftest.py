"""A small network of the kinds a diffusion model is made of, and what it gives, computed by numpy alone.

Convolution, group normalisation, SiLU, attention, a residual, nearest upsampling: in opset 17 primitives that
every engine has had for years, so that what fails is the engine on this machine and not an operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CHANNELS, GROUPS, SIZE, EPSILON = 16, 4, 12, 1e-5
SHAPE = (1, 4, SIZE, SIZE)

# How near the result has to be to numpy's in float64: the cosine of the angle between the two, and the
# relative error, which also sees a factor. fp32 leaves room for the TF32 that GPUs round to (10 bits, 1e-3).
# Seen on a processor: cosine 1 - 1e-12 and error 5e-7 in fp32, 0.99991 and 1.4e-2 in bf16, 1 - 4e-7 and
# 9e-4 in fp16. Wrong kernels are far from that: swapped rows of the output give less than 0.9.
COSINE_FLOOR = {"fp32": 0.9999, "half": 0.999}
ERROR_CEILING = {"fp32": 5e-3, "half": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """How a result compares with numpy's."""

    shape_right: bool
    finite: bool
    cosine: float
    relative_l2: float

    def near(self, precision: str) -> bool:
        """Whether the numbers are numpy's, as far as ``fp32`` or ``half`` goes."""
        good = self.cosine >= COSINE_FLOOR[precision] and self.relative_l2 <= ERROR_CEILING[precision]
        return self.shape_right and self.finite and good

    def as_row(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def weights() -> dict[str, np.ndarray]:
    """The parameters, float32, the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(7))

    def normal(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    square = (CHANNELS, CHANNELS)
    return {
        "conv_in": normal(CHANNELS, 4, 3, 3),
        "scale": (1 + normal(CHANNELS) / 2).reshape(CHANNELS, 1, 1),
        "shift": normal(CHANNELS).reshape(CHANNELS, 1, 1),
        "conv": normal(CHANNELS, CHANNELS, 3, 3),
        "to_q": normal(*square) * 3,
        "to_k": normal(*square) * 3,
        "to_v": normal(*square),
        "conv_out": normal(4, CHANNELS, 3, 3),
    }


def sample() -> np.ndarray:
    """The input, float32 ``(1, 4, 12, 12)``."""
    return np.random.Generator(np.random.PCG64(8)).standard_normal(SHAPE).astype(np.float32)


def expected() -> np.ndarray:
    """The output ``(1, 4, 24, 24)`` in float64, by numpy."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    h = _convolve(sample().astype(np.float64), w["conv_in"])
    grouped = h.reshape(1, GROUPS, -1)
    mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    normed = ((grouped - mean) / np.sqrt(var + EPSILON)).reshape(h.shape) * w["scale"] + w["shift"]
    h = h + _convolve(normed / (1 + np.exp(-normed)), w["conv"])
    tokens = h.reshape(CHANNELS, -1).T
    q, k, v = (tokens @ w[name] for name in ("to_q", "to_k", "to_v"))
    scores = q @ k.T / np.sqrt(CHANNELS)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    tokens = tokens + scores / scores.sum(-1, keepdims=True) @ v
    h = tokens.T.reshape(1, CHANNELS, SIZE, SIZE).repeat(2, 2).repeat(2, 3)
    return _convolve(h, w["conv_out"])


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """3 x 3, stride 1, padded with zeros: ``(1, in, h, w)`` and ``(out, in, 3, 3)``."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("bihwyx,oiyx->bohw", windows, kernel)


def onnx_model(half: bool = False) -> bytes:
    """The network as ONNX, opset 17: float32 ``sample`` in, ``out`` out; ``half`` computes in float16."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    dtype = np.float16 if half else np.float32
    constants: dict[str, np.ndarray] = {name: value.astype(dtype) for name, value in weights().items()}
    constants |= {
        "groups": np.array([1, GROUPS, -1], np.int64),
        "ones": np.ones(GROUPS, dtype),
        "zeros": np.zeros(GROUPS, dtype),
        "image": np.array([1, CHANNELS, SIZE, SIZE], np.int64),
        "flat": np.array([1, CHANNELS, SIZE * SIZE], np.int64),
        "root": np.array(1 / np.sqrt(CHANNELS), dtype),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    pads = {"pads": [1, 1, 1, 1]}
    node = helper.make_node
    nodes = [
        node("Cast", ["sample"], ["x"], to=kind),
        node("Conv", ["x", "conv_in"], ["h0"], **pads),
        node("Reshape", ["h0", "groups"], ["g"]),
        node("InstanceNormalization", ["g", "ones", "zeros"], ["gn"], epsilon=EPSILON),
        node("Reshape", ["gn", "image"], ["n0"]),
        node("Mul", ["n0", "scale"], ["n1"]),
        node("Add", ["n1", "shift"], ["n2"]),
        node("Sigmoid", ["n2"], ["s"]),
        node("Mul", ["n2", "s"], ["silu"]),
        node("Conv", ["silu", "conv"], ["c"], **pads),
        node("Add", ["h0", "c"], ["h1"]),
        node("Reshape", ["h1", "flat"], ["f"]),
        node("Transpose", ["f"], ["t"], perm=[0, 2, 1]),
        *(node("MatMul", ["t", f"to_{name}"], [name]) for name in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["qk"]),
        node("Mul", ["qk", "root"], ["scaled"]),
        node("Softmax", ["scaled"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["a"]),
        node("Add", ["t", "a"], ["t1"]),
        node("Transpose", ["t1"], ["f1"], perm=[0, 2, 1]),
        node("Reshape", ["f1", "image"], ["h2"]),
        node(
            "Resize",
            ["h2", "", "twice"],
            ["up"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        node("Conv", ["up", "conv_out"], ["y"], **pads),
        node("Cast", ["y"], ["out"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "kiln_doctor",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 4, 2 * SIZE, 2 * SIZE))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def torch_output(torch: Any, device: str, dtype: Any) -> np.ndarray:
    """The same network by torch's functions, on a device and in a dtype; float32 out."""
    F = torch.nn.functional
    w: Mapping[str, Any] = {k: torch.from_numpy(v).to(device, dtype) for k, v in weights().items()}
    with torch.inference_mode():
        h = F.conv2d(torch.from_numpy(sample()).to(device, dtype), w["conv_in"], padding=1)
        normed = F.group_norm(h, GROUPS, w["scale"].flatten(), w["shift"].flatten(), EPSILON)
        h = h + F.conv2d(F.silu(normed), w["conv"], padding=1)
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (tokens @ w[name] for name in ("to_q", "to_k", "to_v"))
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        h = (tokens + attended).transpose(1, 2).reshape(1, CHANNELS, SIZE, SIZE)
        h = F.conv2d(F.interpolate(h, scale_factor=2, mode="nearest"), w["conv_out"], padding=1)
        return np.asarray(h.float().cpu().numpy())


def compare(actual: np.ndarray) -> Comparison:
    """A result against numpy's: shape, then NaN and infinity, then the numbers."""
    wanted = expected()
    if actual.shape != wanted.shape:
        return Comparison(False, False, 0.0, float("inf"))
    if not np.isfinite(actual).all():
        return Comparison(True, False, 0.0, float("inf"))
    a, e = actual.astype(np.float64).ravel(), wanted.ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(e))
    cosine = float(a @ e) / norms if norms else 0.0
    return Comparison(True, True, cosine, float(np.linalg.norm(a - e) / np.linalg.norm(e)))

"""The graphs that ship are what the tracer makes, and compute what the modules compute."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import kiln
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS
from kiln.exporters import graphs, tracing
from kiln.exporters.binding import bind, check_tensors, weight_names
from kiln.exporters.tensors import TensorInfo
from kiln.exporters.weights import place, write_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

ROOT = Path(kiln.__file__).parent
LIMIT = THRESHOLDS["component_relative_l2"]
CONFIGS = {"sd1": ROOT / "exporters/data/sd1", "taesd": ROOT / "exporters/data/taesd"}
# What a graph must hold as one operator; a VAE decoder of TAESD is convolutions only.
WHOLE = {
    "text_encoder": {"Attention", "LayerNormalization"},
    "unet": {"Attention", "LayerNormalization", "GroupNormalization", "Gelu"},
    "vae_decoder": {"Attention", "GroupNormalization"},
    "vae_encoder": {"Attention", "GroupNormalization"},
}


def config_of(model: str, component: str) -> dict[str, Any]:
    if model == "emoji":
        path = ROOT / "models/emoji" / component / "config.json"
        if not path.exists():
            pytest.skip("the bundled model is not in this checkout")
    else:
        path = CONFIGS[model] / CONTRACTS[component].network / "config.json"
    return json.loads(path.read_text())


def shipped(model: str, component: str) -> onnx.ModelProto:
    config = config_of(model, component)
    name = f"{model}-{component}-{graphs.architecture_digest(component, config)}.onnx.xz"
    assert (graphs.shipped_folder() / name).is_file(), f"{name} does not ship; run tools/make_graphs.py"
    return graphs.find_graph(component, config)


CASES = [
    *(("sd1", component) for component in CONTRACTS),
    *(("taesd", component) for component in ("vae_decoder", "vae_encoder")),
    *(("emoji", component) for component in CONTRACTS),
]


@pytest.mark.parametrize(("model", "component"), CASES)
def test_tracing_again_gives_the_bytes_that_ship(model: str, component: str) -> None:
    old = shipped(model, component)
    new = tracing.trace(component, config_of(model, component))
    assert len(new.graph.node) == len(old.graph.node)
    assert Counter(n.op_type for n in new.graph.node) == Counter(n.op_type for n in old.graph.node)
    assert weight_names(new) == weight_names(old)
    assert new.SerializeToString(deterministic=True) == old.SerializeToString(deterministic=True)


def test_another_architecture_gives_other_bytes() -> None:
    config = config_of("taesd", "vae_decoder")
    other = tracing.trace("vae_decoder", config | {"num_decoder_blocks": [3, 3, 2, 1]})
    old = shipped("taesd", "vae_decoder")
    assert other.SerializeToString(deterministic=True) != old.SerializeToString(deterministic=True)


def meta_module(component: str, config: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        if component == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
        return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize(("model", "component"), CASES)
def test_initializers_are_the_state_dict(model: str, component: str) -> None:
    state = meta_module(component, config_of(model, component)).state_dict()
    other = {"vae_decoder": ("encoder.", "quant_conv."), "vae_encoder": ("decoder.", "post_quant_conv.")}
    expected = {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.startswith(other.get(component, ("-",)))
    }
    assert weight_names(shipped(model, component)) == expected


@pytest.mark.parametrize(("model", "component"), CASES)
def test_graphs_are_opset_23_with_whole_operators_and_no_data(model: str, component: str) -> None:
    graph = shipped(model, component)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 23)]
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}
    operators = {node.op_type for node in graph.graph.node}
    if config_of(model, component).get("_class_name") != "AutoencoderTiny":
        assert operators >= WHOLE[component]
    assert not operators & {"Softmax", "ReduceMean", "Erf", "InstanceNormalization"}  # they hide inside
    assert graph.ByteSize() < 2_000_000


def dynamic_axes(value: onnx.ValueInfoProto) -> set[int]:
    return {axis for axis, dim in enumerate(value.type.tensor_type.shape.dim) if dim.dim_param}


@pytest.mark.parametrize("component", CONTRACTS)
def test_ports_are_those_of_optimum(component: str) -> None:
    """Names, order and dynamic axes, with two differences that are meant.

    ``timestep`` is float32, for fractional timesteps. The text encoder's length is fixed at the number
    of its positions, to which every tokenizer pads; Optimum calls it dynamic.
    """
    configs = pytest.importorskip("optimum.exporters.onnx.model_configs")
    from transformers import CLIPTextConfig

    classes = {
        "text_encoder": configs.CLIPTextOnnxConfig,
        "unet": configs.UNetOnnxConfig,
        "vae_decoder": configs.VaeDecoderOnnxConfig,
        "vae_encoder": configs.VaeEncoderOnnxConfig,
    }
    raw = config_of("sd1", component)
    config = CLIPTextConfig.from_dict(raw) if component == "text_encoder" else meta_module(component, raw)
    config = getattr(config, "config", config)
    task = "feature-extraction" if component == "text_encoder" else "semantic-segmentation"
    contract = classes[component](config, task=task)
    graph = shipped("sd1", component).graph
    for ports, wanted in ((graph.input, contract.inputs), (graph.output, contract.outputs)):
        assert [port.name for port in ports] == list(wanted)
        for port in ports:
            axes = set(wanted[port.name]) - ({1} if component == "text_encoder" else set())
            assert dynamic_axes(port) == axes, port.name
    if component == "unet":
        assert graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("model", "component"), CASES)
def test_ports_are_those_of_the_contract(model: str, component: str) -> None:
    graph, contract = shipped(model, component).graph, CONTRACTS[component]
    for values, ports in ((graph.input, contract.inputs), (graph.output, contract.outputs)):
        assert [value.name for value in values] == [port.name for port in ports]
        for value, port in zip(values, ports, strict=True):
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert kind == np.dtype(port.dtype)
            for dim, label in zip(value.type.tensor_type.shape.dim, port.axes, strict=True):
                named = re.sub(r"^\d+\*latent_", "image_", dim.dim_param)
                assert not named or named == label


SIZES = [(1, 9, 13, 77), (2, 16, 16, 77), (3, 35, 43, 154)]


def feeds_of(component: str, size: tuple[int, int, int, int], factor: int = 8) -> dict[str, np.ndarray]:
    batch, height, width, length = size
    rng = np.random.default_rng(sum(size))
    if component == "text_encoder":
        ids = rng.integers(0, 49405, (batch, 77))
        ids[:, -1 - batch :] = 49407
        return {"input_ids": ids}
    if component == "unet":
        return {
            "sample": rng.standard_normal((batch, 4, height, width), dtype=np.float32),
            "timestep": np.array(481.25, np.float32),
            "encoder_hidden_states": rng.standard_normal((batch, length, 32), dtype=np.float32),
        }
    if component == "vae_decoder":
        return {"latent_sample": rng.standard_normal((batch, 4, height, width), dtype=np.float32)}
    pixels = (batch, 3, height * factor, width * factor)
    return {"sample": rng.uniform(-1, 1, pixels).astype(np.float32)}


def run_graph(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_module(component: str, module: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    inputs = [torch.from_numpy(np.array(value)) for value in feeds.values()]
    with torch.no_grad():
        if component == "text_encoder":
            states = module(*inputs)
            return [states.last_hidden_state.numpy(), states.pooler_output.numpy()]
        if component == "unet":
            return [module(*inputs).sample.numpy()]
        if component == "vae_decoder":
            return [module.decode(*inputs).sample.numpy()]
        encoded = module.encode(*inputs)
        tiny = not hasattr(encoded, "latent_dist")
        return [(encoded.latents if tiny else encoded.latent_dist.parameters).numpy()]


def compare(actual: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert all(np.isfinite(a).all() for a in actual)
    return [relative_l2(a, e) for a, e in zip(actual, expected, strict=True)]


def tiny_module(folder: Path, component: str) -> Any:
    from transformers import CLIPTextModel

    network = CONTRACTS[component].network
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    return classes[network].from_pretrained(folder / network).eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("component", CONTRACTS)
def test_the_graph_computes_what_the_module_does(
    tiny_bundle: Path, tiny_sd1: Path, component: str, size: tuple[int, int, int, int]
) -> None:
    feeds = feeds_of(component, size)
    actual = run_graph(tiny_bundle / component / "model.onnx", feeds)
    expected = run_module(component, tiny_module(tiny_sd1, component), feeds)
    for value in compare(actual, expected):
        assert LIMIT.holds(value)


PLANTED = {
    "unet": "conv_out.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
    "vae_decoder": "post_quant_conv.weight",
    "vae_encoder": "quant_conv.weight",
}


@pytest.mark.parametrize("component", CONTRACTS)
def test_a_planted_error_is_seen(tiny_bundle: Path, tiny_sd1: Path, component: str) -> None:
    feeds = feeds_of(component, SIZES[0])
    module = tiny_module(tiny_sd1, component)
    with torch.no_grad():
        module.state_dict()[PLANTED[component]].mul_(1.01)
    actual = run_graph(tiny_bundle / component / "model.onnx", feeds)
    assert not any(LIMIT.holds(value) for value in compare(actual, run_module(component, module, feeds)))


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_taesd_computes_what_the_module_does(
    tmp_path: Path, component: str, size: tuple[int, int, int, int]
) -> None:
    graph = shipped("taesd", component)
    torch.manual_seed(0)
    module = diffusers.AutoencoderTiny.from_config(config_of("taesd", component)).eval()
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    names = weight_names(graph)
    infos = {name: TensorInfo("F32", shape, 0, 0) for name, shape in names.items()}
    check_tensors(component, names, infos)
    header, placed = place((name, "F32", shape) for name, shape in names.items())
    write_weights(tmp_path / "weights.safetensors", header, (state[name] for name in placed))
    (tmp_path / "model.onnx").write_bytes(bind(graph, placed).SerializeToString())
    feeds = feeds_of(component, size)
    actual = run_graph(tmp_path / "model.onnx", feeds)
    for value in compare(actual, run_module(component, module, feeds)):
        assert LIMIT.holds(value)
        assert not LIMIT.holds(value + 0.01)

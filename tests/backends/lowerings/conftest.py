"""Shared by the tests of the lowerings: graphs, feeds, two ways to run a model, and how far it is off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from kiln.backends.base import GraphSource
from kiln.backends.lowerings.registry import external_data_folder_entry, lower
from kiln.backends.lowerings.static import make_static

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]

SHAPES: dict[str, Shapes] = {
    "text_encoder": {"input_ids": (2, 77)},
    "unet": {"sample": (2, 4, 8, 16), "timestep": (), "encoder_hidden_states": (2, 77, 32)},
    "vae_decoder": {"latent_sample": (1, 4, 4, 5)},
    "vae_encoder": {"sample": (1, 3, 40, 48)},
}
SD1_SHAPES: dict[str, Shapes] = {
    "text_encoder": {"input_ids": (2, 77)},
    "unet": {"sample": (2, 4, 64, 64), "timestep": (), "encoder_hidden_states": (2, 77, 768)},
    "vae_decoder": {"latent_sample": (1, 4, 64, 64)},
    "vae_encoder": {"sample": (1, 3, 512, 512)},
}


@pytest.fixture(scope="session")
def shapes() -> dict[str, Shapes]:
    """Input shapes of each component of the tiny bundle; height and width differ, so a mix-up shows."""
    return SHAPES


@pytest.fixture(scope="session")
def sd1_shapes() -> dict[str, Shapes]:
    """Input shapes of Stable Diffusion 1.5 at 512 x 512 with guidance."""
    return SD1_SHAPES


@pytest.fixture(scope="session")
def source_of(tiny_bundle: Path, fp16_bundle: Path) -> Callable[..., GraphSource]:
    """``source_of(component, stored="fp32")``: a component of a tiny bundle."""

    def find(component: str, stored: str = "fp32") -> GraphSource:
        folder = {"fp32": tiny_bundle, "fp16": fp16_bundle}[stored] / component
        return GraphSource(component, folder / "model.onnx", folder / "weights.safetensors", {}, "digest")

    return find


@pytest.fixture(scope="session")
def feeds() -> dict[str, Arrays]:
    """Inputs of each component, of ``shapes``."""
    rng = np.random.default_rng(0)
    made: dict[str, Arrays] = {}
    for component, ports in SHAPES.items():
        made[component] = {name: rng.standard_normal(shape, np.float32) for name, shape in ports.items()}
    ids = rng.integers(0, 49405, SHAPES["text_encoder"]["input_ids"])
    ids[:, 70:] = 49407
    made["text_encoder"]["input_ids"] = ids
    made["unet"]["timestep"] = np.array(981.25, np.float32)
    made["vae_encoder"]["sample"] = np.clip(made["vae_encoder"]["sample"], -1, 1)
    return made


@pytest.fixture(scope="session")
def run_ort() -> Callable[..., list[np.ndarray]]:
    """``run_ort(model, source, feeds)``: on ONNX Runtime's CPU provider, from bytes and the weights file."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def run(model: onnx.ModelProto, source: GraphSource, feeds: Arrays) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*external_data_folder_entry(source))
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        assert session.get_providers() == ["CPUExecutionProvider"]
        return session.run(None, feeds)

    return run


@pytest.fixture(scope="session")
def run_exactly() -> Callable[..., list[np.ndarray]]:
    """``run_exactly(model, feeds, folder)``: with onnx's reference, which rounds after each operator."""

    def run(model: onnx.ModelProto, feeds: Arrays, folder: Path | None = None) -> list[np.ndarray]:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        if folder is not None:
            onnx.external_data_helper.load_external_data_for_model(whole, str(folder))
        with np.errstate(all="ignore"):
            return ReferenceEvaluator(whole).run(None, feeds)

    return run


@pytest.fixture(scope="session")
def canonical_outputs(
    source_of: Callable[..., GraphSource], feeds: dict[str, Arrays], run_ort: Callable[..., list[np.ndarray]]
) -> Callable[..., list[np.ndarray]]:
    """``canonical_outputs(component, stored="fp32")``: what the canonical graph gives, in fp32."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}

    def outputs(component: str, stored: str = "fp32") -> list[np.ndarray]:
        key = component, stored
        if key not in found:
            source = source_of(component, stored)
            found[key] = run_ort(lower((), source, {}), source, feeds[component])
        return found[key]

    return outputs


@pytest.fixture(scope="session")
def compare() -> Callable[[list[np.ndarray], list[np.ndarray]], float]:
    """The largest relative error of a list of outputs, after shapes, types and finiteness were compared."""
    from kiln.benchmarks.parity import relative_l2

    def check(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
        assert [a.shape for a in actual] == [e.shape for e in expected]
        assert [a.dtype for a in actual] == [e.dtype for e in expected]
        assert all(np.isfinite(a).all() for a in actual)
        return max(relative_l2(a, e) for a, e in zip(actual, expected, strict=True))

    return check


@pytest.fixture(scope="session")
def lower_tiny(source_of: Callable[..., GraphSource]) -> Callable[..., onnx.ModelProto]:
    """``lower_tiny(names, component, stored="fp32")``: a component of a tiny bundle, lowered."""

    def lowered(names: tuple[str, ...], component: str, stored: str = "fp32") -> onnx.ModelProto:
        return lower(names, source_of(component, stored), SHAPES[component])

    return lowered


@pytest.fixture(scope="session")
def error_of(
    source_of: Callable[..., GraphSource],
    feeds: dict[str, Arrays],
    run_ort: Callable[..., list[np.ndarray]],
    canonical_outputs: Callable[..., list[np.ndarray]],
    compare: Callable[..., float],
) -> Callable[..., float]:
    """``error_of(model, component, stored="fp32")``: how far a model is from the canonical graph.

    The model reads the weights of that component and is run by ONNX Runtime.
    """

    def error(model: onnx.ModelProto, component: str, stored: str = "fp32") -> float:
        actual = run_ort(model, source_of(component, stored), feeds[component])
        return compare(actual, canonical_outputs(component, stored))

    return error


@pytest.fixture(scope="session")
def exact_error_of(
    source_of: Callable[..., GraphSource],
    feeds: dict[str, Arrays],
    run_exactly: Callable[..., list[np.ndarray]],
    canonical_outputs: Callable[..., list[np.ndarray]],
    compare: Callable[..., float],
) -> Callable[..., float]:
    """``error_of`` with the model run by onnx's reference, which rounds after each operator."""

    def error(model: onnx.ModelProto, component: str, stored: str = "fp32") -> float:
        folder = source_of(component, stored).weights_path.parent
        return compare(run_exactly(model, feeds[component], folder), canonical_outputs(component, stored))

    return error


@pytest.fixture(scope="session")
def small() -> Callable[..., onnx.ModelProto]:
    """``small(nodes, ports, constants)``: a static model of these nodes, whose output is ``y``."""

    def make(nodes: list[onnx.NodeProto], ports: Shapes, constants: Arrays) -> onnx.ModelProto:
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [
                onnx.numpy_helper.from_array(value.astype(np.float32), name)
                for name, value in constants.items()
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return make_static(model, ports)

    return make


@pytest.fixture(scope="session")
def plant_epsilon() -> Callable[[onnx.ModelProto], None]:
    """Make every normalisation of a model slightly wrong; a network without any gets another slope."""

    def plant(model: onnx.ModelProto) -> None:
        found = [entry for node in model.graph.node for entry in node.attribute if entry.name == "epsilon"]
        assert found
        for entry in found:
            entry.f += 0.3

    return plant


@pytest.fixture(scope="session")
def shipped_source(tmp_path_factory: Any) -> Callable[[str], GraphSource]:
    """``shipped_source(component)``: the graph of Stable Diffusion 1.5 that ships, without weights."""
    import json

    import kiln
    from kiln.components import CONTRACTS
    from kiln.exporters.graphs import find_graph

    folder = tmp_path_factory.mktemp("shipped")

    def find(component: str) -> GraphSource:
        network = CONTRACTS[component].network
        config = Path(kiln.__file__).parent / "exporters/data/sd1" / network / "config.json"
        path = folder / f"{component}.onnx"
        if not path.exists():
            path.write_bytes(find_graph(component, json.loads(config.read_text())).SerializeToString())
        return GraphSource(component, path, folder / "weights.safetensors", {}, "digest")

    return find

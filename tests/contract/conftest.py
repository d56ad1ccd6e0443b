"""Shared by the contract: each registered backend, what it can run, and how a result is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import Backend, GraphSource, PrepareOptions
from kiln.backends.isolation.backend import IsolatedBackend
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS

LIMIT = THRESHOLDS["component_relative_l2"]
HIDDEN = 32
# Backends that compute nothing, and that build modules instead of reading graphs.
WITHOUT_VALUES = {"null"}
FROM_MODULES = {"torch"}
# Backends that compile for one shape: they are given every shape, and tests of free shapes are not for them.
STATIC_ONLY = {"onnxruntime-tensorrt", "onnxruntime-migraphx", "onnxruntime-webgpu"}


@dataclass(frozen=True)
class Case:
    """A component with what it should give."""

    source: GraphSource
    expected: Callable[[dict[str, np.ndarray]], np.ndarray]


@pytest.fixture(params=[*registry.names(), "onnxruntime in a child process"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each registered backend; one that is not there is skipped with its own reason."""
    name, _, isolated = request.param.partition(" ")
    found = registry.get_backend(name)
    reason = registry.why_unusable(found)
    if reason:
        pytest.skip(reason)
    if isolated:
        return request.getfixturevalue("isolated_onnxruntime")
    return _WithShapes(found, request.getfixturevalue("toy").SHAPES) if name in STATIC_ONLY else found


class _WithShapes:
    """A backend for fixed shapes only, given those of the default inputs where a test gives none."""

    def __init__(self, inner: Backend, shapes: dict[str, tuple[int, ...]]) -> None:
        self.name, self.probe, self.devices = inner.name, inner.probe, inner.devices
        self._inner, self._shapes = inner, shapes

    def prepare(self, source: Any, options: PrepareOptions) -> Any:
        return self._inner.prepare(source, replace(options, shapes=options.shapes or self._shapes))


@pytest.fixture(scope="module")
def isolated_onnxruntime() -> Iterator[IsolatedBackend]:
    """ONNX Runtime in one child process for all tests."""
    with IsolatedBackend("onnxruntime") as isolated:
        yield isolated


@pytest.fixture
def free_shapes(backend: Backend) -> None:
    """Skips the backends that take fixed shapes only."""
    if backend.name in STATIC_ONLY:
        pytest.skip("takes fixed shapes only")


@pytest.fixture
def reads_files(backend: Backend) -> None:
    """Skips the backends that read no weights."""
    if backend.name in WITHOUT_VALUES:
        pytest.skip("reads no files")


@pytest.fixture
def reads_graphs(backend: Backend) -> None:
    """Skips the backends that run no graph."""
    if backend.name in WITHOUT_VALUES | FROM_MODULES:
        pytest.skip("reads no graph")


@pytest.fixture
def computes(backend: Backend) -> bool:
    """Whether what the backend gives depends on what it is given."""
    return backend.name not in WITHOUT_VALUES


@pytest.fixture
def check(computes: bool) -> Callable[[dict[str, np.ndarray], np.ndarray], None]:
    """``check(outputs, expected)``: names, dtype, shape, finite, values: in this order."""

    def compare(outputs: dict[str, np.ndarray], expected: np.ndarray) -> None:
        assert list(outputs) == [port.name for port in CONTRACTS["unet"].outputs]
        actual = outputs["out_sample"]
        assert actual.dtype == np.float32
        assert actual.shape == expected.shape
        assert np.isfinite(actual).all()
        if computes:
            assert LIMIT.holds(relative_l2(actual, expected))

    return compare


@pytest.fixture
def case(backend: Backend, request: pytest.FixtureRequest) -> Case:
    """A component that this backend can run, with what it should give."""
    return request.getfixturevalue("module_case" if backend.name in FROM_MODULES else "graph_case")


@pytest.fixture(scope="session")
def toy(helper: Callable[[str], Any]) -> Any:
    """The hand-made graph: how it is written, its inputs, and what it computes."""
    return helper("contract/toy_unet")


@pytest.fixture
def feeds(toy: Any) -> Callable[..., dict[str, np.ndarray]]:
    """Makes inputs of given sizes."""
    return toy.make_feeds


@pytest.fixture
def weights(toy: Any) -> dict[str, np.ndarray]:
    """The weights of the hand-made graph."""
    return toy.make_weights()


@pytest.fixture
def write(toy: Any) -> Callable[..., GraphSource]:
    """Writes the hand-made graph with other weights."""
    return toy.write_graph


@pytest.fixture
def graph_case(toy: Any, tmp_path: Path) -> Case:
    """The hand-made graph and numpy's result."""
    source = toy.write_graph(tmp_path / "graph", toy.make_weights(), digest="tiny")
    return Case(source, toy.expected)


@pytest.fixture
def module_case(tmp_path: Path) -> Case:
    """The diffusers module and its own result."""
    return make_module_case(tmp_path / "module")


def make_module_case(folder: Path) -> Case:
    """A tiny UNet of diffusers with the same ports, for the backend that runs modules."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    module = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_torch(module.state_dict(), folder / "weights.safetensors")
    config = {**module.config, "_class_name": "UNet2DConditionModel"}
    source = GraphSource("unet", folder / "model.onnx", folder / "weights.safetensors", config, "tiny")

    def expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            tensors = [torch.from_numpy(np.array(array)) for array in feeds.values()]
            return module(*tensors).sample.numpy()

    return Case(source, expected)

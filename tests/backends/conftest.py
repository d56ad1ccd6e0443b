"""Shared by the tests of backends: a graph, modules of torch, and stand-ins that behave badly."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from kiln.backends.base import GraphSource
from kiln.backends.isolation.backend import IsolatedBackend
from kiln.exporters.export import ExportSpec, export

MODULES = ("text_encoder", "unet", "kl decoder", "kl encoder", "tiny decoder", "tiny encoder")


@pytest.fixture(scope="session")
def fp16_bundle(tiny_bundle: Path, tiny_sd1: Path, kiln_cache: Path, tmp_path_factory: Any) -> Path:
    """The bundle of ``tiny_sd1`` with its weights stored in fp16; its graphs are in the cache already."""
    folder = tmp_path_factory.mktemp("bundle16") / "tiny"
    with filelock.FileLock(kiln_cache / "tracing.lock"):
        export(ExportSpec(tiny_sd1, folder, storage="fp16"))
    return folder


@pytest.fixture(scope="session")
def toy(helper: Callable[[str], Any]) -> Any:
    """The hand-made graph of the contract: how it is written, its inputs, and what it computes."""
    return helper("contract/toy_unet")


@pytest.fixture
def source(toy: Any, tmp_path: Path) -> GraphSource:
    """The hand-made graph, written."""
    return toy.write_graph(tmp_path / "graph", toy.make_weights(), digest="tiny")


@pytest.fixture
def other(toy: Any, tmp_path: Path) -> GraphSource:
    """The same graph bytes, file names and sizes; one weight differs."""
    weights = toy.make_weights()
    weights["conv.bias"][0] += 1
    return toy.write_graph(tmp_path / "other", weights, digest="other")


@pytest.fixture
def fake(helper: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for builds with GPU providers, in place of onnxruntime."""
    for name in ("ORT_MIGRAPHX_FP16_ENABLE", "ORT_MIGRAPHX_MODEL_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return helper("backends/fakes_onnxruntime").install(monkeypatch)


@pytest.fixture
def raw(fake: Any) -> Callable[..., Any]:
    """``raw(source, provider, options)``: a session as a caller without Kiln would make it."""

    def make(source: GraphSource, provider: str, options: dict[str, str] | None = None) -> Any:
        settings = fake.SessionOptions()
        sizes = {"batch_size": 2, "latent_height": 8, "latent_width": 12, "sequence_length": 7}
        for axis, size in sizes.items():
            settings.add_free_dimension_override_by_name(axis, size)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            given = [(provider, options or {})]
            return fake.InferenceSession(str(source.graph_path), settings, providers=given)

    return make


@pytest.fixture
def crashing(helper: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend that goes wrong as it is told; child processes find it too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return helper("backends/crashing_backend")


@pytest.fixture
def backend(crashing: Any) -> Iterator[IsolatedBackend]:
    """``crashing`` in a child process; held, so that the tests of what goes wrong start one child each."""
    with IsolatedBackend("crashing", target=crashing.TARGET) as isolated:
        yield isolated


@pytest.fixture
def make_case(helper: Callable[[str], Any]) -> Callable[[str], Any]:
    """``make_case(kind)``: a component as a module of torch, with random weights, inputs and a check."""
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    cases = helper("backends/torch_cases")
    assert set(cases.MAKERS) == set(MODULES)
    return cases.make_case


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Any]) -> Any:
    """Each component as a module of torch."""
    return make_case(request.param)

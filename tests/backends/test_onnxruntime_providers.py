"""What each provider's adapter does, on a stand-in for its engine: no such hardware is here.

Each behaviour of the stand-in that an adapter has to cope with is shown first without the adapter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

pytest.importorskip("onnxruntime")


def load(path: Path) -> Any:
    """A file of the tests as a module; folders of tests are no packages."""
    spec = importlib.util.spec_from_file_location(f"kiln_tests_{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
FAKES = load(HERE / "fakes_onnxruntime.py")
TOY = load(HERE.parent / "contract/conftest.py")
FEEDS = TOY.make_feeds()
SHAPES = {name: array.shape for name, array in FEEDS.items()}
FP32 = PrepareOptions(shapes=SHAPES, precision="fp32", threads=1)
LIMIT = THRESHOLDS["component_relative_l2"]
ALL = (
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-migraphx",
    "onnxruntime-webgpu",
    "onnxruntime-openvino",
)
COMPILING = ("onnxruntime-tensorrt", "onnxruntime-migraphx")
NVIDIA = ("onnxruntime-cuda", "onnxruntime-tensorrt")
PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-migraphx": "MIGraphXExecutionProvider",
    "onnxruntime-webgpu": "WebGpuExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, in place of onnxruntime."""
    for name in ("ORT_MIGRAPHX_FP16_ENABLE", "ORT_MIGRAPHX_MODEL_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return FAKES.install(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> GraphSource:
    return TOY.write_graph(tmp_path / "graph", TOY.make_weights(), digest="tiny")


@pytest.fixture
def other(tmp_path: Path) -> GraphSource:
    """The same graph bytes, file names and sizes; one weight differs."""
    weights = TOY.make_weights()
    weights["conv.bias"][0] += 1
    return TOY.write_graph(tmp_path / "other", weights, digest="other")


def raw(
    module: Any, source: GraphSource, provider: str, options: dict[str, str] | None = None, **more: Any
) -> Any:
    """A session as a caller without Kiln would make it."""
    settings = module.SessionOptions()
    for axis, size in {"batch_size": 2, "latent_height": 8, "latent_width": 12, "sequence_length": 7}.items():
        settings.add_free_dimension_override_by_name(axis, size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        given = [(provider, options or {})]
        return module.InferenceSession(str(source.graph_path), settings, providers=given, **more)


# What all of them do.


@pytest.mark.parametrize("name", ALL)
def test_computes_and_says_where(fake: Any, source: GraphSource, name: str) -> None:
    backend = registry.get_backend(name)
    session = backend.prepare(source, FP32)
    found = session.in_force
    assert (found.backend, found.provider, found.precision, found.threads) == (
        name,
        PROVIDERS[name],
        "fp32",
        1,
    )
    assert found.device == backend.devices()[0].id
    assert found.settings["nodes"].keys() == {PROVIDERS[name]}
    assert LIMIT.holds(
        relative_l2(session.run(FEEDS)["out_sample"], TOY.numpy_unet(TOY.make_weights(), FEEDS))
    )


@pytest.mark.parametrize("name", ALL)
def test_an_operator_that_stays_on_the_processor_is_an_error(
    fake: Any, source: GraphSource, name: str
) -> None:
    """Matrix products are no arithmetic with shapes."""
    fake.providers[PROVIDERS[name]].lacks = frozenset(["MatMul", "Unsqueeze", "Squeeze", "Reshape"])
    fake.providers["CUDAExecutionProvider"].lacks = frozenset(["MatMul"])
    with pytest.raises(
        SessionError, match=r"cannot run all of this graph: 2 MatMul.* on CPUExecutionProvider"
    ):
        registry.get_backend(name).prepare(source, FP32)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"onnxruntime-migraphx"}))
def test_arithmetic_with_shapes_may_stay(fake: Any, source: GraphSource, name: str) -> None:
    for provider in fake.providers.values():
        provider.lacks = frozenset(["Unsqueeze", "Reshape", "Cast"])
    nodes = registry.get_backend(name).prepare(source, FP32).in_force.settings["nodes"]
    assert nodes["CPUExecutionProvider"] >= 1


def test_migraphx_has_to_run_everything(fake: Any, source: GraphSource) -> None:
    fake.providers["MIGraphXExecutionProvider"].lacks = frozenset(["Unsqueeze", "Reshape", "Cast"])
    with pytest.raises(SessionError, match="cannot run all of this graph"):
        registry.get_backend("onnxruntime-migraphx").prepare(source, FP32)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"onnxruntime-openvino"}))
def test_a_library_that_does_not_load(
    fake: Any, source: GraphSource, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = fake.providers[PROVIDERS[name]]
    provider.missing = "Failed to load library x.so with error: libneeded.so.3: cannot open"
    assert raw(fake, source, provider.name).get_providers() == ["CPUExecutionProvider"]  # in silence
    with pytest.raises(BackendUnavailable, match=r"left out|libneeded") as caught:
        registry.get_backend(name).prepare(source, FP32)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [*NVIDIA, "onnxruntime-migraphx"])
def test_an_unknown_option(fake: Any, source: GraphSource, name: str) -> None:
    assert raw(fake, source, PROVIDERS[name], {"no_such": "1"}).get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(SessionError, match='Unknown provider option: "no_such"'):
        registry.get_backend(name).prepare(source, replace(FP32, extra={"no_such": 1}))


def test_an_option_that_webgpu_would_ignore(fake: Any, source: GraphSource) -> None:
    assert (
        "WebGpuExecutionProvider"
        in raw(fake, source, "WebGpuExecutionProvider", {"no_such": "1"}).get_providers()
    )
    with pytest.raises(SessionError, match=r"WebGPU has no option no_such; it has .*preferredLayout"):
        registry.get_backend("onnxruntime-webgpu").prepare(source, replace(FP32, extra={"no_such": 1}))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("onnxruntime-cuda", "use_tf32"),
        ("onnxruntime-tensorrt", "trt_builder_optimization_level"),
        ("onnxruntime-migraphx", "migraphx_exhaustive_tune"),
    ],
)
def test_an_option_that_the_provider_drops(fake: Any, source: GraphSource, name: str, option: str) -> None:
    fake.providers[PROVIDERS[name]].drops = frozenset([option])
    with pytest.raises(SessionError, match=f"dropped the option {option}="):
        registry.get_backend(name).prepare(source, FP32)


@pytest.mark.parametrize("name", [*COMPILING, "onnxruntime-webgpu"])
def test_free_shapes_are_refused(fake: Any, source: GraphSource, name: str) -> None:
    options = replace(FP32, shapes={k: v for k, v in SHAPES.items() if k != "timestep"})
    with pytest.raises(SessionError, match="needs fixed shapes for this; the shape of timestep is missing"):
        registry.get_backend(name).prepare(source, options)


@pytest.mark.parametrize("name", [*NVIDIA, "onnxruntime-migraphx", "onnxruntime-webgpu"])
def test_fp16_is_typed_into_the_graph(fake: Any, source: GraphSource, name: str) -> None:
    session = registry.get_backend(name).prepare(source, replace(FP32, precision="fp16"))
    assert session.in_force.precision == "fp16"
    assert all("fp16" not in key or value == "0" for key, value in session.in_force.settings.items())
    error = relative_l2(session.run(FEEDS)["out_sample"], TOY.numpy_unet(TOY.make_weights(), FEEDS))
    assert 1e-5 < error < THRESHOLDS["component_bf16_relative_l2"].limit


@pytest.mark.parametrize("name", ALL)
def test_another_bundle_never_gets_the_first_ones_result(
    fake: Any, source: GraphSource, other: GraphSource, tmp_path: Path, name: str
) -> None:
    backend, options = registry.get_backend(name), replace(FP32, cache_dir=tmp_path / "cache")
    first = backend.prepare(source, options).run(FEEDS)["out_sample"]
    second = backend.prepare(other, options)
    assert not second.in_force.from_cache
    assert np.allclose(second.run(FEEDS)["out_sample"][:, 0] - first[:, 0], 1, atol=1e-3)


# Caches of engines.


@pytest.mark.parametrize(
    ("provider", "options"),
    [
        ("TensorrtExecutionProvider", {"trt_engine_cache_enable": "1", "trt_engine_cache_path": "{folder}"}),
        ("MIGraphXExecutionProvider", {"migraphx_model_cache_dir": "{folder}"}),
    ],
)
def test_the_engines_own_cache_gives_the_first_lora_again(
    fake: Any, source: GraphSource, other: GraphSource, tmp_path: Path, provider: str, options: dict[str, str]
) -> None:
    """That the stand-in is as blind as the engines: otherwise the test above would show nothing."""
    given = {key: value.format(folder=tmp_path) for key, value in options.items()}
    first = raw(fake, source, provider, given).run(["out_sample"], FEEDS)[0]
    assert np.array_equal(raw(fake, other, provider, given).run(["out_sample"], FEEDS)[0], first)
    assert len(fake.compiled) == 1


@pytest.mark.parametrize("name", COMPILING)
def test_second_time_from_the_cache(fake: Any, source: GraphSource, tmp_path: Path, name: str) -> None:
    backend, options = registry.get_backend(name), replace(FP32, cache_dir=tmp_path / "cache")
    first, second = (backend.prepare(source, options) for _ in range(2))
    assert (first.in_force.from_cache, second.in_force.from_cache) == (False, True)
    assert len(fake.compiled) == 1
    assert replace(second.in_force, from_cache=False) == first.in_force
    assert str(tmp_path) not in str(first.in_force)
    assert np.array_equal(first.run(FEEDS)["out_sample"], second.run(FEEDS)["out_sample"])
    assert {path.suffix for path in (tmp_path / "cache" / name).glob("*/engine/*")} <= {".engine", ".mxr"}


@pytest.mark.parametrize("name", COMPILING)
@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp16"},
        {"shapes": SHAPES | {"encoder_hidden_states": (2, 9, 32)}},
        {"extra": {"device_id": "0", "trt_builder_optimization_level": "5", "migraphx_exhaustive_tune": "1"}},
    ],
    ids=["precision", "shapes", "option"],
)
def test_other_options_never_share_an_entry(
    fake: Any, source: GraphSource, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    if "extra" in change:
        mine = "trt_" if "tensorrt" in name else "migraphx_"
        change = {"extra": {k: v for k, v in change["extra"].items() if k.startswith(mine)}}
    backend, options = registry.get_backend(name), replace(FP32, cache_dir=tmp_path)
    backend.prepare(source, options)
    assert not backend.prepare(source, replace(options, **change)).in_force.from_cache
    assert backend.prepare(source, options).in_force.from_cache


@pytest.mark.parametrize("name", COMPILING)
def test_a_damaged_entry_is_made_again(fake: Any, source: GraphSource, tmp_path: Path, name: str) -> None:
    backend, options = registry.get_backend(name), replace(FP32, cache_dir=tmp_path)
    expected = backend.prepare(source, options).run(FEEDS)["out_sample"]
    [file] = [path for path in tmp_path.rglob("*") if path.suffix in (".engine", ".mxr")]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    session = backend.prepare(source, options)
    assert not session.in_force.from_cache
    assert np.array_equal(session.run(FEEDS)["out_sample"], expected)


@pytest.mark.parametrize("name", COMPILING)
def test_nothing_is_kept_without_a_folder(
    fake: Any, source: GraphSource, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not registry.get_backend(name).prepare(source, FP32).in_force.from_cache
    assert list(tmp_path.glob("*.*")) == []


# NVIDIA.


def test_a_cuda_graph_needs_fixed_buffers(fake: Any, source: GraphSource) -> None:
    """Passing arrays, the third run gives the second's result; through the binding it does not."""
    twice = {name: array * 2 for name, array in FEEDS.items()}
    plain = raw(fake, source, "CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    runs = [plain.run(["out_sample"], feeds)[0] for feeds in (FEEDS, FEEDS, twice)]
    assert np.array_equal(runs[2], runs[0])
    session = registry.get_backend("onnxruntime-cuda").prepare(source, FP32)
    assert session.in_force.settings["enable_cuda_graph"] == "1"
    for _ in range(3):
        for feeds in (FEEDS, twice):
            expected = TOY.numpy_unet(TOY.make_weights(), feeds)
            assert LIMIT.holds(relative_l2(session.run(feeds)["out_sample"], expected))


@pytest.mark.parametrize(
    ("component", "shapes", "expected"),
    [
        ("unet", SHAPES, {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}),
        ("unet", {}, {"enable_cuda_graph": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
        (
            "vae_decoder",
            {"latent_sample": (1, 4, 8, 8)},
            {"enable_cuda_graph": "0", "cudnn_conv_algo_search": "HEURISTIC"},
        ),
    ],
)
def test_what_pays_only_for_many_runs(component: str, shapes: Any, expected: dict[str, str]) -> None:
    from kiln.backends.onnxruntime_cuda import provider_options

    source = GraphSource(component, Path("x"), Path("x"), {}, "")
    found = provider_options(source, PrepareOptions(shapes=shapes), 0)
    assert {name: found[name] for name in expected} == expected
    assert (found["use_tf32"], found["arena_extend_strategy"]) == ("0", "kSameAsRequested")


def test_fp32_is_not_tf32(fake: Any, source: GraphSource) -> None:
    with pytest.raises(SessionError, match="fp32 was asked for, but use_tf32 is on"):
        registry.get_backend("onnxruntime-cuda").prepare(source, replace(FP32, extra={"use_tf32": "1"}))


@pytest.mark.parametrize("name", NVIDIA)
def test_devices_and_what_they_compute_in(fake: Any, source: GraphSource, name: str) -> None:
    backend = registry.get_backend(name)
    assert [(d.id, d.precisions) for d in backend.devices()] == [
        ("cuda:0", ("fp16", "bf16", "fp32")),
        ("cuda:1", ("fp32",)),  # a Pascal: no fast fp16
    ]
    assert backend.prepare(source, replace(FP32, device="cuda:1")).in_force.settings["device_id"] == "1"
    with pytest.raises(BackendUnavailable, match=r"no device 'cuda:2'; it has: cuda:0, cuda:1"):
        backend.prepare(source, replace(FP32, device="cuda:2"))
    with pytest.raises(SessionError, match="does not compute in fp16 on Old; use auto or one of fp32"):
        backend.prepare(source, replace(FP32, device="cuda:1", precision="fp16"))


def test_cuda_in_fp16_needs_fixed_shapes(fake: Any, source: GraphSource) -> None:
    backend = registry.get_backend("onnxruntime-cuda")
    with pytest.raises(SessionError, match="needs fixed shapes"):
        backend.prepare(source, replace(FP32, shapes={}, precision="fp16"))
    assert backend.prepare(source, replace(FP32, shapes={}, precision="auto")).in_force.precision == "fp32"
    assert backend.prepare(source, replace(FP32, precision="auto")).in_force.precision == "fp16"


@pytest.mark.parametrize("option", ["trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"])
def test_what_tensorrt_11_dropped(fake: Any, source: GraphSource, option: str) -> None:
    with pytest.raises(SessionError, match=f"{option} has gone with TensorRT 11"):
        registry.get_backend("onnxruntime-tensorrt").prepare(source, replace(FP32, extra={option: 1}))


# MIGraphX.

MIGRAPHX = "onnxruntime-migraphx"


def test_environment_really_overrides(
    fake: Any, source: GraphSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the stand-in as in the provider: what is reported says 0, and fp16 is computed."""
    session = raw(fake, source, PROVIDERS[MIGRAPHX], {"migraphx_fp16_enable": "0"})
    plain = session.run(["out_sample"], FEEDS)[0]
    monkeypatch.setenv("ORT_MIGRAPHX_FP16_ENABLE", "1")
    assert not np.array_equal(session.run(["out_sample"], FEEDS)[0], plain)
    assert session.get_provider_options()[PROVIDERS[MIGRAPHX]]["migraphx_fp16_enable"] == "0"
    monkeypatch.setenv("ORT_MIGRAPHX_BF16_ENABLE", "1")  # both: neither
    assert np.array_equal(session.run(["out_sample"], FEEDS)[0], plain)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ORT_MIGRAPHX_FP16_ENABLE", "1", "overrides migraphx_fp16_enable=0"),
        ("ORT_MIGRAPHX_BF16_ENABLE", "1", "overrides migraphx_bf16_enable=0"),
        ("ORT_MIGRAPHX_INT8_ENABLE", "1", "overrides migraphx_int8_enable=0"),
        ("ORT_MIGRAPHX_EXHAUSTIVE_TUNE", "1", "overrides migraphx_exhaustive_tune=0"),
        ("ORT_MIGRAPHX_MODEL_CACHE_PATH", "/somewhere", "model of other weights"),
    ],
)
def test_environment_that_contradicts(
    fake: Any, source: GraphSource, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SessionError, match=f"{told}.*unset {name}"):
        registry.get_backend(MIGRAPHX).prepare(source, FP32)


def test_environment_that_agrees_is_reported(
    fake: Any, source: GraphSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend, options = registry.get_backend(MIGRAPHX), replace(FP32, cache_dir=tmp_path)
    backend.prepare(source, options)
    monkeypatch.setenv("ORT_MIGRAPHX_FP16_ENABLE", "0")
    monkeypatch.setenv("MIGRAPHX_DISABLE_MLIR", "1")
    found = backend.prepare(source, options).in_force
    assert found.settings["MIGRAPHX_DISABLE_MLIR"] == "1"
    assert found.settings["ORT_MIGRAPHX_FP16_ENABLE"] == "0"
    assert not found.from_cache  # it changes what is compiled


def test_bf16_is_migraphx_own_conversion(fake: Any, source: GraphSource) -> None:
    found = registry.get_backend(MIGRAPHX).prepare(source, replace(FP32, precision="bf16")).in_force
    assert (found.precision, found.settings["migraphx_bf16_enable"]) == ("bf16", "1")
    assert found.settings["migraphx_fp16_enable"] == "0"


def test_quantisers_are_not_for_callers(fake: Any, source: GraphSource) -> None:
    with pytest.raises(SessionError, match="migraphx_int8_enable is not for callers"):
        registry.get_backend(MIGRAPHX).prepare(source, replace(FP32, extra={"migraphx_int8_enable": 1}))


# OpenVINO as a plug-in.


def test_the_plug_in_without_a_device(
    fake: Any, source: GraphSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen on a processor of AMD: the library loads and lists nothing."""
    monkeypatch.setattr(fake, "get_ep_devices", list)
    backend = registry.get_backend("onnxruntime-openvino")
    assert backend.devices() == ()
    with pytest.raises(BackendUnavailable, match=r"offers no device here.*use the openvino backend"):
        backend.prepare(source, FP32)


def test_the_plug_in_is_registered_once(fake: Any, source: GraphSource) -> None:
    backend = registry.get_backend("onnxruntime-openvino")
    for _ in range(2):
        backend.prepare(source, FP32)
    assert fake.plugged == ["OpenVINOExecutionProvider"]


def test_sessions_are_freed(fake: Any, source: GraphSource) -> None:
    import gc
    import weakref

    make: Callable[[str], Any] = lambda name: registry.get_backend(name).prepare(source, FP32)  # noqa: E731
    for name in ALL:
        session = make(name)
        native = weakref.ref(fake.sessions.pop())
        session.close()
        gc.collect()
        assert native() is None

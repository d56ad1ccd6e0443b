"""Graphs are found by what decides them: shipped, cached, or traced."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import kiln
from kiln.errors import GraphError
from kiln.exporters import graphs, tracing
from kiln.exporters.graphs import architecture, architecture_digest, find_graph, save_graph

DATA = Path(kiln.__file__).parent / "exporters/data"
UNET = json.loads((DATA / "sd1/unet/config.json").read_text())
VAE = json.loads((DATA / "sd1/vae/config.json").read_text())
TEXT = json.loads((DATA / "sd1/text_encoder/config.json").read_text())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    return tmp_path / "graphs"


@pytest.fixture
def small() -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "small", [], []))


def test_sd1_ships() -> None:
    for component, config in (("unet", UNET), ("vae_decoder", VAE), ("text_encoder", TEXT)):
        assert find_graph(component, config).graph.node


@pytest.mark.parametrize(
    "change",
    [
        {"resnet_time_scale_shift": "default"},  # the class's default, said
        {"sample_size": 96},
        {"_diffusers_version": "0.99.0"},
        {"_name_or_path": "somewhere"},
        {"something_of_a_trainer": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_decide_the_graph_is_left_out(change: dict[str, Any]) -> None:
    assert architecture_digest("unet", UNET | change) == architecture_digest("unet", UNET)


@pytest.mark.parametrize(
    "change",
    [{"cross_attention_dim": 1024}, {"use_linear_projection": True}, {"in_channels": 9}, {"norm_eps": 1e-6}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_graph_is_in(change: dict[str, Any]) -> None:
    assert architecture_digest("unet", UNET | change) != architecture_digest("unet", UNET)


def test_the_order_of_a_config_does_not_matter() -> None:
    turned = dict(reversed(UNET.items()))
    assert list(turned) != list(UNET)
    assert architecture_digest("unet", turned) == architecture_digest("unet", UNET)


def test_each_half_of_a_vae_ignores_the_other() -> None:
    tiny = {"_class_name": "AutoencoderTiny"}
    encoder = tiny | {"encoder_block_out_channels": [32, 32]}
    assert architecture("vae_decoder", encoder) == architecture("vae_decoder", tiny)
    assert architecture("vae_encoder", encoder) != architecture("vae_encoder", tiny)
    decoder = tiny | {"num_decoder_blocks": [1, 1, 1, 1]}
    assert architecture("vae_decoder", decoder) != architecture("vae_decoder", tiny)
    assert architecture("vae_encoder", decoder) == architecture("vae_encoder", tiny)
    assert architecture_digest("vae_decoder", VAE) != architecture_digest("vae_encoder", VAE)


def test_the_end_token_of_a_text_encoder_decides_its_graph() -> None:
    """transformers pools at the largest id when the end token is 2, as SD1 has it, else at that token."""
    assert architecture_digest("text_encoder", TEXT | {"eos_token_id": 49407}) != architecture_digest(
        "text_encoder", TEXT
    )
    assert architecture_digest("text_encoder", TEXT | {"projection_dim": 9}) == architecture_digest(
        "text_encoder", TEXT
    )


def test_config_defaults_are_those_of_the_installed_classes() -> None:
    diffusers = pytest.importorskip("diffusers")
    import inspect

    for name, table in graphs._defaults().items():
        if name == "CLIPTextConfig":
            continue
        signature = inspect.signature(getattr(diffusers, name).__init__)
        found = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
        assert {key: json.loads(json.dumps(found.get(key))) for key in table} == table


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(GraphError, match=r"FluxTransformer2DModel.*Kiln knows.*UNet2DConditionModel"):
        find_graph("unet", UNET | {"_class_name": "FluxTransformer2DModel"})


def test_a_cached_graph_is_used(cache: Path, small: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNET | {"cross_attention_dim": 99}
    calls = []
    monkeypatch.setattr(tracing, "trace", lambda *args: calls.append(args) or small)
    assert find_graph("unet", config) == small
    assert [path.name for path in cache.iterdir()] == [f"unet-{architecture_digest('unet', config)}.onnx.xz"]
    assert find_graph("unet", config) == small
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["cut", "text", "inside"])
def test_a_damaged_cached_graph_is_named(cache: Path, damage: str) -> None:
    import lzma

    config = UNET | {"cross_attention_dim": 99}
    path = cache / f"unet-{architecture_digest('unet', config)}.onnx.xz"
    whole = next(graphs.shipped_folder().glob("sd1-unet-*")).read_bytes()
    cache.mkdir()
    path.write_bytes({"cut": whole[:1000], "text": b"hello", "inside": lzma.compress(b"\xff\xff")}[damage])
    with pytest.raises(GraphError, match=rf"{path.name} cannot be read.*delete it"):
        find_graph("unet", config)


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, small: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tracing, "trace", lambda *args: small)
    assert find_graph("unet", UNET | {"cross_attention_dim": 99}) == small


def test_a_failed_write_leaves_nothing(
    cache: Path, small: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        save_graph(small, cache / "unet-0.onnx.xz")
    assert list(cache.iterdir()) == []


def test_without_torch_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        GraphError, match=r"needs torch and diffusers: pip install 'kiln-diffusion\[export\]'"
    ):
        find_graph("unet", UNET | {"cross_attention_dim": 99})
    assert not cache.exists()

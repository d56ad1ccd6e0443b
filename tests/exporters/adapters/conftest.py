"""A tiny SD1 with all of its block types, random LoRAs for it, and the ways in which trainers spell them."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from kiln.exporters.ldm_names import ldm_unet_module_map

HERE = Path(__file__).parent
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _load(name: str) -> Any:
    """A file beside this one as a module; folders of tests are no packages."""
    spec = importlib.util.spec_from_file_location(f"kiln_tests_adapters_{name}", HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> Any:
    """reference.py: every family in float64 numpy."""
    return _load("reference")


@pytest.fixture(scope="session")
def cases() -> Any:
    """cases.py: one module of every family."""
    return _load("cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case`` runs over every module of cases.py, ``additive_case`` over those that only add."""
    for name, chosen in (("case", "CASES"), ("additive_case", "ADDITIVE")):
        if name in metafunc.fixturenames and not any(
            name in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
        ):
            metafunc.parametrize(name, list(getattr(_load("cases"), chosen)))


@pytest.fixture(scope="session")
def bake_one(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``bake_one(weight, tensors, strength)``: a one-layer model's weight after one file, and the report."""
    from kiln.exporters.adapters.base import AdapterRef
    from kiln.exporters.adapters.plan import plan_bake

    folder = tmp_path_factory.mktemp("one")

    def bake(
        weight: np.ndarray,
        tensors: Mapping[str, np.ndarray],
        strength: float = 1.0,
        stem: str = "lora_unet_x",
        bias: np.ndarray | None = None,
        **request: Any,
    ) -> Any:
        path = folder / "one.safetensors"
        safetensors.numpy.save_file({f"{stem}.{key}": v for key, v in tensors.items()}, path)
        shapes = {"x.weight": weight.shape} | ({} if bias is None else {"x.bias": bias.shape})
        with plan_bake({"unet": shapes}, [AdapterRef(path, strength, **request)]) as plan:
            baked = plan.bake("unet", "x.weight", weight)
            if bias is not None:
                return baked, plan.bake("unet", "x.bias", bias), plan.reports[0]
            return baked, plan.reports[0]

    return bake


@dataclass(frozen=True)
class Factors:
    """One LoRA module, free of any dialect."""

    network: str
    module: str
    down: np.ndarray
    up: np.ndarray
    alpha: float | None


@dataclass(frozen=True)
class Tiny:
    """The tiny model: torch modules, and its tensors by network."""

    unet: Any
    text_encoder: Any
    tensors: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {n: {k: v.shape for k, v in tensors.items()} for n, tensors in self.tensors.items()}

    def pipeline(self) -> Any:
        """A fresh copy in a diffusers pipeline; fusing changes it."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=None,
            text_encoder=copy.deepcopy(self.text_encoder),
            tokenizer=None,
            unet=copy.deepcopy(self.unet),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 32, 48),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=8,
    )
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    text_encoder = CLIPTextModel(config)
    tensors = {
        network: {name: value.detach().numpy() for name, value in module.state_dict().items()}
        for network, module in (("unet", unet), ("text_encoder", text_encoder))
    }
    return Tiny(unet.eval(), text_encoder.eval(), tensors)


@pytest.fixture(scope="session")
def make_lora(tiny: Tiny) -> Callable[..., list[Factors]]:
    """``make_lora(select, rank, alpha)``: random factors for every selected weight."""

    def make(
        select: Callable[[str, str], bool], rank: int = 4, alpha: float | None = 2.0, seed: int = 0
    ) -> list[Factors]:
        rng, found = np.random.default_rng(seed), []
        for network, tensors in tiny.tensors.items():
            for name, weight in tensors.items():
                module = name.removesuffix(".weight")
                if module == name or weight.ndim < 2 or "embedding" in name or not select(network, module):
                    continue
                down = rng.normal(size=(rank, *weight.shape[1:])).astype(np.float32)
                up = rng.normal(size=(weight.shape[0], rank, *(1,) * (weight.ndim - 2))).astype(np.float32)
                found.append(Factors(network, module, down / 8, up / 8, alpha))
        return found

    return make


def _kohya(factors: Factors, path: str) -> dict[str, np.ndarray]:
    prefix = "lora_unet_" if factors.network == "unet" else "lora_te_"
    stem = prefix + path.replace(".", "_")
    tensors = {f"{stem}.lora_down.weight": factors.down, f"{stem}.lora_up.weight": factors.up}
    if factors.alpha is not None:
        tensors[f"{stem}.alpha"] = np.array(factors.alpha, np.float32)
    return tensors


def _dotted(factors: Factors, module: str, down: str, up: str, prefix: bool = True) -> dict[str, np.ndarray]:
    stem = f"{factors.network}.{module}" if prefix else module
    return {f"{stem}{down}.weight": factors.down, f"{stem}{up}.weight": factors.up}


def _processors(factors: Factors, prefix: bool) -> dict[str, np.ndarray]:
    module = factors.module
    if factors.network == "unet":
        block, name = module.replace(".to_out.0", ".to_out").rsplit(".", 1)
        module = f"{block}.processor.{name}"
    else:
        block, name = module.rsplit(".", 1)
        module = f"{block}.to_{name.removesuffix('_proj')}"
    return _dotted(factors, module, "_lora.down", "_lora.up", prefix)


@pytest.fixture(scope="session")
def spell(tiny: Tiny) -> Callable[[str, Iterable[Factors]], dict[str, np.ndarray]]:
    """``spell(dialect, factors)``: the state dict that a trainer of that dialect would have written."""
    ldm = {path: name for name, path in ldm_unet_module_map(tiny.tensors["unet"]).items()}
    new = (".lora_linear_layer.down", ".lora_linear_layer.up")
    writers: dict[str, Callable[[Factors], dict[str, np.ndarray]]] = {
        "kohya": lambda f: _kohya(f, f.module),
        "kohya, LDM names": lambda f: _kohya(
            f, ldm.get(f.module, f.module) if f.network == "unet" else f.module
        ),
        "diffusers attention processors": lambda f: _processors(f, True),
        "bare attention processors": lambda f: _processors(f, False),
        "diffusers": lambda f: _dotted(
            f, f.module, *((".lora.down", ".lora.up") if f.network == "unet" else new)
        ),
        "diffusers, peft suffixes": lambda f: _dotted(f, f.module, ".lora_A", ".lora_B"),
    }
    return lambda dialect, factors: {k: v for f in factors for k, v in writers[dialect](f).items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """``save(state_dict, name, metadata)``: a safetensors file in the test's folder."""

    def write(
        tensors: Mapping[str, np.ndarray], name: str = "adapter", metadata: dict[str, str] | None = None
    ) -> Path:
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(dict(tensors), path, metadata)
        return path

    return write


@pytest.fixture(scope="session")
def baked() -> Callable[..., dict[tuple[str, str], np.ndarray]]:
    """``baked(tiny, *refs)``: all weights of the model after baking."""
    from kiln.exporters.adapters.plan import plan_bake

    def bake(tiny: Tiny, *refs: Any) -> dict[tuple[str, str], np.ndarray]:
        with plan_bake(tiny.shapes, refs) as plan:
            return {
                (network, name): plan.bake(network, name, value)
                for network, tensors in tiny.tensors.items()
                for name, value in tensors.items()
            }

    return bake


@pytest.fixture(scope="session")
def fused() -> Callable[[Any], dict[tuple[str, str], np.ndarray]]:
    """``fused(pipeline)``: all weights of a diffusers pipeline after ``fuse_lora``."""

    def collect(pipeline: Any) -> dict[tuple[str, str], np.ndarray]:
        found = {}
        for network in ("unet", "text_encoder"):
            for name, value in getattr(pipeline, network).state_dict().items():
                if ".lora_A." not in name and ".lora_B." not in name:
                    found[network, name.replace(".base_layer", "")] = value.detach().numpy()
        return found

    return collect


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real sample files; the test is skipped where it is not there."""
    if not SHARED.is_dir():
        pytest.skip("the real adapter files are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def sd1_shapes() -> Any:
    """Tensor names and shapes of the real SD1, by network."""
    return _load("shapes").sd1()


@pytest.fixture(scope="session")
def sd2_shapes() -> Any:
    """Those of the real SD2."""
    return _load("shapes").sd2()


@pytest.fixture(scope="session")
def sdxl_shapes() -> Any:
    """Those of the real SDXL with both text encoders."""
    return _load("shapes").sdxl()


@pytest.fixture(scope="session")
def with_alpha() -> Callable[[Iterable[Factors], float | None], list[Factors]]:
    return lambda factors, alpha: [replace(f, alpha=alpha) for f in factors]

"""Shared by all tests: a cache of their own, a tiny SD1 of the real topology, and a bundle made of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import kiln
from kiln.exporters import graphs, tracing
from kiln.exporters.export import ExportSpec, export

SHIPPED = Path(kiln.__file__).parent / "exporters/data/sd1"


@pytest.fixture(scope="session")
def helper() -> Callable[[str], Any]:
    """``helper("backends/fakes_onnxruntime")``: a module of the tests that holds none.

    Folders of tests are no packages, so it is imported by its bare name, and so is what it imports.
    """

    def load(path: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend((Path(__file__).parent / path).parent)
            return importlib.import_module(Path(path).name)

    return load


@pytest.fixture(scope="session")
def traced(request: pytest.FixtureRequest) -> Path:
    """Graphs of the tiny architectures, kept from run to run for one tracer and one torch: minutes."""
    torch = pytest.importorskip("torch")
    versions = [torch.__version__, Path(tracing.__file__).read_text(), Path(graphs.__file__).read_text()]
    digest = hashlib.sha256("".join(versions).encode()).hexdigest()[:12]
    return request.config.cache.mkdir(f"kiln-graphs-{digest}")


@pytest.fixture(scope="session", autouse=True)
def kiln_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``KILN_CACHE`` for the whole session; the workers of one pytest-xdist run share it."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if base.name.startswith("popen-") else base) / "kiln-cache"
        folder.mkdir(exist_ok=True)
        patch.setenv("KILN_CACHE", str(folder))
        yield folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``KILN_CACHE`` for one test: a folder that is not there yet, without a limit."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KILN_CACHE", str(folder))
    monkeypatch.delenv("KILN_CACHE_LIMIT", raising=False)
    return folder


@pytest.fixture
def run_command(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``run_command("lora", "inspect", path)``: kiln in an empty folder, with a cache outside it."""
    from click.testing import CliRunner

    from kiln.cli import main

    here = own_cache.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A background job of a shell ignores Ctrl-C, and so would everything that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_sd1(write_tiny_sd1: Callable[[int, int], Path]) -> Path:
    """A diffusers folder, fp32: SD1's topology with few channels and random weights; images of 128 x 128."""
    return write_tiny_sd1(32, 4)


@pytest.fixture(scope="session")
def write_tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """``write_tiny_sd1(width, heads)``: a tiny SD1 whose text encoder has that width and as many heads."""
    return lambda width, heads: _write_tiny_sd1(tmp_path_factory.mktemp("tiny") / "sd1", width, heads)


def _write_tiny_sd1(folder: Path, width: int, heads: int) -> Path:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    for name, module in _tiny_modules(width, heads).items():
        with torch.no_grad():
            for key, value in module.named_parameters():
                if "norm" in key or key.endswith("bias"):  # left at 1 and 0, a mix-up would not be seen
                    value.add_(torch.randn_like(value), alpha=0.1)
            if name == "vae":
                module.decoder.conv_out.weight.mul_(4)  # an image with contrast
        module.save_pretrained(folder / name, safe_serialization=True)
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer")
    shutil.copytree(SHIPPED / "scheduler", folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _tiny_modules(width: int, heads: int) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=128,
    )
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        vocab_size=49408,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_sd1: Path, kiln_cache: Path, traced: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of ``tiny_sd1``."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    with filelock.FileLock(kiln_cache / "tracing.lock"):
        shutil.copytree(traced, kiln_cache / "graphs", dirs_exist_ok=True)
        export(ExportSpec(tiny_sd1, folder))
        shutil.copytree(kiln_cache / "graphs", traced, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def write_lora() -> Callable[..., Path]:
    """``write_lora(path, folder, seed)``: a kohya LoRA of rank 2 on the attentions of a diffusers folder."""

    def write(
        path: Path, folder: Path, seed: int = 0, networks: tuple[str, ...] = ("unet", "text_encoder")
    ) -> Path:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
        rng, tensors = np.random.default_rng(seed), {}
        for network in networks:
            with safe_open(next((folder / network).glob("*.safetensors")), "numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if not name.endswith(("to_q.weight", "to_v.weight", "q_proj.weight", "v_proj.weight")):
                        continue
                    rows, columns = file.get_slice(name).get_shape()
                    stem = prefixes[network] + name.removesuffix(".weight").replace(".", "_")
                    tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(2, columns)).astype(np.float32)
                    tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(rows, 2)).astype(np.float32) / 4
                    tensors[f"{stem}.alpha"] = np.array(1, np.float32)
        save_file(tensors, path)
        return path

    return write

"""The torch backend against the modules themselves, for each component and storage type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.torch_reference import TorchBackend
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS
from kiln.errors import SessionError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LIMIT = THRESHOLDS["component_relative_l2"]
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 12)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)


@dataclass
class Case:
    """A component: its module, how to call that, the tensors that a bundle keeps of it, and inputs."""

    component: str
    module: Any
    config: dict[str, Any]
    call: Callable[[Any, dict[str, Any]], tuple[Any, ...]]
    feeds: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()


def make_text_encoder() -> Case:
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=97,
        eos_token_id=98,
    )
    ids = np.random.default_rng(2).integers(0, 97, (2, 20))
    ids[0, 7:] = 98
    ids[1, 12:] = 98

    def call(module: Any, feeds: dict[str, Any]) -> tuple[Any, ...]:
        states = module(**feeds)
        return states.last_hidden_state, states.pooler_output

    return Case(
        "text_encoder", transformers.CLIPTextModel(config), config.to_dict(), call, {"input_ids": ids}
    )


def make_unet() -> Case:
    module = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    states = np.random.default_rng(3).standard_normal((2, 20, 16)).astype(np.float32)
    feeds = {"sample": LATENTS, "timestep": np.array(481.25, np.float32), "encoder_hidden_states": states}
    return Case("unet", module, _config(module), lambda m, f: (m(**f).sample,), feeds)


def make_kl(component: str) -> Case:
    module = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    if component == "vae_decoder":
        left_out = ("encoder.", "quant_conv.")
        return Case(
            component, module, _config(module), lambda m, f: (m.decode(f["latent_sample"]).sample,),
            {"latent_sample": LATENTS}, left_out,
        )  # fmt: skip
    left_out = ("decoder.", "post_quant_conv.")

    def encode(module: Any, feeds: dict[str, Any]) -> tuple[Any, ...]:
        posterior = module.encode(feeds["sample"]).latent_dist
        return (torch.cat([posterior.mean, posterior.logvar], dim=1),)

    return Case(component, module, _config(module), encode, {"sample": IMAGES}, left_out)


def make_tiny(component: str) -> Case:
    module = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    if component == "vae_decoder":
        call = lambda m, f: (m.decode(f["latent_sample"]).sample,)  # noqa: E731
        return Case(component, module, _config(module), call, {"latent_sample": LATENTS}, ("encoder.",))
    call = lambda m, f: (m.encode(f["sample"]).latents,)  # noqa: E731
    return Case(component, module, _config(module), call, {"sample": IMAGES}, ("decoder.",))


def _config(module: Any) -> dict[str, Any]:
    return {**module.config, "_class_name": type(module).__name__}


MAKERS = {
    "text_encoder": make_text_encoder,
    "unet": make_unet,
    "kl decoder": lambda: make_kl("vae_decoder"),
    "kl encoder": lambda: make_kl("vae_encoder"),
    "tiny decoder": lambda: make_tiny("vae_decoder"),
    "tiny encoder": lambda: make_tiny("vae_encoder"),
}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    """Each component, with random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = MAKERS[request.param]()
    made.module.eval()
    return made


def save(
    case: Case, folder: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None
) -> GraphSource:
    """Write what a bundle holds of the component."""
    from safetensors.torch import save_file

    tensors = {k: v for k, v in case.module.state_dict().items() if not k.startswith(case.left_out or "\0")}
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "weights.safetensors")
    return GraphSource(case.component, folder / "model.onnx", folder / "weights.safetensors", case.config, "")


def expected(case: Case) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = case.call(case.module, {k: torch.from_numpy(v.copy()) for k, v in case.feeds.items()})
    return [output.float().numpy() for output in outputs]


def check(case: Case, outputs: dict[str, np.ndarray], wanted: list[np.ndarray]) -> None:
    assert list(outputs) == [port.name for port in CONTRACTS[case.component].outputs]
    for array, want in zip(outputs.values(), wanted, strict=True):
        assert array.shape == want.shape
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert LIMIT.holds(relative_l2(array, want))


def test_values(case: Case, tmp_path: Path) -> None:
    session = TorchBackend().prepare(save(case, tmp_path), PrepareOptions())
    assert session.in_force.precision == "fp32"
    check(case, session.run(case.feeds), expected(case))


def test_fp16_storage_is_computed_in_fp32(case: Case, tmp_path: Path) -> None:
    case.module.half().float()
    source = save(case, tmp_path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    check(case, TorchBackend().prepare(source, PrepareOptions()).run(case.feeds), expected(case))


def test_a_wrong_weight_is_seen(case: Case, tmp_path: Path) -> None:
    """The check fails on a planted error: one matrix x1.1."""

    def plant(tensors: dict[str, Any]) -> None:
        name = [k for k, v in tensors.items() if v.ndim > 1][-1]
        tensors[name] = tensors[name] * 1.1

    session = TorchBackend().prepare(save(case, tmp_path, plant), PrepareOptions())
    with pytest.raises(AssertionError):
        check(case, session.run(case.feeds), expected(case))


def test_bf16(case: Case, tmp_path: Path) -> None:
    session = TorchBackend().prepare(save(case, tmp_path), PrepareOptions(precision="bf16"))
    assert session.in_force.precision == "bf16"
    for array, want in zip(session.run(case.feeds).values(), expected(case), strict=True):
        error = relative_l2(array, want)
        assert not LIMIT.holds(error)  # really not fp32
        assert THRESHOLDS["component_bf16_relative_l2"].holds(error)


def test_missing_tensor(case: Case, tmp_path: Path) -> None:
    source = save(case, tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(SessionError, match="lacks 1 of the tensors"):
        TorchBackend().prepare(source, PrepareOptions())


def test_foreign_tensor(case: Case, tmp_path: Path) -> None:
    source = save(case, tmp_path, lambda tensors: tensors.update(foreign=torch.zeros(1)))
    with pytest.raises(SessionError, match="among them foreign"):
        TorchBackend().prepare(source, PrepareOptions())


def test_wrong_shape(case: Case, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name][1:]

    with pytest.raises(SessionError, match=r"has the shape \[.*asks for \["):
        TorchBackend().prepare(save(case, tmp_path, cut), PrepareOptions())


def test_position_ids_may_be_stored(tmp_path: Path) -> None:
    """The graph of CLIP reads them from the file, so a bundle may hold them; the module makes its own."""
    case = make_text_encoder()
    case.module.eval()
    name = "text_model.embeddings.position_ids"
    source = save(case, tmp_path, lambda tensors: tensors.update({name: torch.arange(20)[None]}))
    check(case, TorchBackend().prepare(source, PrepareOptions()).run(case.feeds), expected(case))


def test_unknown_class(tmp_path: Path) -> None:
    case = make_unet()
    source = replace(save(case, tmp_path), config={"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(SessionError, match="FluxTransformer2DModel"):
        TorchBackend().prepare(source, PrepareOptions())

"""The torch backend against the modules themselves, for each component, storage type and precision."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import torch_backend
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.torch_backend import TorchBackend
from kiln.backends.torch_devices import TorchDevice
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.components import CONTRACTS
from kiln.errors import BackendUnavailable, SessionError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LIMIT = THRESHOLDS["component_relative_l2"]
CPU = PrepareOptions(device="cpu")
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
    session = TorchBackend().prepare(save(case, tmp_path), CPU)
    assert session.in_force.precision == "fp32"
    check(case, session.run(case.feeds), expected(case))


def test_fp16_storage_is_computed_in_fp32(case: Case, tmp_path: Path) -> None:
    case.module.half().float()
    source = save(case, tmp_path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    check(case, TorchBackend().prepare(source, CPU).run(case.feeds), expected(case))


def test_a_wrong_weight_is_seen(case: Case, tmp_path: Path) -> None:
    """The check fails on a planted error: one matrix x1.1."""

    def plant(tensors: dict[str, Any]) -> None:
        name = [k for k, v in tensors.items() if v.ndim > 1][-1]
        tensors[name] = tensors[name] * 1.1

    session = TorchBackend().prepare(save(case, tmp_path, plant), CPU)
    with pytest.raises(AssertionError):
        check(case, session.run(case.feeds), expected(case))


def test_bf16(case: Case, tmp_path: Path) -> None:
    session = TorchBackend().prepare(save(case, tmp_path), replace(CPU, precision="bf16"))
    assert session.in_force.precision == "bf16"
    for array, want in zip(session.run(case.feeds).values(), expected(case), strict=True):
        error = relative_l2(array, want)
        assert not LIMIT.holds(error)  # really not fp32
        assert THRESHOLDS["component_bf16_relative_l2"].holds(error)


def test_missing_tensor(case: Case, tmp_path: Path) -> None:
    source = save(case, tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(SessionError, match="lacks 1 of the tensors"):
        TorchBackend().prepare(source, CPU)


def test_foreign_tensor(case: Case, tmp_path: Path) -> None:
    source = save(case, tmp_path, lambda tensors: tensors.update(foreign=torch.zeros(1)))
    with pytest.raises(SessionError, match="among them foreign"):
        TorchBackend().prepare(source, CPU)


def test_wrong_shape(case: Case, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name][1:]

    with pytest.raises(SessionError, match=r"has the shape \[.*asks for \["):
        TorchBackend().prepare(save(case, tmp_path, cut), CPU)


def test_position_ids_may_be_stored(tmp_path: Path) -> None:
    """The graph of CLIP reads them from the file, so a bundle may hold them; the module makes its own."""
    case = make_text_encoder()
    case.module.eval()
    name = "text_model.embeddings.position_ids"
    source = save(case, tmp_path, lambda tensors: tensors.update({name: torch.arange(20)[None]}))
    check(case, TorchBackend().prepare(source, CPU).run(case.feeds), expected(case))


def test_unknown_class(tmp_path: Path) -> None:
    case = make_unet()
    source = replace(save(case, tmp_path), config={"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(SessionError, match="FluxTransformer2DModel"):
        TorchBackend().prepare(source, CPU)


def test_fp16_where_it_is_forced(case: Case, tmp_path: Path) -> None:
    """On a processor torch computes fp16 slowly but right; without force it is refused where it is slow."""
    source = save(case, tmp_path)
    forced = replace(CPU, precision="fp16", extra={"force_precision": True})
    session = TorchBackend().prepare(source, forced)
    assert session.in_force.precision == "fp16"
    for array, want in zip(session.run(case.feeds).values(), expected(case), strict=True):
        error = relative_l2(array, want)
        assert not LIMIT.holds(error)  # really not fp32
        assert THRESHOLDS["component_fp16_relative_l2"].holds(error)
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(SessionError, match="does not compute in fp16"):
            TorchBackend().prepare(source, replace(CPU, precision="fp16"))


def test_channels_last(case: Case, tmp_path: Path) -> None:
    """Another layout, the same numbers up to the order of summing; outputs are contiguous as ever."""
    session = TorchBackend().prepare(save(case, tmp_path), replace(CPU, extra={"channels_last": True}))
    assert session.in_force.settings["channels_last"] == (case.component != "text_encoder")
    outputs = session.run(case.feeds)
    check(case, outputs, expected(case))
    assert all(array.flags.c_contiguous for array in outputs.values())


def test_settings_are_read_back(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_TUNABLEOP_ENABLED", "1")
    found = TorchBackend().prepare(save(case, tmp_path), replace(CPU, threads=1)).in_force
    assert (found.device, found.precision, found.threads, found.provider) == ("cpu", "fp32", 1, "eager")
    kinds = {"text_encoder": "sdpa", "unet": "AttnProcessor2_0"}
    tiny = case.config.get("_class_name") == "AutoencoderTiny"  # has no attention
    wanted = kinds.get(case.component, "none" if tiny else "AttnProcessor2_0")
    assert found.settings["attention"] == wanted
    assert found.settings["mkldnn.matmul.fp32_precision"] == "ieee"
    assert found.settings["env.PYTORCH_TUNABLEOP_ENABLED"] == "1"
    assert found.settings["compile"] is False


def test_a_module_that_is_not_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_unet()
    load = torch_backend.load_module
    monkeypatch.setattr(torch_backend, "load_module", lambda *a, **k: load(*a, **k).bfloat16())
    with pytest.raises(SessionError, match=r"on cpu in fp32; torch reports \['cpu'\] in \['bf16'\]"):
        TorchBackend().prepare(save(case, tmp_path), CPU)


def test_weights_are_never_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one tensor of the file is converted, no other one of them is alive."""
    import safetensors

    case = make_unet()
    source = save(case, tmp_path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self._file = open_file(*arguments, **keywords)

        def __enter__(self) -> Any:
            self._entered = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entered, name)

        def get_tensor(self, name: str) -> Any:
            nonlocal most
            tensor = self._entered.get_tensor(name)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    open_file = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    session = TorchBackend().prepare(source, CPU)
    assert most <= 2  # the one before may still be bound to a name
    assert not alive
    alive.clear()
    most = 0
    monkeypatch.setattr("kiln.backends.torch_modules._placed", lambda tensor, *_: tensor)
    held = torch_backend.load_module(source, torch.float16, torch.device("cpu"))
    assert most > 50  # the watch sees tensors that are kept
    assert held
    check(replace(case, module=case.module.half().float().eval()), session.run(case.feeds), expected(case))


def test_quantized_weights_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    def quantize(tensors: dict[str, Any]) -> None:
        name = next(k for k, v in tensors.items() if v.ndim > 1)
        tensors[name] = tensors[name].mul(127).to(torch.int8)
        tensors[name.replace("weight", "weight_scale")] = torch.ones(1)

    with pytest.raises(SessionError, match=rf"{case.component} is quantized: 1 of its .*: I8\)"):
        TorchBackend().prepare(save(case, tmp_path, quantize), CPU)


GPU = TorchDevice("rocm", "rocm", 0, "Radeon", "gfx1100", ("fp16", "bf16", "fp32"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose memory is the processor's: all that is done for one is done, and noted."""
    done: list[str] = []
    monkeypatch.setattr(torch_backend, "choose_device", lambda *_: (GPU, ""))
    monkeypatch.setattr(torch_backend, "native_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: done.append(f"synchronize {index}"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    return done


def test_on_a_gpu(gpu: list[str], case: Case, tmp_path: Path) -> None:
    session = TorchBackend().prepare(save(case, tmp_path), PrepareOptions())
    found = session.in_force
    assert (found.device, found.precision) == ("rocm", "fp16")
    assert found.settings["toolkit"] == "ROCm 6.4.1"
    assert found.settings["cudnn.conv.fp32_precision"] == "ieee"
    assert found.settings["sdpa"] == "cudnn,flash,mem_efficient,math"
    assert gpu == []
    for array, want in zip(session.run(case.feeds).values(), expected(case), strict=True):
        assert array.dtype == np.float32
        assert THRESHOLDS["component_fp16_relative_l2"].holds(relative_l2(array, want))
    assert gpu == ["synchronize 0"]
    session.close()
    assert gpu == ["synchronize 0", "empty_cache"]


@pytest.mark.usefixtures("gpu")
def test_the_vae_of_sdxl_on_a_gpu(tmp_path: Path) -> None:
    case = make_kl("vae_decoder")
    case.config |= {"scaling_factor": 0.13025, "force_upcast": True}
    found = TorchBackend().prepare(save(case, tmp_path), PrepareOptions(precision="fp16")).in_force
    assert found.precision == "fp32"
    assert "force_upcast" in str(found.settings["fp32_because"])


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_runs_out_of_memory(tmp_path: Path) -> None:
    session = TorchBackend().prepare(save(make_unet(), tmp_path), PrepareOptions())

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB.")

    session._call = fail
    with pytest.raises(SessionError, match=r"on rocm .Radeon.: HIP out of memory.*use a smaller size"):
        session.run(make_unet().feeds)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="no device 'rocm:1'; it has: cpu"):
        TorchBackend().prepare(save(make_unet(), tmp_path), replace(CPU, device="rocm:1"))


def test_compile_needs_all_shapes(tmp_path: Path) -> None:
    options = replace(CPU, shapes={"sample": (2, 4, 8, 12)}, extra={"compile": True})
    with pytest.raises(SessionError, match="unet was given none for timestep, encoder_hidden_states"):
        TorchBackend().prepare(save(make_unet(), tmp_path), options)


def has_compiler() -> bool:
    return bool(shutil.which(os.environ.get("CXX", "g++")))


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler, and there is none")
def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    case = make_text_encoder()
    case.module.eval()
    shapes = {name: array.shape for name, array in case.feeds.items()}
    options = replace(CPU, shapes=shapes, threads=1, extra={"compile": True})
    session = TorchBackend().prepare(save(case, tmp_path), options)
    assert (session.in_force.provider, session.in_force.settings["compile"]) == ("compile", "default")
    assert list((tmp_path / "inductor").rglob("*.so"))  # was compiled, and before the first run
    check(case, session.run(case.feeds), expected(case))
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(case.feeds)

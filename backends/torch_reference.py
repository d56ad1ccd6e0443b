"""The reference: diffusers' and transformers' own modules with the bundle's weights, in fp32.

No graph is involved. What this backend gives is what every other backend is measured against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .cpu import describe_cpu, threads_are_limited, usable_cores
from .engine import Engine
from .errors_map import engine_errors
from .feeds import check_options, contract_of
from .session import CheckedSession, fixed_shapes, refuse_extra

if TYPE_CHECKING:
    import torch

NAME = "torch"
ENGINE = Engine("torch", ("torch",), (2, 10), "export")
_MODULES = {
    "unet": ("UNet2DConditionModel",),
    "vae_decoder": ("AutoencoderKL", "AutoencoderTiny"),
    "vae_encoder": ("AutoencoderKL", "AutoencoderTiny"),
}
# Which half of a VAE a component has no tensors of.
_OTHER_HALF = {"vae_decoder": ("encoder", "quant_conv"), "vae_encoder": ("decoder", "post_quant_conv")}


class TorchBackend:
    """Torch on the processor."""

    name = NAME

    def probe(self) -> Availability:
        """Whether torch, diffusers and transformers are installed; none is imported."""
        found = ENGINE.probe()
        for package in ("diffusers", "transformers"):
            other = Engine(package, (package,), (0,), "export").probe()
            if found.available and not other.available:
                return Availability(False, other.reason, found.version)
        return found

    def devices(self) -> tuple[Device, ...]:
        """The processor, or nothing when torch does not load."""
        try:
            ENGINE.load()
        except BackendUnavailable:
            return ()
        return (Device("cpu", describe_cpu().name, ("fp32", "bf16")),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> TorchSession:
        """Build the module that ``source.config`` describes and load ``source.weights_path`` into it.

        Raises:
            BackendUnavailable: torch or diffusers is not there, or the device is another than ``cpu``.
            SessionError: the config names a class that Kiln does not know, the tensors are not exactly
                those of the module, or the precision is neither fp32 nor bf16.
        """
        check_options(source.component, options)
        refuse_extra(self.name, options)
        if options.device.lower() not in ("auto", "cpu"):
            raise BackendUnavailable(f"the torch backend runs on cpu only, got {options.device!r}")
        if options.precision not in ("auto", "fp32", "bf16"):
            raise SessionError(f"the torch backend computes in auto, fp32 or bf16, got {options.precision}")
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        torch = ENGINE.load()
        threads = options.threads or (usable_cores() if threads_are_limited() else 0)
        if threads:
            torch.set_num_threads(threads)  # for the whole process: torch knows no other way
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        with engine_errors(NAME, f"loading {source.component}"):
            module = load_module(source, dtype)
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[next(module.parameters()).dtype]
        device = str(next(module.parameters()).device)
        in_force = InForce(NAME, torch.__version__, "eager", device, precision, torch.get_num_threads())
        return TorchSession(source, in_force, module, options)


class TorchSession(CheckedSession):
    """One module in evaluation mode."""

    def __init__(self, source: GraphSource, in_force: InForce, module: Any, options: PrepareOptions) -> None:
        super().__init__(source, in_force, fixed_shapes(source, options))
        self._module = module

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        dtype = next(self._module.parameters()).dtype
        with torch.inference_mode():
            inputs = {}
            for name, array in feeds.items():
                tensor = torch.from_numpy(np.array(array))  # a copy, because torch warns of read-only arrays
                # A timestep in bf16 would be off by up to 2; its embedding is made in fp32 and cast.
                inputs[name] = tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim else tensor
            outputs = _call(self.component, self._module, inputs)
            return {
                port.name: tensor.to(torch.float32).numpy()
                for port, tensor in zip(self.contract.outputs, outputs, strict=True)
            }

    def _release(self) -> None:
        self._module = None


def _call(component: str, module: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the contract, in its order."""
    if component.startswith("text_encoder"):
        states = module(input_ids=inputs["input_ids"])
        return states.last_hidden_state, states.pooler_output
    if component == "unet":
        return (module(**inputs, return_dict=False)[0],)
    if component == "vae_decoder":
        return (module.decode(inputs["latent_sample"], return_dict=False)[0],)
    latents = module.encode(inputs["sample"], return_dict=False)[0]
    # AutoencoderKL gives a distribution, whose parameters are mean and log variance along the channels.
    return (getattr(latents, "parameters", latents),)


def load_module(source: GraphSource, dtype: torch.dtype) -> torch.nn.Module:
    """The torch module of a component, in evaluation mode.

    Args:
        source: ``config`` decides the class, ``weights_path`` holds its tensors under diffusers' names.
        dtype: what all floating-point tensors are cast to.

    Raises:
        SessionError: unknown class, or the tensors are not exactly those of the module.
    """
    import torch
    from safetensors.torch import load_file

    with torch.device("meta"):
        module = _build(source.component, source.config)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(source.weights_path).items()
    }
    _restore_buffers(module, tensors)
    wanted = module.state_dict()
    _check_names(source, set(wanted), set(tensors))
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise SessionError(
                f"{source.weights_path}: {name} has the shape {list(tensor.shape)}, the config of "
                f"{source.component} asks for {list(wanted[name].shape)}"
            )
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _build(component: str, config: Mapping[str, Any]) -> torch.nn.Module:
    contract_of(component)
    if component.startswith("text_encoder"):
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig.from_dict(dict(config), attn_implementation="sdpa"))
    import diffusers

    name = config.get("_class_name")
    if name not in _MODULES[component]:
        raise SessionError(
            f"the config of {component} names the class {name!r}; known: {_MODULES[component]}"
        )
    module: torch.nn.Module = getattr(diffusers, str(name)).from_config(dict(config))
    for part in _OTHER_HALF.get(component, ()):
        if hasattr(module, part):
            delattr(module, part)
    return module


def _restore_buffers(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give buffers that no state dict holds their values; on the meta device they have none.

    CLIP's ``position_ids`` counts from 0. A file may hold it, because the graph reads it there.
    """
    import torch

    persistent = set(module.state_dict())
    for name, buffer in list(module.named_buffers()):
        if name in persistent:
            continue
        if not name.endswith("position_ids"):
            raise SessionError(f"the module has a buffer {name}, whose values Kiln does not know")
        tensors.pop(name, None)
        owner = module.get_submodule(name.rpartition(".")[0])
        positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
        owner.register_buffer("position_ids", positions, persistent=False)


def _check_names(source: GraphSource, wanted: set[str], got: set[str]) -> None:
    for kind, names in (("lacks", wanted - got), ("has, unknown to the config,", got - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise SessionError(
                f"{source.weights_path} {kind} {len(names)} of the tensors of {source.component}, "
                f"among them {some}"
            )

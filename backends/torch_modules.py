"""Build the torch module of a component and put a bundle's weights into it, one tensor at a time.

The module is made on the meta device, without memory. Each tensor goes from the file to its device in the
type it is stored in, is cast there, and becomes the module's own; no second copy of the weights ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SessionError
from ..int8 import SCALE_SUFFIX, dequantized
from .base import GraphSource
from .feeds import contract_of

if TYPE_CHECKING:
    import torch

_MODULES = {
    "unet": ("UNet2DConditionModel",),
    "vae_decoder": ("AutoencoderKL", "AutoencoderTiny"),
    "vae_encoder": ("AutoencoderKL", "AutoencoderTiny"),
}
# Which half of a VAE a component has no tensors of.
_OTHER_HALF = {"vae_decoder": ("encoder", "quant_conv"), "vae_encoder": ("decoder", "post_quant_conv")}
_POSITIONS = "position_ids"


def load_module(
    source: GraphSource, dtype: torch.dtype, device: torch.device, *, channels_last: bool = False
) -> torch.nn.Module:
    """The torch module of a component, in evaluation mode.

    Args:
        source: ``config`` decides the class, ``weights_path`` holds its tensors under diffusers' names.
        dtype: what all floating-point tensors are cast to.
        device: where the module lives.
        channels_last: lay out the weights of convolutions as NHWC.

    Raises:
        SessionError: unknown class, the tensors are not exactly those of the module, or they are quantized.
    """
    import torch
    from safetensors import safe_open

    with torch.device("meta"):
        module = _build(source.component, source.config)
    _restore_buffers(module, device)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    with safe_open(source.weights_path, framework="pt", device=str(device)) as file:
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        headers = {name: header for name, header in headers.items() if not _is_made_here(name, wanted)}
        scaled = {name for name in headers if name + SCALE_SUFFIX in headers}
        headers = {name: header for name, header in headers.items() if not _is_scale(name, scaled)}
        if scaled:
            _refuse_int8_activations(source)
        _check_types(source, {n: h.get_dtype() for n, h in headers.items() if n not in scaled})
        _check_names(source, set(wanted), set(headers))
        _check_shapes(source, wanted, {name: tuple(header.get_shape()) for name, header in headers.items()})
        tensors = {name: _placed(_read(file, name, scaled), dtype, channels_last) for name in headers}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _is_scale(name: str, scaled: set[str]) -> bool:
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in scaled


def _read(file: Any, name: str, scaled: set[str]) -> torch.Tensor:
    """A tensor of the file; int8 weights come with their scales and are floating point from here on."""
    names = (name, name + SCALE_SUFFIX) if name in scaled else (name,)
    tensor: torch.Tensor = dequantized(name, {n: file.get_tensor(n) for n in names})
    return tensor


def call_module(component: str, module: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the component's contract, in its order."""
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


def _placed(tensor: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """A tensor of the file in the type and layout it is computed in; itself, if it is that already."""
    import torch

    layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
    return tensor.to(dtype=dtype, memory_format=layout)


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


def _restore_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Give buffers that no state dict holds their values; on the meta device they have none.

    CLIP's ``position_ids`` counts from 0.
    """
    import torch

    persistent = set(module.state_dict())
    for name, buffer in list(module.named_buffers()):
        if name in persistent:
            continue
        if not name.endswith(_POSITIONS):
            raise SessionError(f"the module has a buffer {name}, whose values Kiln does not know")
        owner = module.get_submodule(name.rpartition(".")[0])
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        owner.register_buffer(_POSITIONS, positions, persistent=False)


def _is_made_here(name: str, wanted: Mapping[str, object]) -> bool:
    """A file may hold CLIP's positions, because the graph reads them there; the module has its own."""
    return name.endswith(_POSITIONS) and name not in wanted


def _refuse_int8_activations(source: GraphSource) -> None:
    """Raise for a graph that rounds activations: a module built from the config would not, and not say so."""
    import onnx

    graph = onnx.load(source.graph_path, load_external_data=False).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        raise SessionError(
            f"{source.component} computes in int8 (int8-full), which the torch backend does not; use the "
            "openvino or onnxruntime backend, or a bundle of --precision int8"
        )


def _check_types(source: GraphSource, types: Mapping[str, str]) -> None:
    """Raise for integers: these are codes of quantized weights, whose scales only the graph can apply."""
    coded = {name: kind for name, kind in types.items() if not kind.startswith(("F", "BF"))}
    if coded:
        name, kind = min(coded.items())
        raise SessionError(
            f"{source.component} is quantized: {len(coded)} of its {len(types)} tensors hold integers "
            f"({name}: {kind}), and the torch backend computes from floating-point weights only; use the "
            "openvino or onnxruntime backend, or export the bundle again in fp16"
        )


def _check_shapes(
    source: GraphSource, wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in got.items():
        if shape != wanted[name]:
            raise SessionError(
                f"{source.weights_path}: {name} has the shape {list(shape)}, the config of "
                f"{source.component} asks for {list(wanted[name])}"
            )


def _check_names(source: GraphSource, wanted: set[str], got: set[str]) -> None:
    for kind, names in (("lacks", wanted - got), ("has, unknown to the config,", got - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise SessionError(
                f"{source.weights_path} {kind} {len(names)} of the tensors of {source.component}, "
                f"among them {some}"
            )

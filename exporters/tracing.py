"""Trace an architecture into an ONNX graph without weights: the only part of Kiln that needs torch.

The module is built on the meta device, exported by ``torch.export`` with dynamic batch, height,
width and text length, and translated at opset 23, where attention and normalisation stay whole
operators. Every parameter becomes an initializer that has the name and the shape of the diffusers
state dict, and no data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..components import CONTRACTS
from ..errors import GraphError

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

OPSET = 23
WEIGHTS_FILE = "weights.safetensors"

# diffusers makes activations of 64 and more images contiguous before upsampling (a work-around for
# an old bug in torch); the trace takes the other branch, which computes the same.
_MAX_TRACED_BATCH = 63


def trace(component: str, config: Mapping[str, Any]) -> onnx.ModelProto:
    """Trace one component.

    Args:
        component: a key of ``components.CONTRACTS``.
        config: the diffusers (or transformers) config of the component's network.

    Returns:
        A model whose initializers have name, fp32 type and shape but no data.

    Raises:
        GraphError: torch or diffusers is missing, or the config asks for a class Kiln cannot build.
    """
    try:
        import torch
    except ImportError as exc:
        raise GraphError(
            f"the {component} of this model has an architecture that does not ship with Kiln, and tracing it "
            "needs torch and diffusers: pip install 'kiln-diffusion[export]'"
        ) from exc
    wrapper = _Wrappers(config).build(component)
    inputs, dynamic_shapes = _example(component, config)
    with torch.no_grad():
        program = torch.export.export(
            wrapper,
            tuple(inputs.values()),
            dynamic_shapes=dynamic_shapes,
            strict=False,
        )
        program = program.run_decompositions(_decompositions())
    return _translate(component, program)


class _Wrappers:
    """Modules on the meta device whose forward has exactly the ports of a contract."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def build(self, component: str) -> torch.nn.Module:
        import torch

        with torch.device("meta"):
            return getattr(self, component)().eval().requires_grad_(False)

    def text_encoder(self) -> torch.nn.Module:
        import torch
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig.from_dict(self.config, attn_implementation="sdpa")
        network = CLIPTextModel(config)

        class TextEncoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                # The module's own position_ids is a buffer without data on the meta device.
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
                states = self.network(input_ids=input_ids, position_ids=positions)
                return states.last_hidden_state, states.pooler_output

        return TextEncoder()

    def unet(self) -> torch.nn.Module:
        import torch

        network = self._diffusers("UNet2DConditionModel")
        network.num_upsamplers = _ExplicitSizes()

        class UNet(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(
                self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
            ) -> torch.Tensor:
                return self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]

        return UNet()

    def vae_decoder(self) -> torch.nn.Module:
        import torch

        network = self._vae("encoder", "quant_conv")

        class Decoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
                return self.network.decode(latent_sample, return_dict=False)[0]

        return Decoder()

    def vae_encoder(self) -> torch.nn.Module:
        import torch

        network = self._vae("decoder", "post_quant_conv")
        tiny = self.config["_class_name"] == "AutoencoderTiny"

        class Encoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, sample: torch.Tensor) -> torch.Tensor:
                latents = self.network.encode(sample, return_dict=False)[0]
                return latents if tiny else latents.parameters

        return Encoder()

    def _vae(self, *unused: str) -> torch.nn.Module:
        network = self._diffusers("AutoencoderKL", "AutoencoderTiny")
        for name in unused:
            if hasattr(network, name):
                delattr(network, name)
        return network

    def _diffusers(self, *classes: str) -> torch.nn.Module:
        import diffusers

        wanted = self.config.get("_class_name")
        if wanted not in classes:
            raise GraphError(f"the config names the class {wanted!r}; Kiln traces {' and '.join(classes)}")
        return getattr(diffusers, wanted).from_config(self.config)


class _ExplicitSizes:
    """Stands for the number of upsamplers, and makes diffusers pass sizes to each of them.

    diffusers asks whether ``size % 2**num_upsamplers`` is zero and only otherwise tells the upsamplers
    their output size. The answer must not become a condition on the size of the graph; told sizes are
    right for every size.
    """

    def __rpow__(self, base: int) -> _ExplicitSizes:
        return self

    def __rmod__(self, size: Any) -> int:
        return 1


def _example(component: str, config: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Example inputs on the meta device and the axes that stay dynamic."""
    import torch

    batch = torch.export.Dim("batch_size", min=1, max=_MAX_TRACED_BATCH)
    height, width = torch.export.Dim("latent_height", min=16), torch.export.Dim("latent_width", min=16)
    length = torch.export.Dim("sequence_length", min=1)
    if component == "text_encoder":
        positions = int(config["max_position_embeddings"])
        ids = torch.zeros(2, positions, dtype=torch.int64, device="meta")
        return {"input_ids": ids}, {"input_ids": {0: batch}}
    if component == "unet":
        inputs = {
            # Sizes that no number of halvings divides, so that explicit upsample sizes are traced.
            "sample": torch.empty(2, int(config["in_channels"]), 35, 43, device="meta"),
            "timestep": torch.empty((), device="meta"),
            "encoder_hidden_states": torch.empty(2, 77, int(config["cross_attention_dim"]), device="meta"),
        }
        axes = {"sample": {0: batch, 2: height, 3: width}, "timestep": None}
        return inputs, axes | {"encoder_hidden_states": {0: batch, 1: length}}
    if component == "vae_decoder":
        sample = torch.empty(2, int(config.get("latent_channels", 4)), 35, 43, device="meta")
        return {"latent_sample": sample}, {"latent_sample": {0: batch, 2: height, 3: width}}
    factor = _vae_factor(config)
    image_height = torch.export.Dim("image_cells_high", min=4) * factor
    image_width = torch.export.Dim("image_cells_wide", min=4) * factor
    sample = torch.empty(2, int(config.get("in_channels", 3)), 11 * factor, 13 * factor, device="meta")
    return {"sample": sample}, {"sample": {0: batch, 2: image_height, 3: image_width}}


def _vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell."""
    tiny = config["_class_name"] == "AutoencoderTiny"
    blocks = config.get("encoder_block_out_channels", (64,) * 4) if tiny else config["block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def _decompositions() -> dict[Any, Any]:
    """What torch.onnx itself decomposes at this opset."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    return _decomp.create_onnx_friendly_decomposition_table(_decomp.get_onnx_implemented_overloads(registry))


def _translate(component: str, program: Any) -> onnx.ModelProto:
    import torch
    from onnxscript import ir

    contract = CONTRACTS[component]
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        input_names=[port.name for port in contract.inputs],
        output_names=[port.name for port in contract.outputs],
    )
    model = exported.model
    _simplify(model)
    return finish(component, ir.to_proto(model))


def finish(component: str, graph: onnx.ModelProto) -> onnx.ModelProto:
    """Name the dynamic axes as the contract does, and drop what differs from run to run or says nothing.

    Args:
        component: a key of ``components.CONTRACTS``.
        graph: what torch's exporter made; changed in place.
    """
    contract = CONTRACTS[component]
    ports = zip([*graph.graph.input, *graph.graph.output], [*contract.inputs, *contract.outputs], strict=True)
    axes: dict[str, str] = {}
    for value, port in ports:
        for dim, label in zip(value.type.tensor_type.shape.dim, port.axes, strict=True):
            if dim.dim_param.isidentifier():
                axes.setdefault(dim.dim_param, label)
    # torch lists the constraints on sizes in the order of a set.
    del graph.graph.metadata_props[:]
    weights = {tensor.name for tensor in graph.graph.initializer}
    kept = [info for info in graph.graph.value_info if info.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(kept)
    for value in [*graph.graph.input, *graph.graph.output, *graph.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\bs\d+\b", lambda m: axes.get(m[0], m[0]), dim.dim_param)
    return graph


def _simplify(model: onnx_ir.Model) -> None:
    """Fold shape arithmetic and remove what is not used.

    The initializers have no data, so they are made inputs while constants are folded.
    """
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnx_ir.passes import common

    graph = model.graph
    real_inputs = list(graph.inputs)
    parameters = dict(graph.initializers)
    for name, value in parameters.items():
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model, num_iterations=2)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass(size_limit=1 << 20)(model)
    graph.inputs[:] = real_inputs
    for name, value in parameters.items():
        if value.uses():
            value.name = name.removeprefix("network.")
            # Where the bytes lie is filled in when a bundle is written.
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE, 0, 0, value.dtype, shape=value.shape, name=value.name, base_dir=""
            )
            graph.initializers[value.name] = value
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None

"""Lowering for OpenVINO: under guidance, what does not depend on the prompt is computed once and not twice.

Classifier-free guidance (Ho & Salimans 2207.12598) runs the UNet on the same latents with two prompts. All
that lies before the first cross-attention has equal halves: in Stable Diffusion 1.5 the first residual block
and the first self-attention, one of five over 4,096 tokens; and the embedding of the timestep. The lowered
model takes the latents once and repeats a tensor where one with prompt meets one without. Outputs are the
same bit for bit.

Precondition: static shapes; inputs ``sample`` and, if there, the cut timestep, of an even batch;
``encoder_hidden_states`` of the same batch. Postcondition: ``sample`` has half the batch.
"""

from __future__ import annotations

from typing import Any

from .openvino_numbers import integers
from .openvino_timestep import COSINE, SINE

PROMPT = "encoder_hidden_states"


def share_before_prompt(model: Any) -> bool:
    """Compute what both halves of the batch share once; whether the model is of the form that allows it.

    Args:
        model: an ``openvino.Model`` of the UNet, changed in place.
    """
    inputs = {name: port.get_node() for port in model.inputs for name in port.get_names()}
    if PROMPT not in inputs or "sample" not in inputs or model.is_dynamic():
        return False
    batch = inputs["sample"].output(0).get_shape()[0]
    if batch % 2 or inputs[PROMPT].output(0).get_shape()[0] != batch:
        return False
    shared, told = _split(model, inputs[PROMPT].get_friendly_name())
    shapes = [op for op in model.get_ordered_ops() if _is_reshape(op)]
    common = [op for op in shapes if op.get_friendly_name() in shared]
    # A tensor that mixes the batch with another axis cannot be halved; diffusers' UNet has none.
    if any(
        batch not in (op.output(0).get_shape()[0], 1) for op in common if len(op.output(0).get_shape()) > 2
    ):
        return False
    _join(model, shared, told, batch)
    for op in shapes:
        target = list(op.output(0).get_shape())
        if op.get_friendly_name() in shared and target[0] == batch:
            target[0] = batch // 2
        op.input(1).replace_source_output(integers(*target).output(0))
    _halve([inputs[name] for name in ("sample", SINE, COSINE) if name in inputs], batch)
    model.validate_nodes_and_infer_types()
    return True


def _split(model: Any, prompt: str) -> tuple[set[str], set[str]]:
    """Names of the nodes that depend on inputs but not on the prompt, and of those that do."""
    shared: set[str] = set()
    told = {prompt}
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = {op.input_value(i).get_node().get_friendly_name() for i in range(op.get_input_size())}
        if kind in ("Constant", "ShapeOf", "Result") or name == prompt:
            continue
        if sources & told:
            told.add(name)
        elif kind == "Parameter" or sources & shared:
            shared.add(name)
    return shared, told


def _is_reshape(op: Any) -> bool:
    return op.get_type_name() == "Reshape" and op.get_output_element_type(0).is_real()


def _join(model: Any, shared: set[str], told: set[str], batch: int) -> None:
    """Repeat what is shared where something with prompt reads it, or the model gives it."""
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_friendly_name() not in shared:
            continue
        for output in op.outputs():
            if not _has_batch(output, batch):
                continue
            readers = [
                entry
                for entry in output.get_target_inputs()
                if entry.get_node().get_friendly_name() in told
                or entry.get_node().get_type_name() == "Result"
            ]
            if readers:
                both = opset13.concat([output, output], 0).output(0)
                for entry in readers:
                    entry.replace_source_output(both)


def _has_batch(output: Any, batch: int) -> bool:
    shape = list(output.get_shape())
    return bool(output.get_element_type().is_real() and shape and shape[0] == batch)


def _halve(parameters: list[Any], batch: int) -> None:
    from openvino import PartialShape

    for parameter in parameters:
        shape = list(parameter.output(0).get_shape())
        if shape and shape[0] == batch:
            parameter.set_partial_shape(PartialShape([batch // 2, *shape[1:]]))

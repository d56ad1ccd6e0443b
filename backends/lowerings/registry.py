"""Lower a component's graph by names of lowerings: their order, their versions, and where the weights are.

``lower(("ort_fused", "fp16"), source, shapes)`` reads the graph of a component without its weights,
rewrites it, and gives a model whose initializers still point into the component's weights file. Give it to
ONNX Runtime as bytes::

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*external_data_folder_entry(source))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[...])

ONNX Runtime then looks for ``weights.safetensors`` in that folder; without the entry it would look in the
working directory. Locations in the graph stay relative, so the bytes do not depend on where the bundle lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import GraphError, SessionError
from ..base import GraphSource
from .half import to_half
from .ort_fused import to_ort_fused
from .primitives import to_primitives
from .static import make_static

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]

# onnxruntime_session_options_config_keys.h: kOrtSessionOptionsModelExternalInitializersFileFolderPath
EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Lowering:
    """One lowering.

    Args:
        version: raised whenever the same graph would be lowered to another one; part of cache keys.
        apply: from a model, the component and its shapes to the lowered model.
        needs: lowerings that have to run before, and are run if they are not named.
        excludes: lowerings that cannot be in the same list.
        why: why these are excluded, for the message.
    """

    version: int
    apply: Callable[[onnx.ModelProto, str, Shapes], onnx.ModelProto]
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    why: str = ""


# In the only order in which they may be combined.
_LOWERINGS: dict[str, Lowering] = {
    "static": Lowering(1, lambda model, component, shapes: make_static(model, shapes)),
    "opset17": Lowering(
        1,
        lambda model, component, shapes: to_primitives(model, 17),
        needs=("static",),
        excludes=("opset22", "ort_fused", "bf16"),
        why="opset 17 has no convolutions of bf16 ('opset22' has) and no operators of ONNX Runtime",
    ),
    "opset22": Lowering(
        1,
        lambda model, component, shapes: to_primitives(model, 22),
        needs=("static",),
        excludes=("opset17", "ort_fused"),
        why="a graph has one opset, and primitives are not ONNX Runtime's operators",
    ),
    "ort_fused": Lowering(
        1,
        lambda model, component, shapes: to_ort_fused(model),
        needs=("static",),
        excludes=("opset17", "opset22", "bf16"),
        why="ONNX Runtime's GroupNorm and BiasSplitGelu take float32 and fp16, and are no primitives",
    ),
    "fp16": Lowering(
        1,
        lambda model, component, shapes: to_half(model, component, "fp16"),
        needs=("static",),
        excludes=("bf16",),
        why="a graph computes in one 16-bit type",
    ),
    "bf16": Lowering(
        1,
        lambda model, component, shapes: to_half(model, component, "bf16"),
        needs=("static",),
        excludes=("opset17", "ort_fused", "fp16"),
        why="operators of opset 17 and of ONNX Runtime take no bf16, and a graph computes in one type",
    ),
}


def names() -> tuple[str, ...]:
    """All lowerings, in the order in which they may be combined."""
    return tuple(_LOWERINGS)


def versions(wanted: Sequence[str]) -> dict[str, int]:
    """The version of each lowering that ``lower`` would apply: facts for the key of a compiled cache.

    Raises:
        SessionError: see ``resolve``.
    """
    return {name: _LOWERINGS[name].version for name in resolve(wanted)}


def resolve(wanted: Sequence[str]) -> tuple[str, ...]:
    """A list of lowerings with those that they need before them.

    Raises:
        SessionError: one is unknown, two do not go together, or they are out of order; the text says what
            was expected.
    """
    unknown = [name for name in wanted if name not in _LOWERINGS]
    if unknown:
        raise SessionError(f"there is no lowering {unknown[0]!r}; known are {', '.join(_LOWERINGS)}")
    right = [name for name in _LOWERINGS if name in wanted]
    if list(wanted) != right:
        raise SessionError(f"the lowerings {list(wanted)} are out of order or repeated; expected {right}")
    for name in wanted:
        both = [other for other in _LOWERINGS[name].excludes if other in wanted]
        if both:
            raise SessionError(
                f"the lowerings {name} and {both[0]} do not go together: {_LOWERINGS[name].why}"
            )
    needed = {need for name in wanted for need in _LOWERINGS[name].needs}
    return tuple(name for name in _LOWERINGS if name in needed or name in wanted)


def lower(wanted: Sequence[str], source: GraphSource, shapes: Shapes) -> onnx.ModelProto:
    """Read a component's graph and lower it.

    Args:
        wanted: names of lowerings, in the order of ``names()``; what they need comes before them by itself,
            and none at all gives the graph as it is.
        source: the component; its weights are not read.
        shapes: of each input.

    Returns:
        A model whose weights are references into the file beside the graph.

    Raises:
        SessionError: the list of lowerings or the shapes are not as expected.
        GraphError: the graph cannot be read, or a lowering refuses it.
    """
    steps = resolve(wanted)
    model = _read(source)
    for name in steps:
        model = _LOWERINGS[name].apply(model, source.component, shapes)
    return model


def external_data_folder_entry(source: GraphSource) -> tuple[str, str]:
    """What ``add_session_config_entry`` takes: where a model that is given as bytes has its weights.

    All weights of a component lie in one folder, beside its graph, as the entry demands.
    """
    return EXTERNAL_DATA_FOLDER, str(source.weights_path.resolve().parent)


def _read(source: GraphSource) -> onnx.ModelProto:
    """The graph of a component, without weights.

    Raises:
        GraphError: it is not there, is no ONNX file, or points at another file than the component's weights.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(source.graph_path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise GraphError(
            f"the graph {source.graph_path} cannot be read ({error}); export the bundle again"
        ) from error
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
            if location != source.weights_path.name:
                raise GraphError(
                    f"{source.graph_path} has {tensor.name} in {location!r}, expected "
                    f"{source.weights_path.name}; export the bundle again"
                )
    return model

"""Run a component once and look at tensors inside it. Runs in a child process.

Backends check a graph against the contract of its component, so the tensors are not added as outputs: they
are flattened and joined to the component's own first output, which keeps its name. So any backend can be
looked into, with all its own lowerings. Exposing a tensor keeps an engine from fusing across it; the
component's own output, which comes first, tells whether that changed anything.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...backends.base import GraphSource, PrepareOptions, Session
from ...bundle import Bundle
from ...components import CONTRACTS
from ...errors import GraphError, ParityError
from ..records.record import Requested
from .calls import Call, read_calls
from .layers import OUTPUT, read_map
from .opening import open_sessions, session_of

if TYPE_CHECKING:
    import onnx

_TRUE = "__probed"


def probe(
    bundle: Bundle,
    requested: Requested,
    folder: Path,
    component: str,
    number: int,
    names: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Run call ``number`` of a component and write the tensors asked for into ``out``, an .npz file.

    Args:
        bundle: what runs.
        requested: on which backend.
        folder: a finished recording, for the inputs.
        component: its name.
        number: of the component's calls, from 0.
        names: of layers; of tensors of the graph with ``tensor:`` before them, which torch does not have.
        out: float32 arrays by these names, and the component's own as ``output``; a name that cannot be
            looked at is left out.

    Raises:
        BackendError: the engine refused.
        ParityError: the backend cannot be looked into.
    """
    call = list(read_calls(folder, component))[number]
    look = _torch_tensors if requested.name == "torch" else _graph_tensors
    found = look(bundle, requested, call, names)
    np.savez(out, **found)  # type: ignore[arg-type]  # numpy's stub: allow_pickle
    return {"names": sorted(found)}


def _torch_tensors(
    bundle: Bundle, requested: Requested, call: Call, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Outputs of modules, by hooks."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[name] = tensor.detach().float().contiguous().cpu().numpy().copy()

        return hook

    sessions = open_sessions(bundle, requested, cache=False)
    try:
        session = session_of(sessions, call.component, call.shapes)
        module = getattr(session, "_module", None)
        if module is None:
            raise ParityError(
                "torch runs in a process of its own here, whose modules cannot be looked into; "
                "explain with another backend, or torch:cpu"
            )
        modules = dict(module.named_modules())
        with ExitStack() as stack:
            for name in names:
                if name in modules:
                    stack.callback(modules[name].register_forward_hook(keep(name)).remove)
            found[OUTPUT] = _first(call, session.run(call.feeds))
    finally:
        sessions.close()
    return found


def _graph_tensors(
    bundle: Bundle, requested: Requested, call: Call, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Tensors of the graph, joined to its output."""
    import onnx

    source = bundle.source(call.component)
    model = onnx.load(source.graph_path, load_external_data=False)
    layers = {layer.name: layer.tensor for layer in read_map(source.graph_path).layers}
    tensors = {name: name.removeprefix("tensor:") if ":" in name else layers.get(name, "") for name in names}
    shapes = tensor_shapes(model, call.shapes)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor in shapes}
    made = probing_graph(model, call.component, list(tensors.values()))
    with _written(made, source) as probed:
        sessions = open_sessions(bundle, requested, cache=False)
        try:
            session = _prepare(sessions.backend, probed, sessions.device, requested, call)
            packed = _first(call, session.run(call.feeds)).ravel()
            session.close()
        finally:
            sessions.close()
    expected = call.outputs[_first_name(call)].shape
    return _unpacked(packed, {OUTPUT: expected, **{name: shapes[t] for name, t in tensors.items()}})


def _prepare(backend: Any, source: GraphSource, device: str, requested: Requested, call: Call) -> Session:
    # The halves of a guided batch are not shared here: their sizes would not be those of the graph.
    options = PrepareOptions(
        shapes=call.shapes, device=device, precision=requested.precision, threads=requested.threads
    )
    session: Session = backend.prepare(source, options)
    return session


def probing_graph(model: onnx.ModelProto, component: str, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of a graph whose first output is itself and ``tensors``, flattened and joined on the last axis.

    Rank, name and type of the output stay as the contract has them.
    """
    import onnx
    from onnx import helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, port = made.graph, CONTRACTS[component].outputs[0]
    rename = {port.name: port.name + _TRUE}
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = rename.get(name, name)
    rank = len(port.axes)
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.array([1] * (rank - 1) + [-1], np.int64), "probe_shape")
    )
    lines = []
    for index, tensor in enumerate([rename[port.name], *(rename.get(t, t) for t in tensors)]):
        lines.append(f"probe_{index}")
        graph.node.append(helper.make_node("Reshape", [tensor, "probe_shape"], [lines[-1]]))
    graph.node.append(helper.make_node("Concat", lines, [port.name], axis=rank - 1))
    for value in graph.output:
        if value.name == port.name:
            axes = [*[1] * (rank - 1), "probed"]
            value.CopyFrom(helper.make_tensor_value_info(port.name, onnx.TensorProto.FLOAT, axes))
    return made


def tensor_shapes(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the float tensors that nodes of a graph make, for inputs of fixed shapes."""
    import onnx

    from ...backends.lowerings.static import make_static

    static = make_static(model, shapes).graph
    return {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in [*static.value_info, *static.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        and all(axis.dim_value > 0 for axis in value.type.tensor_type.shape.dim)
    }


@contextmanager
def _written(model: onnx.ModelProto, source: GraphSource) -> Iterator[GraphSource]:
    """The graph as a file beside its weights, where engines look for them; with a copy if that cannot be."""
    with ExitStack() as stack:
        folder = source.graph_path.parent
        try:
            place = Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx")).name)
            weights = source.weights_path
        except OSError:  # a bundle that may only be read
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kiln-probe-")))
            weights = folder / source.weights_path.name
            shutil.copyfile(source.weights_path, weights)
            place = folder / "model.onnx"
        place.write_bytes(model.SerializeToString())
        yield replace(source, graph_path=place, weights_path=weights)


def _first_name(call: Call) -> str:
    return CONTRACTS[call.component].outputs[0].name


def _first(call: Call, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return outputs[_first_name(call)]


def _unpacked(packed: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if packed.size != sum(sizes):
        raise GraphError(
            f"the engine gave {packed.size} values for the tensors of {sum(sizes)} that were asked"
        )
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

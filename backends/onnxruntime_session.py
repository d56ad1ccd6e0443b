"""The one place that makes sessions of ONNX Runtime: settings, graph, providers, and what is read back.

An adapter says what it wants in a ``Plan``; everything that could go wrong in silence is checked here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GraphError, SessionError
from .base import GraphSource, InForce, PrepareOptions
from .cpu import usable_cores
from .errors_map import engine_errors
from .feeds import Shape, contract_of
from .onnxruntime_precision import graph_precision
from .onnxruntime_readback import CPU, RECORD, check_options, check_placement, check_provider
from .session import CheckedSession, check_port_names

if TYPE_CHECKING:
    import onnx

# ONNX Runtime's severity levels: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal.
_ERRORS_ONLY, FATAL_ONLY = 3, 4
# Where weights are found when the graph itself comes as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# A MatMul with int8 weights is computed in fp32: the default, 4, rounds its activations to int8 as well.
_INT8_WEIGHTS = {"session.qdq_matmulnbits_accuracy_level": "1"}


@dataclass(frozen=True)
class Plan:
    """What an adapter asks of ONNX Runtime for one component.

    Args:
        backend: Kiln's name.
        provider: ONNX Runtime's name of the provider that has to run the graph.
        device: the id in force.
        precision: what it computes in.
        options: provider options, which have to be in force afterwards.
        helpers: further providers for the operators in ``elsewhere``, with their options.
        lowerings: names for ``lowerings.registry.lower``, in order; none keeps the graph as it is.
        typed: what the graph is typed in after ``lowerings``, where an option makes another precision of it.
        config: session config entries.
        elsewhere: the operators that ``provider`` may leave to the helpers and to the processor.
        reports_options: whether the provider says which options are in force; if not, ``options`` are not
            compared, and an adapter has to refuse names that it does not know.
        plugin_devices: the ``OrtEpDevice`` of a provider that is a plug-in.
        settings: what else goes into ``InForce.settings``, such as environment variables.
        why_missing: what to say when ONNX Runtime leaves the provider out.
    """

    backend: str
    provider: str
    device: str
    precision: str = "fp32"
    options: Mapping[str, str] = field(default_factory=dict)
    helpers: tuple[tuple[str, Mapping[str, str]], ...] = ()
    lowerings: tuple[str, ...] = ()
    typed: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()
    reports_options: bool = True
    plugin_devices: tuple[Any, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    why_missing: Callable[[], str] = lambda: "kiln doctor says more"


@dataclass(frozen=True)
class Opened:
    """A native session, what is in force in it, and its input shapes, None for free axes."""

    native: Any
    in_force: InForce
    shapes: Mapping[str, Shape]


def open_session(module: ModuleType, source: GraphSource, options: PrepareOptions, plan: Plan) -> Opened:
    """Make a session and read back what it is.

    Raises:
        BackendUnavailable: ONNX Runtime left the provider out.
        SessionError: the graph, a lowering, a shape or an option is refused, operators would run elsewhere,
            or the graph is typed in another precision.
    """
    if not source.graph_path.is_file():
        raise SessionError(f"the graph {source.graph_path} is not there; export the bundle again")
    model = lowered(source, options, plan.lowerings)
    with engine_errors(plan.backend, f"loading {source.component}"), quiet():
        settings = _settings(module, source, options, plan)
        graph: str | bytes = str(source.graph_path) if model is None else model.SerializeToString()
        native = module.InferenceSession(graph, settings, **_providers(plan), enable_fallback=0)
        native.disable_fallback()
    check_port_names(
        source.component, [p.name for p in native.get_inputs()], [p.name for p in native.get_outputs()]
    )
    return Opened(native, _read_back(module, native, model, plan), _input_shapes(native, options))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop ONNX Runtime's warning of a provider that its build does not have: here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def lowered(source: GraphSource, options: PrepareOptions, names: tuple[str, ...]) -> onnx.ModelProto | None:
    """The graph after the lowerings named, None when there are none.

    Raises:
        SessionError: the graph is of another component, or a lowering refuses it.
    """
    if not names:
        return None
    import onnx

    from .lowerings.registry import lower

    with engine_errors("onnx", f"reading {source.component}"):
        graph = onnx.load(source.graph_path, load_external_data=False).graph
    check_port_names(source.component, [p.name for p in graph.input], [p.name for p in graph.output])
    try:
        return lower(names, source, options.shapes)
    except GraphError as error:
        raise SessionError(str(error)) from error


def all_shapes_fixed(source: GraphSource, options: PrepareOptions) -> bool:
    """Whether the caller fixed the shape of every input."""
    return all(port.name in options.shapes for port in contract_of(source.component).inputs)


def require_fixed_shapes(backend: str, source: GraphSource, options: PrepareOptions) -> None:
    """For lowerings, and for engines that compile one program for each shape, which takes minutes.

    Raises:
        SessionError: an input is left free; the text names it.
    """
    free = [p.name for p in contract_of(source.component).inputs if p.name not in options.shapes]
    if free:
        raise SessionError(
            f"the {backend} backend needs fixed shapes for this; the shape of {', '.join(free)} is missing"
        )


class OrtSession(CheckedSession):
    """One InferenceSession that is fed from and read into ordinary memory."""

    def __init__(self, source: GraphSource, opened: Opened) -> None:
        super().__init__(source, opened.in_force, opened.shapes)
        self._native = opened.native
        self._names = [port.name for port in self.contract.outputs]

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._native.run(self._names, feeds), strict=True))

    def _release(self) -> None:
        self._native = None


def _settings(module: ModuleType, source: GraphSource, options: PrepareOptions, plan: Plan) -> Any:
    module.disable_telemetry_events()
    settings = module.SessionOptions()
    settings.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.execution_mode = module.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _ERRORS_ONLY
    settings.enable_profiling = False
    # Given always, because the number in force cannot be read back when ONNX Runtime chooses it. Its own
    # choice, one thread for each physical core, does not see the quota of a container.
    settings.intra_op_num_threads = options.threads or usable_cores()
    entries = {RECORD: "1", **_INT8_WEIGHTS}
    if plan.lowerings:
        entries[_WEIGHTS_FOLDER] = str(source.graph_path.parent)
    for name, value in (entries | dict(plan.config)).items():
        settings.add_session_config_entry(name, value)
    for axis, size in _axes(source, options).items():
        settings.add_free_dimension_override_by_name(axis, size)
    if plan.plugin_devices:
        settings.add_provider_for_devices(list(plan.plugin_devices), dict(plan.options))
    return settings


def _providers(plan: Plan) -> dict[str, Any]:
    """The arguments that name the providers; a plug-in is named in the settings already."""
    if plan.plugin_devices:
        return {}
    names = [(plan.provider, dict(plan.options)), *((name, dict(given)) for name, given in plan.helpers)]
    return {"providers": names}


def _axes(source: GraphSource, options: PrepareOptions) -> dict[str, int]:
    """The size of each axis that the caller fixed, by the label it has in the contract and in the graph.

    Raises:
        SessionError: two inputs share an axis and fix different sizes.
    """
    axes: dict[str, int] = {}
    for port in contract_of(source.component).inputs:
        for label, size in zip(port.axes, options.shapes.get(port.name, ()), strict=False):
            if axes.setdefault(label, size) != size:
                raise SessionError(
                    f"{source.component}: {label} is fixed to {axes[label]} and, for {port.name}, to {size}"
                )
    return axes


def _read_back(module: ModuleType, native: Any, model: onnx.ModelProto | None, plan: Plan) -> InForce:
    check_provider(native, plan.provider, lambda: _why_missing(module, plan))
    wanted = plan.typed or plan.precision
    typed = wanted if model is None else graph_precision(model)
    if typed != wanted:
        raise SessionError(
            f"the graph for {plan.backend} is typed {typed} after the lowerings {', '.join(plan.lowerings)}; "
            f"{wanted} was asked for"
        )
    options = check_options(native, plan.provider, plan.options if plan.reports_options else {})
    settings: dict[str, object] = {**options, **plan.settings}
    if plan.provider != CPU:
        settings["nodes"] = check_placement(native, plan.provider, plan.elsewhere)
    threads = native.get_session_options().intra_op_num_threads
    return InForce(
        plan.backend,
        module.__version__,
        native.get_providers()[0],
        plan.device,
        plan.precision,
        threads,
        settings=settings,
    )


def _why_missing(module: ModuleType, plan: Plan) -> str:
    built = module.get_available_providers()
    if plan.provider in built or plan.plugin_devices:
        return plan.why_missing()
    return (
        f"this build has only {', '.join(built)}. Two onnxruntime wheels overwrite each other's files: "
        "uninstall all of them, then install one"
    )


def _input_shapes(native: Any, options: PrepareOptions) -> dict[str, Shape]:
    """What the graph and the caller fix; ONNX Runtime keeps names for the free axes."""
    shapes: dict[str, Shape] = {}
    for port in native.get_inputs():
        graph = tuple(axis if isinstance(axis, int) else None for axis in port.shape)
        asked = options.shapes.get(port.name, graph)
        if len(asked) != len(graph) or any(g not in (None, a) for g, a in zip(graph, asked, strict=True)):
            raise SessionError(
                f"the shape {tuple(asked)} does not fit the graph's input {port.name} {port.shape}"
            )
        shapes[port.name] = tuple(asked)
    return shapes

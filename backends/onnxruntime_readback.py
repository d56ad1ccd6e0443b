"""What a session of ONNX Runtime says of itself after it was made, and when that is not what was asked for.

ONNX Runtime falls back in silence at four places, all seen on 1.31.1: a provider that its wheel does not have
is left out, one whose libraries do not load too, a provider that raises is replaced by the processor unless
``enable_fallback`` is off, and an operator that a provider lacks runs on the processor. The first three are
told by ``session.get_providers()``, the fourth by ``get_provider_graph_assignment_info`` (onnxruntime#26781).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import BackendUnavailable, SessionError

CPU = "CPUExecutionProvider"
RECORD = "session.record_ep_graph_assignment_info"

# What computes with shapes and positions: small integers that providers leave on the processor on purpose
# (``GetCpuPreferredNodes``), and the search for the end of a text, for which CUDA has no integer kernel.
_INDEX = """
Add ArgMax Cast Concat Constant ConstantOfShape Div Equal Expand Gather Max Min Mod Mul Range ReduceProd
Reshape Shape Size Slice Squeeze Sub Unsqueeze Where
"""
INDEX_OPERATORS = frozenset(_INDEX.split())
_TRUE, _FALSE = ("1", "true"), ("0", "false")
_SHOWN = 5


def check_provider(native: Any, provider: str, why: Callable[[], str]) -> None:
    """That the session runs on ``provider`` first.

    Args:
        native: an ``onnxruntime.InferenceSession``.
        provider: the one asked for.
        why: finds out the reason, for the message.

    Raises:
        BackendUnavailable: it does not.
    """
    providers = list(native.get_providers())
    if providers[:1] != [provider]:
        raise BackendUnavailable(
            f"ONNX Runtime left out {provider} and would run on {', '.join(providers)}: {why()}"
        )


def check_placement(native: Any, provider: str, allowed: Collection[str]) -> dict[str, int]:
    """How many nodes each provider got.

    Nodes of the processor are all listed. Of a provider that changes the layout (WebGPU; CUDA may, by
    ``prefer_nhwc``) only those of its second pass are, seen on 1.27: its own count then is too small.

    Args:
        native: a session made with ``RECORD`` set to 1.
        provider: the one that has to run everything else.
        allowed: operators that may run on another one.

    Raises:
        SessionError: others run elsewhere too, or the session does not say.
    """
    nodes: Counter[str] = Counter()
    strangers: dict[str, Counter[str]] = {}
    for part in native.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            nodes[part.ep_name] += 1
            if part.ep_name != provider and node.op_type not in allowed:
                strangers.setdefault(part.ep_name, Counter())[node.op_type] += 1
    if not nodes:
        raise SessionError(
            "ONNX Runtime does not say which provider got which node; Kiln needs 1.24 or newer"
        )
    if strangers:
        listed = "; ".join(f"{_shortened(found)} on {name}" for name, found in strangers.items())
        raise SessionError(
            f"{provider} cannot run all of this graph: {listed}. Nothing falls back on its own: use another "
            "precision, or another backend"
        )
    return dict(sorted(nodes.items()))


def check_options(native: Any, provider: str, asked: Mapping[str, str]) -> dict[str, str]:
    """The options of a provider as it reports them.

    Raises:
        SessionError: one that was asked for is not reported, or with another value.
    """
    reported = {str(k): str(v) for k, v in native.get_provider_options().get(provider, {}).items()}
    for name, value in asked.items():
        if name not in reported:
            raise SessionError(
                f"{provider} dropped the option {name}={value}; this version of it knows "
                f"{', '.join(sorted(reported)) or 'none'}"
            )
        if not _equal(reported[name], value):
            raise SessionError(
                f"{provider} has {name}={reported[name]} in force, {value} was asked for; look for an "
                "environment variable that overrides it"
            )
    return dict(sorted(reported.items()))


def _equal(reported: str, asked: str) -> bool:
    """Whether two texts stand for one value: engines write a boolean as 1, True or true."""
    for words in (_TRUE, _FALSE):
        if asked.lower() in words and reported.lower() in words:
            return True
    return reported == asked


def _shortened(found: Counter[str]) -> str:
    """``12 Resize, 3 Conv and 4 more``."""
    common = found.most_common()
    text = ", ".join(f"{number} {name}" for name, number in common[:_SHOWN])
    rest = sum(number for _, number in common[_SHOWN:])
    return f"{text} and {rest} more" if rest else text

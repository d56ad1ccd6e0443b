"""Ask the components of the backend under test what the reference was asked, and compare the answers.

Runs in a child process. Sessions are those that drawing would use: same settings, shapes and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import ParityError
from ..records.record import Requested
from .calls import Call, read_calls, recorded_components
from .distance import distance
from .opening import open_sessions, session_of


def replay(bundle: Bundle, requested: Requested, folder: Path, *, cache: bool) -> dict[str, Any]:
    """Run every recorded call and tell how far the answers are from the recorded ones.

    Args:
        bundle: what is judged.
        requested: backend, device, precision, threads.
        folder: a finished recording.
        cache: whether compiled models may come from the cache and go into it.

    Returns:
        ``rows``: component, where, output and the figures of ``Distance``; ``effective`` by component.

    Raises:
        BackendError: the engine refused.
        ParityError: the two bundles' components do not take and give the same shapes.
    """
    rows: list[dict[str, Any]] = []
    effective: dict[str, Any] = {}
    sessions = open_sessions(bundle, requested, cache=cache)
    try:
        for component in recorded_components(folder):
            for call in read_calls(folder, component):
                session = session_of(sessions, component, call.shapes, guided=call.guided)
                rows += compare_call(call, session.run(call.feeds))
            effective[component] = asdict(session.in_force)
            sessions.release(component)
    finally:
        sessions.close()
    return {"rows": rows, "effective": effective}


def compare_call(call: Call, outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The figures of one call, output by output.

    Raises:
        ParityError: an output has another shape than the reference's.
    """
    rows = []
    for name, expected in call.outputs.items():
        actual = outputs[name]
        if actual.shape != expected.shape:
            raise ParityError(
                f"{call.component} gave {name} as {list(actual.shape)}, the reference as "
                f"{list(expected.shape)}; only bundles of one architecture can be compared"
            )
        figures = asdict(distance(actual, expected))
        rows.append({"component": call.component, "where": call.where, "output": name, **figures})
    return rows

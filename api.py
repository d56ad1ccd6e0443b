"""The public face of Kiln in Python: what the command line does, without a shell.

    from kiln.api import Pipeline, Request, resolve_model, save_png

Importing it loads numpy and Pillow and no engine; torch is loaded only to trace an architecture that
does not ship, or by the ``torch`` backend. Every error raised on purpose is a ``KilnError``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .backends.base import InForce
from .backends.device_report import DeviceRow, list_devices
from .baked import BakedAdapter, BakedEmbedding
from .bundle import Bundle, open_bundle
from .errors import (
    AdapterError,
    BackendError,
    BackendUnavailable,
    BundleError,
    CheckpointError,
    GraphError,
    InvalidOutputError,
    KilnError,
    ParityError,
    SessionError,
    StorageError,
    UsageError,
)
from .exporters.adapters.base import AdapterRef
from .exporters.adapters.plan import AdapterReport
from .exporters.embeddings.base import EmbeddingRef
from .exporters.export import ExportReport, ExportSpec, bake, export
from .exporters.inspection import inspect_path
from .exporters.resolve import (
    DEFAULT_MODEL,
    Resolved,
    bundled_adapters,
    bundled_models,
    locate_adapter,
    resolve_model,
)
from .runtime.events import Event, ImageReady, PhaseFinished, PhaseStarted, Record, StepFinished, Warned
from .runtime.images import read_parameters, save_png
from .runtime.pipeline import Pipeline
from .runtime.request import Request
from .runtime.settings import Settings

__all__ = [
    "DEFAULT_MODEL",
    "AdapterError",
    "AdapterRef",
    "AdapterReport",
    "BackendError",
    "BackendUnavailable",
    "BakedAdapter",
    "BakedEmbedding",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DeviceRow",
    "EmbeddingRef",
    "Event",
    "ExportReport",
    "ExportSpec",
    "GraphError",
    "ImageReady",
    "InForce",
    "InvalidOutputError",
    "KilnError",
    "ParityError",
    "PhaseFinished",
    "PhaseStarted",
    "Pipeline",
    "Record",
    "Request",
    "Resolved",
    "SessionError",
    "Settings",
    "StepFinished",
    "StorageError",
    "UsageError",
    "Warned",
    "bake",
    "bundled_adapters",
    "bundled_models",
    "export",
    "generate",
    "inspect_path",
    "list_devices",
    "locate_adapter",
    "open_bundle",
    "read_parameters",
    "resolve_model",
    "save_png",
]


def generate(
    prompt: str,
    model: str = DEFAULT_MODEL,
    *,
    adapters: Iterable[AdapterRef | str] = (),
    settings: Settings | None = None,
    **fields: Any,
) -> list[ImageReady]:
    """Draw images from a prompt, all at once; use ``Pipeline`` for more than one request, or for progress.

    Args:
        prompt: what to draw.
        model: a bundle, a checkpoint, or the name of a bundled model.
        adapters: to bake in, as ``AdapterRef`` or as ``FILE:STRENGTH``.
        settings: backend, precision and threads.
        fields: the other fields of ``Request``, such as ``steps`` and ``seed``.

    Returns:
        One event per image, uint8 ``(h, w, 3)``, with its record.

    Raises:
        KilnError: whichever part of the work could not be done; the text says what to do.
    """
    request = Request(prompt, **fields)
    refs = tuple(a if isinstance(a, AdapterRef) else locate_adapter(a) for a in adapters)
    with Pipeline.open(resolve_model(model, refs).bundle, settings) as pipeline:
        events = pipeline.generate(request, last=True)
        return [event for event in events if isinstance(event, ImageReady)]

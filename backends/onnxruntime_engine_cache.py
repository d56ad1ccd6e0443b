"""Let a provider that compiles keep its files, in a folder of its own for each model.

The caches of TensorRT and MIGraphX know a model by the name of its file, the names of its values and its
shapes; the weights, the precision and the options are no part of that (``TRTGenerateId``, and its twin in the
MIGraphX provider). A second LoRA would be answered with the engine of the first. Here each has its folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from .base import GraphSource, InForce, PrepareOptions
from .compiled_cache import CompiledCache, cache_key
from .feeds import contract_of
from .onnxruntime_gpus import Gpu
from .session import CheckedSession

# Raised when what an adapter asks of its engine changes, so that old entries are not used.
CACHE_VERSION = 1

log = logging.getLogger(__name__)


def prepare_cached(
    backend: str,
    source: GraphSource,
    options: PrepareOptions,
    facts: Mapping[str, object],
    prepare: Callable[[Path | None], CheckedSession],
) -> CheckedSession:
    """Prepare with the folder that belongs to ``facts``, and run once so that all is compiled inside of it.

    Args:
        backend: Kiln's name, under which the cache files it.
        source: the component.
        options: whose ``cache_dir`` is used, if any.
        facts: of ``key_facts``.
        prepare: makes the session, given the folder for the engine's files or None for none.
    """
    key = cache_key(facts)
    lent = (
        CompiledCache(options.cache_dir / backend).engine_folder(key) if options.cache_dir else nullcontext()
    )
    with lent as folder:
        if folder is None or not folder.ready:
            log.info("%s compiles %s for %s, which takes minutes", backend, source.component, options.shapes)
        session = prepare(None if folder is None else folder.path)
        try:
            warm_up(session, options)
        except BaseException:
            session.close()
            raise
        session.in_force = _without_paths(session.in_force, folder is not None and folder.ready)
    return session


def _without_paths(found: InForce, ready: bool) -> InForce:
    """What is in force, without the folders of this machine: it goes into the record of an image."""
    settings = {k: v for k, v in found.settings.items() if not k.endswith(("_path", "_dir"))}
    return replace(found, settings=settings, from_cache=ready)


def key_facts(
    module: ModuleType,
    source: GraphSource,
    options: PrepareOptions,
    gpu: Gpu,
    lowerings: tuple[str, ...],
    asked: Mapping[str, str],
) -> dict[str, object]:
    """Everything that a compiled engine depends on.

    Args:
        module: onnxruntime.
        source: the component; its digest stands for graph and weights.
        options: shapes, extra and threads.
        gpu: engines are made for one GPU and one driver.
        lowerings: their versions are facts too.
        asked: provider options without paths, and environment variables.
    """
    from .lowerings.registry import versions

    return {
        "cache": CACHE_VERSION,
        "component": source.component,
        "digest": source.digest,
        "shapes": {name: list(shape) for name, shape in options.shapes.items()},
        "threads": options.threads,
        "engine": f"onnxruntime {module.__version__}",
        "device": [gpu.name, gpu.arch, gpu.driver],
        "lowerings": versions(lowerings),
        "options": dict(asked),
    }


def warm_up(session: CheckedSession, options: PrepareOptions) -> None:
    """Run once with zeros of the fixed shapes: engines compile at the first run what they did not before."""
    ports = contract_of(session.component).inputs
    session.run({port.name: np.zeros(options.shapes[port.name], np.dtype(port.dtype)) for port in ports})

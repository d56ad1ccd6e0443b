"""The bundle that a workload is run on: a user's, a bundled one, or random weights that are made here."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from ... import __version__
from ...cache import cache_folder, private_folder
from ...errors import UsageError
from ...exporters.adapters.base import AdapterRef
from ...exporters.resolve import Resolved, cached_bundle, locate_adapter, resolve_model
from .plan import Say
from .workloads import Workload

RANDOM = "random-sd15"
NO_ADAPTER = "none"


def find_bundle(
    workload: Workload, model: str | None, adapters: tuple[AdapterRef, ...], say: Say
) -> Resolved:
    """Open the bundle of a workload with adapters, making it if need be.

    Args:
        workload: names its model, unless it is about any.
        model: what the user names, None for the workload's own.
        adapters: to bake in.
        say: gets progress.

    Raises:
        UsageError: the workload needs a model and none was given.
        KilnError: as ``resolve_model``.
    """
    if model is None and workload.model is None:
        raise UsageError(f"the workload {workload.id} is run on your own model: add -m MODEL")
    if model is not None or workload.model != RANDOM:
        return resolve_model(str(model or workload.model), adapters)
    made = cached_bundle(_random_key(), lambda target: _make_random(target, say))
    return resolve_model(str(made.bundle.path), adapters) if adapters else made


def parse_adapters(text: str) -> tuple[AdapterRef, ...]:
    """One value of ``--lora``: ``FILE:STRENGTH``, several joined by ``+``, or ``none``.

    Raises:
        UsageError: a strength that is no number.
    """
    if text == NO_ADAPTER:
        return ()
    return tuple(locate_adapter(part) for part in text.split("+"))


def _random_key() -> str:
    return f"{RANDOM}-{hashlib.sha256(f'{__version__} fp16 seed 0'.encode()).hexdigest()[:24]}"


def _make_random(target: Path, say: Say) -> None:
    """Write random weights and export them; the folder between the two is not kept."""
    from ...exporters.export import ExportSpec, export
    from ..random_models import write_random_model

    say(
        "making random weights of Stable Diffusion 1.5: 2 GB are kept in the cache, 4 GB are needed meanwhile"
    )
    beside = private_folder(cache_folder("bundles"))
    with tempfile.TemporaryDirectory(prefix=".random-", suffix=".partial", dir=beside) as scratch:
        folder = write_random_model(Path(scratch) / "model", seed=0, storage="fp16")
        # With their source remembered, a baked bundle would look for a folder that is gone.
        export(ExportSpec(folder, target, name=RANDOM, remember_source=False))

"""From what a user calls a model to a bundle on this machine: a name, a bundle, or a checkpoint.

A checkpoint, or any model with adapters, is exported once into the user's cache, under the digest of
everything that decides its bytes; the second time it is only opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from .. import __version__
from ..bundle import Bundle, file_sha256, is_bundle, open_bundle
from ..cache import cache_folder, keeps_nothing, private_folder
from ..cache_locks import Claim, claim
from ..cache_store import discard, enforce_limit
from ..errors import AdapterError, BundleError, CheckpointError, StorageError, UsageError
from .adapters.base import AdapterRef

DEFAULT_MODEL = "emoji"
_ATTEMPTS = 3  # each is lost only to another process that empties the cache at that moment

log = logging.getLogger(__name__)
_TAG = re.compile(r"<lora:([^:>]+)(?::([^>]*))?>")


@dataclass(frozen=True)
class Resolved:
    """The bundle to run, and whether it was made just now.

    One that lies in the cache is not removed from there as long as ``bundle`` is referred to.
    """

    bundle: Bundle
    made: bool


def bundled_models() -> dict[str, Path]:
    """Names and folders of the models that ship with Kiln."""
    root = Path(str(resources.files("kiln"))) / "models"
    return {path.name: path for path in sorted(root.glob("*")) if is_bundle(path)} if root.is_dir() else {}


def bundled_adapters() -> dict[str, Path]:
    """Names and files of the adapters that ship with Kiln, trained on its bundled models."""
    root = Path(str(resources.files("kiln"))) / "models"
    return {path.stem: path for path in sorted(root.glob("*.safetensors"))} if root.is_dir() else {}


def locate_adapter(text: str) -> AdapterRef:
    """The adapter of ``FILE:STRENGTH``, where FILE may be the name of a bundled adapter.

    Raises:
        UsageError: a strength that is no finite number.
    """
    ref = AdapterRef.parse(text)
    bundled = bundled_adapters().get(str(ref.path))
    return replace(ref, path=bundled) if bundled and not ref.path.exists() else ref


def locate_model(model: str) -> Path:
    """The path of a model: a bundled name, or a path that exists.

    Raises:
        UsageError: neither; lists the bundled names.
    """
    path = Path(model)
    if path.exists():
        return path
    bundled = bundled_models()
    if model in bundled:
        return bundled[model]
    names = ", ".join(bundled) or "none"
    raise UsageError(
        f"no model {model!r}: expected a bundle, a .safetensors or .ckpt file, a diffusers folder, "
        f"or a bundled model ({names})"
    )


def resolve_model(model: str, adapters: tuple[AdapterRef, ...] = (), *, storage: str = "auto") -> Resolved:
    """Open the bundle of a model with adapters, exporting it into the cache if it is not there.

    Raises:
        UsageError: there is no such model.
        CheckpointError, AdapterError, GraphError, BundleError, StorageError: as ``export`` and ``bake``.
    """
    path = locate_model(model)
    for adapter in adapters:
        if not adapter.path.is_file():
            raise AdapterError(f"no adapter file {adapter.path}; expected --lora FILE:STRENGTH")
    if is_bundle(path):
        bundle = open_bundle(path)
        if not adapters:
            return Resolved(bundle, made=False)
        base = bundle.content_digest
    else:
        bundle = None
        base = _checkpoint_fingerprint(path)
    target = cache_folder("bundles") / _key(base, adapters, storage)
    return _cached(target, path, bundle, adapters, storage)


def _cached(
    target: Path, path: Path, bundle: Bundle | None, adapters: tuple[AdapterRef, ...], storage: str
) -> Resolved:
    # Two processes that want the same model make it once; the lock dies with its process.
    with _lock(target):
        made = False
        for _ in range(_ATTEMPTS):
            opened = _open_claimed(target)
            if opened is not None:
                if made:
                    enforce_limit()
                return Resolved(opened, made)
            from .export import ExportSpec, bake, export

            name = bundle.name if bundle else path.stem
            if bundle:
                bake(bundle, target, adapters, name=name)
            else:
                export(ExportSpec(path, target, adapters, storage, name=name))
            made = True
        raise StorageError(f"{target} vanishes as soon as it is made; what else empties the cache?")


def _open_claimed(target: Path) -> Bundle | None:
    """The cached bundle, claimed for as long as it is referred to; None if there is none that is whole."""
    held = claim(target)
    if held is None:
        return None
    try:
        bundle = open_bundle(target)
    except BundleError as exc:
        log.warning("a cached model is thrown away and made again: %s", exc)
        held.release()
        discard(target)
        return None
    except BaseException:
        held.release()
        raise
    held.touch()
    weakref.finalize(bundle, _give_up, held)
    return bundle


def _give_up(held: Claim) -> None:
    held.release()
    if keeps_nothing():
        enforce_limit()


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(f"{target}.lock")
    try:
        private_folder(target.parent)
        lock.acquire()
    except OSError as exc:
        raise StorageError(
            f"cannot write the cache {target.parent}: {(exc.strerror or str(exc)).lower()}; "
            "free some space, or set KILN_CACHE to another folder"
        ) from exc
    try:
        yield
    finally:
        lock.release()


def _checkpoint_fingerprint(path: Path) -> str:
    from .checkpoints import open_checkpoint

    if not path.is_dir() and path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; expected a .safetensors file; download it again")
    with open_checkpoint(path) as checkpoint:
        return checkpoint.fingerprint()


def _key(base: str, adapters: tuple[AdapterRef, ...], storage: str) -> str:
    rows = [[file_sha256(a.path), a.path.stem, a.unet_strength, a.text_encoder_strength] for a in adapters]
    return hashlib.sha256(json.dumps([__version__, base, rows, storage]).encode()).hexdigest()[:24]


def prompt_adapters(prompt: str, folder: Path | None) -> tuple[str, tuple[AdapterRef, ...]]:
    """Take A1111's ``<lora:name:strength>`` tags out of a prompt.

    A tag is ``<lora:NAME>``, ``<lora:NAME:BOTH>`` or ``<lora:NAME:TEXT_ENCODER:UNET>``, as in A1111.

    Returns:
        The prompt without tags, and the adapters they name, looked up in ``folder``.

    Raises:
        UsageError: a tag without a folder to look in, an unknown name, or a strength that is no number.
    """
    found = []
    for tag in _TAG.finditer(prompt):
        path = _tagged_file(tag, folder)
        try:
            numbers = [float(n) for n in (tag.group(2) or "1").split(":")]
        except ValueError:
            raise UsageError(
                f"{tag.group(0)} has a strength that is no number; expected <lora:name:0.8>"
            ) from None
        if len(numbers) > 2:
            raise UsageError(f"{tag.group(0)} has {len(numbers)} strengths; expected one or two")
        found.append(AdapterRef(path, unet_strength=numbers[-1], text_encoder_strength=numbers[0]))
    return _TAG.sub("", prompt).strip(), tuple(found)


def _tagged_file(tag: re.Match[str], folder: Path | None) -> Path:
    """The file of a prompt's tag: in the folder given, else among the bundled adapters."""
    name, bundled = tag.group(1), bundled_adapters()
    if folder is None:
        if name in bundled:
            return bundled[name]
        raise UsageError(
            f"the prompt asks for {tag.group(0)}; say where the files are with --lora-dir FOLDER"
        )
    path = folder / f"{name}.safetensors"
    if path.is_file():
        return path
    if name in bundled:
        return bundled[name]
    known = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
    raise UsageError(f"{folder} has no {path.name}, which {tag.group(0)} asks for; its adapters: {known}")

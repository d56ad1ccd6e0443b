"""From what a user calls a model to a bundle on this machine: a name, a bundle, or a checkpoint.

A checkpoint, or any model with adapters, is exported once into the user's cache, under the digest of
everything that decides its bytes; the second time it is only opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
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
from .adapters.block_strengths import PRESETS
from .embeddings.base import EmbeddingRef

DEFAULT_MODEL = "emoji"
_ATTEMPTS = 3  # each is lost only to another process that empties the cache at that moment

log = logging.getLogger(__name__)


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


def locate_adapter(text: str, presets: Mapping[str, str] = PRESETS) -> AdapterRef:
    """The adapter of ``FILE:STRENGTH``, where FILE may be the name of a bundled adapter.

    Raises:
        UsageError: a strength that is no finite number, or other fields than ``AdapterRef.parse`` reads.
    """
    ref = AdapterRef.parse(text, presets)
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


def resolve_model(
    model: str,
    adapters: tuple[AdapterRef, ...] = (),
    *,
    storage: str = "auto",
    embeddings: tuple[EmbeddingRef, ...] = (),
) -> Resolved:
    """Open the bundle of a model with adapters and embeddings, made in the cache if it is not there.

    Embeddings are added to those of a bundle; where no adapters are asked for, those inside it stay.

    Raises:
        UsageError: there is no such model.
        CheckpointError, AdapterError, GraphError, BundleError, StorageError: as ``export`` and ``bake``.
    """
    path = locate_model(model)
    for adapter in adapters:
        if not adapter.path.exists():
            raise AdapterError(f"no adapter file {adapter.path}; expected --lora FILE:STRENGTH")
    if is_bundle(path):
        bundle = open_bundle(path)
        if not adapters and not embeddings:
            return Resolved(bundle, made=False)
        base = bundle.content_digest
    else:
        bundle = None
        base = _checkpoint_fingerprint(path)

    def make(target: Path) -> None:
        from .export import ExportSpec, add_tokens, bake, export

        name = bundle.name if bundle else path.stem
        if bundle is None:
            export(ExportSpec(path, target, adapters, storage, name=name, embeddings=embeddings))
        elif adapters:
            bake(bundle, target, adapters, name=name, embeddings=embeddings)
        else:
            add_tokens(bundle, target, embeddings, name=name)

    return cached_bundle(_key(base, adapters, storage, embeddings), make)


def cached_bundle(key: str, make: Callable[[Path], object]) -> Resolved:
    """The bundle under a key of the cache, which ``make`` writes to the path it is given if it is not there.

    Args:
        key: ends with 12 or more hexadecimal digits, by which the cache knows its entries.
        make: is called by one process at a time.

    Raises:
        StorageError: the cache cannot be written, or its entries vanish at once.
    """
    target = cache_folder("bundles") / key
    # Two processes that want the same model make it once; the lock dies with its process.
    with _lock(target):
        made = False
        for _ in range(_ATTEMPTS):
            opened = _open_claimed(target)
            if opened is not None:
                if made:
                    enforce_limit()
                return Resolved(opened, made)
            make(target)
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


def _key(
    base: str, adapters: tuple[AdapterRef, ...], storage: str, embeddings: tuple[EmbeddingRef, ...] = ()
) -> str:
    rows = [
        [*_facts(a), a.unet_strength, a.text_encoder_strength, a.rank, a.blocks and a.blocks.factors]
        for a in adapters
    ]
    facts: list[object] = [__version__, base, rows, storage]
    if embeddings:
        facts.append([[file_sha256(e.path), e.path.stem, e.token] for e in embeddings])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _facts(adapter: AdapterRef) -> list[str]:
    """Digests of the files of an adapter, and its name, which the bundle remembers."""
    from .adapters.open import weights_and_config

    try:
        return [*map(file_sha256, weights_and_config(adapter.path)), adapter.path.stem]
    except OSError as exc:
        raise AdapterError(f"{adapter.path}: cannot be read: {exc.strerror}") from exc


def prompt_adapters(
    prompt: str, folder: Path | None, presets: Mapping[str, str] = PRESETS
) -> tuple[str, tuple[AdapterRef, ...]]:
    """Take A1111's ``<lora:name:strength>`` tags out of a prompt.

    A tag is ``<lora:NAME>``, ``<lora:NAME:BOTH>`` or ``<lora:NAME:TEXT_ENCODER:UNET:RANK>``, as in A1111, and
    any field may say its name: ``te=``, ``unet=``, ``dyn=``, and ``lbw=`` for block strengths.

    Returns:
        The prompt without tags, and the adapters they name: looked up in ``folder``, then among the bundled.

    Raises:
        UsageError: a tag without a folder to look in, an unknown name, or a strength that is no number.
    """
    from .prompt_tags import AdapterFolder, take_tags

    return take_tags(prompt, AdapterFolder(folder, bundled_adapters()), presets)

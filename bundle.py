"""The bundle: the folder of graphs, weights and facts that backends and runtime read.

    <name>/kiln.json                       the manifest, written last: a folder without it is no bundle
    <name>/model_index.json, scheduler/, tokenizer/       as diffusers has them
    <name>/<component>/model.onnx + weights.safetensors + config.json

A bundle is opened only when every file that the manifest lists has the size and the SHA-256 the
manifest says. Files are read whole for this once; after that a stamp of size, times and inode in
the user's cache stands for the reading until the file is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

from .backends.base import GraphSource
from .baked import ADAPTER_FACTS, BakedAdapter, BakedEmbedding, is_adapter, is_embedding
from .cache import cache_folder
from .components import COMPONENTS, CONTRACTS
from .errors import BundleError

MANIFEST = "kiln.json"
FORMAT_VERSION = 1
# Files up to this size are read whole at every opening: some 20 ms.
_ALWAYS_READ_BYTES = 64 << 20
_COMPONENT_FILES = ("model.onnx", "weights.safetensors", "config.json")
_PIPELINE_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the bundle calls itself."""
        return str(self.manifest["name"])

    @property
    def family(self) -> str:
        """The family, ``sd1``."""
        return str(self.manifest["family"])

    @property
    def components(self) -> tuple[str, ...]:
        """The components inside, in the order of the contract table."""
        return tuple(c for c in COMPONENTS if c in self.manifest["components"])

    @property
    def adapters(self) -> tuple[BakedAdapter, ...]:
        """What was baked in, in order."""
        return tuple(BakedAdapter(**row) for row in self.manifest["adapters"])

    @property
    def embeddings(self) -> tuple[BakedEmbedding, ...]:
        """Tokens with vectors of their own, in the order of their rows."""
        rows = self.manifest.get("embeddings", [])
        return tuple(BakedEmbedding(row["token"], row["sha256"], tuple(row["ids"])) for row in rows)

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with vocab.json, merges.txt and tokenizer_config.json."""
        return self.path / "tokenizer"

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """diffusers' scheduler config: betas and prediction type."""
        return _read_json(self.path / "scheduler/scheduler_config.json")

    def config(self, component: str) -> dict[str, Any]:
        """The diffusers or transformers config of a component's network."""
        self._require(component)
        return _read_json(self.path / component / "config.json")

    def digest(self, component: str) -> str:
        """SHA-256 over the graph's and the weights' digests: changes when one weight changes."""
        self._require(component)
        files = self.manifest["files"]
        parts = [files[f"{component}/{name}"]["sha256"] for name in ("model.onnx", "weights.safetensors")]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over all components: the model hash of a bundle."""
        return hashlib.sha256("".join(self.digest(c) for c in self.components).encode()).hexdigest()

    def source(self, component: str) -> GraphSource:
        """What a backend needs to prepare ``component``."""
        folder = self.path / component
        return GraphSource(
            component,
            folder / "model.onnx",
            folder / "weights.safetensors",
            self.config(component),
            self.digest(component),
        )

    def _require(self, component: str) -> None:
        if component not in self.components:
            raise BundleError(f"{self.path} has no {component}; it has {', '.join(self.components)}")


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def open_bundle(path: str | os.PathLike[str], *, verify: str = "stamped") -> Bundle:
    """Open a bundle and check every file against the manifest.

    Args:
        path: the folder.
        verify: ``full`` reads every file; ``stamped`` reads a file larger than 64 MiB only when its
            size, times or inode changed since it was last read whole.

    Raises:
        BundleError: no manifest, another format version, or a file that is missing or differs.
    """
    folder = Path(path)
    if not is_bundle(folder):
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}. Make one with: kiln export MODEL -o FOLDER"
        )
    manifest = _read_json(folder / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has bundle format {version!r}, this Kiln reads {FORMAT_VERSION}; "
            "export it again with this version"
        )
    _check_manifest(folder / MANIFEST, manifest)
    stamps = _Stamps() if verify == "stamped" else None
    for name, facts in manifest["files"].items():
        _verify(folder, name, facts, stamps)
    if stamps:
        stamps.save()
    return Bundle(folder, manifest)


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Check that a manifest says what is asked of it later, and vouches for every file that is read."""

    def fail(why: str) -> BundleError:
        return BundleError(f"{path} {why}; export the bundle again")

    kinds = {"name": str, "family": str, "components": dict, "files": dict, "adapters": list, "source": dict}
    if not isinstance(manifest.get("embeddings", []), list):
        raise fail("has embeddings that are no list")
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise fail(f"has no {key} of the type {kind.__name__}")
    for name, facts in manifest["files"].items():
        if ".." in Path(name).parts or Path(name).is_absolute() or "\0" in name:
            raise fail(f"names {name!r}, which lies outside the bundle")
        if not (isinstance(facts, dict) and isinstance(facts.get("size"), int) and "sha256" in facts):
            raise fail(f"has no size and digest of {name!r}")
    for component in manifest["components"]:
        if component not in COMPONENTS:
            raise fail(f"names the component {component!r}, which Kiln does not know")
    needed = [f"{component}/{file}" for component in manifest["components"] for file in _COMPONENT_FILES]
    for name in (*needed, *_PIPELINE_FILES):
        if name not in manifest["files"]:
            raise fail(f"has no size and digest of {name!r}")
    if not all(map(is_embedding, manifest.get("embeddings", []))):
        raise fail("describes an embedding by other facts than token, sha256 and ids")
    if not all(map(is_adapter, manifest["adapters"])):
        raise fail("describes an adapter by other facts than " + ", ".join(sorted(ADAPTER_FACTS)))


def bundle_networks(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """Which components hold the tensors of each checkpoint network."""
    networks: dict[str, tuple[str, ...]] = {}
    for component in bundle.components:
        network = CONTRACTS[component].network
        networks[network] = (*networks.get(network, ()), component)
    return networks


def _verify(folder: Path, name: str, facts: Mapping[str, Any], stamps: _Stamps | None) -> None:
    path = folder / name
    try:
        stat = path.stat()
    except FileNotFoundError as exc:
        raise BundleError(
            f"{folder} is incomplete: {name} is missing; export or copy the bundle again"
        ) from exc
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror}") from exc
    if not S_ISREG(stat.st_mode):
        raise BundleError(f"{path} is not a file; export or copy the bundle again")
    if stat.st_size != facts["size"]:
        raise BundleError(
            f"{path} has {stat.st_size} bytes, the manifest says {facts['size']}; "
            "export or copy the bundle again"
        )
    stamp = [
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        stat.st_ino,
        facts["sha256"],
    ]
    if stamps and stat.st_size > _ALWAYS_READ_BYTES and stamps.has(stamp):
        return
    try:
        found = file_sha256(path)
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror}") from exc
    if found != facts["sha256"]:
        raise BundleError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, the manifest says "
            f"{str(facts['sha256'])[:12]}…; export or copy the bundle again"
        )
    if stamps:
        stamps.add(stamp)


class _Stamps:
    """Which large files were read whole and found right, in the user's cache."""

    _MOST = 200

    def __init__(self) -> None:
        self.path = cache_folder("verified") / "stamps.json"
        self.changed = False
        try:
            rows = json.loads(self.path.read_text())
            self.rows: list[Any] = rows if isinstance(rows, list) else []
        except (OSError, ValueError):
            self.rows = []

    def has(self, stamp: list[Any]) -> bool:
        return stamp in self.rows

    def add(self, stamp: list[Any]) -> None:
        if stamp[1] > _ALWAYS_READ_BYTES:
            self.rows = [*self.rows[-self._MOST :], stamp]
            self.changed = True

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            partial.write_text(json.dumps(self.rows))
            partial.replace(self.path)
        except OSError:
            # A cache that cannot be written costs time at the next opening and nothing else.
            return


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{path} is not readable JSON ({exc}); export the bundle again") from exc
    if not isinstance(value, dict):
        raise BundleError(
            f"{path} holds a {type(value).__name__}, expected an object; export the bundle again"
        )
    return value

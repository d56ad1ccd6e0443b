"""Embeddings of bundles: those inside one, and a bundle with more of them and nothing else changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...baked import BakedEmbedding
from ...bundle import MANIFEST, Bundle
from ...components import CONTRACTS
from ...errors import BundleError
from ..publish import published
from ..tensors import TensorFile
from .base import Embedding
from .insert import insert_tokens
from .plan import TABLE, PlannedToken, TokenPlan, plan_tokens
from .tokenizers import known_tokens


def inside(bundle: Bundle) -> tuple[Embedding, ...]:
    """The embeddings of a bundle, read from its tables.

    Raises:
        BundleError: its manifest names rows that a table does not have.
    """
    vectors: dict[str, dict[str, np.ndarray]] = {row.token: {} for row in bundle.embeddings}
    for component in _text_encoders(bundle) if vectors else ():
        source = TensorFile.open(bundle.source(component).weights_path, error=BundleError)
        try:
            table = source.read(TABLE)
        finally:
            source.close()
        for row in bundle.embeddings:
            if max(row.ids) >= len(table):
                raise BundleError(
                    f"{bundle.path} has no row {max(row.ids)} for {row.token!r}; export it again"
                )
            vectors[row.token][CONTRACTS[component].network] = table[list(row.ids)].astype(np.float32)
    return tuple(
        Embedding(row.token, vectors[row.token], str(bundle.path), row.sha256) for row in bundle.embeddings
    )


def facts(token: PlannedToken) -> dict[str, Any]:
    """What the manifest says of one embedding."""
    return {"token": token.embedding.token, "sha256": token.embedding.sha256, "ids": list(token.ids)}


def kept(rows: Iterable[BakedEmbedding]) -> list[dict[str, Any]]:
    """What the manifest said of embeddings that stay where they are."""
    return [{"token": row.token, "sha256": row.sha256, "ids": list(row.ids)} for row in rows]


def plan_for_bundle(bundle: Bundle, embeddings: Iterable[Embedding]) -> TokenPlan:
    """The rows that a bundle would get; those of embeddings that are in it already are left out.

    Raises:
        AdapterError: an embedding does not fit, or its name is taken.
    """
    held = {(row.token, row.sha256) for row in bundle.embeddings}
    new = [embedding for embedding in embeddings if (embedding.token, embedding.sha256) not in held]
    tables = {}
    for component in _text_encoders(bundle):
        source = TensorFile.open(bundle.source(component).weights_path, error=BundleError)
        tables[CONTRACTS[component].network] = source.infos[TABLE].shape
        source.close()
    return plan_tokens(new, tables, known_tokens(bundle.tokenizer_dir))


def add_embeddings(
    bundle: Bundle,
    output: Path,
    embeddings: Iterable[Embedding],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> TokenPlan:
    """Make a bundle with more embeddings; adapters, int8 and the embeddings inside stay as they are.

    Raises:
        AdapterError: an embedding does not fit, or its name is taken.
        StorageError: the output exists, or the disk refused.
    """
    plan = plan_for_bundle(bundle, embeddings)
    with published(output, overwrite=overwrite) as folder:
        manifest = json.loads(json.dumps(bundle.manifest))
        for file in manifest["files"]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, folder / file)
        insert_tokens(folder, manifest["components"], manifest["files"], plan)
        manifest["name"] = name or output.resolve().name
        manifest["embeddings"] = [*kept(bundle.embeddings), *map(facts, plan.tokens)]
        manifest["files"] = dict(sorted(manifest["files"].items()))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return plan


def _text_encoders(bundle: Bundle) -> list[str]:
    return [component for component in bundle.components if component.startswith("text_encoder")]


def from_tokenizer(tokens: Mapping[str, tuple[int, ...]], rows: int) -> list[dict[str, Any]]:
    """What the manifest says of tokens that a checkpoint's own tokenizer brings, and its table has."""
    return [
        {"token": token, "sha256": "", "ids": list(ids)} for token, ids in tokens.items() if max(ids) < rows
    ]

"""Adds rows to the embedding tables of a bundle that lies in a folder and is not yet published.

Nothing but the text encoders is written: their weights with a longer table, their graph with that table's new
size and the new offsets, ``vocab_size`` in their config, and the tokens in the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...components import COMPONENTS, CONTRACTS
from ...errors import BundleError, CheckpointError
from ..binding import rebind
from ..pipeline_files import json_bytes
from ..tensors import DTYPES, TensorFile
from ..weights import largest_if_narrowed, overflow, place, write_weights
from .plan import TABLE, TokenPlan
from .tokenizers import with_tokens

Files = dict[str, dict[str, Any]]
"""Size and digest of each file, as the manifest has them."""


def insert_tokens(folder: Path, components: dict[str, dict[str, Any]], files: Files, plan: TokenPlan) -> None:
    """Add the rows of ``plan`` to a bundle's folder.

    Args:
        folder: holds all files but the manifest.
        components: facts of each component for the manifest; the numbers of parameters are raised.
        files: facts of each file for the manifest; replaced for those that change.
        plan: what to add.

    Raises:
        CheckpointError: a vector does not fit into the type that the table is stored in.
    """
    if not plan.tokens:
        return
    networks = plan.tokens[0].embedding.vectors.keys()
    for component in (c for c in COMPONENTS if c in components and CONTRACTS[c].network in networks):
        rows = plan.vectors(CONTRACTS[component].network)
        _weights(folder / component, component, rows, files)
        config = json.loads((folder / component / "config.json").read_text("utf-8"))
        config["vocab_size"] = plan.start + plan.rows
        _write(folder, f"{component}/config.json", json_bytes(config), files)
        components[component]["parameters"] += rows.size
        _tokenizer(folder, "tokenizer" + component.removeprefix("text_encoder"), plan, files)


def _weights(folder: Path, component: str, rows: np.ndarray, files: Files) -> None:
    """Write the weights anew with a longer table, and bind the graph to them."""
    import onnx

    path, partial = folder / "weights.safetensors", folder / "weights.safetensors.new"
    source = TensorFile.open(path, error=BundleError)
    try:
        dtype = source.infos[TABLE].dtype
        if dtype not in ("F16", "BF16", "F32"):
            raise CheckpointError(f"{component} stores its table as {dtype}; expected fp16, bf16 or fp32")
        misfit = overflow(largest_if_narrowed(rows, dtype), dtype)
        if misfit:
            raise CheckpointError(f"{component}: an embedding {misfit}")
        shapes = {name: info.shape for name, info in source.infos.items()}
        shapes[TABLE] = (shapes[TABLE][0] + len(rows), *shapes[TABLE][1:])
        header, placed = place((name, info.dtype, shapes[name]) for name, info in source.infos.items())

        def tensors() -> Iterator[np.ndarray]:
            for name in placed:
                tensor = source.read(name)
                yield np.concatenate([tensor, rows.astype(DTYPES[dtype])]) if name == TABLE else tensor

        size, sha256 = write_weights(partial, header, tensors())
    finally:
        source.close()
    partial.replace(path)
    files[f"{component}/weights.safetensors"] = {"size": size, "sha256": sha256}
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    rebind(graph, placed)
    _write(folder.parent, f"{component}/model.onnx", graph.SerializeToString(deterministic=True), files)


def _tokenizer(folder: Path, name: str, plan: TokenPlan, files: Files) -> None:
    held = {path.name: path.read_bytes() for path in (folder / name).glob("*.json")}
    for file, data in with_tokens(held, plan.added).items():
        _write(folder, f"{name}/{file}", data, files)


def _write(folder: Path, name: str, data: bytes, files: Files) -> None:
    (folder / name).write_bytes(data)
    files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

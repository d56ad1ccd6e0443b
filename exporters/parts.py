"""One network of a checkpoint: its tensors under diffusers' names, wherever they lie, and its config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .buffers import Buffers
from .families import FAMILIES, Family
from .file_kinds import is_pickle, open_regular
from .ldm_names import vae_shape
from .pickles import TorchFile
from .structure import Shapes
from .tensors import TensorFile, TensorInfo, TensorSource

WEIGHT_TYPES = ("F16", "BF16", "F32", "F64")
JSON_LIMIT = 16 << 20  # bytes; the index of a sharded SDXL has 0.2 MB
_QUANTIZED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", ".qweight", ".SCB")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: the file it lies in, its name there, and its type and shape as diffusers has it."""

    source: TensorSource
    stored: str
    info: TensorInfo

    def read(self, buffers: Buffers | None = None) -> np.ndarray:
        """The tensor in its stored type and in diffusers' shape."""
        return self.source.read(self.stored, buffers).reshape(self.info.shape)


@dataclass(frozen=True)
class Part:
    """One network: ``entries`` by diffusers name, the config, and the file or folder it came from."""

    network: str
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    origin: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.info.shape for name, entry in self.entries.items()}


def open_weights(path: Path, stack: ExitStack) -> TensorSource:
    """Open a weights file by its content: safetensors, or a torch file when torch can read it safely.

    Args:
        path: the file.
        stack: takes over closing it.

    Raises:
        CheckpointError: the file is unreadable, or a pickle that is named .safetensors.
    """
    stream, _ = open_regular(path, CheckpointError)
    with stream:
        head = stream.read(64)
    source: TensorSource
    if is_pickle(head) and path.suffix != ".safetensors":
        source = TorchFile.open(path)
    else:
        source = TensorFile.open(path)
    stack.callback(source.close)
    refuse_quantized(path, source.infos)
    return source


def refuse_quantized(path: Path, names: Iterable[str]) -> None:
    """Raise when tensor names show weights that are numbers only together with separate scales."""
    marker = next((name for name in names if name.endswith(_QUANTIZED)), None)
    if marker is not None:
        kind = "scaled fp8" if "scale" in marker else "quantized"
        raise CheckpointError(
            f"{path}: holds {kind} weights (tensor {marker!r}); use the fp16, bf16 or fp32 version of "
            "the model"
        )


def make_entries(network: str, source: TensorSource, renamed: Mapping[str, str]) -> dict[str, Entry]:
    """Entries of one file for one network.

    Args:
        network: ``unet``, ``vae`` or ``text_encoder``.
        source: the open file.
        renamed: stored name -> diffusers name of the tensors to take.

    Raises:
        CheckpointError: two stored names mean one tensor, or a type is not one of plain weights.
    """
    entries: dict[str, Entry] = {}
    for stored, name in renamed.items():
        info = source.infos[stored]
        if info.dtype not in WEIGHT_TYPES:
            hint = "8-bit float" if info.dtype.startswith("F8") else "quantized or damaged"
            raise CheckpointError(
                f"{source.path}: tensor {stored!r} has the type {info.dtype} ({hint}); Kiln reads weights "
                "in F16, BF16 and F32: use such a version of the model"
            )
        if name in entries:
            raise CheckpointError(f"{source.path}: {stored!r} and {entries[name].stored!r} are both {name}")
        shape = vae_shape(name, info.shape) if network == "vae" else info.shape
        entries[name] = Entry(source, stored, replace(info, shape=shape))
    return entries


def shapes_of(source: TensorSource, renamed: Mapping[str, str]) -> Shapes:
    """Shapes as stored, under new names."""
    return {name: source.infos[stored].shape for stored, name in renamed.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        CheckpointError: the file is missing, larger than 16 MiB, or not a JSON object.
    """
    stream, size = open_regular(path, CheckpointError)
    with stream:
        if size > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size} bytes, a config has at most {JSON_LIMIT}")
        raw = stream.read(size)
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: is not readable JSON: {str(cause)[:160]}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def shipped_folder(family: Family) -> Path:
    """The folder of configs and tokenizer that Kiln ships for a family."""
    if family.data is None:
        raise CheckpointError(f"no configs of {family.title} in this version")
    return Path(__file__).parent / "data" / family.data


def shipped_config(network: str, family: Family = FAMILIES["sd1"]) -> dict[str, Any]:
    """The family's config of one network (``vae_tiny`` for TAESD's)."""
    return read_json(shipped_folder(family) / network / "config.json")

"""Torch's own weight files (.ckpt, .pt, .bin) behind the interface of ``tensors.TensorFile``.

These files are Python pickles. They are read by ``torch.load(weights_only=True)`` of a torch without the
known holes in it, or not at all: nothing here or elsewhere in Kiln unpickles freely.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, KilnError
from .buffers import Buffers
from .file_kinds import foreign_format, is_pickle, open_regular
from .pickled_containers import without_sources
from .tensors import DTYPES, TensorInfo

# CVE-2026-24747 (memory corruption in the weights_only reader) was fixed in 2.10, CVE-2025-32434 in 2.6.
TORCH_FLOOR = (2, 10)
_TYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


class TorchFile:
    """One torch file; tensors stay on disk (memory-mapped) where the zip form allows it."""

    def __init__(self, path: Path, tensors: dict[str, Any], error: type[KilnError]) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = tensors
        self._error = error
        self.infos: dict[str, TensorInfo] = {}
        for name, tensor in tensors.items():
            dtype = _TYPES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise error(
                    f"{path}: tensor {name!r} has the type {tensor.dtype}; expected floating point weights"
                )
            size = int(tensor.numel()) * DTYPES[dtype].itemsize
            self.infos[name] = TensorInfo(dtype, tuple(int(n) for n in tensor.shape), -1, size)

    @classmethod
    def open(cls, path: Path, *, error: type[KilnError] = CheckpointError) -> TorchFile:
        """Open with ``weights_only=True``.

        Raises:
            KilnError: of class ``error``: torch is missing or too old, the file is damaged, or holds objects
                other than tensors.
        """
        loaded = load_object(path, error)
        import torch

        return cls(path, _tensors_of(loaded, torch, path, error), error)

    def read(self, name: str, buffers: Buffers | None = None) -> np.ndarray:
        """A new C-contiguous array of one tensor in its stored type; ``buffers`` are of no use to torch."""
        if name not in self._tensors:
            raise self._error(f"{self.path}: has no tensor named {name!r}")
        import torch

        info = self.infos[name]
        tensor = self._tensors[name].detach().contiguous()
        dtype = DTYPES[info.dtype]
        if dtype.kind == "V" or dtype.type.__module__ == ml_dtypes.__name__:
            whole = torch.uint8 if dtype.itemsize == 1 else torch.int16  # numpy has no such type of its own
            return tensor.view(whole).numpy().copy().view(dtype).reshape(info.shape)
        return np.asarray(tensor.numpy().copy(), dtype).reshape(info.shape)

    def close(self) -> None:
        """Let the mapped tensors go; reading afterwards is an error."""
        self._tensors = {}


def load_object(path: Path, error: type[KilnError], *, modules: bool = False) -> object:
    """What a torch file holds: tensors, and dicts and lists of them.

    Args:
        path: the file.
        error: the class to raise.
        modules: let ``ParameterDict`` through, in which old embeddings lie; it is given back as it was
            stored, and nothing of it runs. The old form of a file is then read whole.

    Raises:
        KilnError: of class ``error``: torch is missing or too old, the file is damaged, or holds objects
            other than tensors.
    """
    stream, _ = open_regular(path, error)
    with stream:
        head = stream.read(64)
    if not is_pickle(head):
        raise error(f"{path}: is {foreign_format(head) or 'not a torch file'}; expected a .ckpt of torch")
    torch = _import_torch(path, error)
    allowed = [torch.nn.ParameterDict] if modules else []
    zipped = head.startswith(b"PK")
    try:
        source = io.BytesIO(without_sources(path.read_bytes())) if modules and not zipped else path
        # Only the zip form can be mapped; the old form is read whole.
        with torch.serialization.safe_globals(allowed):
            loaded: object = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as cause:  # torch raises whatever its readers meet in a damaged file
        raise error(
            f"{path}: torch refuses to read it safely (weights_only): {_first_line(cause)}. "
            "It is damaged or holds more than tensors; look for the .safetensors of the same model"
        ) from cause
    return loaded


def _first_line(cause: Exception) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0][:160]


def _import_torch(path: Path, error: type[KilnError]) -> Any:
    try:
        import torch
    except ImportError as cause:
        raise error(
            f"{path}: is a pickle, which needs torch to be read: pip install 'kiln-diffusion[export]', "
            "or take the .safetensors of the same model"
        ) from cause
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise error(
            f"{path}: torch {torch.__version__} has known holes in reading pickles; install torch >= {floor}"
        )
    return torch


def _tensors_of(loaded: object, torch: Any, path: Path, error: type[KilnError]) -> dict[str, Any]:
    """The table of tensors, which may lie under ``state_dict`` (also twice) or be the only value.

    A list of matrices is numbered as cloneofsimo/lora's safetensors files are.
    """
    if isinstance(loaded, Mapping) and "string_to_param" in loaded:
        raise error(f"{path}: is a textual inversion embedding; give it with --embedding FILE")
    if isinstance(loaded, list):
        return _numbered(loaded, torch, path, error)
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        inner = loaded.get("state_dict")
        if inner is None and len(loaded) == 1:
            inner = next(iter(loaded.values()))
        if not isinstance(inner, Mapping):
            break
        loaded = inner
    table = loaded if isinstance(loaded, Mapping) else {}
    tensors = {
        name: value
        for name, value in table.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
    }
    if not tensors:
        raise error(f"{path}: holds no tensors")
    return tensors


def _numbered(loaded: list[object], torch: Any, path: Path, error: type[KilnError]) -> dict[str, Any]:
    """Names for the flat list ``[up 0, down 0, up 1, down 1, ...]`` that cloneofsimo/lora writes.

    Every layer of CLIP's attention is as wide as the next and square; the UNet's are not.
    """
    if not loaded or len(loaded) % 2 or not all(isinstance(v, torch.Tensor) and v.ndim >= 2 for v in loaded):
        raise error(f"{path}: is a list, but not one of pairs of matrices, up and down, as a LoRA would be")
    tensors: list[Any] = list(loaded)
    widths = {tensor.shape[index % 2] for index, tensor in enumerate(tensors)}
    network = "text_encoder" if len(widths) == 1 else "unet"
    return {
        f"{network}:{index // 2}:{'down' if index % 2 else 'up'}": tensor
        for index, tensor in enumerate(tensors)
    }

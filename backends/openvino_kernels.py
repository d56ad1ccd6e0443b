"""Lowering for OpenVINO: int8 kernels of convolutions in floats are read from a file, in the type it packs.

OpenVINO has no convolution of floats with int8 kernels. It multiplies them with their scales while compiling:
all kernels exist in fp32 then, and stay in memory, and in the cache, beside the ones it packed. Here they are
written out block by block, into a file that is there for as long as they are packed; its pages are given back
meanwhile (``mapped_pages``). What is left in memory are the packed kernels alone: of the UNet of Stable
Diffusion 1.5, 556 million values, in bf16 1.1 GB in place of 3.3 GB. Its entry in the cache has 39 MB in
place of 2.1 GB.

Values are the products in fp32, rounded to bf16 where OpenVINO would round them: outputs are the same bit for
bit.

What is compiled says of each constant only where it lies in the file of weights. So the new ones lie behind
the end of that file, in a file that is empty before; to read an entry of the cache, the weights are copied to
their own places there. Kept between runs it would take more room than the bundle, and reading it to check it
as long as writing it (1.5 GB).

Precondition: none. Postcondition: no convolution whose input is not quantized reads an int8 kernel that lies
in the file of weights under its name, with its scales; but for those that OpenVINO makes products of, for
which it has int8.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..cache import private_folder
from ..errors import SessionError
from ..int8 import SCALE_SUFFIX
from .compiled_cache import PARTIAL_SUFFIX
from .openvino_mapped import Rows, Stored, mapped_rows, stored_tensors
from .openvino_storage import decompressed

_BLOCK = 1 << 18  # values, or bytes that are copied, at a time; larger ones leave holes in the heap
_ALIGNED = 64  # bytes; wider than any type
_RESTORING = ("Convert", "Subtract", "Multiply")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloatKernels:
    """A file with kernels in floats, and where they lie in it, by the name of the int8 ones."""

    path: Path
    placed: Mapping[str, Stored]


def kernels_in_floats(model: Any, stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """The int8 kernels that convolutions in floating point read, in the order of the graph.

    Args:
        model: an ``openvino.Model``, before other lowerings or after them.
        stored: the tensors of its file of weights.
    """
    named = (_kernel_name(op) for op in model.get_ordered_ops())
    return tuple(dict.fromkeys(name for name in named if _is_int8(name, stored)))


def may_have_kernels(weights: Path) -> bool:
    """Whether a safetensors file holds an int8 kernel of a convolution; told from its header."""
    return any(tensor.dtype == "I8" and len(tensor.shape) > 2 for tensor in stored_tensors(weights).values())


@contextmanager
def float_kernels(
    model: Any, weights: Path, kind: str, folder: Path | None, *, whole: bool = False
) -> Iterator[FloatKernels | None]:
    """A file with the int8 kernels of a model in floats; None if it has no such kernels.

    It is removed at the end; where a process has it mapped, what it holds stays until that process lets go.

    Args:
        model: an ``openvino.Model``, before other lowerings.
        weights: the safetensors file that its constants come from.
        kind: ``BF16`` or ``F32``.
        folder: where there is room, on a disk and not in memory; None for the system's folder for temporary
            files.
        whole: whether the other tensors are to lie in it as well.

    Raises:
        SessionError: the disk refused.
    """
    stored = stored_tensors(weights)
    names = kernels_in_floats(model, stored)
    if not names:
        yield None
        return
    with _room(folder) as name:
        path = Path(name) / "weights"
        placed = _places(stored, names, kind, weights.stat().st_size)
        rest = [stored[other] for other in stored.keys() - placed.keys()] if whole else []
        try:
            with weights.open("rb") as source, path.open("xb") as file:
                for tensor in rest:
                    _copy(source, file, tensor)
                for kernel, place in placed.items():
                    _write(source, file, stored[kernel], stored[kernel + SCALE_SUFFIX], place)
        except OSError as error:
            needed = sum(tensor.nbytes for tensor in (*placed.values(), *rest))
            raise SessionError(
                f"the kernels of {weights} in floats need {needed / 1e9:.1f} GB for a moment in "
                f"{path.parent.parent}: {(error.strerror or str(error)).lower()}; free it, or let KILN_CACHE "
                "name a folder on another disk"
            ) from error
        yield FloatKernels(path, placed)


def _room(folder: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed with what is in it; elsewhere if the one asked for cannot be written to."""
    # Windows does not remove what is mapped. What stays, as after a process that was killed, is removed as
    # unfinished entries of the cache are, by its name.
    how: dict[str, Any] = {"prefix": ".kernels-", "suffix": PARTIAL_SUFFIX, "ignore_cleanup_errors": True}
    if folder is not None:
        try:
            return tempfile.TemporaryDirectory(dir=private_folder(folder), **how)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            log.warning("%s: %s; kernels are written to the system's temporary folder", folder, why)
    return tempfile.TemporaryDirectory(**how)


def read_in_floats(core: Any, model: Any, kernels: FloatKernels) -> int:
    """Have the convolutions in floating point read these kernels; how many there were.

    Args:
        core: ``openvino.Core``.
        model: an ``openvino.Model``, changed in place.
        kernels: those of the model.
    """
    readers = [(op, name) for op in model.get_ordered_ops() if (name := _kernel_name(op)) in kernels.placed]
    wanted = [Rows(name, 0, kernels.placed[name].shape[0]) for _, name in readers]
    constants = mapped_rows(core, kernels.path, kernels.placed, wanted) if wanted else []
    for (op, _), constant in zip(readers, constants, strict=True):
        op.input(1).replace_source_output(decompressed(constant).output(0))
    return len(readers)


def _kernel_name(op: Any) -> str:
    """The name of the int8 kernel of a convolution in floating point, empty if it is none."""
    if op.get_type_name() != "Convolution" or _is_quantized(op.input_value(0).get_node()):
        return ""
    if _becomes_product(op):
        return ""
    product = op.input_value(1).get_node()
    cast = product.input_value(0).get_node() if product.get_type_name() == "Multiply" else None
    if cast is None or cast.get_type_name() != "Convert":
        return ""
    constant = cast.input_value(0).get_node()
    return str(constant.get_friendly_name()) if constant.get_type_name() == "Constant" else ""


def _is_quantized(node: Any) -> bool:
    """Whether a node gives quantized values: it quantizes, or restores what was quantized."""
    while node.get_type_name() in _RESTORING:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _becomes_product(op: Any) -> bool:
    """Whether OpenVINO makes a product with an int8 matrix of a convolution: one tap, beside a transposition.

    The pass is ``ConvertWeightCompressedConv1x1ToMatmul``. In Stable Diffusion 1.5 these are the projections
    into the transformer blocks and out of them.
    """
    if any(size != 1 for size in op.input_value(1).get_shape()[2:]):
        return False
    readers = [entry.get_node() for entry in op.output(0).get_target_inputs()]
    behind = [
        entry.get_node()
        for node in readers
        if node.get_type_name() == "Add"
        for entry in node.output(0).get_target_inputs()
    ]
    beside = (op.input_value(0).get_node(), *readers, *behind)
    return any(node.get_type_name() == "Transpose" for node in beside)


def _is_int8(name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether a tensor is of int8, with a scale for each index of its first axis."""
    values, scale = stored.get(name), stored.get(name + SCALE_SUFFIX)
    if values is None or scale is None:
        return False
    return (values.dtype, scale.dtype, scale.shape) == ("I8", "F32", values.shape[:1])


def _places(stored: Mapping[str, Stored], names: Sequence[str], kind: str, size: int) -> dict[str, Stored]:
    """Where the kernels lie: one after the other behind a file of ``size`` bytes."""
    placed = {}
    for name in names:
        placed[name] = Stored(kind, stored[name].shape, -(-size // _ALIGNED) * _ALIGNED)
        size = placed[name].offset + placed[name].nbytes
    return placed


def _copy(source: IO[bytes], file: IO[bytes], tensor: Stored) -> None:
    """Copy a tensor from its place in one file to the same place in the other."""
    source.seek(tensor.offset)
    file.seek(tensor.offset)
    left = tensor.nbytes
    while left:
        block = source.read(min(left, _BLOCK))
        if not block:
            raise OSError(f"{source.name} ends within a tensor; export the bundle again")
        file.write(block)
        left -= len(block)


def _write(source: IO[bytes], file: IO[bytes], kernel: Stored, scale: Stored, placed: Stored) -> None:
    """Write int8 values times their scales, by rows of the first axis."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if placed.dtype == "BF16" else np.float32)
    source.seek(scale.offset)
    scales = np.frombuffer(source.read(scale.nbytes), "<f4").reshape(-1, 1)
    source.seek(kernel.offset)
    file.seek(placed.offset)
    width = kernel.nbytes // kernel.shape[0]
    step = max(1, _BLOCK // width)
    for start in range(0, kernel.shape[0], step):
        rows = scales[start : start + step]
        values = np.frombuffer(source.read(len(rows) * width), np.int8).reshape(len(rows), width)
        file.write((values * rows).astype(kind, copy=False).tobytes())

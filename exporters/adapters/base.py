"""What an adapter is to the rest of the package: a request for one, its modules, and the changes they make.

An adapter file holds *modules*: groups of tensors that share a stem and together change one layer of a
network. A *format* (LoRA, LoHa, ...) says which parameter suffixes it owns and turns a module into
*weight updates*. A new format is one new file that satisfies ``AdapterFormat``, and one line in
``formats.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import AdapterError, UsageError
from ..tensors import TensorSource
from .block_strengths import PRESETS, BlockStrengths
from .halves import widen
from .spelling import EXPECTED, split_file

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64"})


@dataclass(frozen=True)
class AdapterRef:
    """A request for one adapter: where it is and how strongly it acts on each network.

    ``rank`` cuts a LoRA that was trained to be cut (DyLoRA) to its first ranks; None keeps them all.
    ``blocks`` multiplies the strength block by block; None is 1 everywhere.
    """

    path: Path
    unet_strength: float = 1.0
    text_encoder_strength: float | None = None
    rank: int | None = None
    blocks: BlockStrengths | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"{self.path}: cannot be cut to the rank {self.rank}; expected 1 or more")
        for value in (self.unet_strength, self.text_encoder_strength):
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{self.path}: the strength {value} is not a finite number; {EXPECTED}")

    def strength(self, network: str) -> float:
        """The strength on ``network``; text encoders follow the UNet unless they have their own."""
        if network.startswith("text_encoder") and self.text_encoder_strength is not None:
            return self.text_encoder_strength
        return self.unet_strength

    def strength_in(self, network: str, block: str | None) -> float:
        """The strength in one block of a network, of ``block_strengths.BLOCKS``; None is outside of all."""
        factor = 1.0 if self.blocks is None else self.blocks.factor(block)
        return self.strength(network) * factor if factor else 0.0

    @property
    def acts(self) -> bool:
        """Whether the strength is other than 0 anywhere."""
        factors = (1.0,) if self.blocks is None else self.blocks.factors
        return any(factors) and bool(self.unet_strength or self.text_encoder_strength)

    @classmethod
    def parse(cls, text: str, presets: Mapping[str, str] = PRESETS) -> AdapterRef:
        """Read ``FILE``, ``FILE:0.8`` or ``FILE:0.8:0.5`` (UNet, then text encoder), and named fields.

        After them may come ``:te=0.5``, ``:unet=0.8``, ``:dyn=4`` and ``:lbw=INS`` or ``:lbw=1,0,...``.
        Fields are taken from the right, so a path may hold colons; a path that exists as typed is
        taken as a whole.

        Raises:
            UsageError: no path, a strength that is not a finite number, or too many strengths.
        """
        head, fields = split_file(text, presets)
        unet = 1.0 if fields.unet is None else fields.unet
        return cls(Path(head), unet, fields.text_encoder, fields.rank, fields.blocks)


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module, read on demand, with what a configuration file says about its scale.

    ``keys`` maps a format's parameter names to the names in the file. ``alpha`` and ``config_rank`` are None
    where no configuration gives one; a stored alpha always goes before it. ``keep_rank`` is that of the
    request. ``peft_terms`` is None for what PEFT did not write, else how many terms of Neumann's series its
    rotations have, 0 for the exact Cayley transform.
    """

    stem: str
    keys: Mapping[str, str]
    source: TensorSource
    alpha: float | None = None
    rank_stabilized: bool = False
    config_rank: int | None = None
    keep_rank: int | None = None
    peft_terms: int | None = None

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter that is present."""
        return self.source.infos[self.keys[parameter]].shape

    def listed(self, *parameters: str) -> str:
        """The parameters that are present with their shapes, for messages."""
        present = [name for name in parameters if name in self.keys]
        return ", ".join(f"{name} {list(self.shape(name))}" for name in present)

    def read(self, parameter: str) -> np.ndarray:
        """A parameter as float32.

        Raises:
            AdapterError: it is not of a floating point type, or holds NaN or infinity.
        """
        key = self.keys[parameter]
        if self.source.infos[key].dtype not in _FLOATS:
            raise self.error(
                f"tensor {key!r} is of type {self.source.infos[key].dtype}; expected floating point"
            )
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity and is refused below
            value = widen(self.source.read(key))
        if not np.isfinite(value).all():
            raise self.error(
                f"tensor {key!r} holds NaN or infinity; the file is damaged or its training diverged"
            )
        return value

    def integers(self, parameter: str) -> np.ndarray:
        """A parameter of whole numbers, such as indices, as int64.

        Raises:
            AdapterError: it is of another type, or holds a negative number.
        """
        key = self.keys[parameter]
        if self.source.infos[key].dtype not in _INTEGERS:
            raise self.error(
                f"tensor {key!r} is of type {self.source.infos[key].dtype}; expected whole numbers"
            )
        value = self.source.read(key).astype(np.int64)
        if value.size and int(value.min()) < 0:
            raise self.error(f"tensor {key!r} holds {int(value.min())}; expected no negative number")
        return value

    def scalar(self, parameter: str) -> float:
        """A parameter with one element, such as ``alpha``, as a finite number."""
        key = self.keys[parameter]
        if self.source.infos[key].size != 1:
            raise self.error(
                f"tensor {key!r} has the shape {list(self.shape(parameter))}; expected a single number"
            )
        value = float(self.source.read(key).astype(np.float64).reshape(()))
        if not math.isfinite(value):
            raise self.error(f"tensor {key!r} is {value}; expected a finite number")
        return value

    def error(self, text: str) -> AdapterError:
        """An error about this module, to be raised by the caller."""
        return AdapterError(f"{self.source.path}: module {self.stem!r}: {text}")


@dataclass(frozen=True)
class Rows:
    """How the change of a weight is had by rows, its other axes flattened into columns.

    ``fill(start, stop, running, out)`` fills ``out`` with the change of the rows ``start`` to ``stop``. Both
    arrays are float32 of shape ``(stop - start, columns)``. ``running`` holds the same rows of the weight
    with the updates before this one already in it; what only adds does not look at it. Nobody writes into it.

    ``together`` is of how many rows there must be all or none: ``start`` is a multiple of it, and so is
    ``stop`` unless it is the end. ``look(start, stop, running)``, where there is one, is shown all rows of
    the running weight before the first is filled.
    """

    fill: Callable[[int, int, np.ndarray, np.ndarray], None]
    together: int = 1
    look: Callable[[int, int, np.ndarray], None] | None = None


class WeightUpdate(Protocol):
    """How one module changes one tensor of its layer."""

    @property
    def parameter(self) -> str:
        """The tensor of the layer: ``weight`` or ``bias``."""
        ...

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the update fits a tensor of ``shape``, else the shape it has, in words."""
        ...

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of the float32 ``weight`` at ``strength``: float32, of the weight's shape.

        ``weight`` is the running value, with the updates before this one already in it; formats that
        only add do not look at it.
        """
        ...

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """The same change of a weight of ``shape`` by rows; reads the tensors of the module."""
        ...


class AdapterFormat(Protocol):
    """A family of adapters: the suffixes it owns and how its modules become weight updates."""

    @property
    def name(self) -> str:
        """How messages and reports call it."""
        ...

    @property
    def suffixes(self) -> Mapping[str, str]:
        """Key suffix (with its leading separator) -> parameter name."""
        ...

    def owns(self, parameters: frozenset[str]) -> bool:
        """Whether a module with these parameters is of this format."""
        ...

    def updates(self, module: ModuleTensors) -> tuple[WeightUpdate, ...]:
        """The updates of one module; raises AdapterError where its tensors contradict each other."""
        ...

"""What the families share: how a change fits a weight, how it is scaled, and the updates made of it.

Most families add something that does not depend on the weight. Such an *addend* fills rows of its change,
times a factor that costs nothing where it is taken into the smallest of its tensors; ``AddUpdate`` adds it,
and DoRA decomposes the weight together with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .base import ModuleTensors, Rows, WeightUpdate
from .blocks import Spare, row_blocks

MAX_RANK = 1024

Fill = Callable[[int, int, np.ndarray], None]
"""``fill(start, stop, out)`` writes rows of a change, flattened."""


class Addend(Protocol):
    """A change of a weight that does not depend on the weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...) as its tensors give it; a kernel may be flattened into the columns."""
        ...

    @property
    def scale(self) -> float:
        """The factor of the product, without the strength."""
        ...

    def fill(self, factor: float) -> Fill:
        """Read the tensors and give what writes the rows times ``factor``."""
        ...


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the trailing ones of a 1x1 kernel: trainers store linear layers either way."""
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


def fits(own: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a change of the shape ``own`` is one of a weight of ``target``, kernels of one aside."""
    own, target = trimmed(own), trimmed(target)
    flat = min(len(own), len(target)) == 2 and own[:1] == target[:1] and math.prod(own) == math.prod(target)
    return own == target or flat


def pads(own: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether this is a change of a 4-channel conv_in for one that also reads a mask or an image.

    Inpainting (9), depth (5) and pix2pix (8) models keep the latent in their first four channels, and
    stable-diffusion-webui pads the change with zeros.
    """
    if len(own) != 4 or len(target) != 4 or own[1] != 4 or target[1] not in (5, 8, 9):
        return False
    return own[0] == target[0] and own[2:] == target[2:]


def check_rank(module: ModuleTensors, rank: int) -> int:
    """The rank itself; an AdapterError when it is not one."""
    if not 1 <= rank <= MAX_RANK:
        raise module.error(f"has the rank {rank}; expected 1 to {MAX_RANK}")
    return rank


def scale_of(module: ModuleTensors, rank: int) -> float:
    """The factor of a product: a stored scale, else alpha / rank, else 1.

    With rank stabilization (Kalajdzievski 2023, arXiv:2312.03732) the divisor is the square root of the rank.
    """
    if "scale" in module.keys:
        return module.scalar("scale")
    alpha = module.scalar("alpha") if "alpha" in module.keys else module.alpha
    if alpha is None:
        alpha = float(rank)
    return alpha / (math.sqrt(rank) if module.rank_stabilized else rank)


def require(module: ModuleTensors, *parameters: str) -> None:
    """Raise an AdapterError when one of the parameters is missing."""
    missing = [name for name in parameters if name not in module.keys]
    if missing:
        raise module.error(f"has no {missing[0]} tensor; the file is incomplete")


def matrix(value: np.ndarray) -> np.ndarray:
    """A weight as its rows by all the rest."""
    return np.ascontiguousarray(value).reshape(len(value), -1)


def by_rows(update: WeightUpdate, weight: np.ndarray, strength: float) -> np.ndarray:
    """The ``delta`` of an update: all of its rows."""
    out = np.empty(weight.shape, np.float32)
    rows = update.rows(weight.shape, strength)
    if out.size:
        running, change = matrix(weight), out.reshape(len(out), -1)
        if rows.look is not None:
            for start, stop in row_blocks(*change.shape):
                rows.look(start, stop, running[start:stop])
        for start, stop in row_blocks(*change.shape, rows.together):
            rows.fill(start, stop, running[start:stop], change[start:stop])
    return out


@dataclass(frozen=True)
class AddUpdate:
    """``strength * scale * change``, added to one tensor of the layer."""

    change: Addend
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the change has the shape of the weight, kernels of one aside."""
        own = self.change.shape
        return None if fits(own, shape) or pads(own, shape) else str(list(own))

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The scaled change, float32, in the shape of ``weight``."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of the scaled change."""
        fill = fill_for(self.change, shape, self.change.scale * strength)
        return Rows(lambda start, stop, running, out: fill(start, stop, out))


def fill_for(change: Addend, shape: tuple[int, ...], factor: float) -> Fill:
    """What fills rows of a weight of ``shape``: factor times the change, zeros for channels that it lacks."""
    fill = change.fill(factor)
    if not pads(change.shape, shape):
        return fill
    columns = math.prod(change.shape[1:])  # the latent comes first, so they are the first columns

    def padded(start: int, stop: int, out: np.ndarray) -> None:
        inner = np.empty((stop - start, columns), np.float32)
        fill(start, stop, inner)
        out[:, :columns], out[:, columns:] = inner, 0.0

    return padded


def summed(changes: Sequence[Addend], shape: tuple[int, ...], strength: float = 1.0) -> Fill:
    """Rows of all changes of a weight of ``shape``, each times its scale, and all times ``strength``."""
    first, *others = (fill_for(change, shape, change.scale * strength) for change in changes)
    spare = Spare()

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        first(start, stop, out)
        for more in others:
            part = spare.like(out.shape)
            more(start, stop, part)
            out += part

    return fill


@dataclass(frozen=True)
class SumUpdate:
    """``strength`` times the sum of what one module adds in several ways, so that it counts as one change."""

    changes: tuple[Addend, ...]
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when every change fits."""
        return next((bad for change in self.changes if (bad := AddUpdate(change).misfit(shape))), None)

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The sum, float32, in the shape of ``weight``."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of the sum."""
        fill = summed(self.changes, shape, strength)
        return Rows(lambda start, stop, running, out: fill(start, stop, out))


def joined(updates: Sequence[WeightUpdate]) -> tuple[WeightUpdate, ...]:
    """The same updates, those that only add to one tensor joined into one."""
    adding: dict[str, list[AddUpdate]] = {}
    for update in updates:
        if isinstance(update, AddUpdate):
            adding.setdefault(update.parameter, []).append(update)
    found: list[WeightUpdate] = []
    for update in updates:
        if not isinstance(update, AddUpdate):
            found.append(update)
        elif update is adding[update.parameter][0]:
            same = adding[update.parameter]
            several = SumUpdate(tuple(one.change for one in same), update.parameter)
            found.append(several if len(same) > 1 else update)
    return tuple(found)


@dataclass(frozen=True)
class Stored:
    """A change that is stored as it is, such as a difference of weights or of biases."""

    module: ModuleTensors
    name: str
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        return self.module.shape(self.name)

    def fill(self, factor: float) -> Fill:
        """Rows of the tensor, cast as they are used."""
        stored = matrix(self.module.source.read(self.module.keys[self.name]))
        times = np.float32(factor)

        def fill(start: int, stop: int, out: np.ndarray) -> None:
            out[:] = stored[start:stop]
            out *= times

        return fill


@dataclass(frozen=True)
class PartUpdate:
    """An update of some rows of a tensor, such as the query of an attention that stores q, k and v as one."""

    inner: WeightUpdate
    start: int
    stop: int

    @property
    def parameter(self) -> str:
        """That of the update."""
        return self.inner.parameter

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """None when the update fits its rows of a tensor of ``shape``."""
        if not shape or shape[0] < self.stop:
            return f"of the rows {self.start} to {self.stop}"
        return self.inner.misfit((self.stop - self.start, *shape[1:]))

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The change of its rows, and zeros."""
        return by_rows(self, weight, strength)

    def rows(self, shape: tuple[int, ...], strength: float) -> Rows:
        """Rows of zeros, and of the change where it has some."""
        inner = self.inner.rows((self.stop - self.start, *shape[1:]), strength)

        def own(start: int, stop: int) -> tuple[int, int]:
            return max(start, self.start), min(stop, self.stop)

        def look(start: int, stop: int, running: np.ndarray) -> None:
            low, high = own(start, stop)
            if low < high and inner.look is not None:
                inner.look(low - self.start, high - self.start, running[low - start : high - start])

        def fill(start: int, stop: int, running: np.ndarray, out: np.ndarray) -> None:
            low, high = own(start, stop)
            out[: max(0, low - start)] = 0.0
            out[max(0, high - start) :] = 0.0
            if low < high:
                part = slice(low - start, high - start)
                inner.fill(low - self.start, high - self.start, running[part], out[part])

        # Where the part begins amid rows that go together, only all rows hold all of those.
        together = inner.together if self.start % inner.together == 0 else shape[0]
        return Rows(fill, together, None if inner.look is None else look)

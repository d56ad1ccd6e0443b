"""The registry of adapter formats: whose suffix ends a key, and whose module a set of parameters is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .base import AdapterFormat, ModuleTensors, WeightUpdate
from .dora import DORA
from .full import DIFFERENCE, NORM, SET
from .glora import GLORA
from .ia3 import IA3
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .oft import OFT
from .oft_input import INPUT_OFT
from .sparse import SPARSE
from .unsupported import UNSUPPORTED
from .updates import joined

# The families one of which a module is; DoRA takes the place of those that it decomposes.
FAMILIES: tuple[AdapterFormat, ...] = (LORA, LOHA, LOKR, IA3, OFT, INPUT_OFT, GLORA, SET)
# What may stand beside a family, and alone.
BESIDE: tuple[AdapterFormat, ...] = (SPARSE, DIFFERENCE, NORM)
FORMATS: tuple[AdapterFormat, ...] = (*UNSUPPORTED, DORA, *FAMILIES, *BESIDE)

SUFFIXES: Mapping[str, str] = {
    suffix: name for form in reversed(FORMATS) for suffix, name in form.suffixes.items()
}
_END = min(map(len, SUFFIXES))
# How long the suffixes with these last letters are, the longest first.
_LENGTHS = {
    suffix[-_END:]: sorted({len(other) for other in SUFFIXES if other.endswith(suffix[-_END:])}, reverse=True)
    for suffix in SUFFIXES
}


@dataclass(frozen=True)
class SplitKey:
    """A key taken apart: the module's stem, the suffix as written, and the parameter it means."""

    stem: str
    suffix: str
    parameter: str


def split_key(key: str) -> SplitKey | None:
    """Split at the longest known suffix; None when the key ends in none of them."""
    for length in _LENGTHS.get(key[-_END:], ()):
        parameter = SUFFIXES.get(key[-length:]) if len(key) > length else None
        if parameter is not None:
            return SplitKey(key[:-length], key[-length:], parameter)
    return None


def formats_of(parameters: Iterable[str]) -> tuple[AdapterFormat, ...]:
    """The formats of a module with these parameters; none when they belong to no format."""
    return _formats_of(frozenset(parameters))


@lru_cache(1024)  # a file has thousands of modules, of few kinds
def _formats_of(present: frozenset[str]) -> tuple[AdapterFormat, ...]:
    for form in UNSUPPORTED:
        if form.owns(present):
            return (form,)
    owners = tuple(form for form in (*FAMILIES, *BESIDE) if form.owns(present))
    if DORA.owns(present):
        return (DORA, *(form for form in owners if form not in DORA.over))
    return owners


def format_name(parameters: Iterable[str]) -> str | None:
    """What reports call a module: ``LoRA``, ``DoRA over LoHa``, ``LoRA, sparse remainder``; None for none."""
    present = frozenset(parameters)
    names = [form.name for form in formats_of(present)]
    if names and names[0] == DORA.name:
        under = [form.name for form in DORA.over if form.owns(present)]
        names[0] = f"{DORA.name} over {' and '.join(under)}" if under else DORA.name
    return ", ".join(names) or None


def updates_of(module: ModuleTensors) -> tuple[WeightUpdate, ...]:
    """All updates of a module, of every format that it has.

    Raises:
        AdapterError: it is of two families at once, or a format finds its tensors in contradiction.
    """
    forms = formats_of(module.keys)
    families = [form.name for form in forms if form in (DORA, *FAMILIES)]
    if len(families) > 1:
        raise module.error(f"holds parameters of {' and '.join(families)}; expected one family in a module")
    return joined([update for form in forms for update in form.updates(module)])


def unused(parameters: Iterable[str]) -> tuple[str, ...]:
    """Parameters of a module that none of its formats reads."""
    present = frozenset(parameters)
    forms = formats_of(present)
    read = {name for form in forms for name in form.suffixes.values()}
    if DORA in forms:
        read |= {name for form in DORA.over for name in form.suffixes.values()}
    return tuple(sorted(present - read))

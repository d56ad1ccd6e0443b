"""Says what an adapter file is, without a base model: format, dialect, family, modules, ranks, types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..tensors import TensorInfo
from .base import ModuleTensors
from .families import foreign_kind, guess_family
from .keys import network_of
from .open import Adapter, AdapterModule, open_adapter


@dataclass(frozen=True)
class AdapterInspection:
    """What is known of an adapter from its file alone.

    ``kind`` is ``adapter``, or what the file is instead (``a FLUX LoRA``). ``family`` is None when the
    tensors do not tell; ``family_reason`` is the observation. ``ranks``, ``alphas`` and ``dtypes`` count
    modules, modules and tensors. ``size_bytes`` is that of the file.
    """

    path: Path
    kind: str
    formats: Mapping[str, int]
    dialects: Mapping[str, int]
    family: str | None
    family_reason: str
    modules: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtypes: Mapping[str, int]
    loose_keys: tuple[str, ...]
    metadata: Mapping[str, str]
    size_bytes: int


def inspect_adapter(path: Path) -> AdapterInspection:
    """Open an adapter and describe it.

    Raises:
        AdapterError: the file cannot be read.
    """
    adapter = open_adapter(path)
    try:
        return inspect_opened(adapter)
    finally:
        adapter.source.close()


def inspect_opened(adapter: Adapter) -> AdapterInspection:
    """Describe an adapter that is open, and stays so."""
    known = [module for module in adapter.modules if module.format]
    infos = adapter.source.infos
    foreign = foreign_kind(infos)
    guess = guess_family(adapter)
    family, reason = (None, f"it has {foreign[1]!r}") if foreign else (guess.family, guess.reason)
    alphas: Counter[float] = Counter()
    for module in known:
        if "alpha" in module.keys:
            alphas[ModuleTensors(module.stem, module.keys, adapter.source).scalar("alpha")] += 1
    ranks = Counter(rank for module in known if (rank := _rank(module, infos)) is not None)
    return AdapterInspection(
        path=adapter.path,
        kind=foreign[0] if foreign else ("adapter" if known else "no adapter that Kiln knows"),
        formats=dict(Counter(str(module.format) for module in known)),
        dialects=dict(Counter(module.dialect for module in known)),
        family=family,
        family_reason=reason,
        modules=dict(Counter(network_of(module.stem) for module in known)),
        ranks=dict(ranks),
        alphas=dict(alphas),
        dtypes=dict(Counter(info.dtype for info in infos.values())),
        loose_keys=adapter.loose_keys,
        metadata=adapter.metadata,
        size_bytes=adapter.path.stat().st_size,
    )


# The factor whose first axis is the rank, in the order in which each family's scale asks for it.
_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def _rank(module: AdapterModule, infos: Mapping[str, TensorInfo]) -> int | None:
    """The rank of a module that has one."""
    shape = next((infos[module.keys[name]].shape for name in _RANKED if name in module.keys), ())
    return shape[0] if shape else None

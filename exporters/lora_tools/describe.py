"""Everything that can be said of an adapter file, and of what it would do to a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterError
from ..adapters.inspection import AdapterInspection, inspect_opened
from ..adapters.keys import ModuleIndex, network_of
from ..adapters.match import match_adapter
from ..adapters.open import Adapter
from .placing import model_index, open_files
from .training import Training, printable, read_training

# The first that is found in a module's name; the name may be of any dialect.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("text encoder attention", re.compile(r"self_attn|text_model.*attn")),
    ("text encoder feed-forward", re.compile(r"(text_model|lora_te|text_encoder).*(mlp|fc[12])")),
    ("text encoder, other", re.compile(r"text_model|lora_te|text_encoder|text_projection")),
    ("self-attention", re.compile(r"attn1")),
    ("cross-attention", re.compile(r"attn2")),
    ("feed-forward", re.compile(r"ff[._]net")),
    ("projections into attention", re.compile(r"proj_(in|out)")),
    ("norms", re.compile(r"norm|in_layers[._]0$|out_layers[._]0$")),
    ("time embedding", re.compile(r"time_emb|time_embed|emb_layers|label_emb|add_embedding")),
    ("up and down sampling", re.compile(r"samplers|[._]op$|output_blocks[._]\d+[._][12][._]conv")),
    (
        "convolutions of blocks",
        re.compile(r"conv|in_layers|out_layers|skip_connection|s[._]0[._]0$|out[._]2$"),
    ),
)


@dataclass(frozen=True)
class Fit:
    """What would happen with a model: modules by network that would be applied, and each other key's reason.

    ``refused`` is the error with which the adapter would be refused as a whole, else None.
    """

    model: str
    refused: str | None
    applied: Mapping[str, int]
    applied_keys: int
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Description:
    """One file or folder. ``scales`` counts LoRA modules by alpha over rank, ``kinds`` modules by what they
    change.
    """

    inspection: AdapterInspection
    kinds: Mapping[str, int]
    scales: Mapping[float, int]
    training: Training
    fit: Fit | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.inspection
        said = {
            "path": str(found.path),
            "kind": found.kind,
            "family": found.family,
            "family_reason": found.family_reason,
            "formats": dict(found.formats),
            "dialects": dict(found.dialects),
            "modules": dict(found.modules),
            "kinds": dict(self.kinds),
            "ranks": {str(rank): count for rank, count in sorted(found.ranks.items())},
            "alphas": {f"{alpha:g}": count for alpha, count in sorted(found.alphas.items())},
            "scales": {f"{scale:g}": count for scale, count in sorted(self.scales.items())},
            "storage": dict(found.dtypes),
            "unknown_keys": [printable(key) for key in found.loose_keys],
            "size_bytes": found.size_bytes,
            "trigger_words": list(self.training.trigger_words),
            "concepts": list(self.training.concepts),
            "tags": dict(self.training.tags),
            "tag_count": self.training.tag_count,
            "training": dict(self.training.facts),
            "unreadable_metadata": list(self.training.unreadable),
        }
        return said | ({"fit": asdict(self.fit)} if self.fit else {})


def describe(path: Path, model: str | None = None) -> tuple[Description, ...]:
    """Describe an adapter, one description for each of its files (PEFT keeps each network in a folder).

    Args:
        path: a file, a PEFT folder, or a folder of those.
        model: say also what would be applied to this checkpoint or bundle.

    Raises:
        AdapterError: the file cannot be read.
        UsageError, CheckpointError: there is no such file, or the model cannot be read.
    """
    with ExitStack() as stack:
        adapters = open_files(path, stack)
        index = model_index(model) if model else None
        return tuple(_describe(one, model, index) for one in adapters)


def _describe(adapter: Adapter, model: str | None, index: ModuleIndex | None) -> Description:
    known = [module for module in adapter.modules if module.format]
    kinds = Counter(kind_of(module.stem) for module in known)
    fit = None
    if model and index is not None:
        fit = _fit(adapter, model, index)
    return Description(
        inspect_opened(adapter),
        dict(kinds.most_common()),
        _scales(adapter),
        read_training(adapter.source.metadata),
        fit,
    )


def kind_of(stem: str) -> str:
    """What a module changes, judged by its name alone."""
    if network_of(stem) != "unet" and not re.search(r"text|_te\d?_|attn", stem):
        return "text encoder, other"
    return next((kind for kind, pattern in _KINDS if pattern.search(stem)), "other layers")


def _scales(adapter: Adapter) -> dict[float, int]:
    """alpha / rank of the modules that store both."""
    found: Counter[float] = Counter()
    for module in adapter.modules:
        if "alpha" not in module.keys or "down" not in module.keys:
            continue
        shape = adapter.source.infos[module.keys["down"]].shape
        info = adapter.source.infos[module.keys["alpha"]]
        if shape and shape[0] and info.size == 1:
            alpha = float(adapter.source.read(module.keys["alpha"]).astype("f8").reshape(()))
            found[round(alpha / shape[0], 6)] += 1
    return dict(found)


def _fit(adapter: Adapter, model: str, index: ModuleIndex) -> Fit:
    try:
        matched = match_adapter(adapter, index)
    except AdapterError as exc:
        return Fit(Path(model).name, printable(str(exc), 1000), {}, 0, {})
    reasons = {printable(key): why for key, why in matched.reasons.items()}
    return Fit(Path(model).name, None, dict(matched.modules), matched.keys, reasons)

"""The configuration that PEFT keeps beside the factors: a JSON file, or a field of the metadata for
diffusers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..adapters.scaling import METADATA_FIELD


@dataclass(frozen=True)
class Settings:
    """Rank and alpha of most modules, and of those that differ by their path; ``modules`` are all paths."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    modules: tuple[str, ...]
    dora: bool = False

    @classmethod
    def of(cls, modules: Mapping[str, tuple[int, float]], *, dora: bool = False) -> Settings:
        """The settings of modules whose rank and alpha are given by path."""
        rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
        alpha = Counter(alpha for _, alpha in modules.values()).most_common(1)[0][0]
        return cls(
            rank,
            alpha,
            {path: own for path, (own, _) in modules.items() if own != rank},
            {path: own for path, (_, own) in modules.items() if own != alpha},
            tuple(modules),
            dora,
        )

    def as_dict(self) -> dict[str, object]:
        """The arguments of PEFT's LoraConfig; paths are anchored, so that none is taken for the end of
        another.
        """
        return {
            "r": self.rank,
            "lora_alpha": _plain(self.alpha),
            "rank_pattern": {f"^{path}": rank for path, rank in self.ranks.items()},
            "alpha_pattern": {f"^{path}": _plain(alpha) for path, alpha in self.alphas.items()},
            "target_modules": list(self.modules),
            "use_dora": self.dora,
            "use_rslora": False,
            "lora_bias": False,
        }


def _plain(value: float) -> int | float:
    """A whole number without a point, as PEFT's type hint has it."""
    return int(value) if value.is_integer() else value


def diffusers_metadata(settings: Mapping[str, Settings]) -> dict[str, str]:
    """diffusers' metadata field: the settings of all networks, each name behind its network's."""
    flat = {
        f"{network}.{name}": value
        for network, one in settings.items()
        for name, value in one.as_dict().items()
    }
    return {METADATA_FIELD: json.dumps(flat, indent=2, sort_keys=True)}


def peft_config(settings: Settings) -> str:
    """The text of an ``adapter_config.json``."""
    fixed: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }
    return json.dumps(fixed | settings.as_dict(), indent=2, sort_keys=True) + "\n"

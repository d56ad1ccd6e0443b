"""What PEFT's configuration says about alpha: from file metadata or an adapter_config.json beside the file.

PEFT (huggingface/peft) keeps alpha outside the tensors. diffusers writes the same settings into the metadata
field ``lora_adapter_metadata``, each name prefixed with the network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import AdapterError

METADATA_FIELD = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
_CONFIG_LIMIT = 1_000_000
MAX_TERMS = 64
# diffusers anchors and escapes module paths; what else a pattern may hold is not a plain path.
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.\-]+\$?")


# PEFT's types that are read; the value is the name of their alpha, None where there is none.
_KINDS: Mapping[str, str | None] = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha", "OFT": None}


@dataclass(frozen=True)
class Scaling:
    """Alpha and rank for every module and for those that a pattern names; None where nothing is said.

    ``terms`` is how many terms of Neumann's series PEFT's OFT takes, 0 for the exact transform.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    rank: float | None = None
    rank_patterns: Mapping[str, float] = field(default_factory=dict)
    terms: int = 5

    def alpha_of(self, module: str) -> float | None:
        """Alpha of a module: of the first pattern that is its path or a dotted end of it, else ``alpha``."""
        return _of(module, self.patterns, self.alpha)

    def rank_of(self, module: str) -> int | None:
        """The rank that the configuration gives a module, found in the same way."""
        rank = _of(module, self.rank_patterns, self.rank)
        return int(rank) if rank else None


def _of(module: str, patterns: Mapping[str, float], default: float | None) -> float | None:
    for pattern, value in patterns.items():
        whole, plain = pattern.startswith("^"), pattern.strip("^$")
        if module == plain or (not whole and module.endswith(f".{plain}")):
            return value
    return default


def read_scaling(path: Path, metadata: Mapping[str, str], peft_keys: bool) -> dict[str, Scaling]:
    """Scaling rules by network; the empty name holds the rule for all networks.

    Args:
        path: the adapter file.
        metadata: its safetensors metadata.
        peft_keys: whether its keys are those of ``save_pretrained`` (``base_model.model.``); only then does
            an adapter_config.json in the same folder belong to it.

    Raises:
        AdapterError: the configuration cannot be read, or asks for what cannot be honoured.
    """
    if METADATA_FIELD in metadata:
        settings = _parse(metadata[METADATA_FIELD], f"{path}: metadata {METADATA_FIELD}")
        grouped: dict[str, dict[str, object]] = {}
        for name, value in settings.items():
            network, _, setting = name.partition(".")
            grouped.setdefault(network, {})[setting] = value
        return {
            network: _scaling(values, f"{path}: metadata {METADATA_FIELD}")
            for network, values in grouped.items()
        }
    config = path.with_name(CONFIG_NAME)
    if not peft_keys or not config.is_file():
        return {}
    if config.stat().st_size > _CONFIG_LIMIT:
        raise AdapterError(
            f"{config}: is larger than {_CONFIG_LIMIT} bytes; expected the configuration of one adapter"
        )
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise AdapterError(f"{config}: cannot be read: {cause}") from cause
    return {"": _scaling(_parse(text, str(config)), str(config))}


def _parse(text: str, where: str) -> dict[str, object]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise AdapterError(f"{where}: is not JSON: {str(cause)[:200]}") from cause
    if not isinstance(settings, dict):
        raise AdapterError(f"{where}: is not a JSON object")
    return settings


def _scaling(settings: Mapping[str, object], where: str) -> Scaling:
    kind = settings.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise AdapterError(
            f"{where}: the adapter is of PEFT's type {str(kind)[:40]}; this version reads {', '.join(_KINDS)}"
        )
    if settings.get("fan_in_fan_out"):
        raise AdapterError(
            f"{where}: fan_in_fan_out is set; no network of Stable Diffusion stores weights that way"
        )
    if kind == "OFT" and settings.get("coft"):
        raise AdapterError(f"{where}: coft is set; a constrained OFT of PEFT is not read, merge it with PEFT")
    alpha = _KINDS[kind]
    return Scaling(
        None if alpha is None else _number(settings.get(alpha), where),
        _patterns(settings, "alpha_pattern", where),
        settings.get("use_rslora") is True,
        _number(settings.get("r"), where, "rank"),
        _patterns(settings, "rank_pattern", where),
        _terms(settings, where),
    )


def _patterns(settings: Mapping[str, object], name: str, where: str) -> dict[str, float]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{where}: {name} is not a JSON object")
    return {_plain(pattern, name, where): _required(value, where) for pattern, value in patterns.items()}


def _terms(settings: Mapping[str, object], where: str) -> int:
    if settings.get("use_cayley_neumann") is False:
        return 0
    terms = settings.get("num_cayley_neumann_terms", 5)
    if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= MAX_TERMS:
        raise AdapterError(
            f"{where}: num_cayley_neumann_terms is {str(terms)[:40]}; expected 1 to {MAX_TERMS}"
        )
    return terms


def _plain(pattern: str, name: str, where: str) -> str:
    """A pattern that is a path; a general regular expression from a stranger's file is never run."""
    unescaped = pattern.replace("\\", "")
    if not _PLAIN.fullmatch(unescaped):
        raise AdapterError(f"{where}: {name} {pattern[:80]!r} is not a module path; Kiln runs no expressions")
    return unescaped


def _required(value: object, where: str) -> float:
    number = _number(value, where)
    if number is None:
        raise AdapterError(f"{where}: an alpha is null; expected a number")
    return number


def _number(value: object, where: str, what: str = "alpha") -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{where}: {what} is {str(value)[:40]!r}; expected a finite number")
    return float(value)

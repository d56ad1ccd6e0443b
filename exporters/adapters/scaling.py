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
# diffusers anchors and escapes module paths; what else a pattern may hold is not a plain path.
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.\-]+\$?")


@dataclass(frozen=True)
class Scaling:
    """Alpha for every module and for those that a pattern names; None where nothing is said."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def alpha_of(self, module: str) -> float | None:
        """Alpha of a module: of the first pattern that is its path or a dotted end of it, else ``alpha``."""
        for pattern, alpha in self.patterns.items():
            whole, plain = pattern.startswith("^"), pattern.strip("^$")
            if module == plain or (not whole and module.endswith(f".{plain}")):
                return alpha
        return self.alpha


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
    if kind != "LORA":
        raise AdapterError(
            f"{where}: the adapter is of PEFT's type {str(kind)[:40]}; this version reads LORA"
        )
    if settings.get("fan_in_fan_out"):
        raise AdapterError(
            f"{where}: fan_in_fan_out is set; no network of Stable Diffusion stores weights that way"
        )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{where}: alpha_pattern is not a JSON object")
    return Scaling(
        _number(settings.get("lora_alpha"), where),
        {_plain(name, where): _required(value, where) for name, value in patterns.items()},
        settings.get("use_rslora") is True,
    )


def _plain(pattern: str, where: str) -> str:
    """A pattern that is a path; a general regular expression from a stranger's file is never run."""
    unescaped = pattern.replace("\\", "")
    if not _PLAIN.fullmatch(unescaped):
        raise AdapterError(
            f"{where}: alpha_pattern {pattern[:80]!r} is not a module path; Kiln runs no expressions"
        )
    return unescaped


def _required(value: object, where: str) -> float:
    number = _number(value, where)
    if number is None:
        raise AdapterError(f"{where}: an alpha is null; expected a number")
    return number


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{where}: alpha is {str(value)[:40]!r}; expected a finite number")
    return float(value)

"""What the metadata of an adapter says of its training: words that call it, tags, data, settings.

Names are those of kohya-ss/sd-scripts (``ss_*``) and Stability's ModelSpec (``modelspec.*``). All of it was
written by a stranger: it is read as text, cut to a length, and believed nowhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_JSON_LIMIT = 20_000_000  # characters; the tags of some 100,000 images
_TEXT_LIMIT = 300
_TAGS = 50
_FACTS = (
    ("modelspec.title", "title"),
    ("modelspec.author", "author"),
    ("modelspec.description", "description"),
    ("modelspec.license", "license"),
    ("modelspec.architecture", "architecture"),
    ("modelspec.resolution", "resolution"),
    ("modelspec.prediction_type", "prediction_type"),
    ("modelspec.usage_hint", "usage_hint"),
    ("modelspec.merged_from", "merged_from"),
    ("modelspec.date", "date"),
    ("ss_output_name", "output_name"),
    ("ss_base_model_version", "base_model_version"),
    ("ss_v2", "v2"),
    ("ss_sd_model_name", "base_model"),
    ("ss_sd_model_hash", "base_model_hash"),
    ("ss_new_sd_model_hash", "base_model_sha256"),
    ("ss_vae_name", "vae"),
    ("ss_network_module", "network_module"),
    ("ss_network_dim", "network_dim"),
    ("ss_network_alpha", "network_alpha"),
    ("ss_network_args", "network_args"),
    ("ss_num_train_images", "images"),
    ("ss_num_reg_images", "regularisation_images"),
    ("ss_num_epochs", "epochs"),
    ("ss_epoch", "epoch"),
    ("ss_steps", "steps"),
    ("ss_max_train_steps", "max_steps"),
    ("ss_total_batch_size", "batch_size"),
    ("ss_learning_rate", "learning_rate"),
    ("ss_unet_lr", "unet_learning_rate"),
    ("ss_text_encoder_lr", "text_encoder_learning_rate"),
    ("ss_lr_scheduler", "learning_rate_scheduler"),
    ("ss_optimizer", "optimizer"),
    ("ss_resolution", "training_resolution"),
    ("ss_clip_skip", "clip_skip"),
    ("ss_noise_offset", "noise_offset"),
    ("ss_min_snr_gamma", "min_snr_gamma"),
    ("ss_mixed_precision", "mixed_precision"),
    ("ss_seed", "seed"),
    ("ss_training_comment", "comment"),
    ("sshs_model_hash", "tensor_hash"),
    ("kiln_recipe", "recipe"),
)


@dataclass(frozen=True)
class Training:
    """``trigger_words`` as the author gave them; ``concepts`` are the folders trained on, with their repeats.

    ``tags`` are the commonest words of the captions with their number, ``tag_count`` how many there are in
    all. ``facts`` are other fields under readable names; ``unreadable`` are fields that are not what they
    should be.
    """

    trigger_words: tuple[str, ...]
    concepts: tuple[str, ...]
    tags: Mapping[str, int]
    tag_count: int
    facts: Mapping[str, str]
    unreadable: tuple[str, ...] = ()


def read_training(metadata: Mapping[str, str]) -> Training:
    """Read the metadata of a file; what cannot be read is named and never an error."""
    unreadable: list[str] = []
    frequency = _table(metadata, "ss_tag_frequency", unreadable)
    tags: Counter[str] = Counter()
    for counts in frequency.values():
        if isinstance(counts, dict):
            tags.update({printable(t): int(n) for t, n in counts.items() if _is_count(n)})
        else:
            unreadable.append("ss_tag_frequency")
    folders = {**frequency, **_table(metadata, "ss_dataset_dirs", unreadable)}
    facts = {name: printable(metadata[key]) for key, name in _FACTS if metadata.get(key, "None") != "None"}
    words = printable(metadata.get("modelspec.trigger_phrase", ""), 2000)
    return Training(
        tuple(word for part in words.split(",") if (word := part.strip())),
        tuple(dict.fromkeys(map(printable, folders))),
        dict(tags.most_common(_TAGS)),
        len(tags),
        {name: text for name, text in facts.items() if text},
        tuple(dict.fromkeys(unreadable)),
    )


def _table(metadata: Mapping[str, str], field: str, unreadable: list[str]) -> dict[str, object]:
    text = metadata.get(field)
    if not text or text == "None":
        return {}
    try:
        value = json.loads(text) if len(text) <= _JSON_LIMIT else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    unreadable.append(field)
    return {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def printable(text: str, limit: int = _TEXT_LIMIT) -> str:
    """A text in one line that cannot move a terminal's cursor, cut to ``limit`` characters."""
    cleaned = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    cleaned = " ".join(cleaned.split())
    return cleaned if len(text) <= limit else f"{cleaned[:limit]}..."

"""Tokens in the files of a CLIP tokenizer, so that transformers and Kiln know them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"


def known_tokens(folder: Path) -> dict[str, int]:
    """Tokens that were added to a tokenizer after its vocabulary, and its special ones; with their ids.

    Raises:
        CheckpointError: a file of it is not JSON.
    """
    config, added = _read(folder / CONFIG), _read(folder / ADDED)
    listed = config.get("added_tokens_decoder") or {}
    found = {str(_content(token)): int(number) for number, token in listed.items()}
    return found | {str(name): int(number) for name, number in added.items()}


def ordinary_tokens(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tokens that a tokenizer brings and that are no special ones, with the ids of all of their vectors.

    ``token``, ``token_1``, ``token_2`` ... are the vectors of one token, as diffusers names them.
    """
    config, added = _read(folder / CONFIG), _read(folder / ADDED)
    listed = config.get("added_tokens_decoder") or {}
    special = {
        _content(token) for token in listed.values() if isinstance(token, Mapping) and token.get("special")
    }
    for values in (config, _read(folder / "special_tokens_map.json")):
        special |= {_content(value) for key, value in values.items() if key.endswith("_token")}
    names = {**known_tokens(folder), **{str(name): int(number) for name, number in added.items()}}
    names = {name: number for name, number in names.items() if name not in special and name.strip()}
    found: dict[str, tuple[int, ...]] = {}
    rest = {f"{name}_1" for name in names} & names.keys()
    for name in sorted(names, key=len):
        ids = [names[name]]
        while (following := f"{name}_{len(ids)}") in names:
            rest.add(following)
            ids.append(names[following])
        if name not in rest:
            found[name] = tuple(ids)
    return found


def with_tokens(files: Mapping[str, bytes], tokens: Mapping[str, int]) -> dict[str, bytes]:
    """The files of a tokenizer that change when tokens are added.

    transformers reads ``added_tokens.json``, unless the config lists added tokens itself.

    Args:
        files: by name; those that do not matter may be absent.
        tokens: names and ids.
    """
    config = json.loads(files.get(CONFIG, b"{}"))
    if "added_tokens_decoder" not in config:
        known = json.loads(files.get(ADDED, b"{}"))
        return {ADDED: _bytes(known | dict(tokens))}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    listed = {str(number): {"content": name, **flags} for name, number in tokens.items()}
    return {CONFIG: _bytes(config | {"added_tokens_decoder": config["added_tokens_decoder"] | listed})}


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, Mapping) else token


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: is not readable JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def _bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

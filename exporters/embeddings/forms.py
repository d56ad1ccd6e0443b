"""The forms in which vectors of tokens are stored, told apart by their keys.

Forms: AUTOMATIC1111/stable-diffusion-webui (``string_to_param``), kohya-ss/sd-scripts (``emb_params``, and
``clip_l`` with ``clip_g`` for SDXL), Nerogar/OneTrainer (the same, and ``emp_params``), huggingface/diffusers
and cloneofsimo/lora (a tensor under its token), and lists of any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import AdapterError
from .base import TEXT, TEXT_2

Leaf = Any
"""A tensor, of torch or of numpy."""

# Keys of one embedding's vectors, and the text encoder each is for; None is told by the width.
_PARAMETERS: Mapping[str, str | None] = {
    "emb_params": None,
    "emp_params": None,  # as OneTrainer once spelt it
    "clip_l": TEXT,
    "clip_g": TEXT_2,
    "emb": TEXT,
    "emb2": TEXT_2,
}
_SINGLE = ("emb_params", "emp_params")
# Added to what comes out of the text encoder, where no row of the table can stand.
_OUTPUTS = frozenset({"emb_params_out", "emp_params_out", "clip_l_out", "clip_g_out"})
_BUNDLED = re.compile(
    r"bundle_emb\.(?P<token>.+)\.(?P<parameter>string_to_param\.\*|em[bp]_params|clip_[lg]|em[bp]_params_out|clip_[lg]_out)"
)
_TOKEN = re.compile(r"<[^<>]+>")
_PLACEHOLDER = "*"  # how trainers call a token that is named by its file
MOST_ENTRIES = 1000


@dataclass(frozen=True)
class Entry:
    """One embedding as stored: its token, None where the file's name is the token, and tensors by encoder."""

    token: str | None
    tensors: Mapping[str | None, Leaf]


def entries_of(loaded: object, path: str, is_tensor: Callable[[object], bool]) -> list[Entry]:
    """The embeddings of a file.

    Args:
        loaded: what was read: tensors, and mappings and lists of them.
        path: for messages.
        is_tensor: tells tensors.

    Raises:
        AdapterError: it is none, or of a form that cannot be rows of a table.
    """
    if is_tensor(loaded):
        return [Entry(None, {None: loaded})]
    if isinstance(loaded, list | tuple):
        found = [entry for item in loaded for entry in _of_list(item, path, is_tensor)]
        if len(found) > MOST_ENTRIES:
            raise AdapterError(f"{path}: holds {len(found)} embeddings; expected at most {MOST_ENTRIES}")
        return found
    loaded = _table(loaded)
    if not isinstance(loaded, Mapping):
        raise AdapterError(f"{path}: holds a {type(loaded).__name__}; expected the vectors of a token")
    inner = _table(loaded.get("state_dict"))
    if isinstance(inner, Mapping):
        loaded = inner
    if "string_to_param" in loaded:
        return [Entry(None, {None: _only_parameter(loaded["string_to_param"], path, is_tensor)})]
    tensors = {str(key): value for key, value in loaded.items() if is_tensor(value)}
    _refuse_outputs(tensors, path)
    known = {key: value for key, value in tensors.items() if key in _PARAMETERS}
    if known:
        return [_known(known, loaded, path)]
    alone = len(tensors) == 1
    tokens = [
        Entry(None if alone and key == _PLACEHOLDER else key, {None: value}) for key, value in tensors.items()
    ]
    if (
        not tokens
        or len(tokens) > MOST_ENTRIES
        or len(tokens) != len(loaded)
        or any("." in t for t in tensors)
    ):
        keys = ", ".join(repr(str(key)[:60]) for key in list(loaded)[:4]) or "nothing"
        raise AdapterError(
            f"{path}: is no textual inversion embedding (it holds {keys}); expected string_to_param, "
            "emb_params, clip_l and clip_g, or one tensor for each token"
        )
    return tokens


def _of_list(item: object, path: str, is_tensor: Callable[[object], bool]) -> Iterator[Entry]:
    """The embeddings of one item of a list, which have to say their own names."""
    if not isinstance(item, Mapping):
        raise AdapterError(f"{path}: is a list of {type(item).__name__}; expected a list of embeddings")
    for entry in entries_of(item, path, is_tensor):
        name = item.get("name")
        token = entry.token or (name if isinstance(name, str) else None)
        if token is None:
            raise AdapterError(
                f"{path}: is a list with an embedding that has no name; give one file for each"
            )
        yield Entry(token, entry.tensors)


def _table(value: object) -> object:
    """A ``ParameterDict`` as the dict of its parameters, whichever torch wrote it; others as they are."""
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {}).get("_parameters", value)


def _only_parameter(value: object, path: str, is_tensor: Callable[[object], bool]) -> Leaf:
    """The one tensor of ``string_to_param``: a dict, or the ParameterDict of files from before 2022-10."""
    table = _table(value)
    if not isinstance(table, Mapping) or len(table) != 1 or not is_tensor(next(iter(table.values()))):
        count = len(table) if isinstance(table, Mapping) else "no"
        raise AdapterError(
            f"{path}: string_to_param holds {count} entries; expected the one tensor of a token"
        )
    return next(iter(table.values()))


def _refuse_outputs(keys: Mapping[str, Leaf], path: str) -> None:
    outputs = sorted(_OUTPUTS & keys.keys())
    if outputs:
        raise AdapterError(
            f"{path}: has {' and '.join(outputs)}, which OneTrainer adds to what comes out of the text "
            "encoder; that is no row of its table and cannot be baked: train without the output embedding"
        )


def _known(tensors: Mapping[str, Leaf], loaded: Mapping[Any, object], path: str) -> Entry:
    """One embedding by the names that trainers give its parts."""
    if len([key for key in tensors if key in _SINGLE]) > 1 or (
        set(tensors) & set(_SINGLE) and len(tensors) > 1
    ):
        raise AdapterError(f"{path}: holds {', '.join(sorted(tensors))}; expected the vectors of one token")
    by_network: dict[str | None, Leaf] = {}
    for key, value in tensors.items():
        network = _PARAMETERS[key]
        if network in by_network:
            raise AdapterError(f"{path}: holds vectors for the {network} twice")
        by_network[network] = value
    name = loaded.get("name")
    # Files that say ``emb`` come in packs and are called by their names; the others by the file's.
    return Entry(name if "emb" in tensors and isinstance(name, str) else None, by_network)


def bundled_keys(keys: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Embeddings inside a LoRA's file: token -> parameter -> key.

    Args:
        keys: names of the file's tensors: ``bundle_emb.TOKEN.PARAMETER`` of stable-diffusion-webui's form, or
            ``<token>`` of cloneofsimo/lora.
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _BUNDLED.fullmatch(key)
        if match:
            found.setdefault(match["token"], {})[
                match["parameter"].replace("string_to_param.*", "emb_params")
            ] = key
        elif _TOKEN.fullmatch(key):
            found.setdefault(key, {})["emb_params"] = key
    return found


def bundled_entry(token: str, tensors: Mapping[str, Leaf], path: str) -> Entry:
    """One embedding inside a LoRA's file, from its tensors by parameter.

    Raises:
        AdapterError: it cannot be rows of a table.
    """
    where = f"{path}: embedding {token!r}"
    _refuse_outputs(tensors, where)
    return Entry(token, _known(tensors, {}, where).tensors)

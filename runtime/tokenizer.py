"""The CLIP tokenizer, giving the ids of transformers' CLIPTokenizer without transformers.

Text is cleaned as CLIPTokenizer does where the ``ftfy`` package is absent (control characters dropped, CJK
characters set apart, NFC, lower case), cut into words by CLIP's pattern, and merged by byte-level BPE from
the ``tokenizers`` library. CLIPTokenizer always lowers, whatever ``do_lower_case`` says; so does this.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, models, pre_tokenizers  # type: ignore[import-untyped]

from ..errors import BundleError, UsageError
from .triggers import Triggers

DEFAULT_MAX_LENGTH = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
# OpenAI CLIP, simple_tokenizer.py. The text is lower case, so of its IGNORECASE two things are left: the
# long s is an s, and U+0345 (whose capital is a letter) is neither letter nor sign for the regex package.
_WORDS = (
    "<\\|[s\u017f]tartoftext\\|>|<\\|endoftext\\|>|'[s\u017f]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"
)
_CJK = re.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


class Encoded(NamedTuple):
    """Prompts as ids.

    ``input_ids`` is int64 ``(n, max_length)``; ``truncated[i]`` is the end of prompt i that did not fit,
    empty when all of it did.
    """

    input_ids: np.ndarray
    truncated: tuple[str, ...]


@dataclass(frozen=True)
class _Special:
    """Tokens taken literally out of the text, and those that have a role."""

    ids: Mapping[str, int]
    bos: int
    eos: int
    pad: int
    unk: str


class ClipTokenizer:
    """Prompts to ids; made by ``open``."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: _Special,
        max_length: int,
        embeddings: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """Use ``open`` instead, which reads the folder."""
        self.max_length = max_length
        self._vocab = vocab
        self._special = special
        self._bpe = models.BPE(
            vocab=dict(vocab), merges=list(merges), unk_token=special.unk, end_of_word_suffix="</w>"
        )
        self._words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._triggers = Triggers(embeddings, _clean)
        rows = {number for ids in embeddings.values() for number in ids}
        self._taken = {name: i for name, i in special.ids.items() if i not in rows}
        literal = sorted(self._taken, key=len, reverse=True)
        self._literals = re.compile("(" + "|".join(map(re.escape, literal)) + ")")

    @classmethod
    def open(
        cls, tokenizer_dir: Path, embeddings: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> ClipTokenizer:
        """Read a diffusers ``tokenizer`` folder.

        Args:
            tokenizer_dir: holds vocab.json and merges.txt, and as a rule tokenizer_config.json and
                special_tokens_map.json.
            embeddings: tokens of textual inversion and the ids of their vectors, all of which a token in a
                prompt stands for.

        Raises:
            BundleError: a file is missing or makes no sense.
        """
        config = _read_config(tokenizer_dir)
        vocab = _read_json(tokenizer_dir / "vocab.json")
        try:
            lines = (tokenizer_dir / "merges.txt").read_text("utf-8").strip().split("\n")[1:]
            merges = [(left, right) for left, right in (line.split() for line in lines)]
            added = _read_json(tokenizer_dir / "added_tokens.json", optional=True)
            special = _special_tokens(config, vocab, added)
            return cls(vocab, merges, special, _max_length(config), embeddings)
        except OSError as error:
            raise BundleError(f"{error.filename}: {error.strerror}; a CLIP tokenizer needs it") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{tokenizer_dir} is not a CLIP tokenizer: {error}") from error
        except Exception as error:  # the tokenizers library raises bare Exception
            raise BundleError(f"{tokenizer_dir}: vocab.json and merges.txt do not fit: {error}") from error

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Tokenise, cut to ``max_length`` and pad.

        Args:
            prompts: any text.

        Returns:
            Start token, the words, end token, padding; with what was cut off.

        Raises:
            UsageError: a prompt holds bytes that are not valid UTF-8.
        """
        rows, truncated = [], []
        for prompt in prompts:
            ids = self.tokenize(prompt)
            room = self.max_length - 2
            row = [self._special.bos, *ids[:room], self._special.eos]
            rows.append(row + [self._special.pad] * (self.max_length - len(row)))
            truncated.append(self.decode(ids[room:]))
        return Encoded(np.array(rows, np.int64).reshape(len(rows), self.max_length), tuple(truncated))

    def tokenize(self, text: str) -> list[int]:
        """Ids of ``text``, without start and end token, of any length."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"prompt {text!r} is not valid Unicode text: retype it, or pass it as UTF-8"
            ) from error
        ids: list[int] = []
        for piece in self._literals.split(text):
            if piece in self._taken:
                ids.append(self._taken[piece])
                continue
            for part in self._triggers.split(_clean(piece)):
                ids += self._ordinary(part) if isinstance(part, str) else part
        return ids

    def embeddings_in(self, text: str) -> tuple[str, ...]:
        """The tokens of textual inversion that a text names, each once."""
        return self._triggers.found(text)

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a piece of cleaned text that holds no special token as it was typed."""
        ids: list[int] = []
        for word, _ in self._words.pre_tokenize_str(text):
            if word in (_START, _END):
                ids.append(self._vocab.get(word, self._vocab[self._special.unk]))
                continue
            for mapped, _ in self._bytes.pre_tokenize_str(word):
                ids += [token.id for token in self._bpe.tokenize(mapped)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of ids: for messages, it does not restore the spacing."""
        names = {i: name for name, i in self._special.ids.items()}
        letters = _byte_letters()
        text = ""
        for i in ids:
            token = names.get(i) or self._bpe.id_to_token(i) or ""
            body = token.removesuffix("</w>")
            raw = bytes(letters[c] for c in body if c in letters)
            text += raw.decode("utf-8", "surrogateescape") + (" " if token != body or i in names else "")
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _clean(text: str) -> str:
    """transformers' BasicTokenizer: one space between words, lower case."""
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            kept.append(" ")
        elif category[0] != "C" and char != "\ufffd":
            kept.append(char)
    spaced = unicodedata.normalize("NFC", _CJK.sub(r" \1 ", "".join(kept)))
    return " ".join(" ".join(word.lower() for word in spaced.split()).split())


def names_in(text: str, name: str) -> bool:
    """Whether a text names a token of textual inversion that is called ``name``."""
    return bool(Triggers({name: (0,)}, _clean).found(text))


def _byte_letters() -> dict[str, int]:
    """The printable stand-in of each byte in GPT-2's byte-level BPE, as letter -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); a CLIP tokenizer needs it") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_config(tokenizer_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json.

    Where they differ, as in SD2 (padding ``!``), the map wins, unless the config is of the newer kind that
    lists its added tokens: transformers' rule.
    """
    config = _read_json(tokenizer_dir / "tokenizer_config.json", optional=True)
    names = _read_json(tokenizer_dir / "special_tokens_map.json", optional=True)
    return names | config if "added_tokens_decoder" in config else config | names


def _content(token: object, default: str) -> str:
    """A token in a config is its text, or an object with ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else default


def _special_tokens(
    config: Mapping[str, Any], vocab: Mapping[str, int], added_file: Mapping[str, int]
) -> _Special:
    """Start, end, unknown and padding tokens, and tokens added to the vocabulary, which are all literal."""
    names = {"bos": _START, "eos": _END, "unk": _END, "pad": _END}
    names = {role: _content(config.get(f"{role}_token"), default) for role, default in names.items()}
    if missing := [name for name in names.values() if name not in vocab]:
        raise ValueError(f"vocab.json has no {missing[0]}")
    added = config.get("added_tokens_decoder") or {}
    ids = {_content(token, ""): int(i) for i, token in added.items()} | dict(added_file)
    ids |= {name: vocab[name] for name in names.values() if name not in ids}
    return _Special(ids, ids[names["bos"]], ids[names["eos"]], ids[names["pad"]], names["unk"])


def _max_length(config: Mapping[str, Any]) -> int:
    """``model_max_length``; transformers writes 1e30 where it is not known."""
    length = config.get("model_max_length", DEFAULT_MAX_LENGTH)
    if not isinstance(length, int | float) or length < 3:
        raise ValueError(f"model_max_length is {length!r}, expected a number of at least 3")
    return int(length) if length < 1e6 else DEFAULT_MAX_LENGTH

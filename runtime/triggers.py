"""Words of a prompt that stand for rows of the embedding table: the tokens of textual inversion.

A token is found whatever its case, as a word: a letter does not follow a letter of it, nor a digit a digit.
stable-diffusion-webui compares sequences of ids, which finds the same but for signs: there ``<toy>,`` is
not ``<toy>``, because its comma belongs to the last id; in diffusers it is, and so here. Of several tokens
that could begin at one place the longest is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

_LETTER = r"[^\W\d_]"


class Triggers:
    """Names with the ids that they stand for."""

    def __init__(self, ids: Mapping[str, Sequence[int]], clean: Callable[[str], str]) -> None:
        """Compile the names.

        Args:
            ids: the rows of each name, in order.
            clean: what the tokenizer does to a text first; names go through it too.
        """
        self._clean = clean
        self._names = {clean(name): name for name in ids if clean(name)}
        self._ids = {name: tuple(ids[typed]) for name, typed in self._names.items()}
        longest = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_bounded, longest))) if longest else None

    def split(self, cleaned: str) -> Iterator[str | tuple[int, ...]]:
        """The pieces of a cleaned text: plain text, and the ids of the names between."""
        start = 0
        for match in self._pattern.finditer(cleaned) if self._pattern else ():
            yield cleaned[start : match.start()]
            yield self._ids[match[0]]
            start = match.end()
        yield cleaned[start:]

    def found(self, text: str) -> tuple[str, ...]:
        """The names that stand in a text, as they were given, each once."""
        if self._pattern is None:
            return ()
        return tuple(dict.fromkeys(self._names[m[0]] for m in self._pattern.finditer(self._clean(text))))


def _bounded(name: str) -> str:
    """A pattern for a name where it is not a part of a longer word or number."""
    before, after = _kind(name[0]), _kind(name[-1])
    head = f"(?<!{before})" if before else ""
    tail = f"(?!{after})" if after else ""
    return head + re.escape(name) + tail


def _kind(char: str) -> str | None:
    """The class of characters that would carry on a word, None for signs."""
    if char.isdigit():
        return r"\d"
    return _LETTER if char.isalpha() else None

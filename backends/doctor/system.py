"""A machine as the checks see it: files below a root, and everything else through injected functions.

Checks are plain functions ``System -> list[Finding]`` that touch nothing but this object. A test gives them a
folder of files and a table of answers; nothing needs to be patched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Distribution:
    """An installed Python distribution; ``folder`` is the site-packages folder that holds it."""

    name: str
    version: str
    folder: Path


@dataclass(frozen=True)
class User:
    """Who runs: ``groups`` are the ids this process really has, which a new login may change."""

    name: str
    uid: int
    groups: frozenset[int]


@dataclass(frozen=True)
class Node:
    """A device file; ``accessible`` is whether this process may read and write it."""

    gid: int
    mode: int
    accessible: bool


@dataclass(frozen=True)
class Disk:
    """The filesystem that holds a folder: bytes free for this user, and of what type it is (``ext4``)."""

    free: int
    type: str


@dataclass(frozen=True)
class Answer:
    """What came of a question that was put to a child process.

    ``status`` is ``ok``, ``error`` (the engine said no), ``crash`` (a signal) or ``timeout``; ``text`` says
    more; ``value`` holds the facts of an ``ok``.
    """

    status: str
    text: str = ""
    value: Mapping[str, object] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the child answered."""
        return self.status == "ok"


# A question is a verb and its arguments, see child.py: ("dlopen", "libamdhip64.so.7").
Question = tuple[str, ...]


@dataclass(frozen=True)
class System:
    """A machine, or a folder that looks like one.

    ``user`` is None and ``ask`` is None where only files are known. ``write_test`` tries to create, rename
    and delete in a folder and gives the reason of a failure, or nothing. ``backends`` are the names that
    Kiln's registry knows.
    """

    root: Path
    environment: Mapping[str, str]
    user: User | None
    python: tuple[int, ...]
    distributions: tuple[Distribution, ...]
    cache: Path
    home: Path
    node: Callable[[str], Node | None]
    disk: Callable[[Path], Disk | None]
    write_test: Callable[[Path], str]
    ask: Callable[[Question], Answer] | None
    backends: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        """A path of that machine, ``/sys/...``, where it lies here."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder, followed through links."""
        try:
            return self.path(name).exists()
        except OSError:
            return False

    def read(self, name: str) -> str:
        """The stripped text of a small file, empty if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def fields(self, name: str, separator: str | None = None) -> dict[str, str]:
        """A file of lines ``key value`` (or ``key=value`` with ``separator="="``) as a table."""
        pairs = (line.split(separator, 1) for line in self.read(name).splitlines())
        return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}

    def names(self, folder: str) -> list[str]:
        """The names in a folder, numbers in them in numeric order; none if it is not there."""
        try:
            found = [entry.name for entry in self.path(folder).iterdir()]
        except OSError:
            return []
        return sorted(found, key=_natural)

    def distribution(self, *wanted: str) -> Distribution | None:
        """The first of the named distributions that is installed."""
        for name in wanted:
            for found in self.distributions:
                if found.name == name:
                    return found
        return None

    def group_name(self, gid: int) -> str:
        """What ``/etc/group`` calls a group, empty if it does not know it."""
        return next((name for name, (number, _) in self._groups().items() if number == gid), "")

    def in_group_file(self, gid: int) -> bool:
        """Whether ``/etc/group`` puts the user into a group, whatever this process has."""
        if self.user is None:
            return False
        return any(number == gid and self.user.name in members for number, members in self._groups().values())

    def _groups(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        found = {}
        for line in self.read("/etc/group").splitlines():
            parts = line.split(":")
            if len(parts) == 4 and parts[2].isdigit():
                found[parts[0]] = (int(parts[2]), tuple(filter(None, parts[3].split(","))))
        return found


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``580.95.05`` gives ``(580, 95, 5)``, nothing gives ``()``."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.1f} GiB"


def number(text: str) -> int | None:
    """A decimal or ``0x`` number of sysfs, None if it is none."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts if p)

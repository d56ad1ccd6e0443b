"""What would tell whose machine it was: host and user names, home folders, absolute paths, addresses."""

from __future__ import annotations

import contextlib
import getpass
import io
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Names that many machines have and that name nobody; they are words, too.
_COMMON = frozenset(
    {"admin", "kiln", "linux", "localhost", "nobody", "root", "runner", "ubuntu", "user", "users"}
)
_LEAST = 3  # letters: a shorter name is found in any text
_PATTERNS = {
    # Not after a letter, a digit, a dot, a colon or a slash: "and/or", "v1/x", "https://" are no paths.
    "an absolute path": re.compile(
        r"(?<![\w./:~\\-])(?:/[\w.@+~-]+){2,}|(?<![\w./:~\\-])/(?:home|root|Users|tmp|opt|mnt)\b"
    ),
    "a home folder": re.compile(r"(?<![\w/])~[\w.-]*/[\w.-]"),
    "a path of Windows": re.compile(r"(?<![\w])[A-Za-z]:\\{1,2}[\w.-]|\\\\\\\\[\w.-]+\\\\"),
    "a file address": re.compile(r"\bfile://"),
    "a mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b"),
    "a hardware address": re.compile(r"\b(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}\b"),
    "a GPU's serial number": re.compile(r"\bGPU-[0-9a-f]{8}-[0-9a-f]{4}-"),
}


@dataclass(frozen=True)
class Identity:
    """Names that must not be published; compared as whole words, without regard to case."""

    names: tuple[str, ...]

    @classmethod
    def here(cls) -> Identity:
        """This machine's host name, the user's name, and the name of the home folder."""
        found = [socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name]
        with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, in a container
            found.append(getpass.getuser())
        kept = [name for name in found if len(name) >= _LEAST and name.lower() not in _COMMON]
        return cls(tuple(dict.fromkeys(kept)))


def find_leaks(text: str, identity: Identity) -> Iterator[str]:
    """Each kind of leak once, with what it found."""
    for name in identity.names:
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text, re.IGNORECASE):
            yield f"the name {name!r} of this machine or its user"
    for what, pattern in _PATTERNS.items():
        match = pattern.search(text)
        if match:
            yield f"{what}: {match.group()!r}"


def find_picture_leaks(data: bytes) -> Iterator[str]:
    """A picture of a benchmark holds pixels; any text or EXIF in it could tell anything."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        texts = sorted(str(name) for name in image.info)
        if texts or len(image.getexif()):
            yield f"the picture holds more than pixels: {', '.join(texts) or 'EXIF'}"

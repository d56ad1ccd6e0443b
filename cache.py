"""Where Kiln keeps what it can make again, and how much of it may lie there.

Everything is below one folder, which ``KILN_CACHE`` moves; ``KILN_CACHE_LIMIT`` bounds its size. What is in
it is listed, removed and kept below the limit by ``cache_store``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .errors import UsageError

# What is cached, one folder each: bundles of models that are not bundles, activations measured for int8,
# what engines compiled, graphs of architectures that do not ship, which backend was fastest, which large
# files were read whole.
KINDS = ("bundles", "calibrations", "compiled", "graphs", "tuning", "verified")

DEFAULT_LIMIT_BYTES = 20 << 30
# Of what the cache holds and the disk has left: a cache must never be what fills a small disk.
DEFAULT_SHARE = 0.5

# Tells backup programs to leave the folder out: https://bford.info/cachedir
_TAG_NAME = "CACHEDIR.TAG"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Kiln can make all of this again: kiln cache prune\n"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([mhdw])", re.IGNORECASE)
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def cache_root() -> Path:
    """The folder of all that is cached. Not created here.

    Raises:
        UsageError: ``KILN_CACHE`` is the root of a disk, the home folder or a folder around it: what is
            removed from a cache must not lie among other things.
    """
    given = os.environ.get("KILN_CACHE")
    if not given:
        import platformdirs

        return Path(platformdirs.user_cache_dir("kiln"))
    root = Path(given)
    found, home = Path(os.path.realpath(root)), Path(os.path.realpath(os.path.expanduser("~")))
    if found == found.parent or found == home or found in home.parents:
        raise UsageError(
            f"KILN_CACHE is {given}, where other things lie than Kiln's; "
            "set it to a folder of its own, for example ~/.cache/kiln"
        )
    return root


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached file; ``KILN_CACHE`` moves all of them. Not created here.

    Raises:
        UsageError: as ``cache_root``.
    """
    return cache_root() / kind


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter, and the missing ones around it; give it back.

    One of ours that others may write to is closed to them: what engines compiled is code.

    Raises:
        OSError: the disk refused.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    root = cache_root()
    inside = [folder for folder in (path, *path.parents) if folder == root or folder.is_relative_to(root)]
    for folder in {path, *inside}:
        found = folder.stat()
        if found.st_mode & 0o022 and found.st_uid == _user():
            folder.chmod(0o700)
    if inside and not (root / _TAG_NAME).exists():
        (root / _TAG_NAME).write_text(_TAG)
    return path


def untrusted(path: Path) -> str:
    """Why something in the cache may not be used as code, empty if it may.

    It must be the user's own or root's, no link, and closed to writing by others.
    """
    try:
        found = path.lstat()
    except OSError as error:
        return f"{path} cannot be read: {(error.strerror or str(error)).lower()}"
    if path.is_symlink():
        return f"{path} is a link"
    if found.st_uid not in (_user(), 0):
        return f"{path} belongs to the user {found.st_uid}, not to {_user()}"
    if found.st_mode & 0o022:
        return f"others may write to {path}; close it with: chmod go-w"
    return ""


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def cache_limit(held_bytes: int) -> int | None:
    """How many bytes the cache may hold, None without a limit; 0 means to keep nothing.

    ``KILN_CACHE_LIMIT`` says it. Without that it is 20 GiB, or less where the disk is small.

    Args:
        held_bytes: what the cache holds now; with the free space it tells how large the disk is for Kiln.

    Raises:
        UsageError: ``KILN_CACHE_LIMIT`` is not a size.
    """
    given = os.environ.get("KILN_CACHE_LIMIT")
    if given:
        try:
            return parse_size(given)
        except UsageError as error:
            raise UsageError(f"KILN_CACHE_LIMIT: {error}") from None
    root = cache_root()
    existing = next((folder for folder in (root, *root.parents) if folder.is_dir()), Path())
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        return DEFAULT_LIMIT_BYTES
    return min(DEFAULT_LIMIT_BYTES, int(DEFAULT_SHARE * (free + held_bytes)))


def keeps_nothing() -> bool:
    """Whether ``KILN_CACHE_LIMIT`` is 0."""
    return bool(os.environ.get("KILN_CACHE_LIMIT")) and cache_limit(0) == 0


def parse_size(text: str) -> int | None:
    """Bytes of ``500MB``, ``10G`` or ``1.5GiB``; None for ``none``.

    Raises:
        UsageError: no number with a unit; a bare number other than 0 could mean anything.
    """
    plain = text.strip().lower()
    if plain == "none":
        return None
    if plain == "0":
        return 0
    match = _SIZE.fullmatch(plain)
    if match is None:
        raise UsageError(f"{text!r} is no size; expected for example 10GB, 500MB, 1.5GiB, 0 or none")
    number, letter, binary = match.groups()
    power = "kmgt".index(letter) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_age(text: str) -> float:
    """Seconds of ``30d``, ``12h``, ``2w`` or ``45m``.

    Raises:
        UsageError: no number with a unit.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age; expected for example 30d, 12h, 2w or 45m")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_size(size_bytes: int) -> str:
    """A size as a person reads it, in powers of 1000 as disks are sold: ``1.8 GB``."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"

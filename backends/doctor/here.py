"""Make a System: of this machine, or of a folder that holds another one's files.

A folder may also hold ``kiln-facts.json``, with what files cannot tell; all parts are optional::

    {"environment": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"},
     "user": {"name": "ada", "uid": 1000, "groups": [1000, 44]},
     "python": [3, 12, 3],
     "distributions": {"onnxruntime-migraphx": "1.27.1"},
     "nodes": {"/dev/kfd": {"gid": 992, "mode": "0660"}},
     "disk": {"free": 100000000000, "type": "ext4"},
     "write_error": "",
     "backends": ["openvino"],
     "answers": {"dlopen libamdhip64.so.7": {"status": "ok", "value": {}}}}

An answer that is not there is that of a library or engine that is not there. Without ``answers`` nothing
live is looked at.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...cache import cache_folder
from ...errors import UsageError
from .. import registry
from .children import asker
from .system import Answer, Disk, Distribution, Node, Question, System, User

FACTS = "kiln-facts.json"
_SITES = (
    "usr/lib/python3*/*-packages",
    "usr/local/lib/python3*/*-packages",
    "opt/*/lib/python3*/site-packages",
)


def this_system(timeout: float) -> System:
    """This machine; engines get ``timeout`` seconds for each question."""
    groups = frozenset({os.getgid(), os.getegid(), *os.getgroups()})
    return System(
        root=Path("/"),
        environment=dict(os.environ),
        user=User(_user_name(), os.getuid(), groups),
        python=tuple(sys.version_info[:3]),
        distributions=tuple(_distributions(sys.path)),
        cache=cache_folder("bundles").parent,
        home=Path.home(),
        node=_node,
        disk=lambda folder: _disk(folder, Path("/")),
        write_test=write_test,
        ask=asker(timeout),
        backends=registry.names(),
    )


def sysroot_system(root: Path) -> System:
    """Another machine's files below ``root``, with the facts of ``kiln-facts.json`` if it is there.

    Raises:
        UsageError: ``root`` is no folder, or the facts are not as expected.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; expected one that holds proc, sys, etc of a machine")
    facts = _read_facts(root)
    user = facts.get("user")
    home = root / "home" / str(user["name"]) if user else root / "root"
    nodes: Mapping[str, Mapping[str, Any]] = facts.get("nodes", {})
    groups = frozenset(user["groups"]) if user else frozenset()
    found_user = User(user["name"], user["uid"], groups) if user else None
    disk = facts.get("disk")
    answers: Mapping[str, Mapping[str, Any]] | None = facts.get("answers")

    def node(name: str) -> Node | None:
        if name in nodes:
            gid, mode = int(nodes[name]["gid"]), int(str(nodes[name]["mode"]), 8)
            bits = mode | (mode >> 3 if gid in groups else 0)
            return Node(gid, mode, found_user is not None and (found_user.uid == 0 or bits & 0o6 == 0o6))
        return Node(0, 0o666, True) if (root / name.lstrip("/")).exists() and not nodes else None

    def ask(question: Question) -> Answer:
        assert answers is not None
        row = answers.get(" ".join(question))
        if row is None:
            last = question[-1]
            return Answer("error", f"{last}: cannot open shared object file: No such file or directory")
        return Answer(str(row.get("status", "ok")), str(row.get("text", "")), row.get("value", {}))

    return System(
        root=root,
        environment=facts.get("environment", {}),
        user=found_user,
        python=tuple(facts.get("python", sys.version_info[:3])),
        distributions=_sysroot_distributions(root, facts),
        cache=home / ".cache/kiln",
        home=home,
        node=node,
        disk=lambda folder: Disk(int(disk["free"]), str(disk["type"])) if disk else None,
        write_test=lambda folder: str(facts.get("write_error", "")),
        ask=None if answers is None else ask,
        backends=tuple(facts.get("backends", registry.names())),
    )


def _read_facts(root: Path) -> dict[str, Any]:
    path = root / FACTS
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(facts, dict):
        raise UsageError(f"{path} holds {type(facts).__name__}, expected an object")
    return facts


def _sysroot_distributions(root: Path, facts: Mapping[str, Any]) -> tuple[Distribution, ...]:
    sites = sorted(path for pattern in _SITES for path in root.glob(pattern))
    found = list(_distributions([str(site) for site in sites]))
    site = sites[0] if sites else root / "usr/lib/python3/site-packages"
    named = [Distribution(name, version, site) for name, version in facts.get("distributions", {}).items()]
    return (*named, *(d for d in found if d.name not in facts.get("distributions", {})))


def _distributions(path: Iterable[str]) -> Iterable[Distribution]:
    """What is installed on a search path, names as the index writes them."""
    seen = set()
    for found in importlib.metadata.distributions(path=list(path)):
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower()
        folder = Path(str(found.locate_file("")))
        if name and (name, folder) not in seen:
            seen.add((name, folder))
            yield Distribution(name, found.version, folder)


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without an entry in /etc/passwd
        return str(os.getuid())


def _node(name: str) -> Node | None:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return Node(found.st_gid, found.st_mode & 0o7777, os.access(name, os.R_OK | os.W_OK))


def _disk(folder: Path, root: Path) -> Disk | None:
    existing = _existing(folder)
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        return None
    return Disk(free, filesystem_type(existing.resolve(), (root / "proc/self/mountinfo").read_text()))


def filesystem_type(folder: Path, mountinfo: str) -> str:
    """The type of the filesystem a folder is on, ``unknown`` if the table does not say.

    Args:
        folder: an absolute path without links.
        mountinfo: the text of ``/proc/self/mountinfo``; field 5 is the mount point, with octal escapes, and
            the type follows the hyphen (Linux Documentation/filesystems/proc.rst, 3.5).
    """
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m.group(1), 8)), fields[4]))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split(" ")[0]
    return kind


def write_test(folder: Path) -> str:
    """Do in a folder what Kiln does: make a folder, write a file, rename, remove. The reason of a failure.

    A folder that is not there yet is tried where it would be made; nothing is left behind.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".kiln-doctor.", dir=_existing(folder)) as name:
            partial = Path(name) / "partial"
            partial.mkdir()
            (partial / "file").write_bytes(b"kiln")
            final = Path(name) / "final"
            os.rename(partial, final)
            if (final / "file").read_bytes() != b"kiln":
                return "a file that was written and renamed reads differently"
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or folder})"
    return ""


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder

"""Whether device files may be opened, and if not, what to type: a group, a login, a container's option."""

from __future__ import annotations

from .container import container_kind
from .finding import Finding, failure, ok
from .system import System


def device_permission(id: str, system: System, wanted: list[str]) -> Finding:
    """Whether this process may read and write device files, and what to type if not."""
    evidence, closed, missing = [], [], []
    for name in wanted:
        node = system.node(name)
        if node is None:
            evidence.append(f"{name} is missing")
            missing.append(name)
            continue
        group = system.group_name(node.gid) or str(node.gid)
        may = "may" if node.accessible else "may not"
        evidence.append(f"{name}: mode {node.mode:04o}, group {group} ({node.gid}), {may} be opened")
        if not node.accessible:
            closed.append((group, node.gid))
    kind = container_kind(system)
    if kind:
        evidence.append(kind)
    if closed:
        return _closed(id, system, dict(closed), evidence, wanted, bool(kind))
    if missing:
        fix = container_fix(wanted) if kind else ["ls -l /dev/dri /dev/accel", "sudo udevadm trigger"]
        return failure(id, f"{', '.join(missing)} is missing", evidence, fix)
    return ok(id, f"{' and '.join(wanted)} may be opened", *evidence)


def _closed(
    id: str, system: System, groups: dict[str, int], evidence: list[str], wanted: list[str], inside: bool
) -> Finding:
    """What helps if files exist but may not be opened; ``groups`` are those of the files."""
    names = ",".join(groups)
    if inside:
        return failure(id, f"this container lacks the group {names}", evidence, container_fix(wanted, groups))
    if any(system.in_group_file(gid) for gid in groups.values()):
        text = f"/etc/group has you in {names}, this session does not: log in again"
        fix = ["Log out and in again, or restart.", f"newgrp {next(iter(groups))}"]
        return failure(id, text, evidence, fix)
    fix = [f"sudo usermod -aG {names} $USER", "Then log out and in again."]
    return failure(id, f"you are not in the group {names}", evidence, fix)


def container_fix(devices: list[str], groups: dict[str, int] | None = None) -> list[str]:
    """How to pass device files into a container; groups by number: the image may not know the name."""
    passed = " ".join(f"--device={name}" for name in devices)
    numbers = [str(gid) for gid in (groups or {}).values()] or [f"$(stat -c %g {devices[0]})"]
    added = " ".join(f"--group-add {gid}" for gid in numbers)
    return [
        f"docker run {passed} {added} --security-opt seccomp=unconfined --ipc=host ...",
        f"podman run {passed} --group-add keep-groups ...",
    ]

"""The cache folder: space, whether it can be written, what its filesystem promises; and the hub's."""

from __future__ import annotations

from pathlib import Path

from .finding import Finding, Verdict, absent, failure, ok, warning
from .system import System, gib

# SD1.5 in fp16 has 2.1 GB; an export writes it once beside its final name, and engines keep compiled copies.
MODEL_SIZE = int(2.1e9)
EXPORT_FACTOR = 2.5
BUNDLED_NEED = 2**27
NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "ceph",
    "glusterfs",
    "beegfs",
    "gpfs",
    "9p",
    "afs",
}
_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.ceph")


def check_disk(system: System) -> list[Finding]:
    """D-DISK: space for exporting Stable Diffusion 1.5 into the cache."""
    disk = system.disk(system.cache)
    if disk is None:
        return [absent("D-DISK", f"how much is free at {system.cache} is not known")]
    need = MODEL_SIZE * EXPORT_FACTOR
    evidence = f"{system.cache}: {gib(disk.free)} free ({disk.type})"
    fix = ["export KILN_CACHE=/path/on/a/larger/disk"]
    if disk.free < BUNDLED_NEED:
        return [failure("D-DISK", f"the disk of the cache is full: {gib(disk.free)} free", [evidence], fix)]
    if disk.free < need:
        text = f"{gib(disk.free)} free; exporting Stable Diffusion 1.5 takes up to {gib(need)}"
        return [warning("D-DISK", text, [evidence], fix)]
    return [ok("D-DISK", f"{gib(disk.free)} free for the cache", evidence)]


def check_cache(system: System) -> list[Finding]:
    """D-CACHE: a folder can be made, renamed and removed there, on a filesystem whose locks hold."""
    reason = system.write_test(system.cache)
    evidence = [str(system.cache)]
    fix = ["export KILN_CACHE=/path/that/can/be/written"]
    if reason:
        text = f"the cache folder cannot be used: {reason}"
        return [failure("D-CACHE", text, evidence, [f"ls -ld {system.cache}", *fix])]
    disk = system.disk(system.cache)
    if disk is not None and (disk.type in NETWORK or disk.type.startswith(_FUSE)):
        text = f"the cache folder is on a network filesystem ({disk.type}): locks and renames may not hold"
        return [warning("D-CACHE", text, evidence, ["export KILN_CACHE=/path/on/a/local/disk"])]
    return [ok("D-CACHE", "the cache folder can be written, and renaming in it works", *evidence)]


def check_hub(system: System) -> list[Finding]:
    """D-HF: ONNX files in the hub's cache are links, which onnx and OpenVINO refuse for external data."""
    hub = hub_folder(system)
    linked = [path for path in _onnx_data(hub) if path.is_symlink()]
    if not linked:
        return [absent("D-HF", "no linked ONNX weights in the hub's cache")]
    name = next(part for part in linked[0].parts if part.startswith("models--"))
    model = name.removeprefix("models--").replace("--", "/", 1)
    evidence = [str(linked[0]), *([f"and {len(linked) - 1} more"] if len(linked) > 1 else [])]
    text = "ONNX weights in the hub's cache are links, which OpenVINO and onnx refuse"
    copy = f"cp -rL {_snapshot(linked[0])} {model.rpartition('/')[2]}"
    return [Finding("D-HF", Verdict.OK, f"{text}; Kiln's bundles are real files", tuple(evidence), (copy,))]


def hub_folder(system: System) -> Path:
    """Where huggingface_hub keeps its files, by its own variables."""
    environment = system.environment
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"])
    home = environment.get("HF_HOME")
    return (Path(home) if home else system.home / ".cache/huggingface") / "hub"


def _onnx_data(hub: Path) -> list[Path]:
    """External data of ONNX files in snapshots; the layout is models--ORG--NAME/snapshots/REVISION/..."""
    try:
        return sorted(hub.glob("models--*/snapshots/*/**/*.onnx_data"))
    except OSError:
        return []


def _snapshot(path: Path) -> Path:
    parts = path.parts
    return Path(*parts[: parts.index("snapshots") + 2])

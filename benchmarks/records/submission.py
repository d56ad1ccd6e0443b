"""A folder that somebody else can verify: records, pictures, commands, versions, and nothing about who
measured.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import StorageError, UsageError
from .labels import told_apart
from .leaks import Identity, find_leaks, find_picture_leaks
from .merge import image_files, write_file
from .record import Record
from .store import RECORDS, Stored, read_store

CHECKSUMS = "SHA256SUMS"
_README = """# {title}

Measured by `kiln bench` {versions}. {count} in `{records}`, one JSON object a line (schema `{schema}`,
`benchmarks/data/record.schema.json` in Kiln); the pictures are in `images`, named by the first 16 digits of
their SHA-256.

| configuration | workload | seconds per image (median, 95 % interval) | verdict |
| --- | --- | --- | --- |
{rows}

## How to verify

```sh
pip install kiln-diffusion
kiln bench verify .         # schema, all figures from the samples, digests, pictures, verdicts
sha256sum -c {checksums}    # the same files, without Kiln
```

## How to repeat

The commands are in `commands.txt`, the versions of the packages that matter in `versions.txt`; processor,
memory and system are in each record's `environment`.
"""


def write_submission(source: Path, output: Path, *, identity: Identity | None = None) -> tuple[Path, ...]:
    """Write the folder; the same records give the same bytes, whatever their order.

    Args:
        source: a results folder that verifies.
        output: a folder that does not exist yet, or is empty.
        identity: what must not be in it; this machine's and user's if None.

    Returns:
        The files, relative to ``output``, in order.

    Raises:
        UsageError: the results do not verify, a line is torn, or something names a user, a machine or a
            folder; the text says what and where. Nothing is written then.
        StorageError: the disk refused.
    """
    from .verify import verify_folder

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty; give a folder that does not exist")
    stored = read_store(source)
    if stored.torn:
        raise UsageError(f"{stored.torn}; merge the folder into a new one first, which leaves such lines out")
    findings = verify_folder(source).findings
    if findings:
        raise UsageError(
            f"{source} does not verify: {'; '.join(map(str, findings[:5]))}; see `kiln bench verify`"
        )
    files = submission_files(stored)
    leaks = [*_all_leaks(files, identity or Identity.here())]
    if leaks:
        raise UsageError(
            f"nothing was written, because it would tell whose machine this is: {'; '.join(leaks[:5])}. "
            "Measure again with names that tell nothing, or run `kiln bench` from the folder the files are in"
        )
    try:
        for name, data in files.items():
            write_file(output / name, data)
    except StorageError:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return tuple(Path(name) for name in files)


def submission_files(stored: Stored) -> dict[str, bytes]:
    """The folder's files by name, the list of checksums last."""
    rows = sorted(zip(stored.records, stored.texts, strict=True), key=lambda row: (row[0].created, row[0].id))
    records = [record for record, _ in rows]
    pictures = sorted({name for record in records for name in image_files(record)})
    files = {
        "README.md": readme(records).encode(),
        "commands.txt": _commands(records).encode(),
        "versions.txt": _versions(records).encode(),
        RECORDS: b"".join(text + b"\n" for _, text in rows),
        **{name: (stored.folder / name).read_bytes() for name in pictures},
    }
    sums = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return {**files, CHECKSUMS: "".join(sums).encode()}


def checksum_findings(folder: Path) -> Iterator[str]:
    """What differs from the list of checksums, in words; nothing if the folder has no such list."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        yield f"cannot be read: {error}"
        return
    for line in lines:
        digest, _, name = line.partition("  ")
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"has a line that names no file of this folder: {line[:80]!r}"
            continue
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
            continue
        if hashlib.sha256(data).hexdigest() != digest:
            yield f"{name} is not the file that was listed"


def readme(records: Sequence[Record]) -> str:
    """What the folder is, what is in it, how to verify it; the same for the same records."""
    from .record import SCHEMA

    versions = ", ".join(dict.fromkeys(record.tool.version for record in records))
    cpus = dict.fromkeys(str(record.environment.get("cpu") or "unknown processor") for record in records)
    return _README.format(
        title=f"Results on {', '.join(cpus)}",
        versions=versions,
        count=f"{len(records)} record{'s are' if len(records) > 1 else ' is'}",
        records=RECORDS,
        schema=SCHEMA,
        checksums=CHECKSUMS,
        rows="\n".join(_row(*row) for row in zip(records, told_apart(records), strict=True)),
    )


def _row(record: Record, name: str) -> str:
    image = record.stats.image
    seconds = "not timed" if image is None else f"{image.median:.4g}"
    if image is not None and image.interval:
        seconds += f" ({image.interval[0]:.4g} to {image.interval[1]:.4g})"
    cells = (name, record.workload.id, seconds, record.verdict)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _commands(records: Sequence[Record]) -> str:
    """One command line for each run, in the order in which they were made."""
    lines = dict.fromkeys(f"# {record.run}\n{shlex.join(record.command)}\n" for record in records)
    return "".join(lines)


def _versions(records: Sequence[Record]) -> str:
    """Pinned versions as pip reads them, a block for each environment."""
    blocks: dict[str, list[str]] = {}
    for record in records:
        packages = record.environment.get("packages")
        named = packages if isinstance(packages, Mapping) else {}
        lines = [f"{name}=={version}\n" for name, version in sorted(named.items())]
        lines.insert(
            0, f"kiln-diffusion=={record.tool.version}  # commit {record.tool.commit or 'unknown'}\n"
        )
        lines.insert(0, f"# Python {record.environment.get('python', 'unknown')}\n")
        blocks.setdefault("".join(lines), []).append(record.run)
    return "\n".join(f"# runs {', '.join(dict.fromkeys(runs))}\n{block}" for block, runs in blocks.items())


def _all_leaks(files: Mapping[str, bytes], identity: Identity) -> Iterator[str]:
    for name, data in files.items():
        if name.endswith(".png"):
            yield from (f"{name}: {text}" for text in find_picture_leaks(data))
        elif name != CHECKSUMS:
            yield from (f"{name}: {text}" for text in find_leaks(data.decode("utf-8"), identity))

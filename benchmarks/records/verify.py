"""Whether a results folder says the truth about itself: every figure computed again, every digest taken
again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import Record
from .stats import derive
from .store import Line, read_lines
from .verify_images import image_findings
from .verify_verdict import verdict_findings

# Sums of floats taken in another order; anything above is another figure.
_CLOSE = 1e-9


@dataclass(frozen=True)
class Finding:
    """Something that is not as the record says; ``record`` is its id, or the line's number."""

    record: str
    text: str

    def __str__(self) -> str:
        return f"{self.record}: {self.text}"


@dataclass(frozen=True)
class Verified:
    """How much was looked at, and what was found."""

    records: int
    images: int
    findings: tuple[Finding, ...]


def verify_folder(path: Path) -> Verified:
    """Verify a results folder or a file of records; pictures lie beside it.

    Of each line: the schema; the digests of prompts and initial noise and the key; all figures in
    ``stats``, from the samples; each picture's bytes, pixels, size, PSNR and SSIM; gates, requested and
    effective settings, and noise against verdict and reasons. Of the folder: ids that are there twice, and
    the list of checksums of a submission.

    Raises:
        UsageError: there is no such file, or no record in it.
        StorageError: it cannot be read.
    """
    from ...errors import UsageError
    from .submission import checksum_findings

    lines = read_lines(path)
    if not lines:
        raise UsageError(f"{path} holds no records; there is nothing to verify")
    folder = path if path.is_dir() else path.parent
    findings = [finding for line in lines for finding in _line_findings(line, folder)]
    ids = [line.record.id for line in lines if line.record]
    findings += [
        Finding(one, f"is there {ids.count(one)} times") for one in sorted(set(ids)) if ids.count(one) > 1
    ]
    findings += [Finding("SHA256SUMS", text) for text in checksum_findings(folder)]
    records = [line.record for line in lines if line.record]
    files = {image.file for r in records for image in (*r.images, *r.parity.reference_images)}
    return Verified(len(records), len(files), tuple(findings))


def _line_findings(line: Line, folder: Path) -> Iterator[Finding]:
    if line.record is None:
        yield Finding(f"line {line.number}", line.error or "is no record")
        return
    record, raw = line.record, json.loads(line.text)
    texts = [*digest_findings(raw), *stats_findings(record), *sample_findings(record)]
    texts += [*image_findings(record, folder), *verdict_findings(record)]
    yield from (Finding(record.id, text) for text in texts)


def digest_findings(raw: Mapping[str, Any]) -> Iterator[str]:
    """The digests that follow from a record's own words; ``raw`` as it is written, because the key is of
    that.
    """
    workload = raw["workload"]
    found = sha256_of_json([workload["prompts"], workload["negative_prompt"]])
    if found != workload["prompts_digest"]:
        yield f"prompts_digest is {workload['prompts_digest'][:16]}…, of the prompts it is {found[:16]}…"
    key = sha256_of_json([workload, raw["requested"]], sort_keys=True)[:16]
    if key != raw["key"]:
        yield f"key is {raw['key']}, of workload and request it is {key}"
    if raw["id"] != f"{raw['run']}-{raw['key']}":
        yield f"id is {raw['id']}, of run and key it is {raw['run']}-{raw['key']}"
    if workload["latents_digest"] not in _latents_digests(workload):
        yield (
            f"latents_digest is {workload['latents_digest'][:16]}…, which is not that of the noise of seed "
            f"{workload['seed']} at {workload['width']}x{workload['height']}, batch {workload['batch']}"
        )


def stats_findings(record: Record) -> Iterator[str]:
    """Every figure that differs from what the samples give."""
    computed = derive(record.samples, record.workload.batch)
    yield from _differences(dataclasses.asdict(record.stats), dataclasses.asdict(computed), "stats")


def sample_findings(record: Record) -> Iterator[str]:
    """Samples that cannot have been measured as they stand there."""
    indexes = [sample.index for sample in record.samples]
    if indexes != sorted(set(indexes)):
        yield f"samples: the indexes are not in order, each once: {indexes[:8]}"
    prompts = len(record.workload.prompts)
    for sample in record.samples:
        if sample.prompt >= prompts:
            yield f"sample {sample.index}: prompt {sample.prompt} of {prompts}"
    for a, b in zip(record.samples, record.samples[1:], strict=False):
        # A run that was resumed after a restart of the machine has a clock that began anew.
        if a.started_ns < b.started_ns < a.started_ns + int(a.seconds * 1e9) - 1_000_000:
            yield f"samples {a.index} and {b.index} overlap: the second started before the first was done"


def sha256_of_json(value: Any, *, sort_keys: bool = False) -> str:
    """The digest that the harness takes of texts: SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()


def _latents_digests(workload: Mapping[str, Any]) -> Iterator[str]:
    """Digests of the noise for each number of pixels per latent cell that a VAE may have."""
    from ..harness.workloads import array_digest, initial_noise

    for factor in (8, 4, 16, 2, 1):
        if workload["height"] % factor == 0 and workload["width"] % factor == 0:
            cells = (workload["height"] // factor, workload["width"] // factor)
            noise = initial_noise(workload["seed"], len(workload["prompts"]), workload["batch"], cells)
            yield array_digest(noise)


def _differences(told: Any, computed: Any, at: str) -> Iterator[str]:
    if isinstance(told, Mapping) and isinstance(computed, Mapping):
        for name in dict.fromkeys([*told, *computed]):
            yield from _differences(told.get(name), computed.get(name), f"{at}.{name}")
    elif isinstance(told, (tuple, list)) and isinstance(computed, tuple) and len(told) == len(computed):
        for index, (one, other) in enumerate(zip(told, computed, strict=True)):
            yield from _differences(one, other, f"{at}[{index}]")
    elif not _same(told, computed):
        yield f"{at} is {_shown(told)}, of the samples it is {_shown(computed)}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-12)
    return bool(a == b)


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, Mapping):
        return "there"
    return f"{value:.9g}" if isinstance(value, float) else str(value)

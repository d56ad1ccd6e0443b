"""Whether a record's verdict follows from its gates, its settings and its noise."""

from __future__ import annotations

from collections.abc import Iterator

from .record import Gate, Record


def verdict_findings(record: Record) -> Iterator[str]:
    """Everything that contradicts the verdict or its reasons, in words.

    A record is invalid if nothing was timed, a gate failed, what was asked for is not in force, Kiln's own
    pictures were held against nothing, components take longer than the whole, or the noise is; noisy
    if only the noise is. It may be invalid for other reasons, which then have to be given.
    """
    for gate in record.parity.gates:
        yield from _gate_findings(gate)
    yield from _noise_findings(record)
    causes = list(_causes(record))
    if causes and record.verdict != "invalid":
        yield f"the verdict is {record.verdict}, and has to be invalid: {'; '.join(causes)}"
    if not causes and record.verdict == "valid" and record.noise.verdict != "clean":
        yield f"the verdict is valid, and the noise {record.noise.verdict}"
    if record.verdict == "noisy" and record.noise.verdict != "noisy":
        yield f"the verdict is noisy, and the noise {record.noise.verdict}"
    if record.verdict == "invalid" and not record.reasons:
        yield "the verdict is invalid, and no reason is given"
    for gate in record.parity.gates:
        if not gate.passed and not any(gate.where in text and gate.metric in text for text in record.reasons):
            yield f"the gate {gate.metric} of {gate.where} failed, and no reason says so"
    missing = [text for text in record.noise.reasons if text not in record.reasons]
    if missing:
        yield f"the reasons leave out what the noise report says: {'; '.join(missing)}"


def holds(gate: Gate) -> bool:
    """Whether a gate's value is on the right side of its limit; one without a limit always is."""
    if gate.limit is None:
        return True
    if gate.value is None:
        return False
    return gate.value <= gate.limit if gate.at_most else gate.value >= gate.limit


def _gate_findings(gate: Gate) -> Iterator[str]:
    if gate.passed != holds(gate):
        side = "at most" if gate.at_most else "at least"
        said = "passed" if gate.passed else "failed"
        yield f"the gate {gate.metric} of {gate.where} {said}, with {gate.value} and {side} {gate.limit}"


def _noise_findings(record: Record) -> Iterator[str]:
    noise = record.noise
    if noise.verdict == "clean" and noise.reasons:
        yield f"the noise is clean, and has reasons: {'; '.join(noise.reasons)}"
    if noise.verdict != "clean" and not noise.reasons:
        yield f"the noise is {noise.verdict}, and no reason is given"
    if noise.verdict == "clean" and record.stats.image is not None and record.stats.image.modes > 1:
        yield "the noise is clean, and the times fall into two groups"


def _causes(record: Record) -> Iterator[str]:
    from ..harness.effective import mismatches

    if not record.samples:
        yield "nothing was timed"
    yield from (
        f"the gate {g.metric} of {g.where} does not hold" for g in record.parity.gates if not holds(g)
    )
    if record.samples:
        yield from mismatches(record.requested, record.effective)
    if record.requested.kind == "kiln" and not record.parity.gates:
        yield "it was held against no reference"
    if record.stats.unattributed is not None and record.stats.unattributed < -1e-6:
        yield "the components take longer than the whole"
    if record.noise.verdict == "invalid":
        yield f"the noise is invalid: {'; '.join(record.noise.reasons)}"

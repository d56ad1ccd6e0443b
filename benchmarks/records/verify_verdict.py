"""A record's verdict: what it follows from, and whether that of a record does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .record import Gate, NoiseReport, Record, Verdict

NOTHING_TIMED = "nothing was timed"
LONGER_THAN_THE_WHOLE = "longer than the whole"
# Components that take longer than the whole are a broken measurement; less than this is rounding.
ROUNDING = 1e-6


def verdict_of(reasons: Sequence[str], noise: NoiseReport) -> Verdict:
    """The verdict that follows, both ways: whoever has the reasons and the noise knows it.

    Args:
        reasons: of the record, those of the noise among them.
        noise: of the record.

    Returns:
        ``invalid`` if the noise is, or any reason is not the noise's; else ``noisy`` if the noise is; else
        ``valid``.
    """
    if noise.verdict == "invalid" or _own(reasons, noise):
        return "invalid"
    return "noisy" if noise.verdict == "noisy" else "valid"


def verdict_findings(record: Record) -> Iterator[str]:
    """Everything that contradicts the verdict or its reasons, in words.

    The verdict has to be that of ``verdict_of``. What shows in the record has to be among the reasons, which
    is that nothing was timed, a gate failed, what was asked for is not in force, Kiln's own pictures were
    held against nothing, components take longer than the whole, or noise; and a reason that says one of
    these has to show in the record. Other reasons are what went wrong, in words.
    """
    for gate in record.parity.gates:
        yield from _gate_findings(gate)
    yield from _noise_findings(record)
    causes = list(_causes(record))
    if causes and record.verdict != "invalid":
        yield f"the verdict is {record.verdict}, and has to be invalid: {'; '.join(causes)}"
    elif record.verdict != (follows := verdict_of(record.reasons, record.noise)):
        own = "; ".join(_own(record.reasons, record.noise)) or "none"
        yield (
            f"the verdict is {record.verdict}, and {follows} follows from its noise, {record.noise.verdict}, "
            f"and its other reasons: {own}"
        )
    for gate in record.parity.gates:
        if not gate.passed and not any(gate.where in text and gate.metric in text for text in record.reasons):
            yield f"the gate {gate.metric} of {gate.where} failed, and no reason says so"
    missing = [text for text in record.noise.reasons if text not in record.reasons]
    if missing:
        yield f"the reasons leave out what the noise report says: {'; '.join(missing)}"
    yield from (f"a reason says {text!r}, and the record does not show it" for text in _unfounded(record))


def _own(reasons: Sequence[str], noise: NoiseReport) -> list[str]:
    """The reasons that are not the noise's."""
    return [text for text in reasons if text not in noise.reasons]


def _unfounded(record: Record) -> Iterator[str]:
    """Reasons that would have to show in the record, and do not."""
    failed = [gate for gate in record.parity.gates if not gate.passed]
    for text in record.reasons:
        if text.startswith("parity of "):
            shown = any(gate.where in text and gate.metric in text for gate in failed)
        elif text == NOTHING_TIMED:
            shown = not record.samples
        elif text.startswith("the components take ") and text.endswith(LONGER_THAN_THE_WHOLE):
            shown = _is_longer(record)
        else:
            continue
        if not shown:
            yield text


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
        yield NOTHING_TIMED
    yield from (
        f"the gate {g.metric} of {g.where} does not hold" for g in record.parity.gates if not holds(g)
    )
    if record.samples:
        yield from mismatches(record.requested, record.effective)
    if record.requested.kind == "kiln" and not record.parity.gates:
        yield "it was held against no reference"
    if _is_longer(record):
        yield f"the components take {LONGER_THAN_THE_WHOLE}"
    if record.noise.verdict == "invalid":
        yield f"the noise is invalid: {'; '.join(record.noise.reasons)}"


def _is_longer(record: Record) -> bool:
    return record.stats.unattributed is not None and record.stats.unattributed < -ROUNDING

"""Which records are held against which: by what they measured, or as the user names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from .facts import differing_facts, workload_key
from .record import Record

_LEAST_PREFIX = 4


@dataclass(frozen=True)
class Pairs:
    """Pairs of baseline and candidate, and the records that have no partner."""

    pairs: tuple[tuple[Record, Record], ...]
    only_baseline: tuple[Record, ...] = ()
    only_candidate: tuple[Record, ...] = ()


def newest(records: Sequence[Record]) -> list[Record]:
    """The last one of each workload and label, in the order of the first."""
    found: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: r.created):
        found[_identity(record)] = record
    return sorted(found.values(), key=records.index)


def pair(baseline: Sequence[Record], candidate: Sequence[Record]) -> Pairs:
    """Records of the same workload and label belong together; then those of the same label, to be refused.

    Of several with one label the last counts.
    """
    old, new = newest(baseline), newest(candidate)
    pairs = []
    for same in (_identity, lambda record: record.label):
        for record in list(new):
            partner = next((other for other in old if same(other) == same(record)), None)
            if partner is not None:
                pairs.append((partner, record))
                old.remove(partner)
                new.remove(record)
    order = {id(record): index for index, record in enumerate(candidate)}
    pairs.sort(key=lambda both: order[id(both[1])])
    return Pairs(tuple(pairs), tuple(old), tuple(new))


def pair_last_runs(records: Sequence[Record]) -> Pairs:
    """The last record of each workload and label against the one before it, of another run.

    Raises:
        UsageError: nothing was measured twice.
    """
    candidates, baselines = [], []
    for record in newest(records):
        before = [
            r
            for r in records
            if _identity(r) == _identity(record) and r.run != record.run and r.created <= record.created
        ]
        if before:
            candidates.append(record)
            baselines.append(newest(before)[0])
    if not candidates:
        raise UsageError(
            f"none of the {len(records)} records was measured twice; name two of them "
            f"({_labels(records)}), or give two results folders"
        )
    return Pairs(tuple(zip(baselines, candidates, strict=True)))


def pair_selected(records: Sequence[Record], baseline: str, candidate: str, *, across_models: bool) -> Pairs:
    """What two selectors name: a pair for each workload that both have measured.

    If they have none in common, the last of each is paired, to be refused with the facts that differ.

    Raises:
        UsageError: a selector names nothing, or something that is not clear.
    """
    old, new = newest(select(records, baseline)), newest(select(records, candidate))
    pairs = []
    for record in new:
        partners = [a for a in old if a.id != record.id and _comparable(a, record, across_models)]
        # Two runs with several configurations each: those of one label belong together.
        partners = [a for a in partners if a.label == record.label] or partners
        if len(partners) > 1:
            labels = ", ".join(a.label for a in partners)
            raise UsageError(
                f"{baseline!r} names {len(partners)} records of one workload ({labels}); give one label, "
                "or the id of a record as `kiln bench show --ids` prints it"
            )
        pairs += [(a, record) for a in partners]
    if not pairs and old[-1].id == new[-1].id:
        raise UsageError(f"{baseline!r} and {candidate!r} are the same record {old[-1].id}; name two")
    return Pairs(tuple(pairs or [(old[-1], new[-1])]))


def select(records: Sequence[Record], selector: str) -> list[Record]:
    """The records that a text names: id, run, key or label, else the beginning of an id, run or key.

    Raises:
        UsageError: none.
    """
    exact = [r for r in records if selector in (r.id, r.run, r.key, r.label)]
    if exact:
        return exact
    if len(selector) >= _LEAST_PREFIX:
        begun = [r for r in records if any(t.startswith(selector) for t in (r.id, r.run, r.key))]
        if begun:
            return begun
    raise UsageError(
        f"no record is called {selector!r}; there are {_labels(records)}, or give an id, run or key"
    )


def _comparable(a: Record, b: Record, across_models: bool) -> bool:
    return not differing_facts(a.workload, b.workload, across_models=across_models)


def _identity(record: Record) -> tuple[str, str]:
    return workload_key(record.workload), record.label


def _labels(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(repr(record.label) for record in records)) or "none"

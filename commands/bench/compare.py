"""``kiln bench compare``: faster, slower, or not significant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ...benchmarks.records.compare import Comparison
    from ...benchmarks.records.pairing import Pairs

_RESULTS = Path("kiln-bench")
_RISE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


class _Percent(click.ParamType[float]):
    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _RISE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no percentage; expected for example 5%", param, ctx)
        return float(match.group(1)) / 100


@click.command()
@click.argument("baseline", required=False)
@click.argument("candidate", required=False)
@click.option(
    "-i",
    "--results",
    type=click.Path(path_type=Path),
    default=_RESULTS,
    show_default=True,
    help="Where BASELINE and CANDIDATE are, if they are names of records.",
)
@click.option("--across-models", is_flag=True, help="Models and adapters may differ: int8 against fp16, say.")
@click.option(
    "--fail-if-slower",
    "limit",
    type=_Percent(),
    metavar="PERCENT",
    help="Exit with 1 if a candidate is slower by more, for example 5%; both have to be of one machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def compare(
    baseline: str | None,
    candidate: str | None,
    results: Path,
    across_models: bool,
    limit: float | None,
    as_json: bool,
) -> None:
    """Say whether CANDIDATE is faster or slower than BASELINE, or that the difference is not significant.

    Both are results folders or .jsonl files, whose records are paired by workload and label; or both are
    names of records in --results: label, id, run or key. With neither, the last run there is compared with
    the one before.

    Faster or slower is said only if the 95 % interval of the ratio excludes 1, a rank test agrees, and the
    difference exceeds the noise floor: what two runs of the same may differ by, else 5 %. Records of
    different work, and invalid ones, are refused: exit code 1.

    Example:

    \b
        kiln bench compare before after --fail-if-slower 5%
        kiln bench compare "onnxruntime fp32" "openvino bf16"
        kiln bench compare
    """
    from ...benchmarks.records.compare import compare as compare_records

    pairs = _pairs(baseline, candidate, results, across_models)
    found = [
        compare_records(a, b, across_models=across_models, same_machine=limit is not None)
        for a, b in pairs.pairs
    ]
    if as_json:
        click.echo(json.dumps([_row(one) for one in found], indent=1))
    else:
        for one in found:
            click.echo(_text(one))
    for side, records in (("baseline", pairs.only_baseline), ("candidate", pairs.only_candidate)):
        for record in records:
            click.echo(f"only the {side} has {record.label} of {record.workload.id}", err=True)
    slower = [one for one in found if limit is not None and one.slower_than(limit)]
    for one in slower:
        click.echo(f"{one.candidate.label} is slower by more than {limit:.1%}", err=True)
    if slower or any(one.answer == "refused" for one in found):
        click.get_current_context().exit(1)


def _pairs(baseline: str | None, candidate: str | None, results: Path, across_models: bool) -> Pairs:
    from ...benchmarks.records.pairing import pair, pair_last_runs, pair_selected
    from ...benchmarks.records.store import read_records
    from ...errors import UsageError

    if baseline is None:
        return pair_last_runs(read_records(results))
    if candidate is None:
        if _is_path(baseline):
            return pair_last_runs(read_records(Path(baseline)))
        raise UsageError(f"{baseline!r} is to be compared with what? Give a second one: BASELINE CANDIDATE")
    if _is_path(baseline) != _is_path(candidate):
        there, missing = (baseline, candidate) if _is_path(baseline) else (candidate, baseline)
        raise UsageError(
            f"{there} is a results folder and {missing!r} is not; give two folders, or two names of records "
            "and -i FOLDER"
        )
    if not _is_path(baseline):
        return pair_selected(read_records(results), baseline, candidate, across_models=across_models)
    found = pair(read_records(Path(baseline)), read_records(Path(candidate)))
    if not found.pairs:
        raise UsageError(
            f"{baseline} and {candidate} have no workload and label in common; name two records of one "
            "folder with -i, after `kiln bench merge`"
        )
    return found


def _is_path(text: str) -> bool:
    return Path(text).is_dir() or text.endswith(".jsonl")


def _text(one: Comparison) -> str:
    head = f"{one.baseline.label} -> {one.candidate.label}, {one.candidate.workload.id}: "
    if one.answer == "refused":
        return "\n".join([f"{head}cannot be compared", *(f"  {text}" for text in one.reasons)])
    assert one.ratio is not None
    assert one.interval is not None
    effect = {"slower": f"{one.ratio - 1:.1%} slower", "faster": f"{1 - one.ratio:.1%} less time, faster"}
    low, high = one.interval
    measured = "" if one.floor_measured else ", not measured: see --aa"
    lines = [
        f"{head}{effect.get(one.answer, 'not significant')}",
        f"  time {one.ratio:.3f} of the baseline's (95 %: {low:.3f} to {high:.3f}), p {one.p_value:.2g}",
        f"  {_counts(one)}; noise floor {one.floor:.1%}{measured}",
    ]
    lines += [f"  note: {text}" for text in one.notes]
    lines += [f"  differs: {text}" for text in one.differences]
    return "\n".join(lines)


def _counts(one: Comparison) -> str:
    if one.paired:
        return f"{one.counts[0]} rounds in which both took turns, compared pair by pair"
    return f"{one.counts[0]} and {one.counts[1]} batches, compared as two groups"


def _row(one: Comparison) -> dict[str, Any]:
    return {
        "baseline": one.baseline.id,
        "candidate": one.candidate.id,
        "workload": one.candidate.workload.id,
        "answer": one.answer,
        "ratio": one.ratio,
        "interval_95": one.interval,
        "p_value": one.p_value,
        "test": None if one.p_value is None else "wilcoxon" if one.paired else "mann-whitney",
        "counts": one.counts,
        "floor": one.floor,
        "floor_measured": one.floor_measured,
        "reasons": one.reasons,
        "notes": one.notes,
        "differences": one.differences,
    }

"""Names that tell records apart: nothing is added where a label is enough, and no two models share a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from kiln.benchmarks.html.grouping import group_records
from kiln.benchmarks.records.labels import told_apart
from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.submission import readme

FP16, SMALL = ("emoji", "a" * 64, "F16"), ("small", "b" * 64, "F16")
INT8, FULL = ("emoji", "c" * 64, "F16+I8"), ("emoji", "d" * 64, "F16+I8")


@pytest.fixture
def record_of(make_record: Callable[..., Record]) -> Callable[[str, tuple[str, str, str]], Record]:
    def made(label: str, model: tuple[str, str, str]) -> Record:
        name, digest, storage = model
        record = make_record([1.0, 1.1, 0.9], label=label)
        facts = replace(record.workload.model, name=name, digest=digest, storage={"unet": storage})
        return replace(record, workload=replace(record.workload, model=facts))

    return made


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ((("one", FP16), ("two", SMALL)), ("one", "two")),
        ((("one", FP16), ("one", FP16)), ("one", "one")),
        ((("one", FP16), ("one", SMALL), ("two", FP16)), ("one, emoji", "one, small", "two")),
        ((("one", FP16), ("one", INT8)), ("one, F16", "one, F16+I8")),
        (
            (("one", FP16), ("one", INT8), ("one", FULL)),
            ("one, F16", f"one, F16+I8, {'c' * 8}", f"one, F16+I8, {'d' * 8}"),
        ),
        (
            (("one", SMALL), ("one", INT8), ("one", FP16)),
            ("one, small", "one, emoji, F16+I8", "one, emoji, F16"),
        ),
        ((), ()),
    ],
)
def test_names(
    record_of: Callable[..., Record],
    rows: Sequence[tuple[str, tuple[str, str, str]]],
    names: Sequence[str],
) -> None:
    assert told_apart([record_of(*row) for row in rows]) == tuple(names)


def test_the_page_and_the_submission_use_them(record_of: Callable[..., Record]) -> None:
    records = [record_of("openvino bf16", FP16), record_of("openvino bf16", INT8)]
    [group] = group_records(records)
    assert {entry.label for entry in group.entries} == {"openvino bf16, F16", "openvino bf16, F16+I8"}
    text = readme(records)
    assert "| openvino bf16, F16 |" in text
    assert "| openvino bf16, F16+I8 |" in text

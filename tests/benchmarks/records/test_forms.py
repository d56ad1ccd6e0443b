"""Records to JSON and back, what is refused and how it is said, and the schema against jsonschema."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kiln
from kiln.benchmarks.records import forms
from kiln.benchmarks.records.forms import RecordError, from_dict, from_json, to_dict, to_json
from kiln.benchmarks.records.record import SCHEMA, Record
from kiln.benchmarks.records.schema import make_schema, published_schema, schema_text
from kiln.benchmarks.records.store import read_records
from kiln.benchmarks.records.verify import verify_folder

Make = Callable[..., Record]
OLD = Path(__file__).parent / "data/kiln-bench-1"
SCHEMA_FILE = Path(kiln.__file__).parent / "benchmarks/data/record.schema.json"


def planted() -> list[tuple[str, Callable[[dict[str, Any]], Any], str]]:
    """A wrong record each: what is done to it, and the beginning of what is said."""
    return [
        ("unknown", lambda d: d.update(speed=1), "record.speed is not known; expected id, run"),
        ("unknown, deep", lambda d: d["samples"][1].update(ms=1), "record.samples[1].ms is not known"),
        ("missing", lambda d: d.pop("verdict"), "record.verdict is missing"),
        ("missing, deep", lambda d: d["workload"].pop("steps"), "record.workload.steps is missing"),
        ("no schema", lambda d: d.pop("schema"), "the schema is None, expected kiln-bench/1"),
        ("other schema", lambda d: d.update(schema="kiln-bench/9"), "the schema is 'kiln-bench/9'"),
        (
            "text for number",
            lambda d: d["samples"][0].update(seconds="1"),
            'record.samples[0].seconds is "1"',
        ),
        ("truth for number", lambda d: d["workload"].update(seed=True), "record.workload.seed is true"),
        ("number for text", lambda d: d.update(label=1), "record.label is 1, expected a text"),
        ("fraction for count", lambda d: d["workload"].update(steps=4.5), "record.workload.steps is 4.5"),
        ("none", lambda d: d.update(label=None), "record.label is null, expected a text"),
        ("object for list", lambda d: d.update(samples={}), "record.samples is {}, expected a list"),
        ("list for object", lambda d: d.update(effective=[]), "record.effective is [], expected an object"),
        (
            "verdict",
            lambda d: d.update(verdict="good"),
            'record.verdict is "good", expected one of valid, noisy',
        ),
        ("digest", lambda d: d["workload"].update(prompts_digest="x"), "record.workload.prompts_digest is"),
        ("time of zero", lambda d: d["samples"][0].update(seconds=0), "record.samples[0].seconds is 0"),
        ("way out", lambda d: d["images"][0].update(file="../x.png"), "record.images[0].file is"),
        (
            "three ends",
            lambda d: d["stats"]["image"].update(interval=[1, 2, 3]),
            "record.stats.image.interval has 3",
        ),
        ("key", lambda d: d.update(key="k"), 'record.key is "k", expected pattern'),
        ("no prompts", lambda d: d["workload"].update(prompts=[]), "record.workload.prompts is []"),
    ]


PLANTED = planted()


@pytest.fixture
def raw(make_record: Make, tmp_path: Path) -> dict[str, Any]:
    return to_dict(make_record(folder=tmp_path))


def test_a_record_comes_back_as_it_was(make_record: Make, tmp_path: Path) -> None:
    record = make_record(folder=tmp_path)
    assert from_json(to_json(record)) == record
    assert to_json(from_json(to_json(record))) == to_json(record)
    assert from_dict(to_dict(record)) == record


def test_whole_numbers_stay_as_they_are_written(raw: dict[str, Any]) -> None:
    raw["workload"]["cfg_scale"] = 7
    raw["workload"]["steps"] = 4.0
    record = from_dict(raw)
    assert json.loads(to_json(record))["workload"]["cfg_scale"] == 7
    assert '"cfg_scale": 7,' in to_json(record)
    assert record.workload.steps == 4


def test_values_of_numpy_become_numbers_or_are_refused(make_record: Make) -> None:
    record = make_record(environment={"x": np.float64(1.5)})
    assert '"x": 1.5' in to_json(record)
    with pytest.raises(RecordError, match=r"record\.environment\.x is a int64"):
        to_json(replace(record, environment={"x": np.int64(1)}))
    with pytest.raises(RecordError, match=r"record\.environment\.x\[1\] is nan"):
        to_json(replace(record, environment={"x": [1.0, float("nan")]}))


@pytest.mark.parametrize(
    ("change", "said"), [(c, s) for _, c, s in PLANTED], ids=[name for name, _, _ in PLANTED]
)
def test_a_wrong_record_is_refused(raw: dict[str, Any], change: Callable[[Any], Any], said: str) -> None:
    change(raw)
    with pytest.raises(RecordError) as error:
        from_dict(raw)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("text", ["[1]", "7", "null"])
def test_other_json_is_no_record(text: str) -> None:
    with pytest.raises(RecordError, match="a record is an object, got"):
        from_json(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON: Expecting"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
    ],
)
def test_what_is_not_json_is_said(text: str, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        from_json(text)


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    assert SCHEMA_FILE.read_text() == schema_text()
    assert published_schema() == make_schema()
    assert published_schema()["title"] == SCHEMA


def test_the_schema_accepts_records(raw: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(published_schema())
    jsonschema.Draft202012Validator(published_schema()).validate(raw)
    for line in (OLD / "records.jsonl").read_text().splitlines():
        jsonschema.Draft202012Validator(published_schema()).validate(json.loads(line))


@pytest.mark.parametrize("change", [c for _, c, _ in PLANTED], ids=[name for name, _, _ in PLANTED])
def test_the_schema_refuses_what_kiln_refuses(raw: dict[str, Any], change: Callable[[Any], Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    change(raw)
    assert not jsonschema.Draft202012Validator(published_schema()).is_valid(raw)


def test_kiln_and_the_schema_agree_on_every_field(raw: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(published_schema())
    for name in ("samples", "warmups", "images"):
        raw[name] = raw[name][:1]
    places = list(leaves(raw, ()))
    assert len(places) > 150
    for path in places:
        for wrong in (None, "", -1, [], {}, 1.5):
            made = copy.deepcopy(raw)
            put(made, path, wrong)
            assert accepted(made) == validator.is_valid(made), (path, wrong)


def leaves(value: Any, path: tuple[Any, ...]) -> Any:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    )
    for name, item in items:
        yield (*path, name)
        yield from leaves(item, (*path, name))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for name in path[:-1]:
        value = value[name]
    value[path[-1]] = new


def accepted(raw: dict[str, Any]) -> bool:
    try:
        from_dict(raw)
    except RecordError:
        return False
    return True


def test_a_record_of_the_first_schema_reads_and_verifies() -> None:
    (record,) = read_records(OLD)
    assert (record.label, record.verdict, len(record.samples)) == ("openvino fp32", "valid", 12)
    assert record.stats.image is not None
    assert record.stats.image.median == pytest.approx(1.0, rel=0.02)
    assert verify_folder(OLD).findings == ()


def test_an_older_schema_is_upgraded(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def upgrade(old: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in old.items() if k != "name"}, "label": old["name"], "schema": SCHEMA}

    monkeypatch.setitem(forms.UPGRADES, "kiln-bench/0", upgrade)
    old = {**raw, "schema": "kiln-bench/0", "name": raw["label"]}
    del old["label"]
    assert from_dict(old) == from_dict(raw)


def test_fields_with_a_default_may_be_missing(raw: dict[str, Any]) -> None:
    expected = from_dict(raw)
    del raw["reasons"]
    del raw["workload"]["adapters"]
    assert from_dict(raw) == expected

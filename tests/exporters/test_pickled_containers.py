"""Source code in torch's old files: taken out where it is a ParameterDict's, and nothing else is touched."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.exporters.pickled_containers import CONTAINER, without_sources

torch = pytest.importorskip("torch")
FEW = settings(max_examples=200, deadline=None, database=None, derandomize=True)


def old_form(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def parameters(*names: str) -> Any:
    return torch.nn.ParameterDict({name: torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for name in names})


def restricted(data: bytes) -> Any:
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        return torch.load(io.BytesIO(data), weights_only=True)


def test_the_class_is_left_and_torch_reads_it() -> None:
    one = parameters("*")
    data = old_form({"first": one, "again": one, "second": parameters("a", "b"), "rest": torch.ones(2)})
    with pytest.raises(pickle.UnpicklingError, match="Only persistent_load of storage"):
        restricted(data)
    made = without_sources(data)
    assert b"class ParameterDict" in data
    assert b"class ParameterDict" not in made
    found = restricted(made)
    assert found["first"] is found["again"]
    assert torch.equal(found["first"]["*"], one["*"])
    assert list(found["second"].keys()) == ["a", "b"]
    assert torch.equal(found["rest"], torch.ones(2))


def test_other_files_come_back_as_they_are(tmp_path: Path) -> None:
    zipped = tmp_path / "zip.pt"
    torch.save(parameters("*"), zipped)
    linear = old_form(torch.nn.Linear(2, 2))
    lists = old_form(
        {"name": CONTAINER.replace(" ", "\n"), "module": torch.nn.ParameterList([torch.ones(2)])}
    )
    for data in (b"", b"\x80\x02", zipped.read_bytes(), linear, lists, old_form({"a": torch.ones(2)})):
        assert without_sources(data) == data
    for refused in (linear, lists):
        with pytest.raises(pickle.UnpicklingError):
            restricted(without_sources(refused))


def test_an_id_of_another_kind_is_left_for_torch_to_refuse() -> None:
    data = old_form(parameters("*"))
    for planted in (
        data.replace(b"module", b"modul3", 1),
        data.replace(b"ParameterDict\n", b"ParameterList\n", 1),
    ):
        assert without_sources(planted) == planted
        with pytest.raises(pickle.UnpicklingError):
            restricted(planted)


def test_a_file_of_endless_opcodes_is_not_followed() -> None:
    start = b"".join(pickle.dumps(value, 2) for value in (1, 2, 3))
    named = pickle.dumps(CONTAINER.replace(" ", "\n"), 2)[:-1]
    data = start + named + b"0N" * 2_000_000 + b"."
    assert sum(1 for _ in pickletools.genops(start)) < 10
    assert without_sources(data) == data


OLD = old_form({"string_to_param": parameters("*")})


@FEW
@given(where=st.integers(0, len(OLD) - 1), noise=st.binary(min_size=1, max_size=6), cut=st.booleans())
def test_a_damaged_file_is_no_error_of_its_own(where: int, noise: bytes, cut: bool) -> None:
    data = OLD[:where] if cut else OLD[:where] + noise + OLD[where + len(noise) :]
    assert isinstance(without_sources(data), bytes)

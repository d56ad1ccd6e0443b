"""Reading safetensors: against the safetensors library, and every damaged or foreign file refused."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from kiln.errors import AdapterError, CheckpointError
from kiln.exporters.tensors import TensorFile


def pack(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    written = {
        "matrix": generator.normal(size=(3, 5)).astype(np.float32),
        "half": generator.normal(size=(2, 2, 2)).astype(np.float16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }
    save_file(written, tmp_path / "a.safetensors", metadata={"ss_network_dim": "4"})
    with (
        TensorFile.open(tmp_path / "a.safetensors") as file,
        safe_open(tmp_path / "a.safetensors", "np") as theirs,
    ):
        assert set(file.infos) == set(theirs.keys())
        assert file.metadata == theirs.metadata()
        for name, value in written.items():
            read = file.read(name)
            assert read.shape == value.shape == file.infos[name].shape
            assert read.dtype == value.dtype
            assert np.array_equal(read, theirs.get_tensor(name))
            assert file.infos[name].size == value.size
        offsets = [info.offset for info in file.infos.values()]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize(
    ("kind", "ours", "name"),
    [
        (torch.bfloat16, ml_dtypes.bfloat16, "BF16"),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2, "F8_E5M2"),
    ],
)
def test_types_that_numpy_lacks(tmp_path: Path, kind: torch.dtype, ours: type, name: str) -> None:
    values = torch.linspace(-3, 3, 24).reshape(4, 6).to(kind)
    save_torch_file({"w": values}, tmp_path / "a.safetensors")
    with TensorFile.open(tmp_path / "a.safetensors") as file:
        read = file.read("w")
    assert file.infos["w"].dtype == name
    assert read.dtype == ours
    assert np.array_equal(read.astype(np.float32), values.float().numpy())
    planted = values.float().numpy() * 1.01
    assert not np.array_equal(read.astype(np.float32), planted)


def test_offset_points_at_the_bytes(tmp_path: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones(3, np.float16)}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    with TensorFile.open(tmp_path / "a.safetensors") as file:
        for name, info in file.infos.items():
            assert raw[info.offset : info.offset + info.nbytes] == file.read(name).tobytes()


FOREIGN = {
    "empty": (b"", "is empty"),
    "short": (b"\x01\x00", "truncated"),
    "text": (b"these are not the weights you are looking for", "a text file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
        "git-LFS pointer",
    ),
    "html": (b"<!DOCTYPE html><html><body>Please log in</body></html>", "HTML page"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + b"\0" * 64, "GGUF"),
    "pickle": (pickle.dumps({"state_dict": [1, 2, 3]}), "pickle"),
    "long header": ((10**6).to_bytes(8, "little") + b"{}", "truncated"),
    "absurd header": ((10**12).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "no json": (pack(b"{oops}"), "cannot be read"),
    "no utf-8": (pack(b'{"\xff": 1}'), "cannot be read"),
    "NaN": (pack(b'{"__metadata__": NaN}'), "cannot be read"),
    "list": (pack([1]), "not a JSON object"),
    "deep": (pack(b"[" * 50000), "cannot be read"),
    "metadata": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "twice": (
        pack(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"\0" * 8,
        ),
        "twice",
    ),
    "hole": (pack({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20), "hole"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlaps"),
    "cut": (pack({"a": entry(shape=(1000,), offsets=(0, 4000))}, b"\0" * 100), "truncated"),
    "tail": (pack({"a": entry()}, b"\0" * 9), "follow the last tensor"),
    "length": (pack({"a": entry(shape=(3,))}, b"\0" * 8), "12 bytes"),
    "negative": (pack({"a": entry(shape=(-2,), offsets=(0, -8))}, b""), "shape"),
    "huge": (pack({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8), "should have"),
    "bool shape": (pack({"a": entry(shape=(True,), offsets=(0, 4))}, b"\0" * 4), "shape"),
    "type": (pack({"a": entry("F4")}, b"\0" * 8), "'F4'"),
    "fields": (pack({"a": {"dtype": "F32"}}, b""), "described by"),
    "offsets": (pack({"a": entry(offsets=(0,))}, b"\0" * 8), "data_offsets"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_or_damaged_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, words = FOREIGN[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TensorFile.open(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zip_named_safetensors_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(CheckpointError, match="zip archive"):
        TensorFile.open(tmp_path / "a.safetensors")


def test_missing_file_folder_and_the_error_class_asked_for(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        TensorFile.open(tmp_path / "nothing.safetensors", error=AdapterError)
    with pytest.raises(AdapterError, match="is not a file"):
        TensorFile.open(tmp_path, error=AdapterError)
    with pytest.raises(CheckpointError):
        TensorFile.open(str(tmp_path / "a\0b"))


def test_reading_an_unknown_name_a_closed_or_a_shrunk_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(1000, np.float32)}, path)
    file = TensorFile.open(path)
    with pytest.raises(CheckpointError, match="no tensor named 'b'"):
        file.read("b")
    with open(path, "r+b") as stream:
        stream.truncate(500)
    with pytest.raises(CheckpointError, match="ends inside"):
        file.read("a")
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read("a")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_is_refused_or_gives_what_the_library_gives(
    tmp_path: Path, data: st.DataObject
) -> None:
    good = pack(
        {"a": entry(), "b": entry("F16", (3,), (8, 14)), "__metadata__": {"k": "v"}}, bytes(range(14))
    )
    at = data.draw(st.integers(0, len(good) - 1))
    raw = bytearray(good)
    raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(raw[:cut])
    try:
        with TensorFile.open(path) as file:
            read = {name: file.read(name).tobytes() for name in file.infos}
    except CheckpointError:
        return
    try:
        with safe_open(path, "np") as theirs:
            names = set(theirs.keys())
    except SafetensorError as refusal:
        # What we accept, the library must accept.
        raise AssertionError(f"accepted although safetensors says {refusal}") from refusal
    assert set(read) == names


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    tail=st.binary(max_size=16),
)
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: object, tail: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(pack(header, tail))
    with contextlib.suppress(CheckpointError):
        TensorFile.open(path).close()

"""The parts of isolation without a child: shared memory, messages, the words for a death, the policy."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln import errors
from kiln.backends import registry
from kiln.backends.base import GraphSource, InForce, PrepareOptions
from kiln.backends.isolation import policy, process
from kiln.backends.isolation.backend import IsolatedBackend
from kiln.backends.isolation.blocks import ALIGNMENT, Block, plan
from kiln.backends.isolation.death import describe_end, last_words
from kiln.backends.isolation.messages import (
    Channel,
    ChannelClosedError,
    pack_error,
    pack_in_force,
    pack_task,
    unpack_error,
    unpack_task,
)
from kiln.backends.isolation.policy import isolated_by_default, with_isolation
from kiln.backends.isolation.target import load_backend, target_of
from kiln.errors import KilnError, SessionError, UsageError

ARRAYS = {
    "sample": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "timestep": np.array(12.5, np.float32),
    "input_ids": np.arange(7, dtype=np.int64)[None],
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def test_arrays_through_shared_memory() -> None:
    layout, size = plan(ARRAYS)
    assert all(entry["offset"] % ALIGNMENT == 0 for entry in layout)
    block = Block.create(size)
    other = Block(os.dup(block.descriptor), size)  # what the other process does
    block.write(ARRAYS, layout)
    found = other.read(layout)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    kept = found["sample"]
    other.close()
    other.close()
    block.close()
    assert kept[1, 2, 3] == 23  # a view that an engine still holds stays valid


def test_memory_that_is_not_what_was_announced() -> None:
    block = Block.create(64)
    with pytest.raises(SessionError, match="of 4096 bytes was announced, a smaller one came"):
        Block(os.dup(block.descriptor), 4096)
    for entry in (
        {"name": "a", "dtype": "<f4", "shape": [17], "offset": 0},
        {"name": "a", "dtype": "<f4", "shape": [16], "offset": 4},
        {"name": "a", "dtype": "<f4", "shape": [-1], "offset": 0},
    ):
        with pytest.raises(SessionError, match="does not lie in shared memory of 64 bytes"):
            block.read([entry])
    if hasattr(os, "memfd_create"):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(block.descriptor, 0)  # nobody can pull it away under a reader


def test_no_memory() -> None:
    with pytest.raises(SessionError, match="shared memory"):
        Block.create(2**62)


def test_task_there_and_back() -> None:
    source = GraphSource("unet", Path("/a/model.onnx"), Path("/a/w.safetensors"), {"n": [1, None]}, "d")
    options = PrepareOptions(
        {"sample": (2, 4, 8, 8), "timestep": ()}, "rocm:1", "fp16", 3, Path("/cache"), {"compile": True}
    )
    assert unpack_task(pack_task(source, options)) == (source, options)
    assert unpack_task(pack_task(source, PrepareOptions())) == (source, PrepareOptions())
    relative = GraphSource("unet", Path("model.onnx"), Path("w"), {}, "")
    assert unpack_task(pack_task(relative, options))[0].graph_path == Path.cwd() / "model.onnx"


def test_in_force_there_and_back() -> None:
    found = InForce("b", "1", "p", "d", "fp32", 2, True, {"flag": True, "path": Path("/x")})
    assert InForce(**pack_in_force(found)) == InForce(
        "b", "1", "p", "d", "fp32", 2, True, {"flag": True, "path": "/x"}
    )


def all_errors() -> list[type[KilnError]]:
    return [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, KilnError)]


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_of_kiln_keeps_its_class(kind: type[KilnError]) -> None:
    found = unpack_error(pack_error(kind("what happened")), "ignored")
    assert type(found) is kind
    assert str(found) == "what happened"


def test_a_subclass_that_only_the_child_knows_becomes_the_nearest_class() -> None:
    class NewError(errors.BackendUnavailable):
        pass

    assert type(unpack_error(pack_error(NewError("x")), "ignored")) is errors.BackendUnavailable


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one), Channel(other)


def test_messages_and_descriptors_stay_in_order() -> None:
    ours, theirs = pair()
    reading, writing = os.pipe()
    ours.send({"kind": "first", "text": "one\ntwo"})
    ours.send({"kind": "second"}, [writing])
    ours.send({"kind": "third", "text": "x" * 100_000})
    assert theirs.receive(1) == ({"kind": "first", "text": "one\ntwo", "fds": 0}, [])
    received = theirs.receive(1)
    assert received
    [descriptor] = received[1]
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"through")
    assert os.read(reading, 99) == b"through"
    third = theirs.receive(1)
    assert third
    assert third[0]["text"] == "x" * 100_000
    assert theirs.receive(0.01) is None
    ours.close()
    with pytest.raises(ChannelClosedError):
        theirs.receive(1)
    with pytest.raises(ChannelClosedError):
        theirs.send({"kind": "answer"})
    for one in (reading, writing, descriptor):
        os.close(one)
    theirs.close()


@pytest.mark.parametrize(
    ("code", "how", "advice"),
    [
        (-signal.SIGABRT, "was ended by SIGABRT (aborted)", "another backend or precision"),
        (-signal.SIGKILL, "was ended by SIGKILL (killed)", "out of memory"),
        (-signal.SIGILL, "was ended by SIGILL (illegal instruction)", "another processor"),
        (-63, "was ended by signal 63", "another backend"),
        (7, "exited with status 7", "see what it wrote"),
        (None, "could not even be killed", "restarted"),
    ],
)
def test_ends(code: int | None, how: str, advice: str) -> None:
    found = describe_end(code)
    assert found[0] == how
    assert advice in found[1]


def test_last_words_are_those_of_the_engine() -> None:
    output = b"""a
Memory access fault by GPU node-1 (Agent handle: 0x7f) on address 0x7f00. Reason: Page not present.

Fatal Python error: Aborted

Current thread 0x00007f (most recent call first):
  File "x.py", line 1 in run

Extension modules: numpy (total: 1)
"""
    assert last_words(output) == (
        "a | Memory access fault by GPU node-1 (Agent handle: 0x7f) on address 0x7f00. "
        "Reason: Page not present. | Fatal Python error: Aborted"
    )
    assert last_words(b"") == ""
    assert "\n" not in last_words(bytes(range(256)) * 10)


def test_processor_time_of_a_group(tmp_path: Path) -> None:
    """Fields 3 to 17 of /proc/PID/stat; the name may hold spaces and brackets. An ended child counts on."""
    for pid, name, group, *used in (
        (10, "a) b (c", 10, 300, 50, 20, 7),
        (11, "cc1", 10, 100, 0, 0, 0),
        (12, "x", 12, 9, 9, 9, 9),
    ):
        (tmp_path / str(pid)).mkdir()
        fields = ["R", 1, group, 10, 0, -1, 0, 0, 0, 0, 0, *used, 20, 0]
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) " + " ".join(map(str, fields)))
    assert process._group_cpu_seconds(10, tmp_path) == 477 / os.sysconf("SC_CLK_TCK")
    assert process._group_cpu_seconds(99, tmp_path) == 0
    assert process._group_cpu_seconds(os.getpgid(0)) > 0


@pytest.mark.parametrize(
    ("name", "device", "rocm_build", "driver", "expected"),
    [
        ("onnxruntime-migraphx", "auto", False, False, True),
        ("torch", "rocm", False, False, True),
        ("torch", "ROCm:1", True, True, True),
        ("torch", "auto", True, True, True),
        ("torch", "auto", True, False, False),
        ("torch", "auto", False, True, False),
        ("torch", "cpu", True, True, False),
        ("torch", "cuda", False, False, False),
        ("onnxruntime", "auto", True, True, False),
        ("openvino", "GPU", True, True, False),
    ],
)
def test_default(
    name: str,
    device: str,
    rocm_build: bool,
    driver: bool,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "torch_is_built_for_rocm", lambda: rocm_build)
    if driver:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev/kfd").touch()
    assert isolated_by_default(name, device, tmp_path) == expected


@pytest.mark.parametrize(
    ("version_py", "expected"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'\n", True),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", False),
        ('hip = "5.2"\n', True),
        ("", False),
    ],
)
def test_how_torch_was_built_is_read_without_importing_it(
    version_py: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faketorch").mkdir()
    (tmp_path / "faketorch/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "faketorch/version.py").write_text(version_py)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(policy, "_TORCH", "faketorch")
    assert policy.torch_is_built_for_rocm() == expected
    assert "faketorch" not in sys.modules
    monkeypatch.setattr(policy, "_TORCH", "no_such_torch")
    assert not policy.torch_is_built_for_rocm()


def test_seam() -> None:
    null: Any = registry.get_backend("null")
    assert with_isolation(null) is null
    assert with_isolation(null, isolate="never") is null
    isolated = with_isolation(null, isolate="always")
    assert isinstance(isolated, IsolatedBackend)
    assert isolated.name == "null"
    assert with_isolation(isolated, isolate="always") is isolated
    assert isinstance(with_isolation(registry.get_backend("torch"), "rocm"), IsolatedBackend)
    assert with_isolation(registry.get_backend("torch"), "rocm", "never") is registry.get_backend("torch")
    with pytest.raises(UsageError, match="auto, always, never; got 'maybe'"):
        with_isolation(null, isolate="maybe")


def test_targets() -> None:
    null = registry.get_backend("null")
    assert target_of(null) == "kiln.backends.null:NullBackend"
    assert load_backend("null", "some.module:Other") is null  # a registered name counts first
    assert type(load_backend("mine", target_of(null))) is type(null)

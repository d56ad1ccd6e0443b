"""A bundle appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kiln.errors import StorageError
from kiln.exporters import publish
from kiln.exporters.publish import published

FILES = ("model_index.json", "unet/model.onnx", "unet/weights.safetensors", "kiln.json")


def fill(folder: Path, text: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with published(tmp_path / "deep/er/b") as folder:
        assert not (tmp_path / "deep/er/b").exists()
        fill(folder, "one")
    assert contents(tmp_path / "deep/er/b") == dict.fromkeys(FILES, "one")
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["b"]


def test_a_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    with published(tmp_path / "b") as folder:
        fill(folder, "one")
    with (
        pytest.raises(StorageError, match=r"exists; choose another name.*--overwrite"),
        published(tmp_path / "b"),
    ):
        pass
    with published(tmp_path / "b", overwrite=True) as folder:
        fill(folder, "two")
    assert contents(tmp_path / "b") == dict.fromkeys(FILES, "two")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_empty_folder_may_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    with published(Path()) as folder:
        fill(folder, "one")
    assert contents(tmp_path / "b") == dict.fromkeys(FILES, "one")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
def test_only_bundles_are_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "b"
    with published(tmp_path / "real") as folder:
        fill(folder, "one")
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("precious")
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to("real" if kind == "link" else "nowhere")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StorageError, match="is not a bundle"), published(target, overwrite=True):
        pass
    assert sorted(os.listdir(tmp_path)) == before


class _Faults:
    """Counts the calls that change the disk, and lets the n-th of them fail."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.count, self.fail_at, self.error = 0, -1, error
        for owner, name in ((Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (os, "fsync")):
            patch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.fail_at:
                raise self.error
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(143)], ids=repr
)
def test_a_failure_anywhere_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, overwrite: bool
) -> None:
    if overwrite:
        with published(tmp_path / "b") as folder:
            fill(folder, "one")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        faults = _Faults(patch, error)
        with published(tmp_path / "clean") as folder:
            fill(folder, "two")
    steps = faults.count + overwrite
    assert steps > 10
    shutil.rmtree(tmp_path / "clean")
    kind = StorageError if isinstance(error, OSError) else SystemExit
    for step in range(1, steps + 1):
        with monkeypatch.context() as patch:
            faults = _Faults(patch, error)
            faults.fail_at = step
            with pytest.raises(kind) as caught, published(tmp_path / "b", overwrite=overwrite) as folder:
                fill(folder, "two")
        if kind is StorageError:
            assert "the disk is full; free some space" in str(caught.value)
        assert contents(tmp_path) == before, step
        assert sorted(os.listdir(tmp_path)) == (["b"] if overwrite else []), step


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from kiln.exporters import publish

target, how = Path(sys.argv[1]), sys.argv[2]
if how == "between":
    real = Path.rename
    def rename(self, new):
        if self.name.endswith(".partial"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, new)
    Path.rename = rename
with publish.published(target, overwrite=True) as folder:
    (folder / "kiln.json").write_text("half")
    if how == "wait":
        print("ready", flush=True)
        time.sleep(60)
"""


def start(target: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(target), how], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_no_bundle(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path / "b", "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    assert process.returncode in (128 + number, -number, 1)
    left = os.listdir(tmp_path)
    if number != signal.SIGKILL:
        assert left == []
        return
    assert len(left) == 1
    assert left[0].startswith(".b.")
    assert left[0].endswith(".partial")
    with published(tmp_path / "other") as folder:
        fill(folder, "one")
    assert os.listdir(tmp_path) == ["other"]


def test_a_bundle_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    with published(tmp_path / "b") as folder:
        fill(folder, "one")
    with start(tmp_path / "b", "between") as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    with published(tmp_path / "other") as folder:
        fill(folder, "two")
    assert sorted(os.listdir(tmp_path)) == ["b", "other"]
    assert contents(tmp_path / "b") == dict.fromkeys(FILES, "one")


def test_what_others_write_is_not_touched(tmp_path: Path) -> None:
    here = f".b.{publish._HOST}.{os.getpid()}.01234567.partial"
    names = [here, ".b.deadbeef.1.01234567.partial", ".b.partial", f".b.{publish._HOST}.x.01234567.partial"]
    for name in names:
        (tmp_path / name).mkdir()
    with published(tmp_path / "b") as folder:
        fill(folder, "one")
    assert sorted(os.listdir(tmp_path)) == sorted(["b", *names])


def sizes_to_try(bundle: Path) -> list[int]:
    """A file-size limit just under each kind of file: the next larger ones cannot be written."""
    sizes = sorted({path.stat().st_size for path in bundle.rglob("*") if path.is_file()})
    return [sizes[0] - 1, *(sizes[len(sizes) * n // 4] - 1 for n in (1, 2, 3)), sizes[-1] - 1]


def test_the_disk_refusing_at_any_size_leaves_nothing(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The kernel refuses to grow a file: what a full disk does, at several points of an export."""
    code = "from kiln.cli import main; main()"
    out = tmp_path / "out"
    out.mkdir()
    for limit in sizes_to_try(tiny_bundle):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, "export", str(tiny_sd1), "-o", str(out / "b")],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 1, limit
        lines = done.stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: cannot write")
        assert "larger than the disk or a limit allows" in lines[0]
        assert os.listdir(out) == [], limit

"""A folder for others: complete, verifiable, the same each time, and silent about whose machine it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from kiln.benchmarks.records.leaks import Identity, find_leaks
from kiln.benchmarks.records.record import Record
from kiln.benchmarks.records.store import RECORDS, append_record, read_records
from kiln.benchmarks.records.submission import write_submission
from kiln.benchmarks.records.verify import verify_folder
from kiln.errors import UsageError

Make = Callable[..., Record]
NOBODY = Identity(())
MALLORY = Identity(("mallory", "blackbox"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_submission_is_complete_and_verifies(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    files = write_submission(results, out, identity=MALLORY)
    assert {str(file) for file in files} == set(content(out))
    assert {"README.md", "commands.txt", "versions.txt", "SHA256SUMS", RECORDS} <= set(content(out))
    assert len(list((out / "images").iterdir())) == 6
    assert verify_folder(out).findings == ()
    assert read_records(out) == tuple(sorted(read_records(results), key=lambda r: r.id))
    assert "kiln bench run quick --backend openvino" in (out / "commands.txt").read_text()
    assert "openvino==2026.4.1" in (out / "versions.txt").read_text()
    readme = (out / "README.md").read_text()
    assert "kiln bench verify ." in readme
    assert "| openvino fp32 | test@1 |" in readme
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_same_records_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    write_submission(results, tmp_path / "a", identity=NOBODY)
    lines = (results / RECORDS).read_bytes().splitlines(keepends=True)
    (results / RECORDS).write_bytes(b"".join(reversed(lines)))
    write_submission(results, tmp_path / "b", identity=NOBODY)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_any_changed_file_is_found(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    write_submission(results, out, identity=NOBODY)
    for name in content(out):
        if name == "SHA256SUMS":
            continue
        before = (out / name).read_bytes()
        (out / name).write_bytes(before + b"\n")
        assert any(name in f.text for f in verify_folder(out).findings if f.record == "SHA256SUMS"), name
        (out / name).write_bytes(before)
    (out / "commands.txt").unlink()
    (out / "SHA256SUMS").write_text((out / "SHA256SUMS").read_text() + f"{'0' * 64}  ../secret\n")
    texts = [finding.text for finding in verify_folder(out).findings]
    assert "commands.txt cannot be read: No such file or directory" in texts
    assert any(text.startswith("has a line that names no file of this folder") for text in texts)


LEAKS: list[tuple[str, dict[str, Any]]] = [
    ("the name 'mallory'", {"label": "openvino of Mallory"}),
    ("the name 'blackbox'", {"environment": {"cpu": "blackbox.local"}}),
    ("an absolute path", {"command": ("kiln", "bench", "run", "-m", "/srv/me/model.safetensors")}),
    ("an absolute path", {"environment": {"variables": {"X": "/data/cache"}}}),
    ("a home folder", {"command": ("kiln", "-o", "~/results")}),
    ("a path of Windows", {"remarks": ("cannot read C:\\models\\x",)}),
    ("a file address", {"remarks": ("file://x",)}),
    ("a mail address", {"label": "me@example.org"}),
    ("a hardware address", {"environment": {"nic": "00:1b:44:11:3a:b7"}}),
    ("a GPU's serial number", {"environment": {"gpus": [{"name": "GPU-12345678-abcd-0000"}]}}),
]


@pytest.mark.parametrize(("said", "changes"), LEAKS, ids=[f"{said} {i}" for i, (said, _) in enumerate(LEAKS)])
def test_what_tells_whose_machine_it_was_is_refused(
    make_record: Make, tmp_path: Path, said: str, changes: dict[str, Any]
) -> None:
    append_record(tmp_path / "results", replace(make_record(folder=tmp_path / "results"), **changes))
    with pytest.raises(UsageError, match=said):
        write_submission(tmp_path / "results", tmp_path / "out", identity=MALLORY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "red and/or green",
        "1/2",
        "https://example.org/a/b",
        "2026.4.1-22982-e213a147257-releases/2026/4",
        "kiln-bench/1",
        "text/plain",
        "ratio 3:4",
        "malloryx",
        json.dumps({"prompt": 'a "cat", 8 / 2'}),
    ],
)
def test_what_tells_nothing_passes(text: str) -> None:
    assert list(find_leaks(text, MALLORY)) == []


def test_this_machines_names_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "blackbox.example.org")
    monkeypatch.setattr("getpass.getuser", lambda: "mallory")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/root"))
    assert Identity.here().names == ("blackbox.example.org", "blackbox", "mallory")


def test_a_picture_with_words_in_it_is_refused(make_record: Make, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "results"
    record = make_record(folder=folder)
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "somebody")
    pixels = np.array(Image.open(folder / record.images[0].file))
    Image.fromarray(pixels).save(folder / "images/x.png", pnginfo=info)
    digest = hashlib.sha256((folder / "images/x.png").read_bytes()).hexdigest()
    (folder / "images/x.png").rename(folder / f"images/{digest[:16]}.png")
    first = replace(record.images[0], file=f"images/{digest[:16]}.png", sha256=digest)
    append_record(folder, replace(record, images=(first, *record.images[1:])))
    assert verify_folder(folder).findings == ()
    with pytest.raises(UsageError, match="the picture holds more than pixels: Author"):
        write_submission(folder, tmp_path / "out", identity=NOBODY)


def test_what_does_not_verify_is_refused(results: Path, tmp_path: Path) -> None:
    text = (results / RECORDS).read_text().replace('"median": ', '"median": 1', 1)
    (results / RECORDS).write_text(text)
    with pytest.raises(UsageError, match=r"does not verify: .* stats"):
        write_submission(results, tmp_path / "out", identity=NOBODY)


def test_torn_lines_and_folders_in_use_are_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty; give a folder that does not exist"):
        write_submission(results, results, identity=NOBODY)
    with (results / RECORDS).open("a") as file:
        file.write('{"id": "20')
    with pytest.raises(UsageError, match="was not written to its end"):
        write_submission(results, tmp_path / "out", identity=NOBODY)

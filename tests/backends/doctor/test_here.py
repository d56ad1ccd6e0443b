"""Making a System: of this machine, of a folder, and what a folder's facts may look like."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kiln.backends.doctor.amd_topology import amd_gpus
from kiln.backends.doctor.diagnosis import CHECKS, diagnose
from kiln.backends.doctor.finding import Finding, Verdict
from kiln.backends.doctor.here import FACTS, filesystem_type, sysroot_system, this_system, write_test
from kiln.backends.doctor.storage import check_hub
from kiln.backends.doctor.system import System, version_tuple
from kiln.errors import UsageError

# From a machine with btrfs, an NFS home with a space in its name, and a bind mount below it.
MOUNTS = """22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - btrfs /dev/vda rw
40 27 0:40 / /srv/my\\040files rw,relatime shared:2 master:3 - nfs4 server:/x rw
41 40 254:0 /scratch /srv/my\\040files/scratch rw - ext4 /dev/vdb rw
42 27 0:42 / /srvwork rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/cache", "btrfs"),
        ("/srv/my files/kiln", "nfs4"),
        ("/srv/my files/scratch/kiln", "ext4"),
        ("/srv/my", "btrfs"),
        ("/srvwork", "tmpfs"),
        ("/proc/self", "proc"),
    ],
)
def test_filesystem_type(folder: str, kind: str) -> None:
    assert filesystem_type(Path(folder), MOUNTS) == kind


def test_filesystem_type_of_no_table() -> None:
    assert filesystem_type(Path("/x"), "") == "unknown"
    assert filesystem_type(Path("/x"), "nonsense\n1 2 3\n") == "unknown"


def test_write_test_leaves_nothing_and_makes_nothing(tmp_path: Path) -> None:
    assert write_test(tmp_path / "not/yet/there") == ""
    assert list(tmp_path.iterdir()) == []


def test_write_test_says_why(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in write_test(file)
    if os.getuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in write_test(tmp_path / "locked")
    assert write_test(Path("/proc")) != ""


def test_this_machine() -> None:
    system = this_system(30)
    assert system.root == Path("/")
    assert system.user is not None
    assert system.user.uid == os.getuid()
    assert {"numpy", "onnx"} <= {d.name for d in system.distributions}
    assert system.node("/dev/null") is not None
    assert system.node("/dev/kiln-has-none") is None
    disk = system.disk(Path("/tmp"))
    assert disk is not None
    assert disk.free > 0
    assert "openvino" in system.backends


def test_the_files_of_this_machine_are_enough_for_every_check() -> None:
    # Nothing live: what is examined is this machine's own /proc and /sys, whatever it is.
    found = diagnose(replace(this_system(30), ask=None))
    assert [f for f in found.findings if f.id == "D-DOCTOR"] == []
    assert (found.live, found.engines) == (False, ())


def test_an_empty_folder_is_a_machine_of_which_nothing_is_known(tmp_path: Path) -> None:
    found = diagnose(sysroot_system(tmp_path))
    assert not found.live
    assert [f for f in found.findings if f.verdict is Verdict.FAILURE] == []


def test_a_folder_of_another_machine_has_not_this_ones_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    system = sysroot_system(tmp_path)
    assert (dict(system.environment), system.user, system.distributions) == ({}, None, ())
    assert system.cache.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read as JSON"), ("[]", "holds list, expected an object")]
)
def test_facts_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / FACTS).write_text(text)
    with pytest.raises(UsageError, match=says):
        sysroot_system(tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        sysroot_system(tmp_path / "nowhere")


def test_permissions_in_facts(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "user": {"name": "ada", "uid": 1000, "groups": [44]},
        "nodes": {
            "/a": {"gid": 44, "mode": "0660"},
            "/b": {"gid": 45, "mode": "0660"},
            "/c": {"gid": 45, "mode": "0666"},
            "/d": {"gid": 44, "mode": "0640"},
        },
    }
    (tmp_path / FACTS).write_text(json.dumps(facts))
    system = sysroot_system(tmp_path)
    access = {name: node.accessible for name in facts["nodes"] if (node := system.node(name))}
    assert access == {"/a": True, "/b": False, "/c": True, "/d": False}
    facts["user"]["uid"] = 0
    (tmp_path / FACTS).write_text(json.dumps(facts))
    nodes = [sysroot_system(tmp_path).node(name) for name in facts["nodes"]]
    assert [node is not None and node.accessible for node in nodes] == [True] * 4


def test_the_machines_of_these_tests_read_as_their_cards(machine: Any) -> None:
    names = ["gfx1201", "gfx1100", "gfx90a", "gfx942", "gfx90c", "gfx1036"]
    for name in names:
        machine.amd(name)
    machine.file(FACTS, json.dumps(machine.facts))
    found = amd_gpus(sysroot_system(machine.root))
    assert [gpu.gfx for gpu in found] == names
    assert [gpu.index for gpu in found] == list(range(6))
    assert [gpu.render for gpu in found] == [f"/dev/dri/renderD{128 + i}" for i in range(6)]
    assert {gpu.vram for gpu in found} == {24 * 2**30}


def test_ten_gpus_keep_their_order(machine: Any) -> None:
    for _ in range(11):
        machine.amd("gfx942")
    machine.file(FACTS, json.dumps(machine.facts))
    found = amd_gpus(sysroot_system(machine.root))
    assert [gpu.source.split("/")[-2] for gpu in found] == [str(n) for n in range(1, 12)]


def test_linked_weights_in_the_hub_are_named_with_a_way_out(machine: Any) -> None:
    hub = "home/ada/.cache/huggingface/hub/models--org--sd-onnx"
    machine.file(f"{hub}/blobs/1234", "weights")
    snapshot = machine.root / hub / "snapshots/abcdef/unet"
    snapshot.mkdir(parents=True)
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/1234")
    machine.file(FACTS, json.dumps(machine.facts))
    (finding,) = check_hub(sysroot_system(machine.root))
    assert finding.verdict is Verdict.OK
    assert finding.fix == (f"cp -rL {snapshot.parent} sd-onnx",)
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").write_text("a real file")
    assert check_hub(sysroot_system(machine.root))[0].verdict is Verdict.NOT_APPLICABLE


def test_a_check_that_stumbles_is_reported_and_the_others_run(tmp_path: Path) -> None:
    def check_nothing(system: System) -> list[Finding]:
        raise ZeroDivisionError("planted")

    found = diagnose(sysroot_system(tmp_path), checks=(check_nothing, *CHECKS))
    (first, *rest) = found.findings
    assert (first.id, first.verdict) == ("D-DOCTOR", Verdict.FAILURE)
    assert first.evidence == ("ZeroDivisionError: planted",)
    assert len(rest) >= len(CHECKS)
    assert found.exit_code == 1


def test_version_tuple() -> None:
    assert version_tuple("580.95.05") == (580, 95, 5)
    assert version_tuple("2.11.0+rocm7.2") == (2, 11, 0)
    assert version_tuple("git") == ()

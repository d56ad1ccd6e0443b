"""What an interrupted run leaves, and how the next one goes on from there.

``DIR/partial/run.json`` names the run and what it planned, ``<key>.json`` holds a configuration's record so
far, ``scratch`` its working files. All of it goes when the run is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import StorageError, UsageError
from ..records.forms import from_dict, to_dict
from ..records.record import Record
from .judging import failed_gate
from .lane import Lane
from .plan import Plan

_RUN = "run.json"


class Partials:
    """The folder ``partial`` of the results."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory / "partial"
        self.scratch = self.folder / "scratch"
        self.recordings = self.scratch / "recordings"
        self._plan: dict[str, Any] = {}

    def begin(self, plan: Plan, run: str, *, resume: bool) -> str:
        """Take up what is there, or begin anew; gives the run's id.

        Raises:
            UsageError: there is nothing to resume, or what is there is of another plan.
            StorageError: the folder cannot be written.
        """
        found = self._read()
        keys = [configuration.key for configuration in plan.configurations]
        if resume:
            if found is None:
                raise UsageError(f"{self.folder} holds no interrupted run; leave --resume out")
            if sorted(found["keys"]) != sorted(keys):
                command = " ".join(map(str, found.get("command", ())))
                raise UsageError(
                    f"{self.folder} was interrupted with other options ({command}); resume with the same, "
                    "or drop it with --fresh"
                )
            self._plan = found
            return str(found["run"])
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.scratch.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._plan = {"run": run, "keys": keys, "done": [], "command": list(plan.options.command)}
        self._write(_RUN, self._plan)
        return run

    def interrupted(self) -> dict[str, Any] | None:
        """The plan of a run that was not finished, None without one."""
        return self._read()

    def is_done(self, key: str) -> bool:
        """Whether the record of a configuration is written."""
        return key in self._plan["done"]

    def done(self, key: str) -> None:
        """The record of a configuration is written."""
        self._plan["done"].append(key)
        self._write(_RUN, self._plan)
        (self.folder / f"{key}.json").unlink(missing_ok=True)

    def keep(self, lane: Lane, record: Record) -> None:
        """Write what a lane has so far."""
        extra = {"cold_bytes": lane.cold_bytes, "remarks": lane.remarks}
        self._write(f"{lane.configuration.key}.json", {"record": to_dict(record), **extra})

    def restore(self, lane: Lane) -> None:
        """Give a lane what it had when the run was interrupted."""
        path = self.folder / f"{lane.configuration.key}.json"
        if not path.is_file():
            return
        raw = json.loads(path.read_text(encoding="utf-8"))
        record = from_dict(raw["record"])
        lane.samples, lane.warmups = list(record.samples), list(record.warmups)
        lane.phases, lane.earlier = record.phases, record.memory
        # Pictures are judged anew by the new process; gates of components need not be.
        gates = tuple(gate for gate in record.parity.gates if gate.level == "component")
        lane.parity = replace(record.parity, gates=gates, latents={}, diverges={})
        lane.reasons += [failed_gate(gate) for gate in gates if not gate.passed]
        lane.cold_bytes, lane.remarks = int(raw["cold_bytes"]), list(raw["remarks"])

    def finish(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and {"run", "keys", "done"} <= value.keys() else None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        beside = path.with_name(f".{name}.{os.getpid()}")
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def check_interrupted(directory: Path, *, resume: bool, fresh: bool) -> None:
    """Refuse to drop what an interrupted run has measured, unless asked to.

    Raises:
        UsageError: there is such a run, and the user says neither to go on nor to drop it.
    """
    found = Partials(directory).interrupted()
    if found is None or resume or fresh:
        return
    kept = len(list((directory / "partial").glob("*.json"))) - 1
    raise UsageError(
        f"{directory} holds the interrupted run {found['run']} ({len(found['done'])} of {len(found['keys'])} "
        f"configurations done, {kept} begun); go on with --resume, drop it with --fresh, or use another -o"
    )

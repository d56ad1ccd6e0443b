"""Calls of components kept as files: what went in, and what the reference gave back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import StorageError
from ...runtime.choosing import unet_shapes

INDEX = "calls.json"


@dataclass(frozen=True, eq=False)
class Call:
    """One call: the component, where it stems from (``prompt 1``, ``step 3 of 8``), arrays in and out.

    ``guided`` says that both halves of the UNet's batch have the same latents.
    """

    component: str
    feeds: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    where: str
    guided: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs, as a session is prepared for them."""
        given = {name: tuple(array.shape) for name, array in self.feeds.items()}
        if self.component != "unet":
            return given
        return unet_shapes(given["sample"][0], given["sample"][2:], given["encoder_hidden_states"][1:])


class CallWriter:
    """Writes calls into a folder as they come, so that none stays in memory; ``close`` makes it readable."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._rows: list[dict[str, object]] = []

    def write(self, call: Call) -> None:
        """Add one call."""
        file = f"{len(self._rows):03d}-{call.component}.npz"
        arrays = {f"in/{name}": array for name, array in call.feeds.items()}
        arrays |= {f"out/{name}": array for name, array in call.outputs.items()}
        np.savez(self.folder / file, **arrays)  # type: ignore[arg-type]  # numpy's stub: allow_pickle
        self._rows.append(
            {"component": call.component, "where": call.where, "guided": call.guided, "file": file}
        )

    def close(self, facts: Mapping[str, object]) -> None:
        """Write the list of all calls last; a folder without it is not finished."""
        text = json.dumps({"facts": dict(facts), "calls": self._rows})
        (self.folder / INDEX).write_text(text, encoding="utf-8")


def read_calls(folder: Path, component: str | None = None) -> Iterator[Call]:
    """The calls of a folder in order, of one component or of all; one at a time.

    Raises:
        StorageError: the folder holds no finished list, or a file of it cannot be read.
    """
    for row in _index(folder)["calls"]:
        if component in (None, row["component"]):
            try:
                with np.load(folder / row["file"], allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
            except (OSError, ValueError) as exc:
                raise StorageError(
                    f"{folder / row['file']} cannot be read ({exc}); delete {folder} and run again"
                ) from exc
            yield Call(
                row["component"],
                {name[3:]: array for name, array in arrays.items() if name.startswith("in/")},
                {name[4:]: array for name, array in arrays.items() if name.startswith("out/")},
                row["where"],
                bool(row["guided"]),
            )


def recorded_components(folder: Path) -> tuple[str, ...]:
    """Which components have calls, in the order of the first call of each."""
    return tuple(dict.fromkeys(row["component"] for row in _index(folder)["calls"]))


def recording_facts(folder: Path) -> dict[str, object]:
    """What was written at the end: how the reference ran."""
    return dict(_index(folder)["facts"])


def _index(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise StorageError(f"{folder} holds no finished recording ({exc}); run again") from exc
    return found

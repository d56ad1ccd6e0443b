"""The bundled model, copies of it with planted errors, and a workload of one short drawing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.records.record import ModelFacts, WorkloadFacts
from kiln.bundle import Bundle, open_bundle

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def emoji() -> Bundle:
    return open_bundle(ROOT / "models/emoji")


@pytest.fixture(scope="session")
def workload() -> WorkloadFacts:
    return WorkloadFacts(
        id="test@1",
        tier="quick",
        model=ModelFacts("emoji", "sd1", ""),
        prompts=("red apple", "cat face"),
        negative_prompt="",
        prompts_digest="",
        latents_digest="",
        seed=7,
        sampler="euler",
        schedule="normal",
        steps=2,
        cfg_scale=3.5,
        width=64,
        height=64,
        batch=1,
    )


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept for all tests of a session: the reference draws once."""
    return tmp_path_factory.mktemp("recordings")


Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def plant(emoji: Bundle) -> Callable[[Path, str, str, Change], Bundle]:
    """``plant(folder, component, tensor, change)``: a valid bundle whose one tensor is another."""

    def made(folder: Path, component: str, tensor: str, change: Change) -> Bundle:
        shutil.copytree(emoji.path, folder)
        file = folder / component / "weights.safetensors"
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8:start])[tensor]
        begin, end = entry["data_offsets"]
        values = np.frombuffer(raw, np.float16, (end - begin) // 2, start + begin)
        values[:] = change(values.reshape(entry["shape"]).astype(np.float32)).ravel()
        file.write_bytes(raw)
        sign(folder, f"{component}/weights.safetensors")
        return open_bundle(folder)

    return made


def sign(folder: Path, name: str) -> None:
    """Make the manifest vouch for a file that was changed."""
    manifest = json.loads((folder / "kiln.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "kiln.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def signed() -> Callable[[Path, str], None]:
    return sign

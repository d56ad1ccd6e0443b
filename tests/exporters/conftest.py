"""Shared by the exporters' tests: real key lists, and safetensors files with real names but no disk space."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

Shapes = dict[str, tuple[int, ...]]

KEYS = Path(__file__).parents[3] / "shared" / "data" / "keys"


@pytest.fixture(scope="session")
def key_list() -> Callable[[str], Shapes]:
    """Name and shape of each tensor of a real component, from ``keys/model-toolkit/<name>.txt``."""

    def read(name: str) -> Shapes:
        path = KEYS / "model-toolkit" / f"{name}.txt"
        if not path.exists():
            pytest.skip(f"real key lists are not at {path.parent}")
        found: Shapes = {}
        for line in path.read_text().splitlines():
            if line.strip():
                key, shape = line.split(" ", 1)
                found[key] = tuple(json.loads(shape))
        return found

    return read


@pytest.fixture(scope="session")
def sd1_ldm_keys() -> Shapes:
    """Every tensor of a real SD1 single file, from sd-mecha's model config."""
    path = KEYS / "sd-mecha" / "sd1-ldm.yaml"
    if not path.exists():
        pytest.skip(f"real key lists are not at {path.parent}")
    yaml = pytest.importorskip("yaml")
    components = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))[
        "components"
    ]
    found: Shapes = {}
    for tensors in components.values():
        found.update({name: tuple(fact["shape"]) for name, fact in tensors.items()})
    return found


@pytest.fixture(scope="session")
def write_sparse() -> Callable[..., Path]:
    """Write a float16 safetensors file whose tensors are zeros that take no disk space."""

    def write(
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        values: Mapping[str, np.ndarray] | None = None,
        dtypes: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        sizes = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1, "U8": 1}
        header: dict[str, object] = {"__metadata__": dict(metadata or {})}
        position, places = 0, {}
        for name, shape in shapes.items():
            dtype = (dtypes or {}).get(name, "F16")
            end = position + int(np.prod(shape, dtype=np.int64)) * sizes[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            places[name], position = position, end
        raw = json.dumps(header).encode()
        with open(path, "wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for name, value in (values or {}).items():
                stream.seek(8 + len(raw) + places[name])
                stream.write(value.tobytes())
            stream.truncate(8 + len(raw) + position)
        return path

    return write

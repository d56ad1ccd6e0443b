"""torch.compile: for fixed shapes only, and done before the first run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kiln.backends.base import PrepareOptions
from kiln.backends.torch_backend import TorchBackend
from kiln.errors import SessionError

torch = pytest.importorskip("torch")

CPU = PrepareOptions(device="cpu")


def test_compile_needs_all_shapes(make_case: Any, tmp_path: Path) -> None:
    options = replace(CPU, shapes={"sample": (2, 4, 8, 12)}, extra={"compile": True})
    with pytest.raises(SessionError, match="unet was given none for timestep, encoder_hidden_states"):
        TorchBackend().prepare(make_case("unet").save(tmp_path), options)


def has_compiler() -> bool:
    return bool(shutil.which(os.environ.get("CXX", "g++")))


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler, and there is none")
def test_compile(make_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    case = make_case("text_encoder")
    shapes = {name: array.shape for name, array in case.feeds.items()}
    options = replace(CPU, shapes=shapes, threads=1, extra={"compile": True})
    session = TorchBackend().prepare(case.save(tmp_path), options)
    assert (session.in_force.provider, session.in_force.settings["compile"]) == ("compile", "default")
    assert list((tmp_path / "inductor").rglob("*.so"))  # was compiled, and before the first run
    case.check(session.run(case.feeds))
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(case.feeds)

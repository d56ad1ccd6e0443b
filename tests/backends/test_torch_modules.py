"""Weights into the modules of torch: each tensor fits and has a place, and none is there twice."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kiln.backends import torch_backend
from kiln.backends.base import PrepareOptions
from kiln.backends.torch_backend import TorchBackend
from kiln.errors import SessionError

torch = pytest.importorskip("torch")

CPU = PrepareOptions(device="cpu")


def test_missing_tensor(case: Any, tmp_path: Path) -> None:
    source = case.save(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(SessionError, match="lacks 1 of the tensors"):
        TorchBackend().prepare(source, CPU)


def test_foreign_tensor(case: Any, tmp_path: Path) -> None:
    source = case.save(tmp_path, lambda tensors: tensors.update(foreign=torch.zeros(1)))
    with pytest.raises(SessionError, match="among them foreign"):
        TorchBackend().prepare(source, CPU)


def test_wrong_shape(case: Any, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name][1:]

    with pytest.raises(SessionError, match=r"has the shape \[.*asks for \["):
        TorchBackend().prepare(case.save(tmp_path, cut), CPU)


def test_position_ids_may_be_stored(make_case: Any, tmp_path: Path) -> None:
    """The graph of CLIP reads them from the file, so a bundle may hold them; the module makes its own."""
    case = make_case("text_encoder")
    name = "text_model.embeddings.position_ids"
    source = case.save(tmp_path, lambda tensors: tensors.update({name: torch.arange(20)[None]}))
    case.check(TorchBackend().prepare(source, CPU).run(case.feeds))


def test_unknown_class(make_case: Any, tmp_path: Path) -> None:
    case = make_case("unet")
    source = replace(case.save(tmp_path), config={"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(SessionError, match="FluxTransformer2DModel"):
        TorchBackend().prepare(source, CPU)


def test_quantized_weights_are_refused_by_name(case: Any, tmp_path: Path) -> None:
    def quantize(tensors: dict[str, Any]) -> None:
        name = next(k for k, v in tensors.items() if v.ndim > 1)
        tensors[name] = tensors[name].mul(127).to(torch.int8)
        tensors[name.replace("weight", "weight_scale")] = torch.ones(1)

    with pytest.raises(SessionError, match=rf"{case.component} is quantized: 1 of its .*: I8\)"):
        TorchBackend().prepare(case.save(tmp_path, quantize), CPU)


def test_weights_are_never_there_twice(
    make_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one tensor of the file is converted, no other one of them is alive."""
    import safetensors

    case = make_case("unet")
    source = case.save(tmp_path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self._file = open_file(*arguments, **keywords)

        def __enter__(self) -> Any:
            self._entered = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entered, name)

        def get_tensor(self, name: str) -> Any:
            nonlocal most
            tensor = self._entered.get_tensor(name)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

    open_file = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    session = TorchBackend().prepare(source, CPU)
    assert most <= 2  # the one before may still be bound to a name
    assert not alive
    alive.clear()
    most = 0
    monkeypatch.setattr("kiln.backends.torch_modules._placed", lambda tensor, *_: tensor)
    held = torch_backend.load_module(source, torch.float16, torch.device("cpu"))
    assert most > 50  # the watch sees tensors that are kept
    assert held
    case.module.half().float()
    case.check(session.run(case.feeds))

"""The torch backend against the modules themselves, for each component, storage type and precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kiln.backends import torch_backend
from kiln.backends.base import PrepareOptions
from kiln.backends.torch_backend import TorchBackend
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import SessionError

torch = pytest.importorskip("torch")

LIMIT = THRESHOLDS["component_relative_l2"]
CPU = PrepareOptions(device="cpu")


def test_values(case: Any, tmp_path: Path) -> None:
    session = TorchBackend().prepare(case.save(tmp_path), CPU)
    assert session.in_force.precision == "fp32"
    case.check(session.run(case.feeds))


def test_fp16_storage_is_computed_in_fp32(case: Any, tmp_path: Path) -> None:
    case.module.half().float()
    source = case.save(tmp_path, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    case.check(TorchBackend().prepare(source, CPU).run(case.feeds))


def test_a_wrong_weight_is_seen(case: Any, tmp_path: Path) -> None:
    """The check fails on a planted error: one matrix x1.1."""

    def plant(tensors: dict[str, Any]) -> None:
        name = [k for k, v in tensors.items() if v.ndim > 1][-1]
        tensors[name] = tensors[name] * 1.1

    session = TorchBackend().prepare(case.save(tmp_path, plant), CPU)
    with pytest.raises(AssertionError):
        case.check(session.run(case.feeds))


def test_bf16(case: Any, tmp_path: Path) -> None:
    session = TorchBackend().prepare(case.save(tmp_path), replace(CPU, precision="bf16"))
    assert session.in_force.precision == "bf16"
    for array, want in zip(session.run(case.feeds).values(), case.expected(), strict=True):
        error = relative_l2(array, want)
        assert not LIMIT.holds(error)  # really not fp32
        assert THRESHOLDS["component_bf16_relative_l2"].holds(error)


def test_fp16_where_it_is_forced(case: Any, tmp_path: Path) -> None:
    """On a processor torch computes fp16 slowly but right; without force it is refused where it is slow."""
    source = case.save(tmp_path)
    forced = replace(CPU, precision="fp16", extra={"force_precision": True})
    session = TorchBackend().prepare(source, forced)
    assert session.in_force.precision == "fp16"
    for array, want in zip(session.run(case.feeds).values(), case.expected(), strict=True):
        error = relative_l2(array, want)
        assert not LIMIT.holds(error)  # really not fp32
        assert THRESHOLDS["component_fp16_relative_l2"].holds(error)
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(SessionError, match="does not compute in fp16"):
            TorchBackend().prepare(source, replace(CPU, precision="fp16"))


def test_channels_last(case: Any, tmp_path: Path) -> None:
    """Another layout, the same numbers up to the order of summing; outputs are contiguous as ever."""
    session = TorchBackend().prepare(case.save(tmp_path), replace(CPU, extra={"channels_last": True}))
    assert session.in_force.settings["channels_last"] == (case.component != "text_encoder")
    outputs = session.run(case.feeds)
    case.check(outputs)
    assert all(array.flags.c_contiguous for array in outputs.values())


def test_settings_are_read_back(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_TUNABLEOP_ENABLED", "1")
    found = TorchBackend().prepare(case.save(tmp_path), replace(CPU, threads=1)).in_force
    assert (found.device, found.precision, found.threads, found.provider) == ("cpu", "fp32", 1, "eager")
    kinds = {"text_encoder": "sdpa", "unet": "AttnProcessor2_0"}
    tiny = case.config.get("_class_name") == "AutoencoderTiny"  # has no attention
    wanted = kinds.get(case.component, "none" if tiny else "AttnProcessor2_0")
    assert found.settings["attention"] == wanted
    assert found.settings["mkldnn.matmul.fp32_precision"] == "ieee"
    assert found.settings["env.PYTORCH_TUNABLEOP_ENABLED"] == "1"
    assert found.settings["compile"] is False


def test_a_module_that_is_not_what_was_asked_for(
    make_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("unet")
    load = torch_backend.load_module
    monkeypatch.setattr(torch_backend, "load_module", lambda *a, **k: load(*a, **k).bfloat16())
    with pytest.raises(SessionError, match=r"on cpu in fp32; torch reports \['cpu'\] in \['bf16'\]"):
        TorchBackend().prepare(case.save(tmp_path), CPU)

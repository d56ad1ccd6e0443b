"""What the torch backend does on a graphics card, on one whose memory is the processor's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import torch_backend
from kiln.backends.base import PrepareOptions
from kiln.backends.torch_backend import TorchBackend
from kiln.backends.torch_devices import TorchDevice
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BackendUnavailable, SessionError

torch = pytest.importorskip("torch")

CPU = PrepareOptions(device="cpu")


GPU = TorchDevice("rocm", "rocm", 0, "Radeon", "gfx1100", ("fp16", "bf16", "fp32"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose memory is the processor's: all that is done for one is done, and noted."""
    done: list[str] = []
    monkeypatch.setattr(torch_backend, "choose_device", lambda *_: (GPU, ""))
    monkeypatch.setattr(torch_backend, "native_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: done.append(f"synchronize {index}"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    return done


def test_on_a_gpu(gpu: list[str], case: Any, tmp_path: Path) -> None:
    session = TorchBackend().prepare(case.save(tmp_path), PrepareOptions())
    found = session.in_force
    assert (found.device, found.precision) == ("rocm", "fp16")
    assert found.settings["toolkit"] == "ROCm 6.4.1"
    assert found.settings["cudnn.conv.fp32_precision"] == "ieee"
    assert found.settings["sdpa"] == "cudnn,flash,mem_efficient,math"
    assert gpu == []
    for array, want in zip(session.run(case.feeds).values(), case.expected(), strict=True):
        assert array.dtype == np.float32
        assert THRESHOLDS["component_fp16_relative_l2"].holds(relative_l2(array, want))
    assert gpu == ["synchronize 0"]
    session.close()
    assert gpu == ["synchronize 0", "empty_cache"]


@pytest.mark.usefixtures("gpu")
def test_the_vae_of_sdxl_on_a_gpu(make_case: Any, tmp_path: Path) -> None:
    case = make_case("kl decoder")
    case.config |= {"scaling_factor": 0.13025, "force_upcast": True}
    found = TorchBackend().prepare(case.save(tmp_path), PrepareOptions(precision="fp16")).in_force
    assert found.precision == "fp32"
    assert "force_upcast" in str(found.settings["fp32_because"])


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_runs_out_of_memory(make_case: Any, tmp_path: Path) -> None:
    session = TorchBackend().prepare(make_case("unet").save(tmp_path), PrepareOptions())

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB.")

    session._call = fail
    with pytest.raises(SessionError, match=r"on rocm .Radeon.: HIP out of memory.*use a smaller size"):
        session.run(make_case("unet").feeds)


def test_a_gpu_that_is_not_there(make_case: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="no device 'rocm:1'; it has: cpu"):
        TorchBackend().prepare(make_case("unet").save(tmp_path), replace(CPU, device="rocm:1"))

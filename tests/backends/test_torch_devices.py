"""Which devices torch offers, from a made-up ``torch.cuda``: there is no GPU where these tests run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from kiln.backends.torch_backend import TorchBackend
from kiln.backends.torch_devices import choose_device, list_devices, why_no_gpu, why_no_kernels
from kiln.errors import BackendUnavailable

torch = pytest.importorskip("torch")

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Makes torch a build for CUDA or ROCm that sees GPUs of the architectures given."""
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)

    def properties(arch: str) -> SimpleNamespace:
        if arch.startswith("gfx"):
            return SimpleNamespace(
                name=f"Radeon {arch}", gcnArchName=f"{arch}:sramecc-:xnack-", major=11, minor=0
            )
        major, minor = divmod(int(arch.removeprefix("sm_")), 10)
        return SimpleNamespace(name=f"GeForce {arch}", major=major, minor=minor)

    def make(
        *gpus: str, hip: str | None = None, archs: tuple[str, ...] = (), bf16: bool = True, warns: str = ""
    ) -> None:
        def is_available() -> bool:
            if warns:  # as torch._C._cuda_getDeviceCount does for an old driver
                warnings.warn(warns, UserWarning, stacklevel=2)
            return bool(gpus)

        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
        for name, value in {
            "is_available": is_available,
            "device_count": lambda: len(gpus),
            "get_device_properties": lambda index: properties(gpus[index]),
            "get_arch_list": lambda: list(archs or gpus),
            "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
            "device": lambda index: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return make


def test_this_machine() -> None:
    [*_, cpu] = TorchBackend().devices()
    assert cpu.id == "cpu"
    assert cpu.precisions[:2] == ("fp32", "bf16")
    assert ("fp16" in cpu.precisions) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_nvidia(pretend: Pretend) -> None:
    pretend("sm_86", "sm_120")
    assert [(d.id, d.name) for d in TorchBackend().devices()[:2]] == [
        ("cuda", "GeForce sm_86"),
        ("cuda:1", "GeForce sm_120"),
    ]
    assert TorchBackend().devices()[-1].id == "cpu"
    assert TorchBackend().devices()[0].precisions == ("fp16", "bf16", "fp32")


def test_emulated_bf16_is_not_offered(pretend: Pretend) -> None:
    pretend("sm_75", bf16=False)
    assert TorchBackend().devices()[0].precisions == ("fp16", "fp32")


def test_amd(pretend: Pretend) -> None:
    pretend("gfx1100", "gfx1030", hip="6.4.1", archs=("gfx90a:xnack-", "gfx1100", "gfx1030"))
    assert [d.id for d in TorchBackend().devices()] == ["rocm", "rocm:1", "cpu"]
    assert [d.arch for d in list_devices(torch)] == ["gfx1100", "gfx1030", ""]


@pytest.mark.parametrize(
    ("asked", "found"),
    [("auto", "rocm"), ("rocm", "rocm"), ("ROCm:0", "rocm"), ("rocm:1", "rocm:1"), ("cpu", "cpu")],
)
def test_choice(pretend: Pretend, asked: str, found: str) -> None:
    pretend("gfx1100", "gfx1100", hip="6.4.1")
    assert choose_device(torch, asked)[0].id == found


@pytest.mark.parametrize(
    ("gpus", "hip", "asked", "told"),
    [
        (("gfx1100",), "6.4.1", "cuda", "it has: rocm, cpu .*is built for ROCm 6.4.1"),
        (("sm_86",), None, "rocm", r"it has: cuda, cpu .*is built for CUDA 12\.8"),
        (("sm_86",), None, "cuda:1", "no device 'cuda:1'; it has: cuda, cpu$"),
        ((), None, "cuda", "no NVIDIA GPU or driver"),
        ((), "6.4.1", "rocm", "no AMD GPU .*/dev/kfd"),
        ((), None, "tpu", "no device 'tpu'; it has: cpu$"),
    ],
)
def test_no_such_device(
    pretend: Pretend, gpus: tuple[str, ...], hip: str | None, asked: str, told: str
) -> None:
    pretend(*gpus, hip=hip)
    with pytest.raises(BackendUnavailable, match=told):
        choose_device(torch, asked)


def test_a_build_for_processors_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailable, match="is built without CUDA and ROCm"):
        choose_device(torch, "cuda")


def test_an_old_driver_is_told_by_a_warning_only(pretend: Pretend) -> None:
    pretend(warns="CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).")
    assert "driver on your system is too old" in why_no_gpu(torch)
    with pytest.raises(BackendUnavailable, match="driver on your system is too old"):
        choose_device(torch, "cuda")


def test_a_driver_that_fails(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("gfx1100", hip="6.4.1")

    def fail() -> bool:
        raise RuntimeError("Unexpected error from hipGetDeviceCount(). Error 101:\ninvalid device ordinal")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert [d.id for d in TorchBackend().devices()] == ["cpu"]
    with pytest.raises(BackendUnavailable, match="Error 101: invalid device ordinal"):
        choose_device(torch, "rocm")


def test_a_gpu_without_kernels_is_passed_over_aloud(
    pretend: Pretend, caplog: pytest.LogCaptureFixture
) -> None:
    pretend("gfx1031", "gfx1100", hip="6.4.1", archs=("gfx1030", "gfx1100"))
    assert [d.id for d in TorchBackend().devices()] == ["rocm:1", "cpu"]
    device, passed_over = choose_device(torch, "auto")
    assert device.id == "rocm:1"
    assert "rocm: this build of torch has no kernels for gfx1031" in passed_over
    assert "gfx1031" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"gfx1031.* or try HSA_OVERRIDE_GFX_VERSION=10\.3\.0"):
        choose_device(torch, "rocm")


# CUDA C++ programming guide: a binary runs on its own major version from its minor version on, PTX later too.
@pytest.mark.parametrize(
    ("arch", "built_for", "runs"),
    [
        ("sm_86", "sm_80", True),
        ("sm_80", "sm_86", False),
        ("sm_75", "sm_80 sm_90", False),
        ("sm_61", "sm_75 sm_80 compute_80", False),
        ("sm_120", "sm_80 compute_90", True),
        ("sm_120", "sm_80 sm_90", False),
        ("sm_90", "sm_90a", True),
        ("sm_100", "sm_90a", False),
        ("sm_103", "sm_100a", False),
        ("sm_103", "sm_100f", True),
        ("gfx1100", "gfx1030 gfx1100", True),
        ("gfx90a", "gfx90a:xnack-", True),
        ("gfx1103", "gfx1100", False),
        ("gfx1100", "", True),
    ],
)
def test_kernels(arch: str, built_for: str, runs: bool) -> None:
    why = why_no_kernels(arch, built_for.split())
    assert (not why) == runs
    assert runs or arch in why


@pytest.mark.parametrize(
    ("arch", "built_for", "advice"),
    [
        ("gfx1032", ["gfx1030"], "HSA_OVERRIDE_GFX_VERSION=10.3.0"),
        ("gfx1103", ["gfx1100"], "HSA_OVERRIDE_GFX_VERSION=11.0.0"),
        ("gfx1103", ["gfx1030"], "install a build of torch for gfx1103"),
        ("gfx1010", ["gfx1030"], "install a build of torch for gfx1010"),
    ],
)
def test_advice_for_amd(
    arch: str, built_for: list[str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    assert advice in why_no_kernels(arch, built_for)
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "9.0.0")
    assert "HSA_OVERRIDE_GFX_VERSION=9.0.0 is set: unset it" in why_no_kernels(arch, built_for)


def test_devices_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from kiln.backends import engine

    monkeypatch.setattr(engine, "_failures", {"torch": "torch is installed but does not load: gone"})
    found: Any = TorchBackend().devices()
    assert found == ()

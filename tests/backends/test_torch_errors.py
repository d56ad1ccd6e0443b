"""What CUDA, HIP and torch.compile say when they fail becomes one line with advice."""

from __future__ import annotations

import pytest

from kiln.backends.torch_devices import TorchDevice
from kiln.backends.torch_errors import advice_for, torch_errors
from kiln.errors import BackendUnavailable, SessionError, UsageError

torch = pytest.importorskip("torch")

GPU = TorchDevice("rocm:1", "rocm", 1, "Radeon RX 6700 XT", "gfx1031", ("fp16", "fp32"))
CPU = TorchDevice("cpu", "cpu", 0, "a processor", "", ("fp32",))

# As torch printed them: TheRock#1054, pytorch#164346, pytorch's own documentation of asynchronous errors.
OUT_OF_MEMORY = (
    "HIP out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 15.24 GiB of which 15.09 "
    "GiB is free. Of the allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting PYTORCH_HIP_ALLOC_CONF="
    "expandable_segments:True to avoid fragmentation."
)
INVALID = (
    "HIP error: invalid device function\nHIP kernel errors might be asynchronously reported at some other "
    "API call, so the stacktrace below might be incorrect.\nFor debugging consider AMD_SERIALIZE_KERNEL=3\n"
    "Compile with `TORCH_USE_HIP_DSA` to enable device-side assertions."
)
NO_IMAGE = (
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might ..."
)


@pytest.mark.parametrize(
    ("native", "ours", "told"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            SessionError,
            "09 GiB is free; use a smaller size or batch",
        ),
        (
            RuntimeError(INVALID),
            BackendUnavailable,
            "invalid device function; this build of torch has no kernels",
        ),
        (RuntimeError(NO_IMAGE), BackendUnavailable, "no kernels for gfx1031, only for gfx1030, gfx1100"),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            SessionError,
            "context is lost",
        ),
        (RuntimeError("HIP error: unspecified launch failure"), SessionError, "child process"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), SessionError, "smaller size"),
        (RuntimeError("No HIP GPUs are available"), BackendUnavailable, "/dev/kfd"),
        (RuntimeError("miopenStatusUnknownError"), SessionError, "MIOPEN_FIND_MODE"),
        (RuntimeError("CUDA driver version is insufficient"), BackendUnavailable, "update the GPU's driver"),
    ],
)
def test_texts(native: Exception, ours: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx1030", "gfx1100"])
    with pytest.raises(ours, match=told) as caught, torch_errors(torch, GPU, "running unet"):
        raise native
    text = str(caught.value)
    assert text.startswith("torch failed while running unet on rocm:1 (Radeon RX 6700 XT): ")
    assert "\n" not in text
    assert "PyTorch, and 0 bytes" not in text
    assert "asynchronously" not in text
    assert caught.value.__cause__ is native


def test_an_architecture_that_is_in_the_list_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx1031"])
    with (
        pytest.raises(BackendUnavailable, match="names among gfx1031; its libraries lack it"),
        torch_errors(torch, GPU, "running unet"),
    ):
        raise RuntimeError(INVALID)


def test_unknown_texts_keep_to_the_common_map() -> None:
    with (
        pytest.raises(SessionError, match=r"^torch failed while running unet on rocm:1: strange$"),
        torch_errors(torch, GPU, "running unet"),
    ):
        raise RuntimeError("strange")
    assert advice_for(RuntimeError("strange")) is None
    with pytest.raises(ZeroDivisionError), torch_errors(torch, GPU, "running unet"):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="mine"), torch_errors(torch, GPU, "running unet"):
        raise UsageError("mine")


def test_a_processor_gets_no_advice_for_gpus() -> None:
    with (
        pytest.raises(SessionError, match=r"out of memory .*close other programs") as caught,
        torch_errors(torch, CPU, "running unet"),
    ):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")
    assert "GPU" not in str(caught.value)


def test_torch_compile_without_a_compiler() -> None:
    """As seen with CXX naming no file: torch wraps its InvalidCxxCompiler in an InductorError."""
    exc = pytest.importorskip("torch._inductor.exc")
    native = exc.InductorError(exc.InvalidCxxCompiler(), None)
    with (
        pytest.raises(SessionError, match=r"No working C\+\+ compiler .*install it or leave compile out"),
        torch_errors(torch, CPU, "compiling unet"),
    ):
        raise native

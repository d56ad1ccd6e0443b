"""What engines raise becomes Kiln's errors."""

from __future__ import annotations

import pytest

from kiln.backends.errors_map import ORT_ERRORS, engine_errors, kiln_class, one_line
from kiln.errors import BackendError, BackendUnavailable, SessionError, UsageError


def test_every_exception_of_onnxruntime_is_mapped() -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    found = {
        name
        for name, value in vars(native).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert found
    assert found - set(ORT_ERRORS) == set()
    for name in found:
        with (
            pytest.raises(
                ORT_ERRORS[name], match="onnxruntime failed while running unet: it broke"
            ) as caught,
            engine_errors("onnxruntime", "running unet"),
        ):
            raise getattr(native, name)("[ONNXRuntimeError] : 1 : FAIL : it broke")
        assert type(caught.value.__cause__) is getattr(native, name)


def test_an_unknown_exception_of_onnxruntime_is_not_hidden() -> None:
    """The test above fails when ONNX Runtime adds a class: an unknown one has no mapping."""
    new = type("BrandNew", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    assert kiln_class(new("x")) is None
    with pytest.raises(new), engine_errors("onnxruntime", "running unet"):
        raise new("x")


@pytest.mark.parametrize(
    ("native", "ours"),
    [
        (RuntimeError("x"), SessionError),
        (NotImplementedError("x"), SessionError),
        (ValueError("x"), SessionError),
        (TypeError("x"), SessionError),
        (OSError("x"), SessionError),
        (KeyError("x"), SessionError),
        (MemoryError(), SessionError),
        (ImportError("x"), BackendUnavailable),
    ],
)
def test_builtin(native: Exception, ours: type[BackendError]) -> None:
    with pytest.raises(ours) as caught, engine_errors("openvino", "compiling unet"):
        raise native
    assert type(caught.value) is ours
    assert caught.value.__cause__ is native


def test_torch_out_of_memory() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(SessionError, match="out of memory"), engine_errors("torch", "running unet"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_safetensors() -> None:
    from safetensors import SafetensorError

    with pytest.raises(SessionError, match="header too large"), engine_errors("torch", "loading unet"):
        raise SafetensorError("header too large")


@pytest.mark.parametrize("text", ["std::bad_alloc", "Failed to allocate memory for requested buffer", ""])
def test_out_of_memory_says_what_to_do(text: str) -> None:
    native = RuntimeError(text) if text else MemoryError()
    advice = r"out of memory \(.+\); use a smaller size or batch"
    with pytest.raises(SessionError, match=advice), engine_errors("openvino", "running unet"):
        raise native


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1",
        "CUDA failure 100: no CUDA-capable device is detected",
        "HIP failure 700: hipErrorIllegalAddress",
        "Failed to get a WebGPU adapter: No supported adapters",
        "Failed to load library libp.so with error: libmigraphx_c.so.3: cannot open shared object file",
        "Please install TensorRT libraries as mentioned in the GPU requirements page",
    ],
)
def test_no_device_is_unavailable(text: str) -> None:
    with pytest.raises(BackendUnavailable), engine_errors("onnxruntime-cuda", "loading unet"):
        raise RuntimeError(text)
    with pytest.raises(SessionError), engine_errors("onnxruntime-cuda", "loading unet"):
        raise RuntimeError("CUDA failure 9: invalid configuration argument")


def test_kilns_own_errors_pass() -> None:
    with pytest.raises(UsageError, match=r"^mine$"), engine_errors("openvino", "running unet"):
        raise UsageError("mine")


def test_others_pass() -> None:
    for other in (KeyboardInterrupt(), ZeroDivisionError(), AttributeError("a bug")):
        with pytest.raises(type(other)), engine_errors("openvino", "running unet"):
            raise other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Exception from src/inference/src/cpp/core.cpp:217:\nException from src/plugin.cpp:74:\n"
            "Check 'x' failed at a.cpp:3:\nwhat   happened\n\n",
            "what happened",
        ),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : bad : input", "bad : input"),
        # As onnxruntime-gpu 1.31.1 and onnxruntime-migraphx 1.27.1 say them, with shorter names.
        (
            "/onnxruntime_src/cuda/info.cc:63 static Info From(const Options&) [ONNXRuntimeError] : 1 : "
            'FAIL : utils.h:182 Parse Unknown provider option: "no_such".\n',
            'utils.h:182 Parse Unknown provider option: "no_such".',
        ),
        (
            "/a/cuda_call.cc:154 void CudaCall(ERRTYPE) [with ERRTYPE = cudaError] CUDA failure 35: CUDA "
            "driver is insufficient ; GPU=-1 ; hostname=vm ; file=/a/b.cc",
            "CUDA failure 35: CUDA driver is insufficient",
        ),
        (
            "/src/x/bridge.cc:1988 Provider& Library::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load "
            "library /x/libp.so with error: libm.so.3: cannot open shared object file",
            "Failed to load library /x/libp.so with error: libm.so.3: cannot open shared object file",
        ),
        ("", "RuntimeError"),
        ("a" * 999, "a" * 297 + "..."),
    ],
)
def test_one_line(text: str, expected: str) -> None:
    assert one_line(RuntimeError(text)) == expected

"""Turn what an engine throws into Kiln's errors, with one readable line and the original as cause.

Only calls into an engine belong inside ``engine_errors``: a ``TypeError`` from a binding means that the
engine refused an argument, whereas one from our own code is a bug and has to stay visible.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BackendError, BackendUnavailable, KilnError, SessionError

# The classes of onnxruntime.capi.onnxruntime_pybind11_state by name: they derive from Exception
# directly, and importing them here would import the engine.
ORT_ERRORS: dict[str, type[BackendError]] = {
    "DeviceReset": BackendUnavailable,
    "EPFail": SessionError,
    "EngineError": SessionError,
    "Fail": SessionError,
    "InvalidArgument": SessionError,
    "InvalidGraph": SessionError,
    "InvalidProtobuf": SessionError,
    "ModelLoadCanceled": SessionError,
    "ModelLoaded": SessionError,
    "ModelRequiresCompilation": SessionError,
    "NoModel": SessionError,
    "NoSuchFile": SessionError,
    "NotFound": SessionError,
    "NotImplemented": SessionError,
    "RuntimeException": SessionError,
}

# What openvino, torch and the bindings of all three raise. torch.OutOfMemoryError is a RuntimeError.
_BUILTIN: tuple[tuple[type[Exception], type[BackendError]], ...] = (
    (ImportError, BackendUnavailable),
    (MemoryError, SessionError),
    (RuntimeError, SessionError),
    (ValueError, SessionError),
    (TypeError, SessionError),
    (KeyError, SessionError),
    (OSError, SessionError),
)

# Also what CUDA's libraries, HIP and MIGraphX call it.
_OUT_OF_MEMORY = (
    "out of memory",
    "failed to allocate",
    "bad_alloc",
    "can't allocate memory",
    "status_alloc_failed",
    "hiperroroutofmemory",
    "memory not available",
)
# What providers say when a library or the device is not there, or went away: numbers are CUDA's and HIP's.
_NOT_HERE = re.compile(
    r"(CUDA|HIP) failure (35|100|101|700|719)\b|no (CUDA|ROCm)-capable device|Failed to get a WebGPU adapter"
    r"|Failed to load library|Please install TensorRT libraries"
)
_LINE_LIMIT = 300
# ONNX Runtime puts a source position, and the signature of the function in it, before what happened.
_POSITION = re.compile(r"/\S+\.(cc|cpp|cu|h|hpp):\d+ ")
_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_FAILURE = re.compile(r"(CUDA|CUDNN|CUBLAS|HIP|MIOPEN) failure \d+: ")


def kiln_class(error: BaseException) -> type[BackendError] | None:
    """The Kiln error that stands for a native one, None for what no engine is known to raise."""
    native = type(error)
    if native.__module__.startswith("onnxruntime."):
        return ORT_ERRORS.get(native.__name__)
    if native.__name__ == "SafetensorError":  # derives from Exception; what the torch backend reads with
        return SessionError
    for base, ours in _BUILTIN:
        if isinstance(error, base):
            return ours
    return None


def one_line(error: BaseException) -> str:
    """What a native exception says, in one line: without source positions and repeated prefixes."""
    kept = []
    for line in str(error).splitlines():
        line = line.strip()
        if line and not line.startswith(("Exception from ", "Check '")):
            kept.append(line)
    text = " ".join(" ".join(kept).split()) or type(error).__name__
    text = _without_position(text)
    return text if len(text) <= _LINE_LIMIT else text[: _LINE_LIMIT - 3] + "..."


def _without_position(text: str) -> str:
    """``/a/b.cc:7 void f() [ONNXRuntimeError] : 2 : INVALID_ARGUMENT : bad`` becomes ``bad``.

    Errors are wrapped in errors, so the last mark counts. Without one, what follows a signature cannot be
    told from it, and only the path goes.
    """
    for mark in (_FAILURE, _STATUS):
        found = list(mark.finditer(text))
        if found:
            text = text[found[-1].start() if mark is _FAILURE else found[-1].end() :]
            break
    return _POSITION.sub("", text).partition(" ; GPU=")[0]


@contextmanager
def engine_errors(engine: str, action: str) -> Iterator[None]:
    """Map native exceptions of the calls inside.

    Args:
        engine: the backend's name, for the message.
        action: what was being done, e.g. ``"loading unet/model.onnx"``.

    Raises:
        BackendUnavailable: the engine cannot be imported or its device went away.
        SessionError: everything else an engine raises, out of memory included.
    """
    try:
        yield
    except KilnError:
        raise
    except Exception as error:
        ours = kiln_class(error)
        if ours is None:
            raise
        line = one_line(error)
        if _NOT_HERE.search(line):
            ours = BackendUnavailable
        if isinstance(error, MemoryError) or any(mark in line.lower() for mark in _OUT_OF_MEMORY):
            line = f"out of memory ({line}); use a smaller size or batch, or close other programs"
        raise ours(f"{engine} failed while {action}: {line}") from error

"""OpenVINO itself: found, imported without its model converter, and started once for the process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from .engine import Engine
from .errors_map import engine_errors

NAME = "openvino"
ENGINE = Engine("openvino", ("openvino", "openvino-nightly"), (2026, 2), "cpu")

_CONVERTER = "openvino.tools.ovc"


@cache
def core() -> Any:
    """The one Core of this process.

    Raises:
        BackendUnavailable: OpenVINO is missing, too old or broken.
    """
    with _without_converter():
        module = ENGINE.load()
    with engine_errors(NAME, "starting"):
        made = module.Core()
        made.set_property({"ENABLE_MMAP": True})
    return made


def version() -> str:
    """OpenVINO's own version, with its build number."""
    return str(ENGINE.load().get_version())


@contextmanager
def _without_converter() -> Iterator[None]:
    """Import OpenVINO without its model converter, which Kiln does not use.

    ``import openvino`` tries to import the converter and goes on without it. The converter takes more than
    half of the import time, and importing it reports to Intel's telemetry over the network. Whoever needs
    ``openvino.convert_model`` in the same process still gets it.
    """
    if _CONVERTER in sys.modules or "openvino" in sys.modules:
        yield
        return
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # makes the import raise ImportError
    try:
        yield
    finally:
        del sys.modules[_CONVERTER]
        module = sys.modules.get("openvino")
        if isinstance(module, ModuleType) and not hasattr(module, "convert_model"):
            module.convert_model = _convert_model  # type: ignore[attr-defined]


def _convert_model(*args: Any, **kwargs: Any) -> Any:
    """OpenVINO's converter, imported when somebody calls it."""
    return importlib.import_module(_CONVERTER).convert_model(*args, **kwargs)

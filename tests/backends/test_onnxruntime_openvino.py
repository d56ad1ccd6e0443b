"""OpenVINO as a plug-in of ONNX Runtime, on a stand-in: registered once, and refused without a device."""

from __future__ import annotations

from typing import Any

import pytest

from kiln.backends import registry
from kiln.backends.base import GraphSource
from kiln.errors import BackendUnavailable

pytest.importorskip("onnxruntime")


def test_the_plug_in_without_a_device(
    fake: Any, source: GraphSource, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen on a processor of AMD: the library loads and lists nothing."""
    monkeypatch.setattr(fake, "get_ep_devices", list)
    backend = registry.get_backend("onnxruntime-openvino")
    assert backend.devices() == ()
    with pytest.raises(BackendUnavailable, match=r"offers no device here.*use the openvino backend"):
        backend.prepare(source, toy.FIXED)


def test_the_plug_in_is_registered_once(fake: Any, source: GraphSource, toy: Any) -> None:
    backend = registry.get_backend("onnxruntime-openvino")
    for _ in range(2):
        backend.prepare(source, toy.FIXED)
    assert fake.plugged == ["OpenVINOExecutionProvider"]

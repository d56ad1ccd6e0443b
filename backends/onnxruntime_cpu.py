"""Run components with ONNX Runtime's CPU provider, in fp32; shapes may stay dynamic."""

from __future__ import annotations

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, PrepareOptions
from .cpu import describe_cpu
from .feeds import check_options
from .onnxruntime_readback import CPU
from .onnxruntime_session import OrtSession, Plan, open_session
from .onnxruntime_wheel import ENGINE
from .session import refuse_extra

NAME = "onnxruntime"


class ONNXRuntimeBackend:
    """ONNX Runtime on the processor."""

    name = NAME

    def probe(self) -> Availability:
        """Whether a recent ONNX Runtime is installed; it is not imported."""
        return ENGINE.probe()

    def devices(self) -> tuple[Device, ...]:
        """The processor, or nothing when ONNX Runtime does not load."""
        try:
            ENGINE.load()
        except BackendUnavailable:
            return ()
        return (Device("cpu", describe_cpu().name, ("fp32",)),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> OrtSession:
        """Load one component.

        Raises:
            BackendUnavailable: ONNX Runtime is not there, or the device is another than ``cpu``.
            SessionError: ONNX Runtime refuses the graph or an option, or another precision than fp32 is
                asked for.
        """
        check_options(source.component, options)
        refuse_extra(self.name, options)
        if options.device.lower() not in ("auto", "cpu"):
            raise BackendUnavailable(f"the onnxruntime backend runs on cpu only, got {options.device!r}")
        if options.precision not in ("auto", "fp32"):
            raise SessionError(
                f"ONNX Runtime computes in fp32 on a processor, got {options.precision}; use auto or fp32, "
                "or the openvino backend for bf16"
            )
        return OrtSession(source, open_session(ENGINE.load(), source, options, Plan(NAME, CPU, "cpu")))

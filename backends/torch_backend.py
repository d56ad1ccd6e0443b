"""Run components as diffusers' and transformers' own modules, on the processor, on CUDA and on ROCm.

No graph is involved. On the processor in fp32 this is the reference that every other backend is measured
against; on a GPU it is what remains when an engine does not know the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .cpu import threads_are_limited, usable_cores
from .engine import Engine
from .errors_map import engine_errors
from .feeds import check_options, contract_of
from .session import CheckedSession, fixed_shapes
from .torch_devices import TorchDevice, choose_device, list_devices, native_device
from .torch_errors import NAME, torch_errors
from .torch_modules import call_module, load_module
from .torch_numerics import Numerics, choose_numerics, exact_fp32, read_back

if TYPE_CHECKING:
    import torch

ENGINE = Engine("torch", ("torch",), (2, 10), "export")


class TorchBackend:
    """Torch on the processor and on the GPUs that its build supports."""

    name = NAME

    def probe(self) -> Availability:
        """Whether torch, diffusers and transformers are installed; none is imported."""
        found = ENGINE.probe()
        for package in ("diffusers", "transformers"):
            other = Engine(package, (package,), (0,), "export").probe()
            if found.available and not other.available:
                return Availability(False, other.reason, found.version)
        return found

    def devices(self) -> tuple[Device, ...]:
        """The GPUs that this build of torch has kernels for, then the processor; nothing when torch does
        not load.
        """
        try:
            torch = ENGINE.load()
            with engine_errors(NAME, "looking for devices"):
                found = list_devices(torch)
        except (BackendUnavailable, SessionError):
            return ()
        return tuple(Device(one.id, one.name, one.precisions) for one in found if not one.missing)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> TorchSession:
        """Build the module that ``source.config`` describes and load ``source.weights_path`` into it.

        ``options.extra`` may hold:

        * ``compile``: true, or a mode of torch.compile; compiles here, for exactly ``options.shapes``;
        * ``channels_last``: the layout of convolutions; by default where it is faster;
        * ``tf32``: let GPUs round fp32 products to TF32;
        * ``force_precision``: compute in exactly ``options.precision``, even where that is known to
          overflow (the VAE of SDXL in fp16) or to be slow (fp16 on a processor).

        Raises:
            BackendUnavailable: torch or diffusers is not there, or the device is not.
            SessionError: the config names a class that Kiln does not know, the tensors are not exactly
                those of the module, or the device does not compute in the precision.
        """
        check_options(source.component, options)
        found = self.probe()
        if not found.available:
            raise BackendUnavailable(found.reason)
        torch = ENGINE.load()
        device, passed_over = choose_device(torch, options.device)
        numerics = choose_numerics(source, device, options)
        _set_threads(torch, options)
        native = native_device(torch, device)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[numerics.precision]
        with torch_errors(torch, device, f"loading {source.component}"):
            module = load_module(source, dtype, native, channels_last=numerics.channels_last)
        call = self._callable(torch, source, module, numerics, options)
        with exact_fp32(torch, numerics.tf32):
            in_force = _in_force(torch, module, device, native, numerics, passed_over)
        session = TorchSession(source, in_force, module, options, device, numerics, call)
        if numerics.compile_mode:
            session.warm_up(options)
        return session

    def _callable(
        self, torch: Any, source: GraphSource, module: Any, numerics: Numerics, options: PrepareOptions
    ) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        def call(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
            return call_module(source.component, module, inputs)

        if not numerics.compile_mode:
            return call
        free = [port.name for port in contract_of(source.component).inputs if port.name not in options.shapes]
        if free:
            raise SessionError(
                f"torch.compile makes code for fixed shapes; {source.component} was given none for "
                f"{', '.join(free)}"
            )
        return torch.compile(call, mode=numerics.compile_mode, dynamic=False)


class TorchSession(CheckedSession):
    """One module in evaluation mode on its device."""

    def __init__(
        self,
        source: GraphSource,
        in_force: InForce,
        module: Any,
        options: PrepareOptions,
        device: TorchDevice,
        numerics: Numerics,
        call: Callable[[Mapping[str, Any]], tuple[Any, ...]],
    ) -> None:
        super().__init__(source, in_force, fixed_shapes(source, options))
        self._module, self._call = module, call
        self._device, self._numerics = device, numerics

    def warm_up(self, options: PrepareOptions) -> None:
        """Run once on zeros, so that torch.compile works and fails here and not in the first step."""
        feeds = {port.name: np.zeros(options.shapes[port.name], port.dtype) for port in self.contract.inputs}
        with engine_errors(NAME, f"compiling {self.component}"):
            self._run(feeds)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with (
            torch_errors(torch, self._device, f"running {self.component}"),
            exact_fp32(torch, self._numerics.tf32),
            _no_silent_eager(torch) if self._numerics.compile_mode else nullcontext(),
            torch.inference_mode(),
        ):
            outputs = self._call(self._inputs(feeds))
            # On the device, where half precision is half the traffic; then wait until that is done.
            single = [tensor.to(torch.float32).contiguous() for tensor in outputs]
            if self._device.is_gpu:
                torch.cuda.synchronize(self._device.index)
            arrays = [tensor.cpu().numpy() for tensor in single]
        return {port.name: array for port, array in zip(self.contract.outputs, arrays, strict=True)}

    def _inputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        import torch

        parameter = next(self._module.parameters())
        inputs = {}
        for name, array in feeds.items():
            tensor = torch.from_numpy(np.array(array))  # a copy, because torch warns of read-only arrays
            # A timestep in bf16 would be off by up to 2; its embedding is made in fp32 and cast.
            dtype = parameter.dtype if tensor.is_floating_point() and tensor.ndim else tensor.dtype
            wide = self._numerics.channels_last and tensor.ndim == 4
            layout = torch.channels_last if wide else torch.preserve_format
            inputs[name] = tensor.to(parameter.device).to(dtype=dtype, memory_format=layout)
        return inputs

    def _release(self) -> None:
        self._module = None
        del self._call
        if self._device.is_gpu:
            import torch

            with torch_errors(torch, self._device, f"freeing {self.component}"):
                torch.cuda.empty_cache()  # else torch keeps the memory, and another engine finds none


def _set_threads(torch: Any, options: PrepareOptions) -> None:
    threads = options.threads or (usable_cores() if threads_are_limited() else 0)
    if threads:
        torch.set_num_threads(threads)  # for the whole process: torch knows no other way


def _no_silent_eager(torch: Any) -> Any:
    """After some recompilations torch.compile gives up and runs uncompiled; here that is an error."""
    return torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)


def _in_force(
    torch: Any, module: Any, device: TorchDevice, native: Any, numerics: Numerics, passed_over: str
) -> InForce:
    """What is in force, from the module and torch.

    Raises:
        SessionError: a tensor of the module is elsewhere, or of another type, than was asked for.
    """
    places = {parameter.device for parameter in module.parameters()}
    types = {parameter.dtype for parameter in module.parameters()}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    precisions = {names.get(dtype, str(dtype)) for dtype in types}
    if places != {native} or precisions != {numerics.precision}:
        raise SessionError(
            f"the module should be on {native} in {numerics.precision}; torch reports "
            f"{sorted(map(str, places))} in {sorted(precisions)}"
        )
    settings = read_back(torch, module, device, numerics)
    if passed_over:
        settings["passed_over"] = passed_over
    provider = "compile" if numerics.compile_mode else "eager"
    return InForce(
        NAME,
        torch.__version__,
        provider,
        device.id,
        precisions.pop(),
        torch.get_num_threads(),
        settings=settings,
    )

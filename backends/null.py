"""The smallest backend: outputs of the right shape, and no work.

It shows what a backend has to do, and it measures what the runtime itself costs. Outputs are a ramp
from -1 to 1 rather than zeros, so that checks for NaN and for flat images pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, SessionError
from .base import Availability, Device, GraphSource, InForce, PrepareOptions
from .feeds import check_options, contract_of
from .session import CheckedSession, fixed_shapes, refuse_extra

VERSION = "1"


class NullBackend:
    """No engine at all."""

    name = "null"

    def probe(self) -> Availability:
        """Always there."""
        return Availability(True, "", VERSION)

    def devices(self) -> tuple[Device, ...]:
        """One device that is none."""
        return (Device("none", "no computation", ("fp32",)),)

    def prepare(self, source: GraphSource, options: PrepareOptions) -> NullSession:
        """Load nothing.

        Raises:
            BackendUnavailable: another device than ``none`` was asked for.
            SessionError: the component is unknown, or an option is.
        """
        check_options(source.component, options)
        refuse_extra(self.name, options)
        if options.device not in ("auto", "none"):
            raise BackendUnavailable(f"the null backend has no device {options.device!r}; it has: none")
        if options.precision not in ("auto", "fp32"):
            raise SessionError(f"the null backend has auto and fp32, not {options.precision!r}")
        in_force = InForce(self.name, VERSION, "none", "none", "fp32", 1)
        return NullSession(source, in_force, options)


class NullSession(CheckedSession):
    """Gives a ramp for every output."""

    def __init__(self, source: GraphSource, in_force: InForce, options: PrepareOptions) -> None:
        super().__init__(source, in_force, fixed_shapes(source, options))
        self._config = source.config
        self._ramps: dict[tuple[int, ...], np.ndarray] = {}

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        axes = _input_axes(self.component, feeds) | _output_axes(self.component, self._config, feeds)
        return {
            port.name: self._ramp(tuple(axes[axis] for axis in port.axes)) for port in self.contract.outputs
        }

    def _release(self) -> None:
        self._ramps.clear()

    def _ramp(self, shape: tuple[int, ...]) -> np.ndarray:
        if shape not in self._ramps:
            self._ramps[shape] = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        return self._ramps[shape].copy()


def _input_axes(component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The size of every axis that the inputs name."""
    ports = contract_of(component).inputs
    return {
        axis: size for port in ports for axis, size in zip(port.axes, feeds[port.name].shape, strict=True)
    }


def _output_axes(
    component: str, config: Mapping[str, Any], feeds: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """The size of every axis that only the outputs have, from the network's config."""
    if component.startswith("text_encoder"):
        return {"hidden_size": _number(component, config, "hidden_size")}
    if component == "unet":
        return {"out_channels": _number(component, config, "out_channels")}
    factor = _vae_factor(component, config)
    if component == "vae_decoder":
        height, width = (size * factor for size in feeds["latent_sample"].shape[2:])
        channels = _number(component, config, "out_channels")
        return {"image_channels": channels, "image_height": height, "image_width": width}
    height, width = (size // factor for size in feeds["sample"].shape[2:])
    # AutoencoderKL gives mean and log variance, AutoencoderTiny the latents themselves.
    values = 1 if config.get("_class_name") == "AutoencoderTiny" else 2
    channels = _number(component, config, "latent_channels") * values
    return {"latent_parameters": channels, "latent_height": height, "latent_width": width}


def _vae_factor(component: str, config: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel along one side: two for each level but the last."""
    levels = config.get("decoder_block_out_channels") or _entry(component, config, "block_out_channels")
    return int(2 ** (len(levels) - 1))


def _number(component: str, config: Mapping[str, Any], key: str) -> int:
    return int(_entry(component, config, key))


def _entry(component: str, config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise SessionError(f"the config of {component} has no {key!r}, which its output shape follows from")
    return config[key]

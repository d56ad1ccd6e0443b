"""Parity: how near the outputs of a configuration are to a reference's, from single components to images."""

from .components import component_gates, measure_components
from .explaining import explain
from .latents import latent_gates
from .limits import run_precision
from .pictures import image_gates
from .reference import plan_reference
from .trial import Trial

__all__ = [
    "Trial",
    "component_gates",
    "explain",
    "image_gates",
    "latent_gates",
    "measure_components",
    "plan_reference",
    "run_precision",
]

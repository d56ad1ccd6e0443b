"""Kiln bakes LoRAs into Stable Diffusion weights and runs the result as ONNX graphs anywhere."""

__version__ = "0.1.0"

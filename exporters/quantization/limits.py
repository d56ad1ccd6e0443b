"""The limits of int8; ``benchmarks/parity.py`` has them in its table, and exporters reach them here."""

from __future__ import annotations

from ...metrics import Threshold

# The gate draws eight prompts (three with a large network) in eight steps with int8 and with the same weights
# in fp32. The bundled model, the worst of eight: int8 46.9 dB and SSIM 0.999, int8-full 42.1 dB and 0.996.
# Full-size SD1.5 with random weights, 512x512, the worst of three: int8-full 29.3 dB and 0.987.
INT8_LIMITS: dict[str, Threshold] = {
    "int8_image_psnr_db": Threshold(
        33.0, False, "images of int8 weights against fp32, the worst of the gate"
    ),
    "int8_image_ssim": Threshold(0.97, False, "the same, structural similarity"),
    "int8_full_image_psnr_db": Threshold(26.0, False, "images of int8 weights and activations against fp32"),
    "int8_full_image_ssim": Threshold(0.94, False, "the same, structural similarity"),
    # A calibration against a model it was not measured on: uniform values that grew by 2 % lose as much.
    "int8_saturated_share": Threshold(0.02, True, "share of a tensor's values that its range cuts off"),
    "int8_range_ratio": Threshold(4.0, True, "extreme of a tensor against the bound of its range"),
}

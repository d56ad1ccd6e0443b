"""How near two outputs are, and how near they have to be: metrics and the one table of thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """``||actual - expected|| / ||expected||`` in float64 over all elements."""
    a, e = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), np.finfo(np.float64).tiny))


def psnr_db(actual: np.ndarray, expected: np.ndarray, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal images."""
    mse = np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


@dataclass(frozen=True)
class Threshold:
    """A limit, whether it bounds from above or below, and the run that justified it."""

    limit: float
    at_most: bool
    why: str

    def holds(self, value: float) -> bool:
        """Whether ``value`` is on the right side; NaN never is."""
        return value <= self.limit if self.at_most else value >= self.limit


# Keyed by what is compared. Tests and benchmarks take limits from here and nowhere else.
THRESHOLDS: dict[str, Threshold] = {
    "sampler_latents_relative_l2": Threshold(1e-4, True, "samplers against diffusers, fp32"),
    "sampler_image_psnr_db": Threshold(45.0, False, "final image against diffusers, fp32"),
    "backend_image_psnr_db": Threshold(40.0, False, "same seed on two backends, fp32"),
    "component_relative_l2": Threshold(1e-4, True, "one component against its torch module, fp32"),
    "component_bf16_relative_l2": Threshold(3e-2, True, "one component in bf16 against fp32"),
    "baked_weight_relative_l2": Threshold(1e-6, True, "baked fp32 weights against fuse_lora and lycoris"),
    "noise_absolute": Threshold(1e-6, True, "normal values against torch.randn"),
    "schedule_sigma_relative": Threshold(
        1e-4,
        True,
        "levels up to 20 steps against diffusers' float32 tables, which interpolate sigma, not ln(sigma)",
    ),
    "schedule_timestep_absolute": Threshold(
        1e-2, True, "fractional timesteps against diffusers' float32 tables"
    ),
    # What the benchmarks are held to: ratios to another way of doing the same in the same run, and, where a
    # user waits, seconds on two cores.
    "export_peak_rss_gb": Threshold(1.0, True, "peak RSS of exporting full-size SD1.5, GB of 1e9 bytes"),
    "export_heavy_imports": Threshold(0, True, "how many of torch, diffusers, ... kiln export imported"),
    "export_time_ratio": Threshold(0.1, True, "export against optimum-intel's of the same folder, one run"),
    "rebake_time_ratio": Threshold(3.0, True, "kiln bake of another LoRA against copying the same bytes"),
    "unet_step_time_ratio": Threshold(1.0, True, "UNet step against optimum-intel's, in one OpenVINO"),
    "unet_step_relative_l2": Threshold(5e-2, True, "the same step in bf16: two orders of rounding"),
    "startup_first_s": Threshold(10.0, True, "kiln generate, bundled model, 20 steps, empty cache, seconds"),
    "startup_second_s": Threshold(4.0, True, "the same with a filled cache, seconds"),
    "startup_before_first_step_s": Threshold(1.5, True, "of that, seconds before the first step"),
}

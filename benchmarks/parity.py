"""How near two outputs are, and how near they have to be: metrics and the one table of thresholds."""

from __future__ import annotations

from ..exporters.quantization.limits import INT8_LIMITS
from ..metrics import Threshold, psnr_db, relative_l2, ssim

__all__ = ["THRESHOLDS", "Threshold", "psnr_db", "relative_l2", "ssim"]

# Parity of a configuration with its fp32 reference, keyed by precision, level and metric. Measured by
# ``benchmarks/parity_table.py``, tables in docs/parity.md; each is the worst of the bundled model (64x64, 8
# steps, 3 prompts) and full-size SD1.5 with random weights (256x256, 4 steps, 2 prompts). Limits of
# components lie 1.4 (bf16) to 4 times above what was measured, in fp32 30 times; those of latents and images
# further, because runs part with every further step.
_PARITY: dict[str, Threshold] = {
    # Measured with openvino, onnxruntime: components 3.2e-6, latents 6.6e-6, images 81 dB.
    "parity_fp32_component_relative_l2": Threshold(1e-4, True, "a component in fp32 on another engine"),
    "parity_fp32_component_cosine": Threshold(0.999999, False, "the same, angle"),
    "parity_fp32_latents_relative_l2": Threshold(1e-3, True, "latents after the last step, fp32"),
    "parity_fp32_latents_cosine": Threshold(0.99999, False, "the same, angle"),
    "parity_fp32_image_psnr_db": Threshold(50.0, False, "images in fp32 on another engine"),
    "parity_fp32_image_ssim": Threshold(0.995, False, "the same, structural similarity"),
    # Measured with openvino and torch: components 2.2e-2 (the last step) and 0.99976, latents 3.1e-2 and
    # 0.9995, images 38.6 dB and 0.9977.
    "parity_bf16_component_relative_l2": Threshold(3e-2, True, "a component in bf16 against fp32"),
    "parity_bf16_component_cosine": Threshold(0.999, False, "the same, angle"),
    "parity_bf16_latents_relative_l2": Threshold(0.1, True, "latents after the last step, bf16"),
    "parity_bf16_latents_cosine": Threshold(0.995, False, "the same, angle"),
    "parity_bf16_image_psnr_db": Threshold(30.0, False, "images in bf16 against fp32"),
    "parity_bf16_image_ssim": Threshold(0.97, False, "the same, structural similarity"),
    # The bundled model only, with torch on a processor that was made to: components 1.3e-3, latents 2.0e-3,
    # images 60.8 dB and 0.9998. No card was measured.
    "parity_fp16_component_relative_l2": Threshold(5e-3, True, "a component in fp16 against fp32"),
    "parity_fp16_component_cosine": Threshold(0.9999, False, "the same, angle"),
    "parity_fp16_latents_relative_l2": Threshold(2e-2, True, "latents after the last step, fp16"),
    "parity_fp16_latents_cosine": Threshold(0.9995, False, "the same, angle"),
    "parity_fp16_image_psnr_db": Threshold(40.0, False, "images in fp16 against fp32"),
    "parity_fp16_image_ssim": Threshold(0.99, False, "the same, structural similarity"),
    # Both with int8 weights against the fp16 bundle in fp32, openvino in fp32 and bf16 and onnxruntime:
    # components 2.5e-2 (a text encoder) and 0.9998, latents 4.1e-2 and 0.9992; images as the gate of int8.
    "parity_int8_component_relative_l2": Threshold(3e-2, True, "a component with int8 weights against fp32"),
    "parity_int8_component_cosine": Threshold(0.9995, False, "the same, angle"),
    "parity_int8_latents_relative_l2": Threshold(0.12, True, "latents after the last step, int8 weights"),
    "parity_int8_latents_cosine": Threshold(0.995, False, "the same, angle"),
    "parity_int8_image_psnr_db": INT8_LIMITS["int8_image_psnr_db"],
    "parity_int8_image_ssim": INT8_LIMITS["int8_image_ssim"],
    # The same of int8-full: components 5.5e-2 and 0.9985, latents 0.13 and 0.9911, images 26.7 dB and 0.973.
    # Two engines that run one int8-full bundle differ as much (0.11, 0.9937, 32.4 dB, 0.977), because a value
    # on the edge may round to either side.
    "parity_int8_full_component_relative_l2": Threshold(8e-2, True, "a component of int8-full against fp32"),
    "parity_int8_full_component_cosine": Threshold(0.998, False, "the same, angle"),
    "parity_int8_full_latents_relative_l2": Threshold(0.25, True, "latents after the last step, int8-full"),
    "parity_int8_full_latents_cosine": Threshold(0.98, False, "the same, angle"),
    "parity_int8_full_image_psnr_db": INT8_LIMITS["int8_full_image_psnr_db"],
    "parity_int8_full_image_ssim": INT8_LIMITS["int8_full_image_ssim"],
}

# Keyed by what is compared. Tests and benchmarks take limits from here and nowhere else.
THRESHOLDS: dict[str, Threshold] = {
    "sampler_latents_relative_l2": Threshold(1e-4, True, "samplers against diffusers, fp32"),
    "sampler_image_psnr_db": Threshold(45.0, False, "final image against diffusers, fp32"),
    "backend_image_psnr_db": Threshold(40.0, False, "same seed on two backends, fp32"),
    "component_relative_l2": Threshold(1e-4, True, "one component against its torch module, fp32"),
    "component_bf16_relative_l2": Threshold(3e-2, True, "one component in bf16 against fp32"),
    # tests/backends/test_torch_backend.py on its tiny networks: at most 2.5e-3 (the decoder of the KL VAE).
    "component_fp16_relative_l2": Threshold(5e-3, True, "one component in fp16 against fp32"),
    # tests/backends/lowerings on the tiny SD1, each against its canonical graph in fp32: measured 2.5e-6,
    # 4.4e-3 and 3.6e-2 (the VAE's decoder), where onnx's reference rounds after every single operator.
    "lowered_relative_l2": Threshold(1e-5, True, "a lowered graph that computes in fp32"),
    "lowered_fp16_relative_l2": Threshold(1e-2, True, "a graph typed fp16, rounded after each operator"),
    "lowered_bf16_relative_l2": Threshold(5e-2, True, "a graph typed bf16, rounded after each operator"),
    "baked_weight_relative_l2": Threshold(1e-6, True, "baked fp32 weights against fuse_lora and lycoris"),
    # tests/exporters/lora_tools/test_extract_properties.py: at most 6.7e-6; a planted error is 1e-2 and more.
    "extracted_energy_absolute": Threshold(3e-5, True, "energy that an extracted LoRA restores, as stated"),
    "noise_absolute": Threshold(1e-6, True, "normal values against torch.randn"),
    "schedule_sigma_relative": Threshold(
        1e-4,
        True,
        "levels up to 20 steps against diffusers' float32 tables, which interpolate sigma, not ln(sigma)",
    ),
    "schedule_timestep_absolute": Threshold(
        1e-2, True, "fractional timesteps against diffusers' float32 tables"
    ),
    **_PARITY,
    # What the benchmarks are held to: ratios to another way of doing the same in the same run, and, where a
    # user waits, seconds on two cores.
    "export_peak_rss_gb": Threshold(1.0, True, "peak RSS of exporting full-size SD1.5, GB of 1e9 bytes"),
    "export_heavy_imports": Threshold(0, True, "how many of torch, diffusers, ... kiln export imported"),
    "export_time_ratio": Threshold(0.1, True, "export against optimum-intel's of the same folder, one run"),
    "rebake_time_ratio": Threshold(3.0, True, "kiln bake of another LoRA against copying the same bytes"),
    "adapters_peak_rss_gb": Threshold(1.5, True, "peak RSS of baking ten adapters of ten families, GB"),
    "adapters_time_ratio": Threshold(3.0, True, "baking those ten against baking one of them"),
    "unet_step_time_ratio": Threshold(1 / 1.1, True, "UNet step against optimum-intel's, in one OpenVINO"),
    "compile_time_ratio": Threshold(1.5, True, "preparing the SD1.5 UNet against OpenVINO's own format"),
    "compile_cached_s": Threshold(2.0, True, "the same from the cache of compiled models, seconds"),
    "run_peak_rss_gb": Threshold(4.0, True, "peak RSS of kiln generate, SD1.5 fp16 at 512x512, GB"),
    "run_int8_peak_rss_gb": Threshold(2.5, True, "the same from an int8 bundle, GB"),
    "unet_step_relative_l2": Threshold(5e-2, True, "the same step in bf16: two orders of rounding"),
    "startup_first_s": Threshold(10.0, True, "kiln generate, bundled model, 20 steps, empty cache, seconds"),
    "startup_second_s": Threshold(4.0, True, "the same with a filled cache, seconds"),
    "startup_before_first_step_s": Threshold(1.5, True, "of that, seconds before the first step"),
    # What int8 weights keep in floats. Measured by ``benchmarks/int8_weights.py``: see docs/parity.md.
    "int8_kept_values_share": Threshold(0.07, True, "values of a UNet's weights that int8 keeps in floats"),
    "int8_kept_error_share": Threshold(0.5, False, "squared error that they would make, of all weights'"),
    # The gate of int8: exporters may not import benchmarks, so the rows stand where both reach them.
    **INT8_LIMITS,
    "int8_decode_time_ratio": Threshold(0.8, True, "decoding by the VAE in int8 against its fp16 bundle"),
    "int8_step_time_ratio": Threshold(1 / 1.1, True, "int8 UNet step against optimum-intel's int8 by NNCF"),
    "int8_size_ratio": Threshold(0.55, True, "bytes of an int8 bundle of SD1.5 against its fp16 bundle"),
    "int8_peak_rss_gb": Threshold(2.5, True, "peak RSS of drawing with SD1.5 in int8, GB of 1e9 bytes"),
}

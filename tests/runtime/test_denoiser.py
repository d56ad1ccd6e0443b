"""Guidance and prediction types against diffusers' own arithmetic."""

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import BundleError, InvalidOutputError, UsageError
from kiln.runtime.denoiser import GuidedDenoiser
from kiln.runtime.schedules import NoiseSchedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

NEAR = THRESHOLDS["sampler_latents_relative_l2"]
SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = NoiseSchedule.from_config(SD)
RANDOM = np.random.default_rng(0)
COND, UNCOND = (RANDOM.standard_normal((2, 7, 4)).astype(np.float32) for _ in range(2))
UNIT = RANDOM.standard_normal((2, 4, 6, 5)).astype(np.float32)
X = 3 * UNIT


def unet(sample, timestep, states):
    """Depends on each image's own states, and on the timestep."""
    return np.tanh(sample) * states.sum((1, 2))[:, None, None, None] + np.float32(timestep / 1000)


def diffusers_denoised(x, timestep, scale, prediction_type):
    """StableDiffusionPipeline's step up to Euler's estimate of x0: negative first, then the prompt."""
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD, prediction_type=prediction_type, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(timesteps=[timestep])
    told = scheduler.timesteps[0]
    sample = scheduler.scale_model_input(torch.from_numpy(np.concatenate([x, x])), told).numpy()
    output = unet(sample, np.float32(told), np.concatenate([UNCOND, COND]))
    negative, positive = torch.from_numpy(output).chunk(2)
    guided = negative + scale * (positive - negative)
    return scheduler.step(guided, told, torch.from_numpy(x)).pred_original_sample.numpy()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [999, 500, 20])
@pytest.mark.parametrize("scale", [7.0, 1.5])
def test_denoised_is_diffusers(prediction_type, timestep, scale):
    sigma = float(TABLE.timestep_to_sigma(timestep))
    x = UNIT * np.float32(np.sqrt(1 + sigma**2))
    expected = diffusers_denoised(x, timestep, scale, prediction_type)
    ours = GuidedDenoiser(unet, COND, UNCOND, scale, TABLE.sigma_to_timestep, prediction_type)
    actual = ours(x, sigma)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == np.float32
    assert NEAR.holds(relative_l2(actual, expected))
    swapped = GuidedDenoiser(unet, UNCOND, COND, scale, TABLE.sigma_to_timestep, prediction_type)
    assert not NEAR.holds(relative_l2(swapped(x, sigma), expected))
    assert not NEAR.holds(relative_l2(ours(x, sigma * 1.01), expected))


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_the_negative_prompt_costs_nothing(scale):
    batches = []

    def counting(sample, timestep, states):
        batches.append(len(sample))
        return unet(sample, timestep, states)

    plain = GuidedDenoiser(counting, COND, UNCOND, scale, TABLE.sigma_to_timestep)
    np.testing.assert_array_equal(
        plain(X, 3.0), GuidedDenoiser(counting, COND, None, 1.0, TABLE.sigma_to_timestep)(X, 3.0)
    )
    assert batches == [2, 2]


def test_what_cannot_be():
    with pytest.raises(BundleError, match="epsilon or v_prediction"):
        GuidedDenoiser(unet, COND, UNCOND, 7.0, TABLE.sigma_to_timestep, "flow")
    with pytest.raises(UsageError, match="negative prompt"):
        GuidedDenoiser(unet, COND, None, 7.0, TABLE.sigma_to_timestep)
    with pytest.raises(UsageError, match="negative prompt"):
        GuidedDenoiser(unet, COND, UNCOND[:1], 7.0, TABLE.sigma_to_timestep)


def test_infinity_is_refused():
    def broken(sample, timestep, states):
        output = unet(sample, timestep, states)
        output[1, 0, 0, 0] = np.inf
        return output

    with pytest.raises(InvalidOutputError, match=r"unet gave 1 values of 480 .* timestep 500"):
        GuidedDenoiser(broken, COND, UNCOND, 7.0, TABLE.sigma_to_timestep)(
            X, float(TABLE.timestep_to_sigma(500))
        )

"""Samplers against diffusers' schedulers: the same model, the same noise, latents after 1, 5 and 20 steps.

Two kinds of oracle:

* native: a diffusers scheduler configured for the same schedule, nothing patched (Euler with linspace
  spacing, with and without Karras; Euler ancestral; DDIM with leading spacing, our sampler on its timesteps).
* tabled: diffusers' DDIM and DPM-Solver++ round timesteps to integers, and DDIM's steps must be equally long,
  so they cannot walk k-diffusion's ``normal`` and ``karras`` levels. They are given a training table
  (``trained_betas``) that consists of just these levels and take every step of it; the model is called with
  the true, fractional timesteps. The stepping code is diffusers', untouched. The levels themselves are
  compared with diffusers in test_schedules.py.
"""

import math

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import InvalidOutputError, UsageError
from kiln.runtime.denoiser import GuidedDenoiser
from kiln.runtime.noise import make_generators, make_noise_sampler
from kiln.runtime.samplers import SAMPLERS, resolve_sampler
from kiln.runtime.schedules import SCHEDULES, NoiseSchedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

NEAR = THRESHOLDS["sampler_latents_relative_l2"]
SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = NoiseSchedule.from_config(SD)
SHAPE = (4, 16, 16)
SEED = 1234
MODELS = ["analytic", "unet"]
VP = ("ddim", "dpmpp_2m")  # diffusers keeps these samplers' latents divided by sqrt(1 + sigma^2)


def analytic(sample, timestep):
    """A smooth, nonlinear stand-in for a network, sensitive to the timestep and to neighbouring pixels."""
    t = float(timestep)
    near = 0.3 * torch.roll(sample, 1, -1) - 0.2 * torch.roll(sample, 3, -2)
    return torch.tanh(sample * (1.2 + 0.4 * math.sin(t / 90)) + near) + 0.05 * math.cos(t / 40)


@pytest.fixture(scope="module")
def models():
    """Both models as ``(sample, timestep) -> output`` over torch tensors."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()
    states = torch.randn(1, 7, 32)

    @torch.no_grad()
    def network(sample, timestep):
        t = torch.tensor(float(timestep), dtype=torch.float32)
        # an untrained network says little about its input: half of a sensible answer is added
        return 0.5 * sample + unet(sample, t, states.expand(len(sample), -1, -1)).sample

    yield {"analytic": analytic, "unet": network}
    torch.set_num_threads(threads)


def kiln_latents(sampler, model, sigmas, count=1, prediction_type="epsilon"):
    """Latents after each step, in k-diffusion's space."""
    generators = make_generators("cpu", SEED, count)
    draw = make_noise_sampler(generators, SHAPE)

    def unet(sample, timestep, _states):
        assert sample.dtype == timestep.dtype == np.float32
        assert timestep.shape == ()
        return model(torch.from_numpy(sample), timestep).numpy()

    denoiser = GuidedDenoiser(
        unet, np.zeros((count, 1, 1)), None, 1.0, TABLE.sigma_to_timestep, prediction_type
    )
    x = draw() * np.float32(sigmas[0])
    steps = list(SAMPLERS[sampler].function(denoiser, x, sigmas, draw))
    assert [step.index for step in steps] == list(range(1, len(sigmas)))
    assert {step.total for step in steps} == {len(sigmas) - 1}
    assert all(step.x.dtype == np.float32 for step in steps)
    return [step.x for step in steps]


def diffusers_latents(scheduler, sampler, model, timesteps, prediction_type="epsilon"):
    """Latents after each step, in k-diffusion's space; ``timesteps`` are those the model is told."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn((1, *SHAPE), generator=generator)
    vp = sampler in VP
    kept = scheduler.alphas_cumprod.double() if vp else None

    def level(i):
        if i == len(timesteps):
            return 0.0
        if not vp:
            return float(scheduler.sigmas[i])
        a = float(kept[int(scheduler.timesteps[i])])
        return math.sqrt((1 - a) / a)

    norms = [math.sqrt(1 + level(i) ** 2) if vp else 1.0 for i in range(len(timesteps) + 1)]
    x, latents = noise * level(0) / norms[0], []
    extra = {"generator": generator} if sampler == "euler_a" else {}
    for i, timestep in enumerate(timesteps):
        told = scheduler.timesteps[i]
        output = model(scheduler.scale_model_input(x, told), timestep)
        x = scheduler.step(output, told, x, **extra).prev_sample
        latents.append(x.numpy() * np.float32(norms[i + 1]))
    return latents


def tabled_scheduler(sampler, sigmas, prediction_type="epsilon"):
    """diffusers' scheduler over a training table made of just these levels."""
    kept = 1 / (1 + np.asarray(sigmas[:-1])[::-1] ** 2)
    betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    common = {"num_train_timesteps": len(betas), "trained_betas": betas, "prediction_type": prediction_type}
    if sampler == "euler":
        scheduler = diffusers.EulerDiscreteScheduler(**common, timestep_spacing="linspace")
    elif sampler == "euler_a":
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**common, timestep_spacing="linspace")
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **common, timestep_spacing="leading", steps_offset=0, clip_sample=False, set_alpha_to_one=True
        )
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")
    scheduler.set_timesteps(len(betas))
    return scheduler


def fractional(sigmas):
    return [np.float32(TABLE.sigma_to_timestep(sigma)) for sigma in sigmas[:-1]]


def assert_near(actual, expected):
    assert len(actual) == len(expected)
    for i in {1, 5, len(expected)} - set(range(len(expected) + 1, 6)):
        a, e = actual[i - 1], expected[i - 1]
        assert a.shape == e.shape
        assert a.dtype == e.dtype == np.float32
        assert np.isfinite(a).all()
        assert NEAR.holds(relative_l2(a, e)), f"after step {i}: {relative_l2(a, e):.2e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_tabled(models, sampler, schedule, steps, name):
    sigmas = SCHEDULES[schedule].function(TABLE, steps)
    expected = diffusers_latents(tabled_scheduler(sampler, sigmas), sampler, models[name], fractional(sigmas))
    assert_near(kiln_latents(sampler, models[name], sigmas), expected)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_v_prediction(models, sampler, schedule):
    sigmas = SCHEDULES[schedule].function(TABLE, 20)
    scheduler = tabled_scheduler(sampler, sigmas, "v_prediction")
    expected = diffusers_latents(scheduler, sampler, models["analytic"], fractional(sigmas))
    assert_near(kiln_latents(sampler, models["analytic"], sigmas, prediction_type="v_prediction"), expected)
    as_epsilon = kiln_latents(sampler, models["analytic"], sigmas)
    assert not NEAR.holds(relative_l2(as_epsilon[0], expected[0]))


def native(sampler, schedule):
    if sampler == "euler_a":
        return diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="linspace")
    return diffusers.EulerDiscreteScheduler(
        **SD, timestep_spacing="linspace", use_karras_sigmas=schedule == "karras"
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("sampler", "schedule"), [("euler", "normal"), ("euler", "karras"), ("euler_a", "normal")]
)
def test_native_euler(models, sampler, schedule, steps, name):
    """diffusers' own levels and timesteps too; it interpolates sigma, we ln(sigma), hence up to 2e-5."""
    scheduler = native(sampler, schedule)
    scheduler.set_timesteps(steps)
    expected = diffusers_latents(scheduler, sampler, models[name], scheduler.timesteps.tolist())
    assert_near(kiln_latents(sampler, models[name], SCHEDULES[schedule].function(TABLE, steps)), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [5, 20])
def test_native_ddim(models, steps, name):
    """Whole timesteps, equally spaced: diffusers' DDIM as hub configs have it, ending at alpha 1."""
    scheduler = diffusers.DDIMScheduler(
        **SD, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    expected = diffusers_latents(scheduler, "ddim", models[name], timesteps)
    sigmas = np.append(TABLE.timestep_to_sigma(np.array(timesteps)), 0.0)
    assert_near(kiln_latents("ddim", models[name], sigmas), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [5, 20])
def test_native_dpmpp_2m_karras(models, steps, name):
    """diffusers' own Karras levels; only the timesteps told to the model are ours, because it rounds them."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    sigmas = SCHEDULES["karras"].function(TABLE, steps)
    rounded = np.rint(np.array(fractional(sigmas)))
    np.testing.assert_array_equal(rounded, scheduler.timesteps.numpy())
    generator = torch.Generator().manual_seed(SEED)
    start = float(scheduler.sigmas[0])
    x, expected = torch.randn((1, *SHAPE), generator=generator) * start / math.sqrt(1 + start**2), []
    scheduler.set_begin_index(0)  # rounded timesteps can repeat
    for i, timestep in enumerate(fractional(sigmas)):
        x = scheduler.step(models[name](x, timestep), scheduler.timesteps[i], x).prev_sample
        expected.append(x.numpy() * np.float32(math.sqrt(1 + float(scheduler.sigmas[i + 1]) ** 2)))
    assert_near(kiln_latents("dpmpp_2m", models[name], sigmas), expected)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_planted_errors_are_seen(models, sampler, schedule):
    """A shifted schedule, one wrong level, another sampler, latents a step late: each is beyond the limit."""
    model, sigmas = models["analytic"], SCHEDULES[schedule].function(TABLE, 20)
    expected = diffusers_latents(tabled_scheduler(sampler, sigmas), sampler, model, fractional(sigmas))
    shifted = np.append(sigmas[1:-1], [sigmas[-2] / 2, 0.0])
    off = sigmas.copy()
    off[5] *= 1.01
    for wrong in (shifted, off):
        with pytest.raises(AssertionError, match="after step"):
            assert_near(kiln_latents(sampler, model, wrong), expected)
    other = "dpmpp_2m" if sampler != "dpmpp_2m" else "euler"
    with pytest.raises(AssertionError, match="after step"):
        assert_near(kiln_latents(other, model, sigmas), expected)
    late = [*kiln_latents(sampler, model, sigmas)[1:], expected[-1]]
    with pytest.raises(AssertionError, match="after step"):
        assert_near(late, expected)


def test_ancestral_noise_comes_from_each_image_own_generator(models):
    sigmas = SCHEDULES["normal"].function(TABLE, 5)
    pair = kiln_latents("euler_a", models["analytic"], sigmas, count=2)[-1]
    alone = kiln_latents("euler_a", models["analytic"], sigmas, count=1)[-1]
    np.testing.assert_allclose(pair[:1], alone, rtol=0, atol=1e-6)
    assert np.abs(pair[1] - pair[0]).max() > 0.1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_failure_names_component_and_step(sampler):
    calls = []

    def unet(sample, timestep, states):
        calls.append(timestep)
        return np.full_like(sample, np.nan) if len(calls) == 3 else sample * 0

    denoiser = GuidedDenoiser(unet, np.zeros((1, 1, 1)), None, 1.0, TABLE.sigma_to_timestep)
    x = np.ones((1, *SHAPE), np.float32)
    with pytest.raises(InvalidOutputError, match=r"^unet gave 1024 values of 1024 .*step 3 of 5"):
        list(SAMPLERS[sampler].function(denoiser, x, SCHEDULES["normal"].function(TABLE, 5), lambda: x))


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("euler", "euler"),
        ("Euler", "euler"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("EULER_A", "euler_a"),
        ("ddim", "ddim"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++2m", "dpmpp_2m"),
        ("dpmpp-2m", "dpmpp_2m"),
    ],
)
def test_names(typed, name):
    assert resolve_sampler(typed).name == name


def test_unknown_name_lists_the_known():
    with pytest.raises(UsageError, match="euler, euler_a, ddim, dpmpp_2m"):
        resolve_sampler("dpm++3m")


def test_euler_a_without_noise():
    with pytest.raises(UsageError, match="noise_sampler"):
        next(SAMPLERS["euler_a"].function(lambda x, s: x, np.zeros((1, 4, 2, 2)), np.array([1.0, 0.0]), None))

"""Noise levels against diffusers' tables and schedules."""

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS
from kiln.errors import BundleError, UsageError
from kiln.runtime.schedules import (
    SCHEDULES,
    NoiseSchedule,
    resolve_schedule,
    sigmas_karras,
    sigmas_normal,
)

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIGMA = THRESHOLDS["schedule_sigma_relative"]
TIMESTEP = THRESHOLDS["schedule_timestep_absolute"]
CONFIGS = [
    {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "scaled_linear"},
]
SD = NoiseSchedule.from_config(CONFIGS[0])


def worst(actual, expected):
    """Largest relative difference, the final zero apart."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float64
    assert actual[-1] == expected[-1] == 0
    return float(np.abs(actual[:-1] / expected[:-1] - 1).max())


@pytest.mark.parametrize("config", CONFIGS, ids=["scaled_linear", "linear", "500"])
def test_table_is_diffusers(config):
    ours = NoiseSchedule.from_config(config).sigmas
    kept = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy().astype(np.float64)
    theirs = np.sqrt((1 - kept) / kept)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float64
    assert SIGMA.holds(float(np.abs(ours / theirs - 1).max()))
    assert not SIGMA.holds(float(np.abs(ours[1:] / theirs[:-1] - 1).max()))


@pytest.mark.parametrize("config", CONFIGS, ids=["scaled_linear", "linear", "500"])
@pytest.mark.parametrize("steps", [2, 5, 10, 20])
@pytest.mark.parametrize("name", ["normal", "karras"])
def test_schedule_is_diffusers(config, steps, name):
    """EulerDiscreteScheduler, linspace spacing; from 2 steps on: its only step would start at timestep 0."""
    table = NoiseSchedule.from_config(config)
    oracle = diffusers.EulerDiscreteScheduler(
        **config, timestep_spacing="linspace", use_karras_sigmas=name == "karras"
    )
    oracle.set_timesteps(steps)
    expected = oracle.sigmas.numpy().astype(np.float64)
    actual = resolve_schedule(name).function(table, steps)
    assert SIGMA.holds(worst(actual, expected))
    timesteps = np.array([table.sigma_to_timestep(sigma) for sigma in actual[:-1]])
    assert TIMESTEP.holds(float(np.abs(timesteps - oracle.timesteps.numpy()).max()))
    # planted: another rho, a wrong end, timesteps shifted by one
    assert not SIGMA.holds(worst(np.append(actual[:-1] * 1.001, 0), expected))
    assert not TIMESTEP.holds(float(np.abs(timesteps - 1 - oracle.timesteps.numpy()).max()))
    if name == "karras" and steps > 2:
        assert not SIGMA.holds(worst(sigmas_karras(table, steps, rho=6.99), expected))


def test_known_values():
    """k-diffusion's own, ten steps."""
    normal = [14.6146, 7.8399, 4.6092, 2.9183, 1.9502, 1.3449, 0.93236, 0.62498, 0.36866, 0.029167, 0]
    karras = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.91407, 0.44692, 0.20140, 0.08191, 0.029167, 0]
    np.testing.assert_allclose(sigmas_normal(SD, 10), normal, rtol=5e-5)
    np.testing.assert_allclose(sigmas_karras(SD, 10), karras, rtol=5e-5)


@pytest.mark.parametrize("entry", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_every_schedule_falls_from_the_top_to_zero(entry, steps):
    sigmas = entry.function(SD, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == pytest.approx(SD.sigma_max)
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_timesteps_and_levels_are_inverse():
    for timestep in (0, 0.25, 1, 500.5, 916.284, 999):
        assert SD.sigma_to_timestep(float(SD.timestep_to_sigma(timestep))) == pytest.approx(
            timestep, abs=1e-9
        )
    assert SD.sigma_to_timestep(100.0) == 999
    assert SD.sigma_to_timestep(1e-3) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_start": "0.1"},
        {"beta_end": None},
        {"beta_start": 0.5},
        {"num_train_timesteps": 1},
        {"trained_betas": [0.1, 0.2]},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_config_that_makes_no_sense(change):
    with pytest.raises(BundleError, match=r"scheduler_config\.json"):
        NoiseSchedule.from_config(CONFIGS[0] | change)


def test_names():
    assert resolve_schedule("Karras").name == "karras"
    assert resolve_schedule("uniform").title == "Normal"
    with pytest.raises(UsageError, match="normal, karras"):
        resolve_schedule("beta9")
    with pytest.raises(UsageError, match="at least 1"):
        sigmas_normal(SD, 0)

"""The timestep's sines and cosines against diffusers, and what bf16 loses without the lowering."""

import json

import numpy as np
import pytest

from kiln.backends.base import PrepareOptions
from kiln.backends.openvino_timestep import COSINE, SINE, cut_timestep, timestep_feeds
from kiln.backends.registry import get_backend
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import open_bundle

torch = pytest.importorskip("torch")
embeddings = pytest.importorskip("diffusers.models.embeddings")
LIMIT = THRESHOLDS["component_bf16_relative_l2"]


@pytest.mark.parametrize("timestep", [0, 1, 481.25, 999])
@pytest.mark.parametrize(("channels", "shift"), [(320, 0), (64, 0), (64, 1)])
def test_feeds_equal_diffusers(timestep, channels, shift):
    config = {"block_out_channels": [channels, 2 * channels], "freq_shift": shift}
    feeds = timestep_feeds(np.array(timestep, np.float32), 2, config)
    told = torch.full((2,), float(timestep))
    expected = embeddings.get_timestep_embedding(told, channels, downscale_freq_shift=shift).numpy()
    actual = np.concatenate([feeds[SINE], feeds[COSINE]], axis=1)
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    # An angle near 1000 has an error of 6e-5 in fp32 whoever computes it.
    assert np.abs(actual - expected).max() < 2e-4
    swapped = np.concatenate([feeds[COSINE], feeds[SINE]], axis=1)
    assert np.abs(swapped - expected).max() > 0.1


@pytest.fixture
def unet(tiny_bundle):
    return open_bundle(tiny_bundle).source("unet")


def feeds_of(unet, timestep):
    width = int(unet.config["cross_attention_dim"])
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(timestep, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, width)).astype(np.float32),
    }


def outputs_of(unet, precision, timesteps, **options):
    """What one session gives at each of the timesteps, and what is in force."""
    shapes = {name: value.shape for name, value in feeds_of(unet, 0).items()}
    session = get_backend("openvino").prepare(unet, PrepareOptions(shapes, precision=precision, **options))
    try:
        found = {timestep: session.run(feeds_of(unet, timestep))["out_sample"] for timestep in timesteps}
        return found, session.in_force
    finally:
        session.close()


def test_bf16_is_near_at_every_timestep(unet, tmp_path):
    openvino = get_backend("openvino")
    if not openvino.probe().available or "bf16" not in openvino.devices()[0].precisions:
        pytest.skip("no OpenVINO, or a processor without bf16")
    timesteps = (1, 501, 999)
    expected, _ = outputs_of(unet, "fp32", timesteps)
    for cached in (False, True):
        actual, in_force = outputs_of(unet, "bf16", timesteps, cache_dir=tmp_path)
        assert in_force.precision == "bf16"
        assert in_force.from_cache == cached
        for timestep in timesteps:
            assert LIMIT.holds(relative_l2(actual[timestep], expected[timestep])), timestep
    assert relative_l2(actual[1], expected[999]) > relative_l2(actual[999], expected[999])


def test_the_graph_is_cut_once(unet):
    ov = pytest.importorskip("openvino")
    model = ov.Core().read_model(unet.graph_path)
    assert cut_timestep(model)
    assert not {op.get_type_name() for op in model.get_ordered_ops()} & {"Sin", "Cos"}
    assert {SINE, COSINE} <= {name for port in model.inputs for name in port.get_names()}
    assert not cut_timestep(model)


def test_config_is_the_one_of_the_bundle(unet):
    assert unet.config == json.loads((unet.graph_path.parent / "config.json").read_text())

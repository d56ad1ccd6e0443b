"""The weight change of one LoRA module against lycoris-lora's formulas, and refused factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError, UsageError
from kiln.exporters.adapters.base import AdapterRef, ModuleTensors
from kiln.exporters.adapters.lora import LORA
from kiln.exporters.tensors import DTYPES, TensorInfo

LIMIT = THRESHOLDS["baked_weight_relative_l2"]
RNG = np.random.default_rng(0)
SHAPES = {
    "linear": ((12, 20), {"down": (4, 20), "up": (12, 4)}),
    "linear stored as 1x1": ((12, 20), {"down": (4, 20, 1, 1), "up": (12, 4, 1, 1)}),
    "1x1 stored as linear": ((12, 20, 1, 1), {"down": (4, 20), "up": (12, 4)}),
    "3x3": ((12, 20, 3, 3), {"down": (4, 20, 3, 3), "up": (12, 4, 1, 1)}),
    "3x3 flat": ((12, 20, 3, 3), {"down": (4, 180), "up": (12, 4)}),
    "cp": ((12, 20, 3, 3), {"down": (4, 20, 1, 1), "mid": (4, 4, 3, 3), "up": (12, 4, 1, 1)}),
}


class Memory:
    """Tensors in memory behind the interface of a file."""

    def __init__(self, tensors):
        self.path, self.metadata, self.tensors = Path("memory.safetensors"), {}, tensors
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.infos = {k: TensorInfo(names[v.dtype], v.shape, 0, v.nbytes) for k, v in tensors.items()}

    def read(self, name):
        return self.tensors[name]

    def close(self):
        pass


def module(tensors, **settings):
    return ModuleTensors("m", {name: name for name in tensors}, Memory(tensors), **settings)


def random(shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def change(tensors, shape, strength=1.0, **settings):
    (update,) = LORA.updates(module(tensors, **settings))
    assert update.misfit(shape) is None
    delta = update.delta(np.zeros(shape, np.float32), strength)
    assert delta.shape == shape
    assert delta.dtype == np.float32
    return delta


def oracle(tensors, shape, scale):
    torch = pytest.importorskip("torch")
    locon = pytest.importorskip("lycoris.functional.locon")
    down, up = (torch.from_numpy(tensors[name]) for name in ("down", "up"))
    mid = torch.from_numpy(tensors["mid"]) if "mid" in tensors else None
    if mid is None:
        down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[:2])
    return locon.diff_weight(down, up, mid, gamma=scale, backend="torch").numpy().reshape(shape)


@pytest.mark.parametrize("case", SHAPES)
def test_the_change_is_that_of_lycoris(case):
    shape, factors = SHAPES[case]
    tensors = random(factors)
    expected = oracle(tensors, shape, 0.3 * 2.5 / 4)
    actual = change({**tensors, "alpha": np.array(2.5, np.float32)}, shape, 0.3)
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("plant", ["x1.01", "alpha", "swapped", "rank"])
def test_a_planted_error_is_seen(case, plant):
    shape, factors = SHAPES[case]
    tensors = {**random(factors), "alpha": np.array(2.5, np.float32)}
    expected = oracle(tensors, shape, 2.5 / 4)
    wrong = dict(tensors)
    if plant == "x1.01":
        wrong["down"] = tensors["down"] * np.float32(1.01)
    elif plant == "alpha":
        wrong["alpha"] = np.array(2.6, np.float32)
    elif plant == "swapped":
        wrong["up"] = tensors["up"][::-1].copy()
    else:
        wrong["up"] = np.roll(tensors["up"], 1, axis=1)
    assert not LIMIT.holds(relative_l2(change(wrong, shape), expected))


@pytest.mark.parametrize(
    ("extra", "settings", "scale"),
    [
        ({}, {}, 1.0),
        ({"alpha": 2.0}, {}, 0.5),
        ({"alpha": 0.0}, {}, 0.0),
        ({}, {"alpha": 8.0}, 2.0),
        ({"alpha": 2.0}, {"alpha": 8.0}, 0.5),
        ({}, {"alpha": 8.0, "rank_stabilized": True}, 4.0),
        ({"alpha": 2.0, "scale": 3.0}, {}, 3.0),
    ],
)
def test_the_scale(extra, settings, scale):
    shape, factors = SHAPES["linear"]
    tensors = random(factors)
    scalars = {name: np.array(value, np.float32) for name, value in extra.items()}
    actual = change({**tensors, **scalars}, shape, **settings)
    np.testing.assert_allclose(actual, (scale * tensors["up"]) @ tensors["down"], rtol=1e-6)


def test_half_precision_files_are_computed_in_float32():
    shape, factors = SHAPES["linear"]
    for dtype in (np.float16, DTYPES["BF16"], DTYPES["F8_E4M3"]):
        tensors = {name: value.astype(dtype) for name, value in random(factors).items()}
        expected = tensors["up"].astype(np.float64) @ tensors["down"].astype(np.float64)
        assert LIMIT.holds(relative_l2(change(tensors, shape), expected))


def test_a_latent_change_of_conv_in_is_padded_for_inpainting():
    tensors = random({"down": (4, 4, 3, 3), "up": (16, 4, 1, 1)})
    (update,) = LORA.updates(module(tensors))
    assert update.misfit((16, 9, 3, 3)) is None
    delta = update.delta(np.zeros((16, 9, 3, 3), np.float32), 1.0)
    np.testing.assert_array_equal(delta[:, :4], update.delta(np.zeros((16, 4, 3, 3), np.float32), 1.0))
    assert not delta[:, 4:].any()


@pytest.mark.parametrize("shape", [(12, 21), (20, 12), (12, 20, 3, 3), (240,), ()])
def test_another_shape_is_a_misfit(shape):
    (update,) = LORA.updates(module(random(SHAPES["linear"][1])))
    assert update.misfit(shape) == "[12, 20]"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"down": (4, 20)}, "has no lora_up"),
        ({"up": (12, 4)}, "has no lora_down"),
        ({"mid": (4, 4, 3, 3), "up": (12, 4)}, "has no lora_down"),
        ({"down": (4, 20), "up": (12, 5)}, "cannot be multiplied"),
        ({"down": (20, 4), "up": (4, 12)}, "cannot be multiplied"),
        ({"down": (20,), "up": (4, 12)}, "cannot be multiplied"),
        ({"down": (), "up": ()}, "cannot be multiplied"),
        ({"down": (0, 20), "up": (12, 0)}, "cannot be multiplied"),
        ({"down": (4, 20, 3, 3), "up": (12, 4, 3, 3)}, "cannot be multiplied"),
        ({"down": (4, 20, 1, 1), "mid": (4, 5, 3, 3), "up": (12, 4, 1, 1)}, "cannot be multiplied"),
        ({"down": (1025, 20), "up": (12, 1025)}, "rank 1025; expected 1 to 1024"),
    ],
)
def test_factors_that_contradict_each_other_are_refused(shapes, message):
    with pytest.raises(AdapterError, match=message):
        LORA.updates(module(random(shapes)))


@pytest.mark.parametrize("alpha", [np.array(np.nan), np.array(np.inf), np.ones(2)])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha):
    with pytest.raises(AdapterError, match="alpha"):
        LORA.updates(module({**random(SHAPES["linear"][1]), "alpha": alpha.astype(np.float32)}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", AdapterRef(Path("a.safetensors"))),
        ("a.safetensors:0.8", AdapterRef(Path("a.safetensors"), 0.8)),
        ("a.safetensors:-0.8:.5", AdapterRef(Path("a.safetensors"), -0.8, 0.5)),
        ("C:\\loras\\a.safetensors:1e-1", AdapterRef(Path("C:\\loras\\a.safetensors"), 0.1)),
        ("x:y/a.pt:2", AdapterRef(Path("x:y/a.pt"), 2.0)),
        ("folder:0.5", AdapterRef(Path("folder"), 0.5)),
    ],
)
def test_a_request_is_read_from_the_right(text, expected):
    assert AdapterRef.parse(text) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path):
    path = tmp_path / "a.safetensors:0.8"
    path.touch()
    assert AdapterRef.parse(str(path)) == AdapterRef(path)
    assert AdapterRef.parse(f"{path}:0.5").unet_strength == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":0.8",
        "a.safetensors:",
        "a.safetensors:strong",
        "a.safetensors:nan",
        "a.pt:1:inf",
        "a.pt:1:2:3",
        "a.pt:1:x",
    ],
)
def test_a_request_that_cannot_be_read_says_what_was_expected(text):
    with pytest.raises(UsageError, match="expected FILE"):
        AdapterRef.parse(text)

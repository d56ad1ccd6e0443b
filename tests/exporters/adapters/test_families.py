"""Every family against the float64 reference, through a file and a plan, at several strengths."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

LIMIT = THRESHOLDS["baked_weight_relative_l2"]


def expected_of(reference, cases, case, weight, tensors, strength):
    stem = cases.stem_of(case)
    return reference.new_weight(weight, tensors, strength, stem, peft=stem.startswith("base_model"))


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_the_new_weight(bake_one, reference, cases, case, strength):
    weight, tensors = cases.make(case)
    actual, report = bake_one(weight, tensors, strength, cases.stem_of(case))
    expected = expected_of(reference, cases, case, weight, tensors, strength)
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.isfinite(actual).all()
    assert LIMIT.holds(relative_l2(actual, expected))
    assert report.matched_modules == {"unet": 1}
    assert report.unmatched_keys == ()
    moved = relative_l2(expected, weight)
    assert report.changes["unet.x.weight"] == pytest.approx(moved, rel=1e-4, abs=1e-7)


def test_a_planted_error_is_seen(bake_one, reference, cases, case):
    """One value of one tensor at a time, a hundredth off, and the strength."""
    weight, tensors = cases.make(case)
    expected = expected_of(reference, cases, case, weight, tensors, 0.7)
    if case == "OFT of kohya with alpha 0":
        assert LIMIT.holds(relative_l2(expected, weight))  # nothing turns, whatever the blocks are
        return
    for key, value in tensors.items():
        if value.size < 2 or value.dtype.kind != "f":
            continue
        wrong = value.copy()
        wrong.flat[1] += 0.05
        actual, _ = bake_one(weight, tensors | {key: wrong}, 0.7, cases.stem_of(case))
        assert not LIMIT.holds(relative_l2(actual, expected)), key
    actual, _ = bake_one(weight, tensors, 0.69, cases.stem_of(case))
    assert not LIMIT.holds(relative_l2(actual, expected))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_half_and_eighth_precision_files_are_computed_in_float32(bake_one, reference, cases, case, dtype):
    weight, tensors = cases.make(case, dtype=dtype)
    actual, _ = bake_one(weight, tensors, 0.7, cases.stem_of(case))
    expected = expected_of(reference, cases, case, weight, tensors, 0.7)
    assert LIMIT.holds(relative_l2(actual, expected))


def test_the_bias(bake_one):
    rng = np.random.default_rng(0)
    weight, bias, change = (rng.normal(size=n).astype(np.float32) for n in ((12, 20), 12, 12))
    parts = {
        "lora_down.weight": rng.normal(size=(4, 20)),
        "lora_up.weight": rng.normal(size=(12, 4)),
        "alpha": 2.0,
    }
    parts = {key: np.asarray(value, np.float32) for key, value in parts.items()}
    for name, scale in (("diff_b", 1.0), ("b_norm", 1.0), ("lora_B.bias", 0.5)):
        _, actual, report = bake_one(weight, parts | {name: change}, 0.7, bias=bias)
        np.testing.assert_allclose(actual, bias + np.float32(0.7 * scale) * change, rtol=1e-6)
        assert report.unmatched_keys == ()


def test_a_layer_without_bias_says_so(bake_one):
    weight = np.ones((12, 20), np.float32)
    tensors = {"diff": weight, "diff_b": np.ones(12, np.float32)}
    _, report = bake_one(weight, tensors)
    assert report.reasons == {"lora_unet_x.diff_b": "the layer has no bias to add to"}
    assert report.unmatched_keys == ("lora_unet_x.diff_b",)
    assert report.matched_keys == 1


def test_both_old_layouts_at_once_are_refused(bake_one):
    from kiln.errors import AdapterError

    square = {f"{name}.weight": np.ones((8, 8), np.float32) for name in ("a1", "a2", "b1", "b2")}
    with pytest.raises(AdapterError, match="either of two layouts"):
        bake_one(np.ones((8, 8), np.float32), square)


def test_a_wrong_on_input_gives_way_to_the_only_axis_that_fits(bake_one):
    weight = np.ones((12, 20), np.float32)
    factors = np.linspace(0, 1, 20, dtype=np.float32)
    actual, _ = bake_one(weight, {"weight": factors, "on_input": np.array(0)})
    np.testing.assert_allclose(actual, weight * (1 + factors))


def test_a_direction_of_zero_keeps_its_length(bake_one):
    weight = np.zeros((3, 4), np.float32)
    weight[0] = 1
    tensors = {
        "lora_down.weight": np.zeros((1, 4), np.float32),
        "lora_up.weight": np.zeros((3, 1), np.float32),
    }
    for shape in ((3, 1), (1, 4)):
        actual, _ = bake_one(weight, tensors | {"dora_scale": np.full(shape, 4, np.float32)})
        assert np.isfinite(actual).all()
        assert not actual[1:].any()


class TestRank:
    """DyLoRA: the first ranks, with alpha and its divisor as they were."""

    @staticmethod
    def parts():
        rng = np.random.default_rng(0)
        down, up = (rng.normal(size=n).astype(np.float32) for n in ((4, 20), (12, 4)))
        return down, up, {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(2, np.float32)}

    @pytest.mark.parametrize("rank", [1, 3, 4, 9])
    def test_the_first_ranks(self, bake_one, rank):
        down, up, tensors = self.parts()
        actual, report = bake_one(np.zeros((12, 20), np.float32), tensors, rank=rank)
        assert LIMIT.holds(relative_l2(actual, 0.5 * up[:, :rank] @ down[:rank]))
        assert report.rank == rank

    def test_only_a_lora_can_be_cut(self, bake_one, cases):
        from kiln.errors import AdapterError

        for case, message in (("LoHa", "only a LoRA"), ("CP", "CP form")):
            weight, tensors = cases.make(case)
            with pytest.raises(AdapterError, match=message):
                bake_one(weight, tensors, rank=2)

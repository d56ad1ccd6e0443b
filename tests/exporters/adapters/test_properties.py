"""What must hold for any module: strength 0, linearity, order, and no silent success for mutated files."""

from __future__ import annotations

import struct
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

LIMIT = THRESHOLDS["baked_weight_relative_l2"]
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
STRENGTHS = st.floats(-2, 2, allow_nan=False, width=32)


@pytest.fixture(scope="module")
def baked(tmp_path_factory, cases):
    """``baked(weight, (case, seed, strength), ...)``: a weight after several files in order."""
    folder = tmp_path_factory.mktemp("properties")

    def bake(weight, *adapters, dtype=np.float32):
        refs = []
        for number, (case, seed, strength) in enumerate(adapters):
            _, tensors = cases.make(case, seed)
            path = folder / f"{number}.safetensors"
            stem = cases.stem_of(case)
            safetensors.numpy.save_file({f"{stem}.{key}": v for key, v in tensors.items()}, path)
            refs.append(AdapterRef(path, strength))
        with plan_bake({"unet": {"x.weight": weight.shape}}, refs) as plan:
            return plan.bake("unet", "x.weight", weight)

    return bake


def test_strength_0_is_identity_to_the_byte(baked, cases, case):
    for dtype in (np.float16, np.float32):
        weight = cases.make(case)[0].astype(dtype)
        assert baked(weight, (case, 0, 0.0)) is weight


def test_a_strength_towards_0_comes_back_to_the_weight(baked, cases, case):
    """Also of DoRA, OFT with rescale and BOFT, where some readers leave a step at 0."""
    weight, _ = cases.make(case)
    assert relative_l2(baked(weight, (case, 0, 1e-4)), weight) < 1e-2


@FEW
@given(one=STRENGTHS, two=STRENGTHS, seed=st.integers(0, 9))
def test_additive_families_are_linear_in_strength(baked, cases, additive_case, one, two, seed):
    weight, _ = cases.make(additive_case, seed)
    together = baked(weight, (additive_case, seed, one + two)) if one + two else weight
    apart = baked(weight, (additive_case, seed, one), (additive_case, seed, two))
    assert relative_l2(apart, together) < 3 * LIMIT.limit


def test_additive_families_do_not_depend_on_the_order(baked, cases, additive_case):
    weight, _ = cases.make(additive_case)
    same_shape = [name for name in cases.ADDITIVE if cases.CASES[name][0] == weight.shape]
    stack = [(name, 1, 0.1 + 0.1 * number) for number, name in enumerate(same_shape)]
    assert LIMIT.holds(relative_l2(baked(weight, *stack), baked(weight, *reversed(stack))))


@pytest.mark.parametrize(
    "pair",
    [
        ("LoRA", "IA3 on the inputs"),
        ("LoHa", "DoRA of the inputs"),
        ("OFT", "LoKr"),
        ("GLoRA", "OFT of PEFT"),
    ],
)
def test_other_families_see_what_came_before_them(baked, cases, reference, pair):
    weight, _ = cases.make(pair[0])
    for order in (pair, pair[::-1]):
        expected = weight
        for number, case in enumerate(order):
            _, tensors = cases.make(case, number)
            stem = cases.stem_of(case)
            expected = reference.new_weight(expected, tensors, 0.7, stem, peft=stem.startswith("base_model"))
        actual = baked(weight, *((case, number, 0.7) for number, case in enumerate(order)))
        assert LIMIT.holds(relative_l2(actual, expected))
        wrong = baked(weight, *reversed([(case, number, 0.7) for number, case in enumerate(order)]))
        assert not LIMIT.holds(relative_l2(wrong, expected))


DTYPES = (np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_)


KINDS = ("value", "shape", "type", "drop", "rename", "extra", "stem", "bytes", "cut")


@st.composite
def mutations(draw):
    """A function of the tensors, and one of the bytes of the file."""
    kind = draw(st.sampled_from(KINDS))
    where, size = draw(st.integers(0, 99)), draw(st.integers(0, 40))
    special = draw(st.sampled_from((np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, -1e38, 3e38, 65504.0)))
    dtype = draw(st.sampled_from(DTYPES))
    axes = draw(st.lists(st.integers(0, 24), max_size=5))
    name = draw(
        st.sampled_from(("alpha", "scale", "rescale", "on_input", "dora_scale", "diff", "lokr_t2", "hada_t1"))
    )
    noise = draw(st.binary(min_size=1, max_size=4))
    return kind, where, size, special, dtype, axes, name, noise


def mutated(tensors, mutation):
    kind, where, size, special, dtype, axes, name, _ = mutation
    keys = list(tensors)
    key = keys[where % len(keys)]
    tensors = dict(tensors)
    if kind == "value":
        value = tensors[key].copy()
        if value.size and value.dtype.kind == "f":
            value.flat[size % value.size] = special
        tensors[key] = value
    elif kind == "shape":
        tensors[key] = np.resize(tensors[key], axes) if np.prod(axes) else np.zeros(axes, np.float32)
    elif kind == "type":
        tensors[key] = np.nan_to_num(tensors[key]).astype(dtype)
    elif kind == "drop":
        del tensors[key]
    elif kind == "rename":
        tensors[name] = tensors.pop(key)
    elif kind == "extra":
        tensors[name] = np.full(axes, min(abs(special), 9.0), np.float32)
    return tensors


def written(path, stem, tensors, mutation):
    kind, where, size, _, _, _, _, noise = mutation
    stem = f"{stem}y" if kind == "stem" else stem
    safetensors.numpy.save_file({f"{stem}.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    raw = bytearray(path.read_bytes())
    if kind == "bytes":
        start = (where * 4099 + size * 17) % len(raw)
        raw[start : start + len(noise)] = noise[: len(raw) - start]
    elif kind == "cut":
        raw = raw[: len(raw) * where // 100]
    path.write_bytes(raw)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_mutated_files_are_refused_or_applied_and_accounted_for(hostile_path, cases):
    """At least 2,000 files, of every case and every kind of mutation; the count is part of the test."""
    seen, outcomes = Counter(), Counter()

    @settings(
        max_examples=2200,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.sampled_from(list(cases.CASES)), mutations(), st.sampled_from((1.0, -0.5, 1e30)))
    def one_file(name, mutation, strength):
        weight, tensors = cases.make(name)
        tensors = mutated(tensors, mutation)
        if not tensors:
            return
        written(hostile_path, cases.stem_of(name), tensors, mutation)
        refused = refusal(hostile_path, weight, strength)
        seen[name] += 1
        outcomes[mutation[0], refused] += 1

    one_file()
    assert sum(seen.values()) >= 2000
    assert set(seen) == set(cases.CASES)
    # Neither outcome comes from the mutations being too strong or too weak.
    assert all(outcomes[kind, True] > 5 for kind in KINDS)
    assert all(outcomes[kind, False] > 0 for kind in ("value", "type", "bytes", "extra", "drop"))


def refusal(path, weight, strength):
    """Bake a file: whether it was refused, in one line. What was applied is accounted for to the last key."""
    try:
        with plan_bake({"unet": {"x.weight": weight.shape}}, [AdapterRef(path, strength)]) as plan:
            touched = plan.is_touched("unet", "x.weight")
            baked = plan.bake("unet", "x.weight", weight)
            (report,) = plan.reports
    except AdapterError as error:
        text = str(error)
    else:
        text = ""
    if text:
        assert str(path) in text
        assert "\n" not in text
        return True
    head = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert head > 0
    assert np.isfinite(baked).all()
    assert baked.shape == weight.shape
    # Nothing is dropped without a word: every key was read or is listed with a reason.
    assert report.matched_keys + len(report.unmatched_keys) == len(safetensors.numpy.load_file(path))
    assert all(report.reasons[key] for key in report.unmatched_keys)
    assert touched
    assert report.changes["unet.x.weight"] == pytest.approx(relative_l2(baked, weight), rel=1e-2, abs=1e-6)
    if not (np.asarray(baked) != weight).any():
        assert report.warnings
    return False


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "hostile.safetensors"

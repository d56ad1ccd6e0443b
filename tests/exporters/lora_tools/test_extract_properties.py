"""Extract, then bake: the difference comes back to the stated energy, whatever the layers and their spectra.

The energy is that of float64 numpy over the baked weights, and what could be kept that of numpy's SVD.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from kiln.benchmarks.parity import THRESHOLDS
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake
from kiln.exporters.lora_tools.extract import ExtractSpec, extract
from kiln.exporters.lora_tools.factors import Budget

FEW = settings(max_examples=25, deadline=None, database=None, derandomize=True)
LIMIT = THRESHOLDS["extracted_energy_absolute"]
BLOCK = "down_blocks.0.attentions.0"
LINEAR = (f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.transformer_blocks.0.attn2.to_k")
POINT = (f"{BLOCK}.proj_in",)
CONV = ("conv_in", "down_blocks.0.resnets.0.conv1", "conv_out")
WIDE = (430, 400)  # sides at which singular vectors are found by projection


@dataclass(frozen=True)
class Drawn:
    """Two models of a few layers: the base's values, and by how much the tuned one differs."""

    base: dict[str, np.ndarray]
    tuned: dict[str, np.ndarray]

    @property
    def differences(self) -> dict[str, np.ndarray]:
        return {name: self.tuned[name].astype(np.float64) - value for name, value in self.base.items()}


def with_spectrum(rng, shape, values, scale):
    """A random tensor whose matrix has these singular values, as many as it has room for."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    count = min(rows, columns, len(values))
    left = np.linalg.qr(rng.normal(size=(rows, count)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, count)))[0]
    return (scale * (left * np.array(values[:count])) @ right.T).reshape(shape)


SPECTRA = st.one_of(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    st.floats(0, 3).map(lambda power: [n**-power for n in range(1, 31)]),
    st.integers(1, 6).map(lambda rank: [1.0] * rank),
)


@st.composite
def models(draw):
    sides, kernel = st.integers(1, 16), st.integers(1, 3)
    shapes = {name: (draw(sides), draw(sides)) for name in LINEAR}
    if draw(st.integers(0, 9)) == 0:
        shapes[LINEAR[0]] = draw(st.permutations(WIDE).map(tuple))
    shapes |= {name: (draw(sides), draw(sides), 1, 1) for name in POINT}
    shapes |= {name: (draw(sides), draw(sides), draw(kernel), draw(kernel)) for name in CONV}
    shapes["conv_in"] = (shapes["conv_in"][0], 4, *shapes["conv_in"][2:])
    shapes["conv_out"] = (4, *shapes["conv_out"][1:])
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    base, tuned = {}, {}
    for name, shape in shapes.items():
        scale, values = draw(st.sampled_from((0.01, 0.3, 20.0))), draw(SPECTRA)
        base[f"{name}.weight"] = value = rng.normal(size=shape).astype(np.float32)
        first = name == LINEAR[0]  # so that there is always something to extract
        if first or draw(st.integers(0, 4)):  # a fifth of the others is the same in both
            values = [1.0, *values] if first else values
            tuned[f"{name}.weight"] = (value + with_spectrum(rng, shape, values, scale)).astype(np.float32)
    base["conv_in.bias"] = rng.normal(size=shapes["conv_in"][0]).astype(np.float32)
    tuned["conv_in.bias"] = base["conv_in.bias"] + np.float32(draw(st.sampled_from((0.0, 0.1))))
    return Drawn(base, base | tuned)


BUDGETS = st.one_of(
    st.builds(Budget, rank=st.integers(1, 12)), st.builds(Budget, energy=st.floats(0.05, 1.0))
)


def written(folder, tensors):
    """A diffusers folder with a UNet of these tensors."""
    (folder / "unet").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    safetensors.numpy.save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")
    return folder


def baked(drawn, path, strength=1.0):
    shapes = {name: value.shape for name, value in drawn.base.items()}
    with plan_bake({"unet": shapes}, [AdapterRef(path, strength)]) as plan:
        return {name: plan.bake("unet", name, value) for name, value in drawn.base.items()}


def squared(value):
    return float(np.vdot(value, value))


def restored(drawn, weights):
    """The part of each difference that is in the weights, by tensor, and that of all."""
    lost = {name: squared(drawn.tuned[name].astype(np.float64) - value) for name, value in weights.items()}
    total = {name: squared(value) for name, value in drawn.differences.items()}
    assert all(weights[name].dtype == np.float32 for name in weights)
    found = {name: 1 - lost[name] / total[name] for name in lost if total[name]}
    return found, 1 - sum(lost.values()) / sum(total.values())


def is_stated(report, drawn, weights):
    """Whether baked weights have what the report states, for every layer and for all."""
    found, whole = restored(drawn, weights)
    each = [
        abs(found[f"{one.module}.{'weight' if one.rank else 'bias'}"] - one.energy) for one in report.modules
    ]
    return all(LIMIT.holds(distance) for distance in (*each, abs(whole - report.energy)))


def best(difference, rank):
    """What Eckart and Young allow for a rank."""
    squares = np.linalg.svd(difference.reshape(len(difference), -1), compute_uv=False) ** 2
    return float(squares[:rank].sum() / squares.sum())


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """``extracted(drawn, budget, ...)``: the report of an extraction."""

    def run(drawn, budget, conv=None, **options):
        folder = tmp_path_factory.mktemp("extract")
        spec = ExtractSpec(
            written(folder / "tuned", drawn.tuned),
            written(folder / "base", drawn.base),
            folder / "out.safetensors",
            budget,
            conv,
            **options,
        )
        return extract(spec)

    return run


@FEW
@given(
    drawn=models(),
    budget=BUDGETS,
    conv=st.none() | BUDGETS,
    precision=st.sampled_from(("fp32", "fp16")),
    exact=st.booleans(),
    bias=st.booleans(),
)
def test_extract_then_bake_restores_the_stated_energy(extracted, drawn, budget, conv, precision, exact, bias):
    report = extracted(drawn, budget, conv, precision=precision, exact=exact, differences=bias)
    weights = baked(drawn, report.output)
    assert is_stated(report, drawn, weights)
    assert report.energy <= 1 - report.left_out_energy + 1e-9
    stored = {f"{one.module}.weight" for one in report.modules if one.rank}
    for one in report.modules:
        if not one.rank:
            continue
        name = f"{one.module}.weight"
        shape = drawn.base[name].shape
        wanted = budget if np.prod(shape[2:]) == 1 else conv
        assert one.rank <= min(shape[0], int(np.prod(shape[1:])), wanted.rank or 1024)
        limit = best(drawn.differences[name], one.rank)
        assert one.energy <= limit + LIMIT.limit
        if wanted.energy:
            assert one.energy >= wanted.energy - LIMIT.limit
        elif exact or min(shape[:2]) < 384:
            assert one.energy >= limit - LIMIT.limit
    for name, value in weights.items():
        left = name not in stored and not (bias and name.endswith("bias"))
        if left:
            assert value is drawn.base[name] or np.array_equal(value, drawn.base[name])
    event(f"{precision}, {'energy' if budget.energy else 'rank'}, conv {conv is not None}")


@FEW
@given(
    drawn=models(),
    budget=BUDGETS,
    plant=st.sampled_from(("strength", "sign", "alpha", "rows", "layer", "energy")),
)
def test_a_planted_error_is_not_what_is_stated(extracted, drawn, budget, plant):
    report = extracted(drawn, budget, Budget(rank=8), precision="fp32")
    assert is_stated(report, drawn, baked(drawn, report.output))
    if plant in ("strength", "sign"):
        weights = baked(drawn, report.output, 1.2 if plant == "strength" else -1.0)
        assert not is_stated(report, drawn, weights)
        return
    one = max(report.modules, key=lambda module: module.energy * (module.rank > 0))
    if plant == "energy":
        wrong = replace(one, energy=one.energy - 0.01)
        others = tuple(wrong if module is one else module for module in report.modules)
        weights = baked(drawn, report.output)
        assert not is_stated(replace(report, modules=others), drawn, weights)
        return
    tensors = safetensors.numpy.load_file(report.output)
    stem = f"lora_unet_{one.module.replace('.', '_')}"
    up = tensors[f"{stem}.lora_up.weight"]
    if plant == "alpha":
        tensors[f"{stem}.alpha"] = np.asarray(2 * tensors[f"{stem}.alpha"])
    elif plant == "rows":  # the two that differ most
        matrix = up.reshape(len(up), -1)
        order = np.argsort(matrix @ np.linalg.svd(matrix)[2][0])
        assume(
            len(up) > 1 and np.linalg.norm(matrix[order[0]] - matrix[order[-1]]) > 0.2 * np.linalg.norm(up)
        )
        tensors[f"{stem}.lora_up.weight"][[order[0], order[-1]]] = up[[order[-1], order[0]]]
    else:
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            del tensors[f"{stem}.{part}"]
        assume(tensors)
    safetensors.numpy.save_file(tensors, report.output)
    assert not is_stated(report, drawn, baked(drawn, report.output))

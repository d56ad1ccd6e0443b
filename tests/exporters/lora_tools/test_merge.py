"""Several adapters to one: baking it equals baking all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kiln.benchmarks.parity import relative_l2
from kiln.errors import AdapterError, StorageError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake
from kiln.exporters.lora_tools.merge import MergeSpec, merge

FEW = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
STRENGTHS = st.floats(-2, 2, allow_nan=False, width=32)
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
POINT = "lora_unet_down_blocks_0_attentions_0_proj_in"
TARGETS = {CONV: (12, 20, 3, 3), LINEAR: (12, 20), POINT: (12, 20, 1, 1)}


def is_sampled(network, module):
    return network == "text_encoder" or any(part in module for part in ("attentions", "resnets", "samplers"))


def merged(refs, output, **options):
    return merge(MergeSpec(tuple(refs), output, **options))


def shapes():
    dotted = {
        CONV: "down_blocks.0.resnets.0.conv1",
        LINEAR: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        POINT: "down_blocks.0.attentions.0.proj_in",
    }
    return {"unet": {f"{dotted[stem]}.weight": shape for stem, shape in TARGETS.items()}}


def changes(*refs):
    """What adapters do to three layers of zeros, in float32: the change itself."""
    targets = shapes()
    with plan_bake(targets, refs) as plan:
        return {
            name: plan.bake("unet", name, np.zeros(shape, np.float32))
            for name, shape in targets["unet"].items()
        }


def write(path, seed, rank, dtype, alpha, stems):
    rng, tensors = np.random.default_rng(seed), {}
    for stem in stems:
        out, *rest = TARGETS[stem]
        tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(rank, *rest)).astype(dtype)
        tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(out, rank, *(1,) * len(rest[1:]))).astype(dtype)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    safetensors.numpy.save_file(tensors, path)
    return path


@FEW
@given(
    files=st.lists(
        st.tuples(
            st.integers(1, 6),
            st.sampled_from((np.float16, np.float32)),
            st.one_of(st.none(), st.floats(0.125, 16, width=32)),
            st.sets(st.sampled_from(list(TARGETS)), min_size=1),
            STRENGTHS.filter(lambda s: abs(s) > 1e-3),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_merge_then_bake_is_bake_both(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("merge")
    refs = [
        AdapterRef(write(folder / f"{n}.safetensors", n, rank, dtype, alpha, sorted(stems)), strength)
        for n, (rank, dtype, alpha, stems, strength) in enumerate(files)
    ]
    report = merged(refs, folder / "all.safetensors")
    expected, actual = changes(*refs), changes(AdapterRef(report.output))
    for name, value in expected.items():
        # Both are sums of float32; the sum itself may be small beside what is added.
        scale = sum(np.abs(changes(ref)[name]).max() for ref in refs)
        assert np.abs(actual[name] - value).max() <= 2e-6 * scale, name
    assert report.energy == pytest.approx(1, abs=1e-9)
    assert sum(report.ranks.values()) == len({stem for *_, stems, _ in files for stem in stems})


def test_one_scale_for_all_copies_the_factors_to_the_bit(tmp_path):
    one = write(tmp_path / "one.safetensors", 0, 4, np.float16, 4.0, TARGETS)
    two = write(tmp_path / "two.safetensors", 1, 2, np.float16, 2.0, TARGETS)
    report = merged([AdapterRef(one, 0.7), AdapterRef(two, -0.7)], tmp_path / "both.safetensors")
    assert report.precision == "fp16"
    assert report.exact == len(TARGETS)
    found = safetensors.numpy.load_file(report.output)
    first, second = safetensors.numpy.load_file(one), safetensors.numpy.load_file(two)
    for stem in TARGETS:
        key = f"{stem}.lora_up.weight"
        assert np.array_equal(found[key], np.concatenate([first[key], -second[key]], axis=1))
        assert float(found[f"{stem}.alpha"]) == pytest.approx(6 * 0.7, rel=1e-15)
    other = merged([AdapterRef(one, 0.7), AdapterRef(two, 0.3)], tmp_path / "other.safetensors")
    assert other.precision == "fp32", "multiplied factors would be rounded in fp16"


@pytest.mark.parametrize("plant", ["strength", "sign", "order"])
def test_a_planted_error_is_seen(tmp_path, plant):
    one = write(tmp_path / "one.safetensors", 0, 4, np.float32, 2.0, TARGETS)
    two = write(tmp_path / "two.safetensors", 1, 2, np.float32, 2.0, TARGETS)
    refs = {
        "strength": [AdapterRef(one, 0.707), AdapterRef(two, -0.3)],
        "sign": [AdapterRef(one, 0.7), AdapterRef(two, 0.3)],
        "order": [AdapterRef(two, 0.7), AdapterRef(one, -0.3)],
    }[plant]
    report = merged(refs, tmp_path / "both.safetensors")
    expected = changes(AdapterRef(one, 0.7), AdapterRef(two, -0.3))
    actual = changes(AdapterRef(report.output))
    assert min(relative_l2(actual[name], expected[name]) for name in expected) > 1e-3


def test_diffusers_draws_the_merge_as_both(tiny, make_lora, spell, save, fused, worst, limit, tmp_path):
    import torch

    first = spell("kohya", make_lora(is_sampled, alpha=3.0))
    second = spell("kohya", make_lora(is_sampled, rank=2, seed=1, alpha=None))
    pipeline = tiny.pipeline()
    for name, tensors in (("a", first), ("b", second)):
        state = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
        with pytest.warns(UserWarning, match="peft_config") if name == "b" else _nothing():
            pipeline.load_lora_weights(state, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.5, -0.25])
    pipeline.fuse_lora(adapter_names=["a", "b"])
    paths, expected = (save(first, "a"), save(second, "b")), fused(pipeline)

    def drawn(strengths):
        refs = [AdapterRef(path, strength) for path, strength in zip(paths, strengths, strict=True)]
        report = merged(refs, tmp_path / "both.safetensors", overwrite=True)
        other = tiny.pipeline()
        other.load_lora_weights(report.output)
        other.fuse_lora()
        return fused(other)

    assert limit.holds(worst(drawn((0.5, -0.25)), expected))
    assert not limit.holds(worst(drawn((0.505, -0.25)), expected)), "another strength is not seen"


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_rank_cuts_to_the_largest_singular_values(tmp_path):
    import torch

    one = write(tmp_path / "one.safetensors", 0, 4, np.float32, 2.0, TARGETS)
    two = write(tmp_path / "two.safetensors", 1, 4, np.float32, 2.0, TARGETS)
    refs = [AdapterRef(one, 0.7), AdapterRef(two, -0.3)]
    report = merged(refs, tmp_path / "cut.safetensors", rank=3)
    assert report.ranks == {3: 3}
    expected, actual = changes(*refs), changes(AdapterRef(report.output))
    for name, value in expected.items():
        flat = torch.from_numpy(value.reshape(len(value), -1)).double()
        squares = torch.linalg.svdvals(flat) ** 2
        best = float(squares[:3].sum() / squares.sum())
        assert report.energies[f"unet.{name}"] == pytest.approx(best, rel=1e-5)
        rest = 1 - relative_l2(actual[name], value) ** 2
        assert rest == pytest.approx(best, rel=1e-5)
    found = safetensors.numpy.load_file(report.output)
    wrong = {k: v[:, ::-1].copy() if "lora_up" in k else v for k, v in found.items()}
    safetensors.numpy.save_file(wrong, tmp_path / "wrong.safetensors")
    planted = changes(AdapterRef(tmp_path / "wrong.safetensors"))
    for name, value in expected.items():  # the values in another order
        rest = 1 - relative_l2(planted[name], value) ** 2
        assert rest < report.energies[f"unet.{name}"] - 0.05


@pytest.mark.parametrize("case", ["LoHa", "LoHa conv", "LoHa Tucker", "LoKr", "LoKr conv factored", "CP",
                                  "sparse beside a LoRA", "difference", "difference conv"])  # fmt: skip
def test_families_that_add_go_through_their_difference(cases, tmp_path, case):
    weight, tensors = cases.make(case)
    stem = CONV if weight.ndim == 4 else LINEAR
    safetensors.numpy.save_file({f"{stem}.{k}": v for k, v in tensors.items()}, tmp_path / "one.safetensors")
    lora = write(tmp_path / "two.safetensors", 1, 2, np.float32, 2.0, [stem])
    refs = [AdapterRef(tmp_path / "one.safetensors", 0.7), AdapterRef(lora, 0.005)]
    with pytest.raises(AdapterError, match=r"no product of two factors.*--rank N"):
        merged(refs, tmp_path / "out.safetensors")
    report = merged(refs, tmp_path / "out.safetensors", rank=12)  # all that the weight has
    expected, actual = changes(*refs), changes(AdapterRef(report.output))
    for name in expected:
        assert relative_l2(actual[name], expected[name]) < 1e-5
    down = safetensors.numpy.load_file(report.output)[f"{stem}.lora_down.weight"]
    assert down.shape[1:] == TARGETS[stem][1:], "a kernel was lost"
    cut = merged(refs, tmp_path / "cut.safetensors", rank=2)
    (energy,) = cut.energies.values()
    name = next(name for name in expected if np.abs(expected[name]).max() > 0)
    lost = relative_l2(changes(AdapterRef(cut.output))[name], expected[name]) ** 2
    assert energy == pytest.approx(1 - lost, abs=1e-5)
    assert energy < 0.999


@pytest.mark.parametrize("case", ["DoRA of the inputs", "IA3 on the inputs", "GLoRA", "OFT", "set"])
def test_families_that_depend_on_the_weight_need_the_model(
    tiny, tiny_folder, cases, make_lora, spell, save, baked, tmp_path, case
):
    names = {"DoRA of the inputs": "DoRA", "IA3 on the inputs": "IA3", "set": "set weight"}
    lora = save(spell("kohya", make_lora(lambda n, m: m.endswith("attn1.to_q"))), "lora")
    weight = tiny.tensors["unet"]["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    rng = np.random.default_rng(0)
    tensors = _family(case, weight.shape, rng)
    path = save({f"{LINEAR}.{k}": v.astype(np.float32) for k, v in tensors.items()}, "one")
    refs = [AdapterRef(lora, 0.5), AdapterRef(path, 0.7)]
    with pytest.raises(AdapterError, match=rf"{names.get(case, case)}.*depends on the weight.*--model"):
        merged(refs, tmp_path / "out.safetensors", rank=16)
    report = merged(refs, tmp_path / "out.safetensors", rank=16, model=str(tiny_folder()))
    expected, actual = baked(tiny, *refs), baked(tiny, AdapterRef(report.output))
    for key, value in expected.items():
        assert relative_l2(actual[key], value) < 2e-6, key


def _family(case, shape, rng):
    out, inputs = shape
    if case.startswith("DoRA"):
        return {
            "lora_down.weight": rng.normal(size=(2, inputs)),
            "lora_up.weight": rng.normal(size=(out, 2)),
            "dora_scale": 1 + rng.random((1, inputs)),
        }
    if case.startswith("IA3"):
        return {"weight": rng.normal(size=inputs) / 4, "on_input": np.array(1.0)}
    if case == "GLoRA":
        shapes = {"a1": (inputs, 3), "a2": (3, inputs), "b1": (out, 3), "b2": (3, inputs)}
        return {f"{k}.weight": rng.normal(size=v) / 4 for k, v in shapes.items()}
    if case == "OFT":
        return {"oft_blocks": rng.normal(size=(4, out // 4, out // 4)) / 8, "alpha": np.array(0.0)}
    return {"set_weight": rng.normal(size=shape)}


def test_biases_and_norms_are_summed_as_they_are(tmp_path):
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    rng = np.random.default_rng(0)
    values = [{f"{norm}.w_norm": rng.normal(size=8), f"{norm}.b_norm": rng.normal(size=8),
               f"{LINEAR}.diff_b": rng.normal(size=12)} for _ in range(2)]  # fmt: skip
    for number, tensors in enumerate(values):
        single = {k: v.astype(np.float32) for k, v in tensors.items()}
        safetensors.numpy.save_file(single, tmp_path / f"{number}.safetensors")
    refs = [AdapterRef(tmp_path / "0.safetensors", 0.5), AdapterRef(tmp_path / "1.safetensors", -2.0)]
    found = safetensors.numpy.load_file(merged(refs, tmp_path / "out.safetensors").output)
    assert found.keys() == values[0].keys()
    for key, value in found.items():
        assert np.allclose(value, 0.5 * values[0][key] - 2 * values[1][key], rtol=1e-6)
        assert not np.allclose(value, 0.505 * values[0][key] - 2 * values[1][key], rtol=1e-6)
        assert not np.allclose(value, -2 * values[0][key] + 0.5 * values[1][key], rtol=1e-6)


def test_strengths_by_network_and_block(tiny, make_lora, spell, save, baked, worst, limit, tmp_path):
    from kiln.exporters.adapters.block_strengths import BlockStrengths

    path = save(spell("kohya", make_lora(is_sampled)))
    ref = AdapterRef(path, 0.8, 0.3, blocks=BlockStrengths.parse("OUTD"))
    report = merged([ref], tmp_path / "out.safetensors")
    assert limit.holds(worst(baked(tiny, AdapterRef(report.output)), baked(tiny, ref)))
    wrong = AdapterRef(path, 0.8, 0.3, blocks=BlockStrengths.parse("IND"))
    assert not limit.holds(worst(baked(tiny, AdapterRef(report.output)), baked(tiny, wrong)))


def test_a_dylora_is_cut_before_it_is_merged(tmp_path):
    path = write(tmp_path / "one.safetensors", 0, 6, np.float32, 3.0, TARGETS)
    report = merged([AdapterRef(path, 0.8, rank=2)], tmp_path / "out.safetensors")
    assert report.ranks == {2: 3}
    expected, actual = changes(AdapterRef(path, 0.8, rank=2)), changes(AdapterRef(report.output))
    assert all(relative_l2(actual[name], expected[name]) < 1e-6 for name in expected)


def test_what_is_not_merged_is_reported(tmp_path):
    path = write(tmp_path / "one.safetensors", 0, 2, np.float32, 3.0, [LINEAR])
    tensors = safetensors.numpy.load_file(path) | {
        "bundle_emb.x.string_to_param.*": np.zeros((1, 8), np.float32)
    }
    safetensors.numpy.save_file(tensors, path)
    report = merged([AdapterRef(path)], tmp_path / "out.safetensors")
    assert report.unmatched == {"bundle_emb.x.string_to_param.*": "no parameter that Kiln knows"}


def test_the_metadata_says_where_it_is_from(tmp_path):
    path = write(tmp_path / "one.safetensors", 0, 2, np.float32, 3.0, [LINEAR])
    merged([AdapterRef(path, 0.8)], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["modelspec.merged_from"] == "one"
    assert metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["kiln_recipe"])["adapters"][0] == {
        "file": "one.safetensors", "unet": 0.8, "text_encoder": 0.8,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(metadata)
    again = tmp_path / "again" / "out.safetensors"
    merged([AdapterRef(path, 0.8)], again)
    assert again.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path):
    one = write(tmp_path / "one.safetensors", 0, 600, np.float16, 2.0, [LINEAR])
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match=r"1200 ranks together.*--rank N"):
        merged([AdapterRef(one), AdapterRef(one)], out)
    tensors = {
        k: np.concatenate([v, v]) if "up" in k else v for k, v in safetensors.numpy.load_file(one).items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(AdapterError, match="different models"):
        merged([AdapterRef(one), AdapterRef(tmp_path / "two.safetensors")], out)
    with pytest.raises(AdapterError, match="change nothing"):
        merged([AdapterRef(one, 0.0)], out)
    with pytest.raises(AdapterError, match="overflows float32"):
        merged([AdapterRef(one, 1.0), AdapterRef(one, 1e42)], out, rank=4)
    with pytest.raises(AdapterError, match=r"F16 ends at 65504"):
        merged([AdapterRef(one, 1.0), AdapterRef(one, 1e13)], out, rank=4, precision="fp16")
    with pytest.raises(UsageError, match="'fp8'"):
        merged([AdapterRef(one)], out, precision="fp8")
    out.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        merged([AdapterRef(one)], out)
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.safetensors",
        "out.safetensors",
        "two.safetensors",
    ]

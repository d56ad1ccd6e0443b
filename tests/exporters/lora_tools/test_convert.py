"""Dialects into each other: without loss, and as diffusers and PEFT read them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.lora_tools.convert import ConvertSpec, convert

FEW = settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DIALECTS = (
    "kohya",
    "kohya, LDM names",
    "diffusers",
    "diffusers, peft suffixes",
    "diffusers attention processors",
    "bare attention processors",
)


def is_sampled(network, module):
    return network == "text_encoder" or any(part in module for part in ("attentions", "resnets", "samplers"))


def is_attention(network, module):
    return ".attn" in module or ".self_attn." in module


def load(path):
    return safetensors.numpy.load_file(path)


def converted(path, output, to, **options):
    return convert(ConvertSpec(path, output, to, **options))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_every_dialect_bakes_as_before(
    tiny, make_lora, spell, save, baked, worst, limit, tmp_path, dialect, to
):
    alpha = 3.0 if dialect.startswith("kohya") else None
    select = is_sampled if "processors" not in dialect and dialect != "diffusers" else is_attention
    if dialect == "bare attention processors":
        select = lambda network, module: network == "unet" and ".attn" in module  # noqa: E731
    path = save(spell(dialect, make_lora(select, alpha=alpha)))
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    converted(path, out, to)
    folders = [out / n for n in ("unet", "text_encoder") if (out / n).is_dir()] or [out]
    refs = [AdapterRef(one, 0.7) for one in folders]
    assert worst(baked(tiny, *refs), baked(tiny, AdapterRef(path, 0.7))) == 0.0


@FEW
@given(
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    alphas=st.lists(
        st.one_of(st.none(), st.floats(-64, 64, width=32), st.floats(1e-3, 4, width=64)),
        min_size=4,
        max_size=4,
    ),
    dtype=st.sampled_from((np.float16, np.float32)),
    chain=st.lists(st.sampled_from(("diffusers", "peft", "kohya")), min_size=1, max_size=3),
)
def test_a_way_through_dialects_ends_at_the_same_numbers(tmp_path_factory, ranks, alphas, dtype, chain):
    """Factors to the bit; alpha as a number, explicit where it was the rank."""
    rng, tensors = np.random.default_rng(0), {}
    stems = [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", (8, 8, 1, 1)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (8, 6)),
        ("lora_unet_up_blocks_1_resnets_2_conv1", (8, 12, 3, 3)),
        ("lora_te_text_model_encoder_layers_1_mlp_fc1", (9, 6)),
    ]
    for (stem, shape), rank, alpha in zip(stems, ranks, alphas, strict=True):
        ones = (1,) * (len(shape) - 2)
        tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(rank, *shape[1:])).astype(dtype)
        tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(shape[0], rank, *ones)).astype(dtype)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha)
    folder = tmp_path_factory.mktemp("chain")
    path = folder / "start.safetensors"
    safetensors.numpy.save_file(tensors, path)
    for number, to in enumerate([*chain, "kohya"]):
        out = folder / f"{number}{'' if to == 'peft' else '.safetensors'}"
        converted(path, out, to)
        path = out
    found = load(path)
    for (stem, _), rank, alpha in zip(stems, ranks, alphas, strict=True):
        assert float(found.pop(f"{stem}.alpha")) == (rank if alpha is None else alpha)
        tensors.pop(f"{stem}.alpha", None)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].shape == value.shape, key
        assert found[key].dtype == value.dtype, key
        assert np.array_equal(found[key], value), key


def tensors_with(make_lora, spell, **options):
    """LoRAs of several ranks and alphas in one file, which a single pair of numbers does not describe."""

    def is_first(network, module):
        return "attn1" in module or "q_proj" in module

    first = make_lora(lambda n, m: is_sampled(n, m) and is_first(n, m), rank=2, alpha=3.0)
    rest = make_lora(lambda n, m: is_sampled(n, m) and not is_first(n, m), **options)
    return spell("kohya", first) | spell("kohya", rest)


def fuse(tiny, path, strength=0.7):
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=strength)
    return pipeline


def test_diffusers_reads_the_file_and_its_metadata(
    tiny, make_lora, spell, save, baked, fused, worst, limit, tmp_path
):
    path = save(tensors_with(make_lora, spell, rank=5, alpha=1.5))
    out = tmp_path / "diffusers.safetensors"
    report = converted(path, out, "diffusers")
    assert set(report.modules) == {"unet", "text_encoder"}
    expected = baked(tiny, AdapterRef(path, 0.7))
    assert limit.holds(worst(fused(fuse(tiny, out)), expected))
    # A companion: without the metadata, alpha is lost, and that is seen.
    bare = tmp_path / "bare.safetensors"
    safetensors.numpy.save_file(load(out), bare)
    assert not limit.holds(worst(fused(fuse(tiny, bare)), expected))


def test_diffusers_reads_what_became_kohya(
    tiny, make_lora, spell, save, baked, fused, worst, limit, tmp_path
):
    source = save(spell("diffusers, peft suffixes", make_lora(is_sampled, alpha=None)))
    out = tmp_path / "kohya.safetensors"
    converted(source, out, "kohya")
    expected = baked(tiny, AdapterRef(source, 0.7))
    assert limit.holds(worst(fused(fuse(tiny, out)), expected))
    wrong = {k: v * np.float32(1.01) if "lora_up" in k else v for k, v in load(out).items()}
    safetensors.numpy.save_file(wrong, tmp_path / "wrong.safetensors")
    assert not limit.holds(worst(fused(fuse(tiny, tmp_path / "wrong.safetensors")), expected))


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_peft_opens_the_folder(tiny, make_lora, spell, save, baked, worst, limit, tmp_path, network):
    from peft import PeftModel

    path = save(tensors_with(make_lora, spell, rank=5, alpha=1.5))
    report = converted(path, tmp_path / "peft", "peft")
    assert f"{network}/adapter_config.json" in report.files
    module = copy.deepcopy(getattr(tiny, network))
    merged = PeftModel.from_pretrained(module, tmp_path / "peft" / network).merge_and_unload()
    actual = {(network, name): value.detach().numpy() for name, value in merged.state_dict().items()}
    expected = {key: value for key, value in baked(tiny, AdapterRef(path)).items() if key[0] == network}
    assert limit.holds(worst(actual, expected))
    assert any(
        not np.array_equal(value, tiny.tensors[network][name]) for (_, name), value in expected.items()
    )
    config = tmp_path / "peft" / network / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {}}))
    other = PeftModel.from_pretrained(copy.deepcopy(getattr(tiny, network)), config.parent).merge_and_unload()
    wrong = {(network, name): value.detach().numpy() for name, value in other.state_dict().items()}
    assert not limit.holds(worst(wrong, expected)), "the patterns say nothing"


def test_dora_of_the_outputs_is_carried_and_read_by_peft(
    tiny, make_lora, spell, save, baked, worst, limit, tmp_path
):
    from peft import PeftModel

    tensors = spell("kohya", make_lora(lambda n, m: n == "unet" and ("attn1" in m or "conv1" in m)))
    for key in [key for key in tensors if key.endswith("lora_up.weight")]:
        up, down = tensors[key], tensors[key.replace("lora_up", "lora_down")]
        lengths = np.linspace(1, 2, len(up), dtype=np.float32).reshape(-1, *(1,) * (down.ndim - 1))
        tensors[key.replace("lora_up.weight", "dora_scale")] = lengths
    path = save(tensors)
    converted(path, tmp_path / "peft", "peft")

    def opened():
        merged = PeftModel.from_pretrained(copy.deepcopy(tiny.unet), tmp_path / "peft").merge_and_unload()
        return {("unet", name): value.detach().numpy() for name, value in merged.state_dict().items()}

    expected = {key: value for key, value in baked(tiny, AdapterRef(path)).items() if key[0] == "unet"}
    assert worst(opened(), expected) < 4 * limit.limit  # PEFT adds and normalises in another order
    converted(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    back = load(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], value) for key, value in tensors.items())
    file = tmp_path / "peft" / "adapter_model.safetensors"
    wrong = {k: v * np.float32(1.01) if "magnitude" in k else v for k, v in load(file).items()}
    safetensors.numpy.save_file(wrong, file)
    assert worst(opened(), expected) > 4 * limit.limit, "other lengths are not seen"


def test_rank_stabilized_scales_become_an_alpha(tiny, baked, worst, limit, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "k_proj"], use_rslora=True)
    model = get_peft_model(copy.deepcopy(tiny.text_encoder), config)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "peft")
    converted(tmp_path / "peft", tmp_path / "out.safetensors", "kohya")
    found = load(tmp_path / "out.safetensors")
    alpha = next(v for k, v in found.items() if k.endswith("alpha"))
    assert float(alpha) == pytest.approx(3 * 5**0.5, rel=1e-14)
    state = model.merge_and_unload().state_dict()
    expected = {("text_encoder", name): value.detach().numpy() for name, value in state.items()}

    def own(path):
        return {k: v for k, v in baked(tiny, AdapterRef(path)).items() if k[0] == "text_encoder"}

    assert limit.holds(worst(own(tmp_path / "out.safetensors"), expected))
    assert limit.holds(worst(own(tmp_path / "peft"), expected))
    plain = {k: np.array(3.0, v.dtype) if k.endswith("alpha") else v for k, v in found.items()}
    safetensors.numpy.save_file(plain, tmp_path / "plain.safetensors")
    assert not limit.holds(worst(own(tmp_path / "plain.safetensors"), expected)), "the root is not seen"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_topology_is_that_of_diffusers_classes(family, sd1_shapes, sd2_shapes, sdxl_shapes):
    from kiln.exporters.lora_tools.topology import family_index

    shapes = {"sd1": sd1_shapes, "sd2": sd2_shapes, "sdxl": sdxl_shapes}[family]

    def off(index):
        """Layers that only one of both has."""
        found = set()
        for network, tensors in shapes.items():
            real = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
            mine = set(index.modules(network))
            # A shortcut only stands where the width changes, the projection only in encoders that have one.
            more = {path for path in mine - real if "conv_shortcut" not in path} - {"text_projection"}
            found |= more | (real - mine)
        return found

    assert off(family_index(family)) == set()
    assert off(family_index({"sd1": "sd2", "sd2": "sdxl", "sdxl": "sd1"}[family])), (
        "another family is not seen"
    )


def test_sdxl_gets_kohyas_names_of_ldm(sdxl_shapes, tmp_path):
    """Names of real SDXL files: LDM's, each layer once, and the same layers on the way back."""
    from kiln.exporters.adapters.keys import ModuleIndex

    tensors = {}
    for network, shapes in sdxl_shapes.items():
        for name, shape in shapes.items():
            if name.endswith("weight") and len(shape) > 1 and "embedding." not in name:
                stem = f"{network}.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = np.zeros((1, *shape[1:]), np.float16)
                tensors[f"{stem}.lora_B.weight"] = np.zeros((shape[0], 1, *(1,) * len(shape[2:])), np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    converted(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya")
    stems = {key.split(".")[0] for key in load(tmp_path / "out.safetensors")}
    assert len(stems) == len(tensors) // 2
    assert {s for s in stems if s.startswith("lora_unet_down") or s.startswith("lora_te_")} == set()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_output_blocks_2_2_conv" in stems
    assert "lora_te1_text_model_encoder_layers_11_mlp_fc1" in stems
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in stems
    placed = ModuleIndex(sdxl_shapes).place(stems)
    assert {f"{p.network}.{p.module}" for p in placed.values()} == {k.rsplit(".", 2)[0] for k in tensors}


def test_real_files_come_back(tmp_path):
    from kiln.exporters.resolve import bundled_adapters

    found = bundled_adapters()
    if not found:
        pytest.skip("the bundled adapters are not in this checkout")
    for name, path in found.items():
        converted(path, tmp_path / f"{name}.safetensors", "diffusers")
        converted(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-back.safetensors", "kohya")
        before, after = load(path), load(tmp_path / f"{name}-back.safetensors")
        assert before.keys() == after.keys()
        assert all(np.array_equal(after[key], value) for key, value in before.items())


def test_a_torch_file_becomes_safetensors(make_lora, spell, save, tmp_path):
    import torch

    tensors = spell("kohya", make_lora(is_attention))
    torch.save({k: torch.from_numpy(v.copy()).bfloat16() for k, v in tensors.items()}, tmp_path / "old.pt")
    report = converted(tmp_path / "old.pt", tmp_path / "new.safetensors", "safetensors")
    assert report.tensors == len(tensors)
    loaded = safetensors.torch.load_file(tmp_path / "new.safetensors")

    def is_same(factor=1.0):
        return loaded.keys() == tensors.keys() and all(
            torch.equal(v, (torch.from_numpy(tensors[k].copy()) * factor).bfloat16())
            for k, v in loaded.items()
        )

    assert is_same()
    assert not is_same(1.01)


def test_families_beside_lora_stay_in_kohyas_form(cases, tmp_path, tiny):
    """Any family can be said in kohya's names: here from LDM's names to diffusers'."""
    for case in (
        "LoHa",
        "LoKr",
        "IA3 on the inputs",
        "GLoRA",
        "OFT",
        "DoRA of the inputs",
        "sparse beside a LoRA",
    ):
        _, tensors = cases.make(case)
        stem = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
        safetensors.numpy.save_file(
            {f"{stem}.{k}": v for k, v in tensors.items()}, tmp_path / "in.safetensors"
        )
        converted(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya", overwrite=True)
        new = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        found = load(tmp_path / "out.safetensors")
        assert found.keys() == {f"{new}.{k}" for k in tensors}
        assert all(np.array_equal(found[f"{new}.{k}"], v) for k, v in tensors.items())


def test_metadata_is_carried_but_for_what_is_no_longer_true(make_lora, spell, save, tmp_path):
    from safetensors import safe_open

    said = {
        "ss_tag_frequency": "{}",
        "sshs_model_hash": "abc",
        "modelspec.hash_sha256": "0xabc",
        "ss_seed": "1",
    }
    path = save(spell("kohya", make_lora(is_attention)), metadata=said)
    converted(path, tmp_path / "out.safetensors", "diffusers")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["ss_tag_frequency"] == "{}"
    assert metadata["ss_seed"] == "1"
    assert not metadata.keys() & {"sshs_model_hash", "modelspec.hash_sha256"}
    assert metadata["format"] == "pt"
    assert json.loads(metadata["kiln_recipe"])["source"] == path.name
    assert str(tmp_path) not in json.dumps(metadata)

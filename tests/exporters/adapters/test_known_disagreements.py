"""Where other packages are wrong, or disagree: each test shows what they do and what Kiln does instead.

A package that mends its fault fails its test here; then it can serve as an oracle.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.ldm_names import ldm_unet_module_map

torch = pytest.importorskip("torch")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]


def tensor(value):
    return torch.from_numpy(np.array(value, np.float32))


@pytest.fixture
def lycoris_merged():
    pytest.importorskip("lycoris")
    from lycoris.modules import get_module

    def merged(weight, tensors, strength=1.0):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(tensor(weight))
        kind, parts = get_module({f"x.{key}": tensor(value) for key, value in tensors.items()}, "x")
        with torch.no_grad():
            module = kind.make_module_from_state_dict("x", layer, *parts)
            return module.get_merged_weight(strength)[0].numpy().reshape(weight.shape)

    return merged


@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
def test_lycoris_merges_loha_and_lokr_with_the_square_of_their_scale(bake_one, cases, lycoris_merged, name):
    weight, tensors = cases.make(name)
    rank = len(tensors.get("hada_w1_b", tensors.get("lokr_w2_b")))
    scale = float(tensors["alpha"]) / rank
    actual, _ = bake_one(weight, tensors)
    theirs = lycoris_merged(weight, tensors)
    assert relative_l2(theirs - weight, scale * (actual - weight)) < 1e-5
    assert relative_l2(theirs - weight, actual - weight) > 0.1


@pytest.mark.parametrize("name", ["LoHa without alpha", "OFT", "IA3 on the inputs", "DoRA of the inputs"])
def test_lycoris_cannot_make_some_modules_from_a_file(bake_one, cases, lycoris_merged, name):
    """No alpha, IA3, and lengths of the inputs (its issues 187 and 216)."""
    weight, tensors = cases.make(name)
    bake_one(weight, tensors)
    with pytest.raises((TypeError, RuntimeError)):
        lycoris_merged(weight, tensors)


def test_lycoris_cannot_load_the_first_lokr_files(shared, lycoris_merged):
    from kiln.exporters.adapters.open import open_adapter

    adapter = open_adapter(shared / "adapters" / "smart_falcon_4_lokr.safetensors")
    module = next(m for m in adapter.modules if m.stem.endswith("layers_0_mlp_fc1"))
    tensors = {name: adapter.source.read(key) for name, key in module.keys.items()}
    adapter.source.close()
    with pytest.raises((AttributeError, RuntimeError)):
        lycoris_merged(np.zeros((3072, 768), np.float32), tensors)


def test_lycoris_divides_a_tucker_lokr_by_its_width(bake_one, cases):
    lokr = pytest.importorskip("lycoris.functional.lokr")
    weight, tensors = cases.make("LoKr Tucker")
    names = ("lokr_w1", "", "", "", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    parts = [tensor(tensors[name]) if name else None for name in names]
    theirs = lokr.diff_weight(*parts, gamma=float(tensors["alpha"]), backend="torch").numpy()
    actual, _ = bake_one(weight, tensors)
    rank, width = tensors["lokr_w2_a"].shape
    assert relative_l2(theirs.reshape(weight.shape) * width / rank, actual - weight) < 1e-5


def test_lycoris_leaves_rescale_at_full_strength(bake_one, cases):
    """Towards strength 0 its OFT is the rescaled weight; Kiln's is the weight, as in the webui."""
    pytest.importorskip("lycoris")
    from lycoris.modules.diag_oft import DiagOFTModule

    weight, tensors = cases.make("OFT conv with rescale")
    layer = torch.nn.Conv2d(20, 12, 3, bias=False)
    layer.weight.data.copy_(tensor(weight))
    made = DiagOFTModule.make_module_from_state_dict
    with torch.no_grad():
        module = made(
            "x", layer, tensor(tensors["oft_blocks"]), tensor(tensors["rescale"]), torch.tensor(0.0)
        )
        full, half = (module.get_merged_weight(m)[0].numpy() for m in (1.0, 1e-6))
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, 1.0)[0], full))
    assert relative_l2(half, weight * tensors["rescale"]) < 1e-5
    assert relative_l2(bake_one(weight, tensors, 1e-6)[0], weight) < 1e-5


def test_lycoris_forgets_the_sparse_remainder(bake_one, cases, lycoris_merged):
    """It writes one beside an extracted low rank and merges the low rank alone."""
    weight, tensors = cases.make("sparse beside a LoRA")
    low = {key: value for key, value in tensors.items() if not key.startswith("bias_")}
    theirs = lycoris_merged(weight, tensors)
    assert LIMIT.holds(relative_l2(bake_one(weight, low)[0], theirs))
    assert not LIMIT.holds(relative_l2(bake_one(weight, tensors)[0], theirs))


def test_lycoris_cannot_make_a_glora_in_cp_form(bake_one, cases):
    """Its module asks for a kernel that is both of one and of more, so no trainer wrote such a file."""
    glora = pytest.importorskip("lycoris.modules.glora")
    weight, tensors = cases.make("GLoRA CP")
    bake_one(weight, tensors)
    layer = torch.nn.Conv2d(20, 12, 3, bias=False)
    parts = [tensor(tensors[f"{name}.weight"]) for name in ("a1", "a2", "b1", "b2", "bm")]
    with pytest.raises(AttributeError, match="bm"):
        glora.GLoRAModule.make_module_from_state_dict("x", layer, *parts, torch.tensor(2.5))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_multiplies_the_weight_by_glora_elementwise(bake_one, cases):
    """The paper and LyCORIS multiply matrices, ``W A``; PEFT's GLoRA is ``W * A``."""
    peft = pytest.importorskip("peft")
    weight = cases.make("GLoRA")[0][:, :12].copy()  # square, where both can be had of the same factors
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=n).astype(np.float32) for n in ((12, 4), (4, 12)))
    layer = torch.nn.Linear(12, 12, bias=False)
    layer.weight.data.copy_(tensor(weight))
    config = peft.GloraConfig(target_modules=["0"], r=4, config_C="none", config_D_E="none")
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    path = model.base_model.model[0].glora_A["default"]
    path.Xd.data.copy_(tensor(left))
    path.Xu.data.copy_(tensor(right))
    theirs = model.merge_and_unload()[0].weight.detach().numpy()
    zeros = {"b1.weight": np.zeros((12, 4), np.float32), "b2.weight": np.zeros((4, 12), np.float32)}
    actual, _ = bake_one(weight, {"a1.weight": left, "a2.weight": right, **zeros})
    assert LIMIT.holds(relative_l2(actual, weight + weight @ (left @ right)))
    assert LIMIT.holds(relative_l2(theirs, weight + weight * (left @ right)))


def attention(network, module):
    return network == "unet" and ".attn" in module


def fuse(tiny, tensors, strength=1.0):
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    pipeline.fuse_lora(lora_scale=strength)
    return pipeline


def distances(tiny, baked, fused, pipeline, path):
    actual, theirs = baked(tiny, AdapterRef(path)), fused(pipeline)
    return {key: relative_l2(theirs[key], actual[key]) for key in actual}


def test_diffusers_mixes_up_ranks_without_alpha(tiny, make_lora, spell, save, baked, fused):
    """Modules of one of the ranks get a scale of their own (its pull request 14409)."""
    few = make_lora(lambda n, m: attention(n, m) and "mid_block" in m, rank=8, alpha=None)
    many = make_lora(lambda n, m: attention(n, m) and "mid_block" not in m, rank=4, alpha=None)
    tensors = spell("diffusers, peft suffixes", few + many)
    apart = distances(tiny, baked, fused, fuse(tiny, tensors), save(tensors))
    wrong = {key for key, value in apart.items() if not LIMIT.holds(value)}
    groups = [{("unet", f"{factors.module}.weight") for factors in group} for group in (few, many)]
    assert wrong in groups


def test_diffusers_gives_modules_without_alpha_that_of_the_others(
    tiny, make_lora, spell, save, baked, fused, with_alpha
):
    factors = make_lora(attention, alpha=1.0)
    tensors = spell("kohya", with_alpha(factors[:3], None) + factors[3:])
    apart = distances(tiny, baked, fused, fuse(tiny, tensors), save(tensors))
    wrong = {key for key, value in apart.items() if not LIMIT.holds(value)}
    assert wrong == {("unet", f"{f.module}.weight") for f in factors[:3]}


def test_diffusers_applies_nothing_of_bare_attention_processors(tiny, make_lora, spell, save, baked, fused):
    tensors = spell("bare attention processors", make_lora(attention, alpha=None))
    pipeline = tiny.pipeline()
    pipeline.load_lora_weights({k: torch.from_numpy(v.copy()) for k, v in tensors.items()})
    theirs = fused(pipeline)
    assert all(np.array_equal(theirs[n, k], v) for n, t in tiny.tensors.items() for k, v in t.items())
    actual = baked(tiny, AdapterRef(save(tensors)))
    assert any(not np.array_equal(actual[key], theirs[key]) for key in actual)


SPELLINGS = {
    "diffusion_model.{ldm}": "Invalid LoRA checkpoint",  # ComfyUI
    "diffusion_model_{flat}": "Invalid LoRA checkpoint",  # NTC
    "unet.{ldm}": "Invalid LoRA checkpoint",  # OneTrainer, of the Open Model Initiative
    "lora_unet.{path}": None,  # OneTrainer's own
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_no_names_of_comfyui_onetrainer_and_ntc(tiny, make_lora, save, baked, spelling):
    """It refuses the file, or applies nothing of it."""
    ldm = {path: name for name, path in ldm_unet_module_map(tiny.tensors["unet"]).items()}
    tensors = {}
    for f in make_lora(attention):
        name = ldm[f.module]
        stem = spelling.format(ldm=name, flat=name.replace(".", "_"), path=f.module)
        tensors |= {f"{stem}.lora_down.weight": f.down, f"{stem}.lora_up.weight": f.up}
        tensors[f"{stem}.alpha"] = np.array(f.alpha, np.float32)
    actual = baked(tiny, AdapterRef(save(tensors)))
    changed = [key for key in actual if not np.array_equal(actual[key], tiny.tensors[key[0]][key[1]])]
    assert len(changed) == len(tensors) // 3
    pipeline = tiny.pipeline()
    state = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
    if message := SPELLINGS[spelling]:
        with pytest.raises(ValueError, match=message):
            pipeline.load_lora_weights(state)
        return
    pipeline.load_lora_weights(state)
    assert pipeline.get_list_adapters() == {}


def test_diffusers_drops_the_lengths_of_dora(tiny, make_lora, spell, save, baked, fused):
    """It bakes a plain LoRA and warns (its pull request 9547)."""
    factors = make_lora(attention, alpha=None)
    tensors = spell("kohya", factors)
    stems = {key.split(".")[0] for key in tensors}
    sizes = {stem: len(tensors[f"{stem}.lora_up.weight"]) for stem in stems}
    lengths = {f"{stem}.dora_scale": np.full((size, 1), 2, np.float32) for stem, size in sizes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fused(fuse(tiny, tensors | lengths))
    plain = baked(tiny, AdapterRef(save(tensors, "plain")))
    actual = baked(tiny, AdapterRef(save(tensors | lengths)))
    assert all(LIMIT.holds(relative_l2(theirs[key], plain[key])) for key in plain)
    name = ("unet", f"{factors[0].module}.weight")
    np.testing.assert_allclose(np.linalg.norm(actual[name], axis=1), 2, rtol=1e-5)

"""What few adapter packages merge, against torch itself: its tensors' operators, its layers run forward."""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

torch = pytest.importorskip("torch")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
SPARSE = ["sparse beside a LoRA", "sparse conv"]


@pytest.mark.parametrize("name", SPARSE)
def test_the_sparse_remainder(bake_one, cases, name):
    """LyCORIS writes the three tensors of torch's coordinate format."""
    weight, tensors = cases.make(name)
    t = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    size = tuple(int(n) for n in t["bias_size"])
    change = (
        torch.sparse_coo_tensor(t["bias_indices"].long(), t["bias_values"], size, check_invariants=True)
        .to_dense()
        .numpy()
    )
    scale = 1.0
    if "lora_up.weight" in t:
        change = change + (t["lora_up.weight"] @ t["lora_down.weight"]).numpy()
        scale = float(tensors["alpha"]) / 4
    actual, _ = bake_one(weight, tensors, 0.6)
    assert LIMIT.holds(relative_l2(actual, weight + np.float32(0.6 * scale) * change))
    moved = tensors | {"bias_indices": tensors["bias_indices"][:, ::-1].copy()}
    wrong, _ = bake_one(weight, moved, 0.6)
    assert not LIMIT.holds(relative_l2(wrong, weight + np.float32(0.6 * scale) * change))


def test_what_lycoris_extracts_is_the_difference_of_the_models(bake_one):
    """Its low rank and its sparse remainder together give back all of a difference that they can hold."""
    pytest.importorskip("lycoris")
    from lycoris.utils import extract_linear, make_sparse

    rng = np.random.default_rng(0)
    weight, tuned = (rng.normal(size=(24, 20)).astype(np.float32) for _ in range(2))
    low, mode = extract_linear(torch.from_numpy(tuned - weight), "fixed", 3)
    assert mode == "low rank"
    down, up, left = low
    sparse = make_sparse(left.reshape(24, 20), 0.0).to_sparse().coalesce()
    tensors = {
        "lora_down.weight": down.numpy(),
        "lora_up.weight": up.numpy(),
        "alpha": np.array(3, np.float32),
        "bias_indices": sparse.indices().to(torch.int16).numpy(),
        "bias_values": sparse.values().numpy(),
        "bias_size": np.array([24, 20], np.int16),
    }
    actual, _ = bake_one(weight, {key: np.ascontiguousarray(value) for key, value in tensors.items()})
    # The whole is there but for the roundings of a singular value decomposition in float32.
    assert relative_l2(actual, tuned) < 3 * LIMIT.limit
    del tensors["bias_indices"], tensors["bias_values"], tensors["bias_size"]
    without, _ = bake_one(weight, {key: np.ascontiguousarray(value) for key, value in tensors.items()})
    assert relative_l2(without, tuned) > 0.1


GLORAS = ["GLoRA", "GLoRA conv", "GLoRA 1x1", "GLoRA CP", "GLoRA old"]


@pytest.mark.parametrize("name", GLORAS)
def test_glora_is_the_network_of_its_paper(bake_one, cases, name):
    """``y = W (x + A x) + B x`` run by torch with layers for A and B, and run with the baked weight."""
    weight, tensors = cases.make(name)
    order = ("a2", "a1", "b2", "b1") if name == "GLoRA old" else ("a1", "a2", "b1", "b2")
    t = {k: torch.from_numpy(np.array(v)).double() for k, v in tensors.items()}
    left, right, own, other = (t[f"{part}.weight"] for part in order)
    scale = 0.6 * float(tensors["alpha"]) / 4

    def run(x, *factors):
        for factor in factors:
            if weight.ndim == 2:
                x = torch.nn.functional.linear(x, factor)
            else:
                x = torch.nn.functional.conv2d(x, factor, padding=factor.shape[-1] // 2)
        return x

    torch.manual_seed(0)
    x = torch.randn(*((5, 20) if weight.ndim == 2 else (2, 20, 6, 6)), dtype=torch.float64)
    w = torch.from_numpy(weight).double()
    beside = (other, t["bm.weight"], own) if "bm.weight" in t else (other, own)
    expected = run(x + scale * run(x, right, left), w) + scale * run(x, *beside)
    actual, _ = bake_one(weight, tensors, 0.6)
    assert LIMIT.holds(relative_l2(run(x, torch.from_numpy(actual).double()).numpy(), expected.numpy()))
    wrong, _ = bake_one(weight, tensors, 0.61)
    assert not LIMIT.holds(relative_l2(run(x, torch.from_numpy(wrong).double()).numpy(), expected.numpy()))


def test_a_whole_value(bake_one, cases):
    """The way from the weight to the value is what torch calls ``lerp``, the end of it what it loads."""
    weight, tensors = cases.make("set")
    value = torch.from_numpy(tensors["set_weight"])
    layer = torch.nn.Conv2d(20, 12, 3, bias=False)
    layer.load_state_dict({"weight": value})
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors)[0], layer.weight.detach().numpy()))
    expected = torch.lerp(torch.from_numpy(weight), value, 0.6).numpy()
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, 0.6)[0], expected))
    assert not LIMIT.holds(relative_l2(bake_one(weight, tensors, 0.61)[0], expected))


KRON = "LoKr conv factored with a kernel"


def test_a_kronecker_product_with_a_kernel(bake_one, cases):
    """The second factor is a convolution after a convolution; torch multiplies the whole by the first."""
    weight, tensors = cases.make(KRON)
    t = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    inputs = torch.eye(5)[:, :, None, None]  # each input alone, so that the output is the kernel, mirrored
    padded = torch.nn.functional.pad(inputs, (2, 2, 2, 2))
    passed = torch.nn.functional.conv2d(padded, t["lokr_w2_b"])
    second = torch.nn.functional.conv2d(passed, t["lokr_w2_a"][:, :, None, None]).flip(2, 3).transpose(0, 1)
    change = torch.kron(t["lokr_w1"][:, :, None, None], second.contiguous()) * (t["alpha"] / 2)
    expected = weight + np.float32(0.6) * change.numpy()
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, 0.6)[0], expected))
    mirrored = tensors | {"lokr_w2_b": tensors["lokr_w2_b"][:, :, ::-1].copy()}
    assert not LIMIT.holds(relative_l2(bake_one(weight, mirrored, 0.6)[0], expected))


ROTATIONS = ["OFT of OneTrainer", "OFT of OneTrainer conv", "OFT of OneTrainer shared"]
ROTATIONS += ["OFT of OneTrainer scaled", "OFT of OneTrainer scaled at first"]
ROTATIONS += ["OFT of PEFT", "OFT of PEFT conv"]


def turned(generators):
    """``I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``, by torch's exact Cayley transform: it is that times ``I - Q^4``."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros_like(generators))
    cayley = torch.nn.utils.parametrizations.orthogonal
    cayley(layer, orthogonal_map="cayley", use_trivialization=False)
    layer.parametrizations.weight.original.data.copy_(2 * generators.tril())
    identity = torch.eye(generators.shape[-1], dtype=generators.dtype)
    return (layer.weight @ (identity - torch.linalg.matrix_power(generators, 4))).detach()


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_rotations_of_the_inputs(bake_one, cases, name, strength):
    """``x R`` before a linear layer; OneTrainer turns the kernel of a convolution, PEFT its inputs."""
    weight, tensors = cases.make(name)
    stem = cases.stem_of(name)
    vectors, flag = torch.from_numpy(tensors["oft_R.weight"]).double(), tensors.get("oft_R.scaled_oft")
    columns = weight[0].size
    size = next(b for b in range(2, 64) if b * (b - 1) // 2 == vectors.shape[1])
    if flag is not None:
        vectors = vectors / (vectors.shape[1] ** 0.5 if flag.dtype != np.bool_ else 2 * (size - 1) ** 0.5)
    generators = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    generators[:, *torch.triu_indices(size, size, 1)] = vectors
    blocks = turned(generators - generators.mT)
    whole = torch.block_diag(*blocks.expand(columns // size, -1, -1))
    if weight.ndim == 2 or "PEFT" in name:
        whole = whole.T
    start = torch.from_numpy(weight).double().flatten(1)
    expected = torch.lerp(start, start @ whole, strength).reshape(weight.shape).numpy()
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors, strength, stem)[0], expected))
    wrong = [tensors | {"oft_R.weight": -tensors["oft_R.weight"]}]
    wrong += [{"oft_R.weight": tensors["oft_R.weight"]}] * (flag is not None)
    for changed in wrong:
        assert not LIMIT.holds(relative_l2(bake_one(weight, changed, strength, stem)[0], expected))


CHECKED = (*SPARSE, *GLORAS, "set", KRON, *ROTATIONS)

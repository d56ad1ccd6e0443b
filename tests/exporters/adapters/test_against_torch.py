"""What few adapter packages merge, against torch itself: its sparse tensors, its layers run forward."""

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


CHECKED = (*SPARSE, *GLORAS)

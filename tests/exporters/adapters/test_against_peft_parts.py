"""Baked weights against layers of PEFT that have the same mathematics under another convention.

PEFT turns the inputs of a layer where LyCORIS turns its outputs, so it is given the transposed weight;
it decomposes a LoRA only, so any change is handed to it as a LoRA of full rank. What PEFT lacks is said
in docs/adapters.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tensor(value):
    return torch.from_numpy(np.array(value, np.float32))


def layer(weight):
    """The torch layer that has this weight."""
    if weight.ndim == 4:
        made = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    else:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(tensor(weight))
    return made


def wrapped(weight, config):
    """PEFT's layer around a weight, and the model that holds it."""
    model = peft.get_peft_model(torch.nn.Sequential(layer(weight)), config)
    return model, model.base_model.model[0]


def merged(model):
    """The weight after merging."""
    return model.merge_and_unload()[0].weight.detach().numpy()


def generators(blocks):
    """PEFT's vectors of the upper triangles of ``B - B^T``."""
    rows, columns = np.triu_indices(blocks.shape[-1], 1)
    return tensor((blocks - blocks.swapaxes(-1, -2))[:, rows, columns])


def turned_outputs(weight, blocks):
    """``R^T W`` with PEFT's exact transform, which is given W^T and turns its inputs by ``R(-Q)``."""
    size = blocks.shape[-1]
    flat = weight.reshape(len(weight), -1)
    config = peft.OFTConfig(target_modules=["0"], oft_block_size=size, use_cayley_neumann=False)
    model, inner = wrapped(flat.T, config)
    inner.oft_R["default"].weight.data.copy_(generators(blocks))
    return merged(model).T.reshape(weight.shape)


OUTPUTS = ["OFT", "OFT with alpha 0", "OFT constrained", "OFT of kohya", "OFT conv with rescale"]


def expected_outputs(name, weight, tensors):
    """Constraint and rescale are applied outside of PEFT, to what goes in and to what comes out."""
    blocks = tensors["oft_blocks"].astype(np.float64)
    limit = float(tensors.get("alpha", 0.0)) * len(weight)
    norm = np.linalg.norm(blocks - blocks.swapaxes(1, 2))
    if limit and norm > limit:
        blocks = blocks * (limit / norm)
    return turned_outputs(weight, blocks) * tensors.get("rescale", np.float32(1))


@pytest.mark.parametrize("name", OUTPUTS)
def test_rotations_of_the_outputs(bake_one, cases, name):
    weight, tensors = cases.make(name)
    expected = expected_outputs(name, weight, tensors)
    actual, _ = bake_one(weight, tensors, 1.0, cases.stem_of(name))
    assert LIMIT.holds(relative_l2(actual, expected))
    wrong, _ = bake_one(weight, tensors | {"oft_blocks": tensors["oft_blocks"] * 1.01}, 1.0)
    assert not LIMIT.holds(relative_l2(wrong, expected)) or "alpha" in tensors
    turned, _ = bake_one(weight, tensors | {"oft_blocks": -tensors["oft_blocks"]}, 1.0)
    assert not LIMIT.holds(relative_l2(turned, expected)), "the other way round is another weight"


STORED = ["old OFT", "first OFT"]


@pytest.mark.parametrize("name", STORED)
def test_rotations_that_were_stored_themselves(bake_one, cases, name):
    """PEFT is given the generators of which the exact transform makes the stored rotations."""
    weight, tensors = cases.make(name)
    identity = np.eye(4)
    turns = tensors["oft_diag"].astype(np.float64) + identity * (name == "first OFT")
    blocks = (turns - identity) @ np.linalg.inv(turns + identity) / 2
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, turned_outputs(weight, blocks)))
    assert not LIMIT.holds(relative_l2(actual, turned_outputs(weight, -blocks)))


FACTORS = [f"IA3{conv} on the {side}" for conv in ("", " conv") for side in ("inputs", "outputs")]


@pytest.mark.parametrize("name", FACTORS)
def test_factors(bake_one, cases, name):
    """PEFT stores one plus LyCORIS's factors; its layers of a feed-forward part scale the inputs."""
    weight, tensors = cases.make(name)
    inputs = bool(tensors["on_input"])
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if inputs else [])
    model, inner = wrapped(weight, config)
    kept = inner.ia3_l["default"]
    kept.data.copy_(1 + tensor(tensors["weight"]).reshape(kept.shape))
    expected = merged(model)
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, expected))
    wrong, _ = bake_one(weight, tensors, 1.01)
    assert not LIMIT.holds(relative_l2(wrong, expected))


INPUTS = ["OFT of OneTrainer", "OFT of OneTrainer conv", "OFT of OneTrainer shared"]
INPUTS += ["OFT of OneTrainer scaled", "OFT of OneTrainer scaled at first"]


@pytest.mark.parametrize("name", INPUTS)
def test_rotations_of_the_inputs_as_onetrainer_saves_them(bake_one, cases, name):
    """Its convolutions turn the other way, and its scaled form divides the generators beforehand."""
    weight, tensors = cases.make(name)
    vectors = tensors["oft_R.weight"]
    size = (1 + int(np.sqrt(1 + 8 * vectors.shape[1]))) // 2
    flag = tensors.get("oft_R.scaled_oft")
    if flag is not None:
        vectors = vectors / (2 * np.sqrt(size - 1) if flag.dtype == np.bool_ else np.sqrt(vectors.shape[1]))
    if weight.ndim == 4:
        vectors = -vectors
    config = peft.OFTConfig(target_modules=["0"], oft_block_size=size, block_share=len(vectors) == 1)
    model, inner = wrapped(weight.reshape(len(weight), -1), config)
    inner.oft_R["default"].weight.data.copy_(tensor(vectors))
    expected = merged(model).reshape(weight.shape)
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, expected))
    turned, _ = bake_one(weight, tensors | {"oft_R.weight": -tensors["oft_R.weight"]})
    assert not LIMIT.holds(relative_l2(turned, expected))


BUTTERFLIES = ["BOFT", "BOFT constrained", "BOFT conv with rescale"]


def butterfly(weight, blocks):
    """Every stage by PEFT, which without a GPU makes one stage at a time; the order is the paper's.

    Liu et al. 2023, section 4: stage i joins rows that lie 2^i half blocks apart.
    """
    out = weight.reshape(len(weight), -1)
    size, rows = blocks.shape[-1], np.arange(len(weight))
    for stage, turn in enumerate(blocks.astype(np.float64)):
        apart = 2**stage * size // 2
        pairs = [(row, row + apart) for row in rows if row // apart % 2 == 0]
        order = np.array(pairs).ravel()
        config = peft.BOFTConfig(target_modules=["0"], boft_block_size=size, boft_n_butterfly_factor=1)
        model, inner = wrapped(out.T, config)
        inner.boft_R["default"].data.copy_(tensor(-2 * turn)[None])
        matrix = np.zeros((len(rows), len(rows)), np.float32)
        matrix[order, rows] = 1
        inner.boft_P.copy_(tensor(matrix)[None])
        out = merged(model).T
    return out.reshape(weight.shape)


@pytest.mark.parametrize("name", BUTTERFLIES)
def test_butterflies(bake_one, cases, name):
    weight, tensors = cases.make(name)
    blocks = tensors["oft_blocks"].astype(np.float64)
    limit = float(tensors.get("alpha", 0.0)) * len(weight)
    norm = np.linalg.norm(blocks - blocks.swapaxes(-1, -2))
    if limit and norm > limit:
        blocks = blocks * (limit / norm)
    expected = butterfly(weight, blocks) * tensors.get("rescale", np.float32(1))
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, expected))
    for wrong in (-tensors["oft_blocks"], tensors["oft_blocks"][::-1]):
        turned, _ = bake_one(weight, tensors | {"oft_blocks": np.ascontiguousarray(wrong)})
        assert not LIMIT.holds(relative_l2(turned, expected))


def decomposed(weight, change, lengths, outputs):
    """PEFT's DoRA of a LoRA whose product is the whole change; of the inputs by the transposed weight."""
    if not outputs:
        return decomposed(weight.swapaxes(0, 1), change.swapaxes(0, 1), lengths, True).swapaxes(0, 1)
    columns = int(np.prod(weight.shape[1:]))
    # A convolution decomposes each output's whole kernel, so it is a matrix for this purpose.
    config = peft.LoraConfig(target_modules=["0"], r=columns, lora_alpha=columns, use_dora=True)
    model, inner = wrapped(weight.reshape(len(weight), columns), config)
    inner.lora_A["default"].weight.data.copy_(torch.eye(columns))
    inner.lora_B["default"].weight.data.copy_(tensor(change.reshape(len(change), columns)))
    inner.lora_magnitude_vector["default"].weight.data.copy_(tensor(lengths.reshape(-1)))
    return merged(model).reshape(weight.shape)


def change_of(weight, tensors):
    """The change that PEFT's LoRA, LoHa or LoKr makes of the tensors, with alpha."""
    rank, alpha = 4, float(tensors["alpha"])
    if "hada_w1_a" in tensors:
        config = peft.LoHaConfig(target_modules=["0"], r=rank, alpha=alpha)
    elif "lokr_w1" in tensors:
        rank = len(tensors["lokr_w2_b"])
        config = peft.LoKrConfig(target_modules=["0"], r=rank, alpha=alpha, decompose_factor=3)
    else:
        config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=alpha)
    _, inner = wrapped(np.zeros_like(weight), config)
    for name, value in tensors.items():
        if name.startswith(("lora_down", "lora_up")):
            part = inner.lora_A if "down" in name else inner.lora_B
            part["default"].weight.data.copy_(tensor(value).reshape(part["default"].weight.shape))
        elif name.startswith(("hada", "lokr")):
            getattr(inner, name)["default"].data = tensor(value)
    return inner.get_delta_weight("default").detach().numpy().reshape(weight.shape)


DECOMPOSED = ["DoRA of the inputs", "DoRA of the outputs", "DoRA conv of the inputs"]
DECOMPOSED += [
    "DoRA conv of the outputs",
    "DoRA as a vector of the outputs",
    "DoRA as a vector of the inputs",
]
DECOMPOSED += ["DoRA over LoHa", "DoRA over LoHa of the inputs", "DoRA over LoKr"]
DECOMPOSED += ["DoRA over LoKr of the outputs", "DoRA of PEFT", "DoRA of PEFT conv"]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decompositions(bake_one, cases, name):
    weight, tensors = cases.make(name)
    lengths = next(v for k, v in tensors.items() if k.startswith(("dora_scale", "lora_magnitude")))
    outputs = "of the inputs" not in name and name != "DoRA over LoKr"
    expected = decomposed(weight, change_of(weight, tensors), lengths, outputs)
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, expected))
    other, _ = bake_one(weight, tensors | {"alpha": np.asarray(tensors["alpha"] * np.float32(1.01))})
    assert not LIMIT.holds(relative_l2(other, expected))


SUMS = ["LoRA", "LoCon", "LoHa", "LoHa conv", "LoKr"]


@pytest.mark.parametrize("name", SUMS)
def test_sums(bake_one, cases, name):
    """What the decompositions stand on, by itself."""
    weight, tensors = cases.make(name)
    actual, _ = bake_one(weight, tensors, 0.6)
    assert LIMIT.holds(relative_l2(actual, weight + np.float32(0.6) * change_of(weight, tensors)))


def glora(weight, tensors, kind):
    """PEFT's GLoRA without its paths to the bias."""
    config = peft.GloraConfig(target_modules=["0"], r=4, config_A_B=kind, config_C="none", config_D_E="none")
    model, inner = wrapped(weight, config)
    for path, value in tensors.items():
        name, _, part = path.partition(".")
        getattr(getattr(inner, f"glora_{name}")["default"], part).data.copy_(tensor(value))
    return merged(model)


GLORAS = ["GLoRA", "GLoRA old"]


@pytest.mark.parametrize("name", GLORAS)
def test_the_part_of_glora_that_peft_has_too(bake_one, cases, name):
    """``B`` of low rank, and ``W A`` for an A that only scales: else PEFT's A is another operation."""
    weight, tensors = cases.make(name)
    old = name == "GLoRA old"
    left, right, own, other = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    scale = float(tensors["alpha"]) / 4
    zero = np.zeros_like(tensors[f"{left}.weight"])
    expected = glora(
        weight,
        {
            "A.Xd": np.zeros((12, 4)),
            "B.Xd": tensors[f"{own}.weight"] * scale,
            "B.Xu": tensors[f"{other}.weight"],
        },
        "lora",
    )
    actual, _ = bake_one(weight, tensors | {f"{left}.weight": zero})
    assert LIMIT.holds(relative_l2(actual, expected))
    wrong, _ = bake_one(weight, tensors)
    assert not LIMIT.holds(relative_l2(wrong, expected))
    # A times the identity, of which the rank is the width.
    width = weight.shape[1]
    identity = {
        f"{left}.weight": np.eye(width, dtype=np.float32),
        f"{right}.weight": np.eye(width, dtype=np.float32) * np.float32(0.3),
        f"{own}.weight": np.zeros((12, width), np.float32),
        f"{other}.weight": np.zeros((width, width), np.float32),
    }
    actual, _ = bake_one(weight, identity)
    assert LIMIT.holds(relative_l2(actual, glora(weight, {"A.X": [0.3], "B.X": [0.0]}, "constant")))


# A rotation that is none, and the magnitudes of PEFT's own files, are checked as what they are.
CHECKED = (*OUTPUTS, *STORED, *FACTORS, *INPUTS, *BUTTERFLIES, *DECOMPOSED, *SUMS, *GLORAS)

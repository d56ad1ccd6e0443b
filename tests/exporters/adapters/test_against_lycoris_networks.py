"""Files as LyCORIS itself writes them for a whole UNet, against what LyCORIS itself merges.

Names, layouts, factorizations and alphas are those of its own trainer and nobody's guess.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

torch = pytest.importorskip("torch")
lycoris = pytest.importorskip("lycoris")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
# Its options by family, and whether its merge means the same at every strength. LoHa and LoKr are merged
# with the square of their scale (test_known_disagreements.py), so there alpha is the rank.
FAMILIES = {
    "LoRA": ({"algo": "lora", "linear_alpha": 2}, True),
    "CP": ({"algo": "lora", "linear_alpha": 2, "use_tucker": True}, True),
    "LoHa": ({"algo": "loha", "linear_alpha": 4}, True),
    "LoHa Tucker": ({"algo": "loha", "linear_alpha": 4, "use_tucker": True}, True),
    "LoKr": ({"algo": "lokr", "linear_alpha": 4, "factor": 4}, True),
    "LoKr both factored": (
        {"algo": "lokr", "linear_dim": 1, "linear_alpha": 1, "decompose_both": True},
        True,
    ),
    "LoKr both whole": ({"algo": "lokr", "full_matrix": True, "factor": 4}, True),
    "GLoRA": ({"algo": "glora", "linear_alpha": 2}, True),
    "difference": ({"algo": "full"}, True),
    "norm": ({"algo": "lora", "linear_alpha": 2, "train_norm": True}, True),
    "IA3": ({"algo": "ia3"}, True),
    "OFT": ({"algo": "diag-oft"}, True),
    "OFT constrained": ({"algo": "diag-oft", "constraint": 0.001}, True),
    "OFT with rescale": ({"algo": "diag-oft", "rescaled": True}, False),
    "DoRA of the outputs": ({"algo": "lora", "linear_alpha": 2, "dora_wd": True}, False),
    "DoRA of the inputs": (
        {"algo": "lora", "linear_alpha": 2, "dora_wd": True, "wd_on_output": False},
        False,
    ),
    "DoRA over LoHa": ({"algo": "loha", "linear_alpha": 4, "dora_wd": True}, False),
    "DoRA over LoHa of the inputs": (
        {"algo": "loha", "linear_alpha": 4, "dora_wd": True, "wd_on_output": False},
        False,
    ),
    "DoRA over LoKr": ({"algo": "lokr", "linear_alpha": 4, "factor": 4, "dora_wd": True}, False),
}


@pytest.fixture(scope="module")
def small():
    """A UNet with every kind of layer, and its tensors."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=8,
    )
    return unet, {name: value.detach().numpy() for name, value in unet.state_dict().items()}


@pytest.fixture(scope="module")
def trained(small):
    """``trained(options, strength)``: the file's tensors, and the weights after LyCORIS merged it."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)

    def make(options, strength):
        torch.manual_seed(0)
        model = copy.deepcopy(small[0])
        network = lycoris.create_lycoris(model, 1.0, **{"linear_dim": 4, **options})
        network.apply_to()
        for name, value in network.named_parameters():
            if name.endswith(("dora_scale", "rescale")):
                value.data.mul_(1 + 0.2 * torch.rand_like(value))
            else:
                torch.nn.init.normal_(value, std=0.4)
        tensors = {k: v.detach().numpy().copy() for k, v in network.state_dict().items()}
        network.restore()
        network.merge_to(strength)
        merged = {k: v.detach().numpy() for k, v in model.state_dict().items()}
        return tensors, merged

    return make


def bake(tensors, path, strength=1.0):
    """All weights of the UNet with the file, and the report."""
    shapes = {"unet": {name: value.shape for name, value in tensors.items()}}
    with plan_bake(shapes, [AdapterRef(path, strength)]) as plan:
        return {k: plan.bake("unet", k, v) for k, v in tensors.items()}, plan.reports[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_unet_is_what_lycoris_merges(small, trained, save, name):
    options, any_strength = FAMILIES[name]
    strength = 0.6 if any_strength else 1.0
    file, merged = trained(options, strength)
    actual, report = bake(small[1], save(file), strength)
    assert report.unmatched_keys == ()
    assert report.matched_modules == {"unet": len({key.split(".")[0] for key in file})}
    changed = [key for key, value in small[1].items() if not np.array_equal(merged[key], value)]
    assert len(changed) > 70
    for key in small[1]:
        assert LIMIT.holds(relative_l2(actual[key], merged[key])), key
    wrong, _ = bake({key: small[1][key] for key in changed[:1]}, save(file), strength * 1.01)
    assert not LIMIT.holds(relative_l2(wrong[changed[0]], merged[changed[0]]))

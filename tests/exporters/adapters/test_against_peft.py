"""Folders that PEFT saved, baked with their configuration, against what PEFT merges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
PATTERNS = {"rank_pattern": {"c": 2}, "alpha_pattern": {"c": 5}}
CONFIGS = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 3}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 3, "use_dora": True}),
    "rank stabilized DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 3, "use_dora": True, "use_rslora": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 3}),
    "LoHa Tucker": ("LoHaConfig", {"r": 4, "alpha": 3, "use_effective_conv2d": True}),
    "LoHa with patterns": ("LoHaConfig", {"r": 4, "alpha": 3, **PATTERNS}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "LoKr whole": ("LoKrConfig", {"r": 16, "alpha": 3}),
    "LoKr both factored": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "LoKr Tucker": ("LoKrConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}),
    "OFT shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "OFT exact": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "OFT of three terms": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "OFT of seven terms": ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 7}),
}
# The cases of cases.py whose form these folders have.
CHECKED = (
    *(
        "LoRA",
        "LoCon",
        "LoHa",
        "LoHa conv",
        "LoHa 1x1",
        "LoHa Tucker",
        "LoKr",
        "LoKr both whole",
        "LoKr Tucker",
    ),
    *("LoKr both factored", "DoRA of PEFT", "DoRA of PEFT conv", "OFT of PEFT", "OFT of PEFT conv"),
)


class Net(torch.nn.Module):
    """A linear layer, a convolution, and one of 1x1."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(16, 24)
        self.c = torch.nn.Conv2d(16, 24, 3, padding=1)
        self.d = torch.nn.Conv2d(16, 24, 1)

    def forward(self, x):
        return self.a(x)


def saved(folder, name):
    """A folder of PEFT's and the weights before and after."""
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    net = Net()
    before = {key: value.detach().numpy().copy() for key, value in net.state_dict().items()}
    targets = ["a"] if name == "OFT exact" else ["a", "c", "d"]
    model = peft.get_peft_model(net, getattr(peft, kind)(target_modules=targets, **options))
    for key, value in model.named_parameters():
        if "magnitude" in key:
            value.data.mul_(1.1)
        elif value.requires_grad:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return before, {key: value.detach().numpy() for key, value in merged.items()}


def baked(folder, before, strength=1.0):
    shapes = {"unet": {key: value.shape for key, value in before.items()}}
    with plan_bake(shapes, [AdapterRef(folder, strength)]) as plan:
        weights = {key: plan.bake("unet", key, value) for key, value in before.items()}
        return weights, plan.reports[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_that_of_merge_and_unload(tmp_path, name):
    before, expected = saved(tmp_path, name)
    actual, report = baked(tmp_path, before)
    assert report.unmatched_keys == ()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert LIMIT.holds(relative_l2(actual[key], value)), key
    layers = ("a",) if name == "OFT exact" else ("a", "c", "d")
    assert all(relative_l2(before[f"{layer}.weight"], expected[f"{layer}.weight"]) > 1e-5 for layer in layers)
    wrong, _ = baked(tmp_path, before, 1.01)
    assert not LIMIT.holds(relative_l2(wrong["a.weight"], expected["a.weight"]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["LoHa", "LoKr whole", "OFT exact", "OFT of three terms"])
def test_without_its_configuration_it_would_be_wrong(tmp_path, name):
    before, expected = saved(tmp_path, name)
    (tmp_path / "adapter_config.json").unlink()
    actual, _ = baked(tmp_path, before)
    assert not LIMIT.holds(relative_l2(actual["a.weight"], expected["a.weight"]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coft": True}, "coft is set"),
        ({"num_cayley_neumann_terms": 0}, "expected 1 to"),
        ({"num_cayley_neumann_terms": 10**9}, "expected 1 to"),
        ({"peft_type": "VERA"}, "PEFT's type VERA"),
        ({"peft_type": ["OFT"]}, "PEFT's type"),
        ({"r": "many"}, "rank is 'many'"),
        ({"rank_pattern": {"(a+)+$": 2}}, "runs no expressions"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(tmp_path, change, message):
    before, _ = saved(tmp_path, "OFT")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        baked(tmp_path, before)


def test_ia3_of_peft_is_refused_by_name(tmp_path):
    model = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["a"], feedforward_modules=[]))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    shapes = {"a.weight": np.zeros((24, 16), np.float32)}
    with pytest.raises(AdapterError, match="PEFT's IA3, which cannot be baked"):
        baked(tmp_path, shapes)

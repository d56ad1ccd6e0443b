"""The adapters that the benchmark makes: names of real layers, all read, none without effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks import adapter_cost, random_adapters
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.benchmarks.random_models import random_tensor, weight_shapes
from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

NETWORKS = ("unet", "text_encoder")
FAMILIES = {family.name: family for family in random_adapters.FAMILIES}


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    return {network: weight_shapes(network) for network in NETWORKS}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers of each network, and not three hundred."""
    every = random_adapters.modules

    def some(family):
        found = list(every(family))
        return [*found[:5], *[one for one in found if one[0] != "unet"][:2]]

    monkeypatch.setattr(random_adapters, "modules", some)
    monkeypatch.setattr(adapter_cost, "modules", some)


def test_the_lists_of_layers() -> None:
    counts = {
        name: [[n for n, _, _ in random_adapters.modules(family)].count(network) for network in NETWORKS]
        for name, family in FAMILIES.items()
    }
    assert len(counts) == 10
    assert counts["LoCon"] == counts["LoHa"] == counts["GLoRA"] == counts["DoRA over LoHa"] == [282, 72]
    assert counts["IA3"] == [80, 36]
    assert counts["norms"] == [109, 24]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_each_family_is_applied(tmp_path: Path, shapes, name: str) -> None:
    path = random_adapters.random_adapter(tmp_path / "one.safetensors", FAMILIES[name])
    expected = list(random_adapters.modules(FAMILIES[name]))
    with plan_bake(shapes, [AdapterRef(path, 0.5)]) as plan:
        (report,) = plan.reports
        assert report.unmatched_keys == ()
        assert sum(report.matched_modules.values()) == len(expected) == 7
        for network, layer, shape in expected:
            weight = random_tensor(f"{layer}.weight", shape, 0)
            change = relative_l2(plan.bake(network, f"{layer}.weight", weight), weight)
            assert 1e-4 < change < 1, (layer, change)


@pytest.mark.usefixtures("few")
def test_an_adapter_that_is_not_applied_whole_is_no_measurement(tmp_path: Path) -> None:
    paths = random_adapters.write_all(tmp_path)
    assert adapter_cost.check_all_apply(paths) == dict.fromkeys(FAMILIES, 7)
    sizes = {
        "lora_unet_conv_in.lora_down.weight": (1, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (320, 1, 1, 1),
    }
    path = tmp_path / "small.safetensors"
    random_adapters.write_file(path, "F16", sizes, ((name, np.ones(size)) for name, size in sizes.items()))
    with pytest.raises(
        AdapterError, match="1 modules are applied and 0 keys are not; expected all 7 modules"
    ):
        adapter_cost.check_all_apply(dict.fromkeys(FAMILIES, path))


def test_the_command_line_and_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert adapter_cost.parser().parse_args(["work"]).repeat == 3
    with pytest.raises(SystemExit):
        adapter_cost.parser().parse_args(["work", "--repeat", "0"])
    assert "1 or more" in capsys.readouterr().err
    assert THRESHOLDS["adapters_peak_rss_gb"].limit == 1.5
    assert THRESHOLDS["adapters_time_ratio"].limit == 3.0

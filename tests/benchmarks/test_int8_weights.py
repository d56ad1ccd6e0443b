"""The script that rounds weights one by one, on the bundled model: with the rule, and with a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import kiln
from kiln.benchmarks import int8_weights
from kiln.benchmarks.fidelity.calls import Call
from kiln.bundle import open_bundle
from kiln.exporters.quantization.quantize import quantize_weight
from kiln.metrics import relative_l2

EMOJI = Path(kiln.__file__).parent / "models/emoji"
SIZES = {"small": 10, "middle": 100, "large": 1000}
ALONE = {"small": 0.04, "middle": 0.03, "large": 0.01}


def test_command_line() -> None:
    args = int8_weights.parser().parse_args(["bundle"])
    assert (args.bundle, args.size, args.steps, args.prompts, args.points) == (Path("bundle"), None, 4, 1, 2)


def test_the_worst_for_its_size_comes_first() -> None:
    assert int8_weights.by_value(ALONE, SIZES) == ["small", "middle", "large"]
    assert int8_weights.by_value(ALONE, SIZES | {"small": 10_000}) == ["middle", "small", "large"]


def test_a_rule_is_held_against_both_limits() -> None:
    values, error = int8_weights.rule_checks(ALONE, SIZES, ["small"])
    assert values.value == pytest.approx(10 / 1110)
    assert error.value == pytest.approx(16 / 26)
    assert (values.passed, error.passed) == (True, True)
    values, error = int8_weights.rule_checks(ALONE, SIZES, ["middle"])
    assert (values.passed, error.passed) == (False, False)


def test_a_bundle_of_int8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(EMOJI, tmp_path / "b")
    manifest = json.loads((folder / "kiln.json").read_text()) | {"storage": "int8"}
    (folder / "kiln.json").write_text(json.dumps(manifest))
    assert int8_weights.main([str(folder), "--json", str(tmp_path / "x.json")]) == 2
    assert "is of int8; give the bundle of floats" in capsys.readouterr().err


def test_only_the_weights_asked_for_are_rounded_and_only_for_one_look() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 32, 256), np.float32),
    }
    probe = int8_weights.WeightProbe(open_bundle(EMOJI), [Call("unet", feeds, {}, "here")])
    name = "up_blocks.2.resnets.0.conv_shortcut.weight"
    kernel = probe._weights[name].data.clone()
    made = quantize_weight(kernel.numpy())
    wanted = made.values * made.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(int8_weights.rounded(kernel), torch.from_numpy(wanted), rtol=0, atol=0)
    assert 0 < relative_l2(wanted, kernel.numpy()) < 0.02
    (alone,) = probe.errors([name])
    assert 0 < alone < 0.05
    assert probe.errors([]) == [0.0]
    torch.testing.assert_close(probe._weights[name].data, kernel, rtol=0, atol=0)


def test_of_the_bundled_model_few_values_make_most_of_the_error(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    path = tmp_path / "x.json"
    assert int8_weights.main([str(EMOJI), "--steps", "2", "--points", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    everything, rest = (samples["values"][0] / 100 for samples in found["samples"])
    assert rest < everything
    assert found["facts"]["expected_of_all"] == pytest.approx(everything, rel=0.2)
    # As many values, but of the middle of the network.
    alone = {name: facts["error"] for name, facts in found["facts"]["alone"].items()}
    sizes = {name: facts["values"] for name, facts in found["facts"]["alone"].items()}
    middle = [name for name in alone if name == "mid_block.resnets.0.conv1.weight"]
    values, error = int8_weights.rule_checks(alone, sizes, middle)
    assert (values.passed, error.passed) == (True, False)

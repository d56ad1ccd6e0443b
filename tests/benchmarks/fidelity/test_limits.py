"""Which limits hold for which precision, and that none is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kiln.benchmarks.fidelity.limits import PRECISIONS, judged_precision, make_gate, run_precision
from kiln.benchmarks.fidelity.reference import plan_reference
from kiln.benchmarks.records.record import Effective, Requested
from kiln.bundle import Bundle
from kiln.errors import BackendUnavailable, UsageError

JUDGED = [
    ("component", "relative_l2"),
    ("component", "cosine"),
    ("latents", "relative_l2"),
    ("latents", "cosine"),
    ("image", "psnr_db"),
    ("image", "ssim"),
]
AUTO = Requested("kiln", "openvino")


def stored(bundle: Bundle, storage: str) -> Bundle:
    """As if of another storage; a copy has another digest."""
    return replace(bundle, manifest={**bundle.manifest, "storage": storage})


def in_force(precision: str) -> Effective:
    return Effective("openvino", "1", "CPU", "CPU", precision, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("level", "metric"), JUDGED)
def test_every_precision_is_judged_on_every_level(precision: str, level: str, metric: str) -> None:
    gate = make_gate(level, "x", metric, 0.5, precision)
    assert gate.limit is not None
    assert gate.at_most == (metric == "relative_l2")
    assert not gate.passed
    assert make_gate(level, "x", metric, 0.0 if gate.at_most else 200.0, precision).passed


def test_a_figure_that_is_no_number_fails_and_stays_out_of_json() -> None:
    gate = make_gate("component", "unet", "relative_l2", float("inf"), "int8")
    assert (gate.passed, gate.value) == (False, None)
    assert not make_gate("image", "image 1", "psnr_db", float("nan"), "fp32").passed


def test_no_precision_excuses_nan() -> None:
    assert not make_gate("component", "unet", "nonfinite", 1, "reported").passed
    assert make_gate("component", "unet", "nonfinite", 0, "int8").passed


def test_what_has_no_limit_is_reported() -> None:
    gate = make_gate("component", "unet", "max_abs", 1e9, "fp32")
    assert (gate.limit, gate.passed) == (None, True)
    assert make_gate("component", "unet", "relative_l2", 1e9, "reported").limit is None


def test_int8_weights_are_the_same_numbers_on_both_sides(emoji: Bundle) -> None:
    assert judged_precision("bf16", "unet", stored(emoji, "int8")) == "bf16"
    assert judged_precision("fp32", "unet", stored(emoji, "int8-full")) == "int8-full"
    assert judged_precision("fp32", "vae_decoder", stored(emoji, "int8-full")) == "fp32"


def test_another_bundle_is_judged_only_if_it_is_int8(emoji: Bundle, other: Bundle) -> None:
    assert judged_precision("fp32", "unet", emoji, other) == "reported"
    assert judged_precision("fp32", "unet", stored(emoji, "int8"), other) == "int8"
    assert judged_precision("fp32", "unet", emoji, emoji) == "fp32"


@pytest.fixture(scope="module")
def other(emoji: Bundle) -> Bundle:
    files = {name: {**facts, "sha256": "0" * 64} for name, facts in emoji.manifest["files"].items()}
    return Bundle(emoji.path, {**emoji.manifest, "files": files})


def test_auto_is_judged_by_what_was_in_force(emoji: Bundle) -> None:
    mixed = {"unet": in_force("bf16"), "vae_decoder": in_force("fp32")}
    assert run_precision(emoji, AUTO, mixed) == "bf16"
    assert run_precision(emoji, replace(AUTO, precision="fp16")) == "fp16"
    assert run_precision(stored(emoji, "int8-full"), AUTO, mixed) == "int8-full"
    with pytest.raises(UsageError, match="judged by the precision in force"):
        run_precision(emoji, AUTO)
    with pytest.raises(UsageError, match="no limits of parity for 'fp8'"):
        run_precision(emoji, AUTO, {"unet": in_force("fp8")})


def test_the_reference_is_fp32_on_the_processor(emoji: Bundle) -> None:
    wanted = Requested("kiln", "torch", "cpu", "fp32")
    assert plan_reference(emoji, {"torch", "openvino"}) == wanted
    assert plan_reference(emoji, {"onnxruntime"}).name == "onnxruntime"
    assert plan_reference(emoji, {"openvino", "onnxruntime"}).device == "CPU"
    # torch's modules would leave the rounding of activations out.
    assert plan_reference(stored(emoji, "int8-full"), {"torch", "openvino"}).name == "openvino"
    with pytest.raises(BackendUnavailable, match="usable: onnxruntime-cuda"):
        plan_reference(emoji, {"onnxruntime-cuda"})

"""What was asked for against what is in force."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from kiln.backends.onnxruntime_session import CPU
from kiln.benchmarks.harness.effective import (
    PROVIDERS,
    is_processor,
    mismatches,
    precision_of,
    read_effective,
)
from kiln.benchmarks.records.record import Effective, Requested

ROW = Effective("openvino", "1", "CPU", "CPU", "bf16", 2)


def test_what_is_as_asked_is_no_mismatch() -> None:
    assert mismatches(Requested("kiln", "openvino", "cpu", "bf16", 2), {"unet": ROW}) == []
    assert mismatches(Requested("kiln", "auto"), {"unet": ROW}) == []


@pytest.mark.parametrize(
    ("requested", "text"),
    [
        (Requested("kiln", "torch"), "unet: the backend torch was asked for, and openvino is in force"),
        (Requested("kiln", "openvino", "GPU"), "unet: the device GPU was asked for, and CPU is in force"),
        (
            Requested("kiln", "openvino", precision="fp32"),
            "unet: the precision fp32 was asked for, and bf16 is in force",
        ),
        (Requested("kiln", "openvino", threads=4), "unet: the threads 4 was asked for, and 2 is in force"),
    ],
)
def test_each_difference_is_named(requested: Requested, text: str) -> None:
    assert mismatches(requested, {"unet": ROW}) == [text]


def test_every_component_counts() -> None:
    rows = {"unet": ROW, "vae_decoder": replace(ROW, precision="fp32")}
    (text,) = mismatches(Requested("kiln", "openvino", precision="bf16"), rows)
    assert text.startswith("vae_decoder: the precision")


def test_saying_nothing_is_a_mismatch() -> None:
    assert mismatches(Requested("peer", "diffusers"), {}) == ["diffusers does not say what is in force"]


def test_devices_are_named_by_kind_or_by_number() -> None:
    on_card = {"unet": replace(ROW, backend="torch", device="cuda:1")}
    assert mismatches(Requested("kiln", "torch", "cuda"), on_card) == []
    assert mismatches(Requested("kiln", "torch", "cuda:0"), on_card) != []
    assert not is_processor(on_card)
    assert is_processor({"unet": ROW})
    assert precision_of({"unet": ROW}) == "bf16"


def test_a_peer_need_not_be_called_like_its_engine() -> None:
    assert mismatches(Requested("peer", "diffusers"), {"unet": replace(ROW, backend="torch")}) == []


def test_providers_are_those_of_the_backends() -> None:
    assert PROVIDERS["onnxruntime"] == CPU
    for name, provider in PROVIDERS.items():
        if name != "onnxruntime":
            module = importlib.import_module(f"kiln.backends.{name.replace('-', '_')}")
            assert provider == module.PROVIDER


def test_facts_that_are_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="not as expected"):
        read_effective({"unet": {"backend": "openvino"}})

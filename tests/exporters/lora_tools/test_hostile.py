"""Mutated files through every tool: an error in one line, or a file that can be opened again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kiln.errors import KilnError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.open import open_adapter
from kiln.exporters.lora_tools.convert import ConvertSpec, convert
from kiln.exporters.lora_tools.describe import describe
from kiln.exporters.lora_tools.merge import MergeSpec, merge

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FAMILIES = (
    *(
        "LoRA",
        "LoCon",
        "CP",
        "LoHa Tucker",
        "LoKr conv factored",
        "DoRA of the outputs",
        "difference",
        "norm",
    ),
    *("sparse beside a LoRA", "OFT", "IA3 on the inputs", "GLoRA", "LoRA with scale"),
)
SPECIAL = (np.nan, np.inf, 0.0, -1.0, 1e30, -3e38, 65504.0, 1e-40)
DTYPES = (np.float16, np.float64, np.int64, np.uint8, np.bool_)
NAMES = (
    "alpha",
    "scale",
    "dora_scale",
    "diff_b",
    "lora_mid.weight",
    "lora_down.weight",
    "lora_up.bias",
    "nothing",
)
KINDS = ("value", "shape", "type", "drop", "rename", "extra", "stem", "bytes", "cut")
EVERYTHING = settings(
    max_examples=350,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def mutations(draw):
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "where": draw(st.integers(0, 99)),
        "special": draw(st.sampled_from(SPECIAL)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "axes": draw(st.lists(st.integers(0, 24), max_size=5)),
        "name": draw(st.sampled_from(NAMES)),
        "noise": draw(st.binary(min_size=1, max_size=4)),
    }  # fmt: skip


def mutated(tensors, how):
    tensors, keys = dict(tensors), list(tensors)
    key = keys[how["where"] % len(keys)]
    if how["kind"] == "value" and tensors[key].dtype.kind == "f" and tensors[key].size:
        tensors[key] = tensors[key].copy()
        tensors[key].flat[how["where"] % tensors[key].size] = how["special"]
    elif how["kind"] == "shape":
        full = np.prod(how["axes"]) > 0
        tensors[key] = np.resize(tensors[key], how["axes"]) if full else np.zeros(how["axes"], np.float32)
    elif how["kind"] == "type":
        tensors[key] = tensors[key].astype(how["dtype"])
    elif how["kind"] == "drop":
        del tensors[key]
    elif how["kind"] == "rename":
        tensors[how["name"]] = tensors.pop(key)
    elif how["kind"] == "extra":
        tensors[how["name"]] = np.full(how["axes"], min(abs(how["special"]), 9.0), np.float32)
    return tensors


def write(path, tensors, how):
    stem = f"{STEM}y" if how["kind"] == "stem" else STEM
    safetensors.numpy.save_file({f"{stem}.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    raw = bytearray(path.read_bytes())
    if how["kind"] == "bytes":
        start = how["where"] * 4099 % len(raw)
        raw[start : start + len(how["noise"])] = how["noise"][: len(raw) - start]
    elif how["kind"] == "cut":
        raw = raw[: len(raw) * how["where"] // 100]
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@EVERYTHING
@given(
    family=st.sampled_from(FAMILIES),
    how=mutations(),
    to=st.sampled_from(("kohya", "diffusers", "peft", "safetensors", "merge", "describe")),
    strength=st.sampled_from((1.0, -0.5, 1e30, 1e300)),
    precision=st.sampled_from(("auto", "fp16")),
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning:numpy")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning:kiln_tests.*")
def test_no_tool_fails_in_a_way_of_its_own(place, cases, family, how, to, strength, precision):
    with np.errstate(all="ignore"):
        tensors = mutated(cases.make(family)[1], how)
    if not tensors:
        return
    path, out = place / "in.safetensors", place / ("out" if to == "peft" else "out.safetensors")
    with np.errstate(all="ignore"):
        write(path, tensors, how)
    try:
        if to == "merge":
            merge(MergeSpec((AdapterRef(path, strength), AdapterRef(path)), out, rank=2, precision=precision))
        elif to == "describe":
            (found,) = describe(path)
            assert found.as_dict()["path"] == str(path)
            return
        else:
            convert(ConvertSpec(path, out, to))
    except KilnError as refused:
        event(f"{to} refused after {how['kind']}")
        text = str(refused)
        assert "\n" not in text
        assert not out.exists()
        return
    finally:
        left = {one.name for one in place.iterdir()} - {"in.safetensors", out.name}
        again = open_adapter(out) if out.exists() else None
        if again:
            again.source.close()
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    event(f"{to} done after {how['kind']}")
    assert left == set()
    assert again is not None

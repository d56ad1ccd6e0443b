"""Files made to break the reader: headers that lie, and modules that mean several things at once.

Each is refused in one line, before a tensor of the model is changed and without room for what it claims.
"""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.plan import plan_bake

DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
ROOM = 64 << 20  # bytes that refusing a file of some kilobytes may take


def raw(header, body=b""):
    """A file with this header, text or JSON, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pair(down, up=None):
    """A LoRA of which one entry is as given; the other is right."""
    return {DOWN: down, UP: up if up is not None else entry([12, 4], [320, 512])}


BODY = bytes(512)
GOOD = entry([4, 20], [0, 320])
HEADERS = {
    "overlapping offsets": raw(pair(GOOD, entry([12, 4], [300, 492])), BODY),
    "the same bytes twice": raw(pair(entry([4, 12], [0, 192]), entry([12, 4], [0, 192])), BODY),
    "a hole between tensors": raw(pair(GOOD, entry([12, 4], [324, 516])), bytes(516)),
    "bytes after the last": raw(pair(GOOD), BODY + b"more"),
    "offsets beyond the end": raw(pair(GOOD, entry([12, 4], [2**40, 2**40 + 192])), BODY),
    "offsets turned round": raw(pair(entry([4, 20], [320, 0])), BODY),
    "negative offsets": raw(pair(entry([4, 20], [-320, 0])), BODY),
    "offsets that are fractions": raw(pair(entry([4, 20], [0.0, 320.5])), BODY),
    "offsets that are too many": raw(pair(entry([4, 20], [0, 160, 320])), BODY),
    "a shape that is larger than its bytes": raw(pair(entry([4000, 20], [0, 320])), BODY),
    "a shape beyond all memory": raw(pair(entry([2**31, 2**31], [0, 320])), BODY),
    "a shape whose product overflows to the right size": raw(pair(entry([2**62, 4, 80], [0, 320])), BODY),
    "a negative shape": raw(pair(entry([-4, -20], [0, 320])), BODY),
    "a shape of fractions": raw(pair(entry([4.0, 20.0], [0, 320])), BODY),
    "a shape of truths": raw(pair(entry([True, 80], [0, 320])), BODY),
    "a shape of a thousand axes": raw(pair(entry([1] * 1000 + [80], [0, 320])), BODY),
    "a shape that is a text": raw(pair(entry("4x20", [0, 320])), BODY),
    "a type that does not exist": raw(pair(entry([4, 20], [0, 320], "F31")), BODY),
    "a type that is a list": raw(pair(entry([4, 20], [0, 320], ["F32"])), BODY),
    "an entry that is none": raw(pair(None), BODY),
    "an entry without a shape": raw(pair({"dtype": "F32", "data_offsets": [0, 320]}), BODY),
    "colliding keys": raw(
        b'{"%b":%b,"%b":%b,"%b":%b}'
        % tuple(
            part
            for key, value in ((DOWN, GOOD), (UP, entry([12, 4], [320, 512])), (DOWN, GOOD))
            for part in (key.encode(), json.dumps(value).encode())
        ),
        BODY,
    ),
    "metadata that is a list": raw({"__metadata__": ["a"], **pair(GOOD)}, BODY),
    "metadata of numbers": raw({"__metadata__": {"ss_network_dim": 4}, **pair(GOOD)}, BODY),
    "a header that is a list": raw([1, 2], BODY),
    "a header that is not UTF-8": raw(b'{"\xff\xfe": 1}', BODY),
    "a header of a million brackets": raw(b"[" * 1_000_000, BODY),
    "a header of infinite numbers": raw(
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', BODY
    ),
    "a header of a number of a million digits": raw(b'{"a": %b}' % (b"9" * 1_000_000), BODY),
    "a header length of all bits": b"\xff" * 8 + b"{}",
    "a header and nothing": raw({}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, name):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HEADERS[name])
    refused(path, (12, 20))


def refused(path, shape, match="."):
    """One line with the file's name, and no room taken for what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match=match) as caught:
            plan_bake({"unet": {"x.weight": shape}}, [AdapterRef(path)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert peak < ROOM


def test_the_same_file_told_truly_is_applied(tmp_path):
    """What the others are mutations of; so each is refused for what it says, not for what it is."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw(pair(GOOD), BODY))
    with plan_bake({"unet": {"x.weight": (12, 20)}}, [AdapterRef(path)]) as plan:
        assert plan.reports[0].matched_modules == {"unet": 1}


def some(*shape):
    return np.ones(shape, np.float32)


LORA = {"lora_down.weight": some(4, 20), "lora_up.weight": some(12, 4)}
LOHA = {
    "hada_w1_a": some(12, 4),
    "hada_w1_b": some(4, 20),
    "hada_w2_a": some(12, 4),
    "hada_w2_b": some(4, 20),
}
LOKR = {"lokr_w1": some(3, 4), "lokr_w2": some(4, 5)}
IA3 = {"weight": some(20), "on_input": some()}
OFT = {"oft_blocks": some(3, 4, 4)}
INPUT_OFT = {"oft_R.weight": some(5, 6)}
GLORA = {
    "a1.weight": some(20, 4),
    "a2.weight": some(4, 20),
    "b1.weight": some(12, 4),
    "b2.weight": some(4, 20),
}
SET = {"set_weight": some(12, 20)}
FAMILIES = {
    "LoRA": LORA,
    "LoHa": LOHA,
    "LoKr": LOKR,
    "IA3": IA3,
    "OFT": OFT,
    "OFT of the inputs": INPUT_OFT,
    "GLoRA": GLORA,
    "set weight": SET,
}
PAIRS = [(one, two) for one in FAMILIES for two in FAMILIES if one < two]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_families_on_one_module_are_refused(save, pair):
    tensors = FAMILIES[pair[0]] | FAMILIES[pair[1]]
    path = save({f"lora_unet_x.{key}": np.ascontiguousarray(value) for key, value in tensors.items()})
    refused(path, (12, 20), "expected one family in a module")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("LoRA", "LoHa", "LoKr")])
def test_lengths_over_what_is_no_sum_are_refused(save, name):
    tensors = FAMILIES[name] | {"dora_scale": some(12, 1)}
    path = save({f"lora_unet_x.{key}": np.ascontiguousarray(value) for key, value in tensors.items()})
    refused(path, (12, 20))


COLLISIONS = {
    "underscored and dotted": ("lora_unet_x", "unet.x"),
    "kohya and LyCORIS": ("lora_unet_x", "lycoris_x"),
    "a doubled prefix": ("lora_unet_x", "lora_unet_unet_x"),
    "PEFT and diffusers": ("base_model.model.x", "unet.x"),
    "OFT's prefix and kohya's": ("oft_unet_x", "lora_unet_x"),
}


@pytest.mark.parametrize("name", COLLISIONS)
@pytest.mark.parametrize("second", ["LoRA", "LoHa"])
def test_two_stems_of_one_layer_are_refused(save, name, second):
    one, two = COLLISIONS[name]
    tensors = {f"{one}.{key}": value for key, value in LORA.items()}
    tensors |= {f"{two}.{key}": value for key, value in FAMILIES[second].items()}
    refused(save(tensors), (12, 20), "are the same module")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_in_every_tensor(save, family, value):
    for key, tensor in FAMILIES[family].items():
        wrong = np.array(tensor)
        wrong.reshape(-1)[-1] = value
        tensors = FAMILIES[family] | {key: wrong}
        path = save({f"lora_unet_x.{name}": np.ascontiguousarray(part) for name, part in tensors.items()})
        refused(path, (12, 20))


SCALARS = ("alpha", "scale")


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", ["LoRA", "LoHa", "LoKr", "GLoRA"])
def test_a_scale_that_is_no_number_is_refused(save, family, name, value):
    tensors = FAMILIES[family] | {name: np.array(value, np.float32)}
    path = save({f"lora_unet_x.{key}": np.ascontiguousarray(part) for key, part in tensors.items()})
    refused(path, (12, 20), "expected a finite number")


@pytest.mark.parametrize("axes", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_another_number_of_axes_are_refused(save, family, axes):
    """Every tensor of a family in turn; a trailing axis of one is what some trainers write."""
    for key, tensor in FAMILIES[family].items():
        if tensor.ndim == axes or key == "on_input":
            continue
        wrong = some(*(2,) * axes)
        path = save({f"lora_unet_x.{k}": v for k, v in (FAMILIES[family] | {key: wrong}).items()})
        refused(path, (12, 20))


def test_keys_without_end_are_refused(save, monkeypatch):
    """More keys than any file has, here with a smaller bound; and one that is a megabyte long."""
    monkeypatch.setattr("kiln.exporters.adapters.open.MAX_KEYS", 9)
    refused(save({f"lora_unet_{n}.alpha": np.zeros(1, np.float16) for n in range(10)}), (12, 20), "tensors")
    refused(save({"x" * 1_000_000: some(1)}, "long"), (12, 20))

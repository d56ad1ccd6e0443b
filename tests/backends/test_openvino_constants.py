"""Equal constants that became one: nothing a graph computes changes, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.backends import openvino_compile
from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.openvino_constants import LARGEST, LARGEST_CAST, share_constants
from kiln.backends.registry import get_backend, why_unusable
from kiln.bundle import open_bundle

BACKEND = get_backend("openvino")
pytestmark = pytest.mark.skipif(bool(why_unusable(BACKEND)), reason=why_unusable(BACKEND) or "there")
SHAPES = {"sample": (2, 4, 16, 16), "timestep": (), "encoder_hidden_states": (2, 77, 32)}


@pytest.fixture
def unet(tiny_bundle: Path) -> GraphSource:
    return open_bundle(tiny_bundle).source("unet")


def constants(model: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    found = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return [
        (op.get_output_element_type(0).to_string(), op.get_data().shape, op.get_data().tobytes())
        for op in found
    ]


def test_no_bit_of_the_unet_changes(unet: GraphSource, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    feeds = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    options = PrepareOptions(SHAPES, precision="fp32", threads=1)
    shared = BACKEND.prepare(unet, options).run(feeds)["out_sample"]
    monkeypatch.setattr(openvino_compile, "share_constants", lambda model: 0)
    assert np.array_equal(shared, BACKEND.prepare(unet, options).run(feeds)["out_sample"])


def test_no_two_small_constants_are_equal(unet: GraphSource) -> None:
    import openvino

    model = openvino.Core().read_model(unet.graph_path)
    model.reshape({name: list(shape) for name, shape in SHAPES.items()})
    before = constants(model)
    assert share_constants(model) > 300
    after = [one for one in constants(model) if np.prod(one[1]) <= LARGEST]
    assert len(after) == len(set(after))
    assert set(constants(model)) <= set(before) | set(after)
    kinds = {op.get_type_name() for op in model.get_ops()}
    assert not kinds & {"Range", "ConvertLike"}
    assert share_constants(model) == 0


@pytest.mark.parametrize(
    ("size", "stored", "wanted", "left"),
    [
        (LARGEST_CAST, np.float16, np.float32, False),
        (LARGEST_CAST + 1, np.float16, np.float32, True),
        (16, np.float16, np.float64, True),
        (16, np.int8, np.float32, True),
    ],
)
def test_small_casts_of_fp16_are_done(size: int, stored: Any, wanted: Any, left: bool) -> None:
    import openvino
    from openvino import opset13 as ops

    values = (100 * np.random.default_rng(0).standard_normal(size)).astype(stored)
    given = ops.parameter([size], wanted, name="given")
    model = openvino.Model([ops.add(given, ops.convert(ops.constant(values), wanted))], [given], "cast")
    assert share_constants(model) == (0 if left else 1)
    kinds = [op.get_type_name() for op in model.get_ops()]
    assert ("Convert" in kinds) == left
    if not left:
        [found] = [op.get_data() for op in model.get_ops() if op.get_type_name() == "Constant"]
        assert found.dtype == np.float32
        assert np.array_equal(found, values.astype(np.float32))


def test_what_differs_stays() -> None:
    """In type, in shape or in a bit; and what is computed."""
    import openvino
    from openvino import opset13 as ops

    given = ops.parameter([2], np.float32, name="given")
    start = ops.parameter([], np.int64, name="start")
    numbers = [
        ops.constant(np.array(value, kind))
        for value, kind in (
            (1, np.float32),
            ([1], np.float32),
            (1, np.int64),
            (-0.0, np.float32),
            (0, np.float32),
        )
    ]
    total: Any = given
    for number in numbers:
        total = ops.add(total, ops.convert(number, np.float32))
    axes = ops.range(start, ops.constant(np.array(3, np.int64)), numbers[2], "i64")
    model = openvino.Model([total, ops.convert_like(axes, given)], [given, start], "differs")
    assert share_constants(model) == 0

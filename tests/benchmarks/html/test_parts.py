"""What the page is made of: figures, scales, pictures, order, and speeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.html.axis import fair, linear_axis, log_axis, time_axis
from kiln.benchmarks.html.grouping import group_records
from kiln.benchmarks.html.text import clean, number, seconds, share, size, span
from kiln.benchmarks.html.thumbs import (
    AMPLIFY,
    LEVELS,
    Pair,
    Picture,
    difference,
    make_album,
    read_picture,
)
from kiln.benchmarks.records.bootstrap import ratio_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (1234.5, "1234"), (41.237, "41.2"), (0.0588, "0.0588"), (9.999, "10.0"),
        (2.4e-7, "2.40e−7"), (-3.0, "−3.00"), (math.nan, "not a number"), (math.inf, "∞"), (3e7, "3.00e7"),
    ],
)  # fmt: skip
def test_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 s"), (0.0123, "12.3 ms"), (0.9996, "1.00 s"), (134.2, "134 s"), (1536.0, "25 min 36 s")],
)
def test_times(value: float, text: str) -> None:
    assert seconds(value) == text


def test_other_figures() -> None:
    assert span((2.41, 2.52)) == "2.41–2.52 s"
    assert span((0.041, 0.0425)) == "41.0–42.5 ms"
    assert span(None) == "–"
    assert size(3_144_000_000) == "3.14 GB"
    assert size(512_000) == "512 kB"
    assert share(0.0312) == "3.1 %"


def test_clean_text() -> None:
    assert clean("a\u202eb\x00c\nd\ud800") == "a b c d"
    assert clean("w" * 200, 10) == "wwwwwwwww…"
    assert clean("<b>") == "<b>"  # markup is the templates' business


def test_linear_marks_are_round_and_within() -> None:
    axis = linear_axis([0.0, 134.0])
    assert [tick.text for tick in axis.ticks] == ["0", "50", "100"]
    assert axis.at(0) == 0
    assert axis.at(1e9) == 100
    assert all(0 <= tick.at <= 100 for tick in axis.ticks)
    assert linear_axis([5.0, 5.0], zero=False).at(5.0) == pytest.approx(50)
    assert [tick.text for tick in time_axis([0.0, 0.25]).ticks] == ["0", "100", "200"]


def test_log_marks_are_decades() -> None:
    axis = log_axis([3e-5, 0.04, 0.0, math.nan])
    assert (axis.low, axis.high) == pytest.approx((1e-5, 0.1))
    assert axis.at(0.0) == 0
    assert axis.at(1e-3) == pytest.approx(50)
    assert [tick.text for tick in axis.ticks] == ["10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1"]


def test_one_giant_does_not_press_the_others_flat() -> None:
    assert max(fair([41, 55, 58, 96, 134, 940])) == pytest.approx(134 * 1.2)
    assert max(fair([41, 55, 58, 96, 134, 140])) == 140
    assert max(fair([1, 900])) == 900


def test_order_and_baseline(six) -> None:
    first, second = group_records(six.records)
    assert [e.label for e in first.entries] == [
        "openvino bf16", "diffusers bf16", "openvino fp32", "onnxruntime fp32", "stable-diffusion.cpp fp16",
        "torch bf16",
    ]  # fmt: skip
    assert first.baseline is not None
    assert first.baseline.label == "diffusers bf16"
    assert [e.number for e in (*first.entries, *second.entries)] == [1, 2, 3, 4, 5, 6, 7]
    named, _ = group_records(six.records, "openvino fp32")
    assert named.baseline is not None
    assert named.baseline.label == "openvino fp32"
    backwards, _ = group_records(six.records[:6][::-1] + six.records[6:])
    assert [e.record.id for e in backwards.entries] == [e.record.id for e in first.entries]


def test_speed_is_the_ratio_of_medians(six) -> None:
    group = group_records(six.records)[0]
    best, base = group.entries[0], group.entries[1]
    found = group.relative(best)
    assert found is not None
    assert found.word == "faster"
    assert found.ratio == pytest.approx(base.median / best.median)
    assert found.interval == pytest.approx(ratio_interval(base.per_image, best.per_image), rel=1e-6)
    wrong = group.relative(group.entries[-1])
    assert wrong is not None
    assert wrong.ratio is None
    assert group.relative(base) is None


def test_the_same_again_is_not_significant(make_results, kinds) -> None:
    results = make_results(side=32, prompts=("red apple",))
    a, b = (results.record(kinds[0], n) for n in (1, 2))
    group = group_records([a, b])[0]
    found = [group.relative(e) for e in group.entries if e is not group.baseline]
    assert [f.word for f in found if f] == ["not significant"]


def test_other_sizes_are_other_groups(make_results, kinds) -> None:
    results = make_results(side=32, prompts=("red apple",))
    a, b = (results.record(kinds[0], n) for n in (1, 2))
    b = replace(b, workload=replace(b.workload, width=64))
    assert [len(g.entries) for g in group_records([a, b])] == [1, 1]


def test_differences_are_amplified_and_measured() -> None:
    wanted = np.full((4, 4, 3), 100, np.uint8)
    made = wanted.copy()
    made[0, 0] = (101, 97, 100)
    made[3, 3, 2] = 200
    colours, largest, mean = difference(made, wanted)
    assert largest == 100
    assert mean == pytest.approx((1 + 3 + 100) / 48)
    assert (colours[1, 1] == 0).all()
    assert colours[3, 3].tolist() == [255, 255, 214]
    grey = difference(np.full((1, 1, 3), 3, np.uint8), np.zeros((1, 1, 3), np.uint8))[0]
    assert (grey[0, 0] == colours[0, 0]).all()  # the largest channel counts
    brightness = [
        int(difference(np.full((1, 1, 3), n, np.uint8), np.zeros((1, 1, 3), np.uint8))[0].sum())
        for n in range(256 // AMPLIFY + 1)
    ]
    assert brightness == sorted(brightness)
    with pytest.raises(ValueError, match="sizes differ"):
        difference(made, wanted[:2])


def test_pictures_that_are_not_what_was_recorded(make_results) -> None:
    results = make_results(side=32, prompts=("red apple",))
    facts = results.reference_facts[0]
    good = Picture(facts.file, facts.sha256)
    assert read_picture(results.folder, good).shape == (32, 32, 3)
    outside = results.folder.parent / "secret.png"
    outside.write_bytes((results.folder / facts.file).read_bytes())
    (results.folder / "link.png").symlink_to(outside)
    for file, why in (
        ("../secret.png", "outside"), (str(outside), "outside"), ("link.png", "outside"),
        ("images/no.png", "missing"),
        ("images", "missing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            read_picture(results.folder, Picture(file, facts.sha256))
    with pytest.raises(ValueError, match="not the one that was recorded"):
        read_picture(results.folder, Picture(facts.file, "0" * 64))
    album, _ = make_album(results.folder, [good, Pair(good, Picture(facts.file, "0" * 64))])
    assert album[good].uri.startswith("data:image/webp;base64,")
    assert [thumb.missing for thumb in album.values()] == ["", "its file is not the one that was recorded"]


def test_pictures_shrink_until_they_fit(make_results, tmp_path: Path) -> None:
    results = make_results(side=512, prompts=("red apple", "rocket"))
    wanted = [Picture(facts.file, facts.sha256) for facts in results.reference_facts]
    large, side = make_album(results.folder, wanted)
    assert side == LEVELS[0][0]
    whole = sum(len(thumb.uri) for thumb in large.values())
    small, less = make_album(results.folder, wanted, budget=whole // 3)
    assert less < side
    assert sum(len(thumb.uri) for thumb in small.values()) <= whole // 3
    assert all((thumb.width, thumb.height) == (512, 512) for thumb in small.values())
    assert make_album(results.folder, wanted, budget=1)[1] == LEVELS[-1][0]

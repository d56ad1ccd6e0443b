"""The report's structure, by an HTML parser; what hostile records hold; sizes, and the same bytes again."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from kiln.benchmarks.html.build import REPORT, render_report, write_report
from kiln.benchmarks.html.text import number
from kiln.benchmarks.html.thumbs import AMPLIFY
from kiln.benchmarks.records.record import Derived, Energy, Memory, Parity, Phases
from kiln.benchmarks.records.store import append_record
from kiln.errors import UsageError

VOID = {"meta", "link", "img", "br", "input", "rect", "path", "line", "circle"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}</style></title>\u202e\x00\ud800"


class Tree(HTMLParser):
    """All elements with attributes and text; fails on what is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    def classes(self, name: str) -> int:
        return sum(name in (a.get("class") or "").split() for _, a in self.elements)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html(six) -> str:
    return render_report(six.records, six.folder)


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    return Tree(html)


def test_nothing_outside_is_named(html: str, tree: Tree) -> None:
    for tag, attributes in tree.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            if name in attributes:
                assert re.match(r"(#|data:)", attributes[name] or ""), (tag, attributes[name][:80])
    assert not tree.of("iframe")
    assert not tree.of("object")
    assert not tree.of("form")
    assert not re.search(r"@import|url\((?!#)", html)
    policy = tree.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_it_can_be_read_by_others_than_eyes(tree: Tree) -> None:
    assert tree.of("html")[0]["lang"] == "en"
    assert all(image.get("alt") or "data-below" in image or "data-top" in image for image in tree.of("img"))
    assert all(svg.get("aria-label") for svg in tree.of("svg", role="img"))
    assert all(
        svg.get("role") == "img" or svg.get("aria-hidden")
        for svg in tree.of("svg")
        if "class" in svg and "overflow" not in svg
    )
    assert all(th.get("scope") for th in tree.of("th"))
    ids = [a["id"] for _, a in tree.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in tree.of("a")} <= {f"#{i}" for i in ids}
    pointed = {a["data-reference"] for _, a in tree.elements if "data-reference" in a}
    assert pointed
    assert pointed <= set(ids)
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_every_configuration_is_there_with_its_verdict(tree: Tree, six) -> None:
    assert tree.classes("speedbar") == 7
    assert [tree.classes(name) for name in ("noisy", "invalid")] >= [1, 1]
    for record in six.records:
        assert record.label in tree.words
        for reason in record.reasons:
            assert reason in tree.words
    best, base = (record.stats.image.median for record in (six.records[0], six.records[4]))
    assert f"{number(base / best)}×" in tree.words
    assert "random weights" in tree.words


def test_the_grid_has_all_pictures_and_marks_the_wrong_one(tree: Tree) -> None:
    assert tree.classes("cell") == 8 * 7
    assert len(tree.of("img", **{"class": "diff small"})) == 8 * 5
    assert tree.classes("failed") >= 1
    failed = [a for _, a in tree.elements if "cell failed" in (a.get("class") or "")]
    assert [cell["data-title"] for cell in failed] == [
        "torch bf16 – isometric cutaway of a tiny bakery, papercraft"
    ]
    assert f"amplified {AMPLIFY} times" in tree.words
    assert "not compared with the reference" in tree.words


def test_every_sample_is_drawn(html: str, six) -> None:
    """A dot is a stroke of no length; each sample has one in the plot and one in the strip."""
    timed = [r for r in six.records if r.samples]
    paths = {
        kind: "".join(re.findall(rf'<path class="{kind}" d="([^"]*)"', html))
        for kind in ("dots", "dots small")
    }
    steps = sum(len(s.unet_steps) for r in timed for s in r.samples)
    samples = sum(len(r.samples) for r in timed)
    assert paths["dots small"].count("h0") == samples + steps
    assert paths["dots"].count("h0") == samples + steps
    warm = "".join(re.findall(r'<path class="dots warm" d="([^"]*)"', html)).count("h0")
    above = "".join(re.findall(r'<path class="above" d="([^"]*)"', html)).count("v40")
    assert warm + above == sum(len(r.warmups) for r in timed)
    assert above >= 1


def test_two_groups_of_times_are_named(tree: Tree) -> None:
    assert "two groups" in tree.words


def test_what_was_not_measured_is_said(tree: Tree) -> None:
    assert "no configuration had a counter of energy" in tree.words
    assert "cannot tell its components apart" in tree.words
    assert "its pictures show nothing" in tree.words


def test_each_picture_opens_over_its_own_reference(make_results, kinds) -> None:
    """Two bundles, two references: one of each in the row, before the pictures."""
    first, second = (
        make_results(side=32, prompts=("red apple",)),
        make_results(side=40, prompts=("red apple",)),
    )
    second.folder, second.side = first.folder, 32
    second.references = [image[::-1, :32].copy()[:32] for image in first.references]
    second.reference_facts = tuple(second.keep(0, 1000, image, {}) for image in second.references)
    records = [first.record(kinds[0], 0), second.record(kinds[1], 1)]
    page = Tree(render_report(records, first.folder))
    assert page.classes("ref") == 2
    cells = [a.get("data-reference") for _, a in page.elements if "cell" in (a.get("class") or "").split()]
    assert cells == [None, None, "g1p1r1", "g1p1r2"]


def test_energy_comes_with_its_method(make_results, kinds) -> None:
    results = make_results(side=32, prompts=("red apple",))
    record = results.record(replace(kinds[0], energy=True), 0)
    words = Tree(render_report([record], results.folder)).words
    assert "812 J" in words
    assert "690 J" in words
    assert "rapl" in words


def test_a_setting_not_in_force_is_marked(make_results, kinds) -> None:
    results = make_results(side=32, prompts=("red apple",))
    record = results.record(kinds[0], 0)
    rows = {name: replace(row, precision="fp32") for name, row in record.effective.items()}
    page = Tree(render_report([replace(record, effective=rows)], results.folder))
    assert page.classes("differs") == len(rows)
    assert Tree(render_report([record], results.folder)).classes("differs") == 0


def test_the_same_records_give_the_same_bytes(html: str, six) -> None:
    assert render_report(six.records, six.folder) == html
    assert render_report(six.records[::-1], six.folder) != ""


def test_one_record_without_anything(make_results, kinds) -> None:
    results = make_results(side=32, prompts=("red apple",))
    record = results.record(kinds[0], 0)
    bare = replace(
        record, samples=(), warmups=(), stats=Derived(), phases=Phases(), memory=Memory(), energy=Energy(),
        parity=Parity(), images=(), effective={}, environment={}, command=(), verdict="invalid",
        reasons=("nothing was timed",),
    )  # fmt: skip
    page = Tree(render_report([bare], results.folder))
    assert "nothing was timed" in page.words
    assert "No configuration gave a valid time." in page.words
    assert "not checked" in page.words


def test_thirty_records_stay_apart(make_results, kinds) -> None:
    results = make_results(side=64)
    records = [
        replace(results.record(kinds[n % 6], n, count=30), label=f"{kinds[n % 6].name} variant {n}")
        for n in range(30)
    ]
    html = render_report(records, results.folder)
    page = Tree(html)
    assert len(html.encode()) < 10_000_000
    assert page.classes("speedbar") == 30
    assert all(f"variant {n}" in page.words for n in range(30))


def test_eight_by_six_pictures_of_noise_stay_below_ten_megabytes(make_results, kinds) -> None:
    """Noise is the worst that WebP can meet; half of it already makes the first two sizes fail."""
    results = make_results(side=512, prompts=tuple(f"noise {n}" for n in range(8)))
    rng = np.random.default_rng(0)
    results.references = [rng.integers(0, 256, (512, 512, 3), dtype=np.uint8) for _ in range(8)]
    results.reference_facts = tuple(
        results.keep(i, 1000 + i, im, {}) for i, im in enumerate(results.references)
    )
    records = [results.record(replace(kinds[0], error=40.0, name=f"backend{n}"), n) for n in range(6)]
    html = render_report(records, results.folder)
    assert 1_000_000 < len(html.encode()) < 10_000_000
    assert Tree(html).classes("cell") == 8 * 7


def hostile(record: Any, text: str) -> Any:
    """Every text that a stranger's record can hold."""
    load = record.workload
    load = replace(
        load, prompts=(text,) * len(load.prompts), negative_prompt=text, id=text, sampler=text, schedule=text,
        model=replace(load.model, name=text, family=text),
        adapters=tuple(replace(a, name=text) for a in load.adapters),
    )  # fmt: skip
    gate, told = record.parity.gates[0], next(iter(record.effective.values()))
    surroundings = {
        text: text,
        "packages": {text: text},
        "flags": [text],
        "gpus": [{"name": text}],
        "cpu": text,
    }
    return replace(
        record, label=text, run=text, id=text, created=text, reasons=(text,), command=("kiln", text),
        workload=load, environment=surroundings, verdict="invalid",
        tool=replace(record.tool, version=text, commit=text),
        requested=replace(record.requested, name=text, options={text: text}),
        effective={text: replace(told, backend=text, settings={text: [text]})},
        noise=replace(record.noise, reasons=(text,), facts={text: {"before": text, "after": text}}),
        phases=replace(record.phases, components={text: {"compile_cold": 1.0}}),
        memory=replace(record.memory, rss=replace(record.memory.rss, method=text)),
        energy=Energy(text, 1.0),
        stats=replace(record.stats, components={text: next(iter(record.stats.components.values()))}),
        parity=replace(
            record.parity, diverges={"text": text}, reference={"requested": {"name": text}, "bundle": text},
            gates=(replace(gate, level=text, where=text, metric=text),),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("text", [HOSTILE, "w" * 200_000, "\n" * 50 + "ß" * 3000, ""])
def test_hostile_texts_are_only_text(make_results, kinds, text: str) -> None:
    results = make_results(side=32, prompts=("red apple",))
    record = results.record(kinds[0], 0)
    clean, page = (
        Tree(render_report([r], results.folder).encode("utf-8", "replace").decode())
        for r in (replace(record, verdict="invalid", reasons=("x",)), hostile(record, text))
    )
    assert len(page.of("script")) == len(clean.of("script")) == 1
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert len(page.of("style")) == 1
    assert len(page.of("img")) == len(clean.of("img"))
    assert ("{{ 7*7 }}" in page.words) == (text == HOSTILE)
    assert "\u202e" not in page.words
    assert "\x00" not in page.words
    assert len(page.words) < 80_000


def test_write_report_reads_a_results_folder(six, tmp_path) -> None:
    for record in six.records:
        append_record(six.folder, record)
    path = write_report(six.folder)
    assert path == six.folder / REPORT
    first = path.read_bytes()
    assert write_report(six.folder, tmp_path / "deep/er.html").read_bytes() == first
    assert not list(six.folder.glob(".report*"))
    with pytest.raises(UsageError, match=r"no record of run 'other' \(runs: 2026"):
        write_report(six.folder, run="other")
    with pytest.raises(UsageError, match="no record is called 'x'; expected one of: openvino bf16"):
        write_report(six.folder, baseline="x")

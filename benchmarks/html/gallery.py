"""The pictures: a row for each prompt, a column for each configuration beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..records.record import Gate, ImageFacts
from .grouping import Entry, Group
from .text import clean, number, setting
from .thumbs import Album, Pair, Picture, Thumb

_UNITS = {
    "psnr_db": ("PSNR", " dB"),
    "ssim": ("SSIM", ""),
    "lpips": ("LPIPS", ""),
    "clip_score": ("CLIP", ""),
}
_EQUAL_DB = 150.0  # what is recorded as the PSNR of equal pictures
_NOTHING = Thumb(missing="it was not drawn")


@dataclass(frozen=True)
class Metric:
    """A figure under a picture; ``limit`` says what was expected where it ``failed``."""

    name: str
    text: str
    failed: bool
    limit: str


@dataclass(frozen=True)
class Cell:
    """One picture with what is said of it; ``difference`` None where there is nothing to compare with.

    ``reference`` is the place of its reference in the row, from 1; 0 without one.
    """

    title: str
    entry: Entry | None
    image: Thumb
    reference: int
    difference: Thumb | None
    metrics: tuple[Metric, ...]
    flaws: tuple[str, ...]
    note: str
    alt: str

    @property
    def failed(self) -> bool:
        """Whether a gate fails on this very picture."""
        return bool(self.flaws) or any(metric.failed for metric in self.metrics)


@dataclass(frozen=True)
class PromptRow:
    """The pictures of one prompt and seed."""

    prompt: str
    seed: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Column:
    title: str
    images: Mapping[tuple[int, int], ImageFacts]


def wanted_pictures(group: Group) -> list[Picture | Pair]:
    """What ``gallery`` will ask for: pictures, and pairs where there are metrics."""
    found: list[Picture | Pair] = []
    for column in _references(group):
        found += [_picture(facts) for facts in column.images.values()]
    for entry in _drawn(group):
        references = _by_place(entry.record.parity.reference_images)
        for facts in entry.record.images:
            found.append(_picture(facts))
            other = references.get((facts.prompt, facts.seed))
            if other is not None and facts.metrics:
                found.append(Pair(_picture(facts), _picture(other)))
    return found


def gallery(group: Group, album: Album) -> tuple[PromptRow, ...]:
    """Rows by prompt and seed; empty without pictures, and for random weights, whose show nothing."""
    references, entries = _references(group), _drawn(group)
    images = [_by_place(entry.record.images) for entry in entries]
    places = sorted({place for part in (*images, *(c.images for c in references)) for place in part})
    rows = []
    for place in places:
        prompt = _prompt(group, place[0])
        cells = [_reference_cell(column, place, album, prompt) for column in references]
        cells += [
            _cell(entry, part, place, album, prompt, references)
            for entry, part in zip(entries, images, strict=True)
        ]
        rows.append(PromptRow(prompt, place[1], tuple(cells)))
    return tuple(rows)


def _drawn(group: Group) -> list[Entry]:
    if group.random_weights:
        return []
    return [entry for entry in group.entries if entry.record.images]


def _references(group: Group) -> list[_Column]:
    """One column for each different set of reference pictures."""
    found: dict[tuple[str, ...], _Column] = {}
    for entry in _drawn(group):
        images = entry.record.parity.reference_images
        if images:
            key = tuple(facts.pixels for facts in images)
            found.setdefault(key, _Column(_reference_name(entry), _by_place(images)))
    return list(found.values())


def _reference_name(entry: Entry) -> str:
    asked = entry.record.parity.reference.get("requested")
    asked = asked if isinstance(asked, Mapping) else {}
    text = " ".join(str(asked[key]) for key in ("name", "precision") if asked.get(key))
    bundle = entry.record.parity.reference.get("bundle")
    if bundle and bundle != entry.record.workload.model.name:
        text += f" of {bundle}"
    return clean(f"reference: {text}" if text else "reference")


def _reference_cell(column: _Column, place: tuple[int, int], album: Album, prompt: str) -> Cell:
    facts = column.images.get(place)
    image = album.get(_picture(facts), _NOTHING) if facts else _NOTHING
    return Cell(column.title, None, image, 0, None, (), (), "", f"{column.title}, prompt: {prompt}")


def _cell(
    entry: Entry,
    images: Mapping[tuple[int, int], ImageFacts],
    place: tuple[int, int],
    album: Album,
    prompt: str,
    references: list[_Column],
) -> Cell:
    facts = images.get(place)
    if facts is None:
        return Cell(entry.label, entry, _NOTHING, 0, None, (), (), "", "")
    wanted = _by_place(entry.record.parity.reference_images)
    other = wanted.get(place)
    below = next((n for n, column in enumerate(references, 1) if _same(column.images, wanted)), 0)
    compared = other is not None and bool(facts.metrics)
    index = entry.record.images.index(facts) + 1
    gates = [g for g in entry.record.parity.gates if g.level == "image"]
    metrics = tuple(_metric(name, value, gates) for name, value in facts.metrics.items())
    flaws = tuple(
        clean(g.metric, 40)
        for g in gates
        if not g.passed and g.metric not in facts.metrics and g.where == f"image {index}"
    )
    return Cell(
        title=entry.label,
        entry=entry,
        image=album.get(_picture(facts), _NOTHING),
        reference=below if compared else 0,
        difference=album.get(Pair(_picture(facts), _picture(other))) if other and compared else None,
        metrics=metrics,
        flaws=flaws,
        note="" if compared else "not compared with the reference",
        alt=f"{entry.label}, prompt: {prompt}",
    )


def _same(a: Mapping[tuple[int, int], ImageFacts], b: Mapping[tuple[int, int], ImageFacts]) -> bool:
    return {p: f.pixels for p, f in a.items()} == {p: f.pixels for p, f in b.items()}


def _metric(name: str, value: float, gates: list[Gate]) -> Metric:
    short, unit = _UNITS.get(name, (clean(name, 30), ""))
    equal = name == "psnr_db" and value >= _EQUAL_DB
    text = "equal" if equal else f"{number(value, 4 if name == 'ssim' else 3)}{unit}"
    for gate in gates:
        if gate.metric == name and gate.limit is not None:
            holds = value <= gate.limit if gate.at_most else value >= gate.limit
            side = "≤" if gate.at_most else "≥"
            return Metric(short, text, not holds, f"{side} {setting(gate.limit)}{unit}")
    return Metric(short, text, False, "")


def _by_place(images: tuple[ImageFacts, ...]) -> dict[tuple[int, int], ImageFacts]:
    return {(facts.prompt, facts.seed): facts for facts in images}


def _picture(facts: ImageFacts) -> Picture:
    return Picture(facts.file, facts.sha256)


def _prompt(group: Group, index: int) -> str:
    prompts = group.workload.prompts
    return clean(prompts[index], 300) if 0 <= index < len(prompts) else f"prompt {index + 1}"

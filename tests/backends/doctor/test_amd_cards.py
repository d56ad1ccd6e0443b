"""The table of AMD's GPUs: names from the kernel's numbers, and the page says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kiln.backends.doctor.amd_cards import (
    CARDS,
    OFFICIAL,
    UNOFFICIAL,
    UNSUPPORTED,
    card_of,
    gfx_name,
    gfx_of_override,
    same_family,
)

PAGE = Path(__file__).resolve().parents[3] / "docs/amd.md"


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of the page's table by gfx name."""
    rows = re.findall(r"^\| (gfx[0-9a-f]+) \| (.*) \|$", text, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    return {name: tuple(part.strip() for part in rest.split(" | ")) for name, rest in rows}


def rows_of_code() -> dict[str, tuple[str, ...]]:
    rows = {}
    for card in CARDS:
        backends = ", ".join(f"`{name}`" for name in card.backends) or "none: `openvino`"
        rows[card.gfx] = (card.architecture, card.names, card.support, card.override or "-", backends)
    return rows


def test_the_page_says_what_the_code_says() -> None:
    assert rows_of(PAGE.read_text(encoding="utf-8")) == rows_of_code()


@pytest.mark.parametrize(
    ("old", "new"),
    [("| 10.3.0 |", "| 10.3.1 |"), ("| gfx1100 |", "| gfx1104 |"), ("| unofficial |", "| official |")],
)
def test_a_row_that_differs_is_found(old: str, new: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert old in text
    assert rows_of(text.replace(old, new, 1)) != rows_of_code()


def test_every_gfx_name_on_the_page_is_in_the_table() -> None:
    named = set(re.findall(r"\bgfx[0-9a-f]{3,4}\b", PAGE.read_text(encoding="utf-8")))
    assert named <= {card.gfx for card in CARDS}


@pytest.mark.parametrize(
    ("version", "name"),
    [
        # What the kernel writes for known cards; llvm's names for them.
        (0, ""),
        (80003, "gfx803"),
        (90000, "gfx900"),
        (90010, "gfx90a"),
        (90012, "gfx90c"),
        (90402, "gfx942"),
        (90500, "gfx950"),
        (100100, "gfx1010"),
        (100306, "gfx1036"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (120001, "gfx1201"),
    ],
)
def test_names_from_numbers(version: int, name: str) -> None:
    assert gfx_name(version) == name
    assert not name or card_of(name)


def test_overrides_name_a_relative_that_has_kernels_of_its_own() -> None:
    for card in CARDS:
        if not card.override:
            continue
        relative = card_of(gfx_of_override(card.override))
        assert relative is not None
        assert not relative.override
        assert same_family(card.gfx, relative.gfx)
        assert card.gfx != relative.gfx


def test_what_is_no_override() -> None:
    assert [gfx_of_override(text) for text in ("", "10.3", "gfx1030", "10.3.x", "0.0.0")] == [""] * 5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gfx1031", "gfx1030", True),
        ("gfx1103", "gfx1100", True),
        ("gfx1151", "gfx1100", True),
        ("gfx1010", "gfx1030", False),
        ("gfx1100", "gfx1030", False),
        ("gfx1201", "gfx1100", False),
        ("gfx90c", "gfx900", True),
        ("gfx90a", "gfx900", False),
        ("gfx906", "gfx900", False),
        ("gfx942", "gfx950", False),
    ],
)
def test_families(one: str, other: str, same: bool) -> None:
    assert same_family(one, other) is same


def test_support_is_what_amd_lists() -> None:
    listed = [
        *("gfx950", "gfx942", "gfx90a"),
        *("gfx1200", "gfx1201", "gfx1100", "gfx1101", "gfx1102"),
        *("gfx1150", "gfx1151", "gfx1152", "gfx1153"),
    ]
    assert {card.gfx for card in CARDS if card.support == OFFICIAL} == set(listed)
    assert {card.support for card in CARDS} == {OFFICIAL, UNOFFICIAL, UNSUPPORTED}
    assert [card.gfx for card in CARDS if card.support == UNSUPPORTED] == ["gfx90c", "gfx902", "gfx803"]

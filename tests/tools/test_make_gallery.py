"""docs/gallery.md: its model, LoRAs and picture are there, and its figures are those of the picture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kiln.api import bundled_adapters, bundled_models, locate_adapter

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_gallery.py"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("kiln_tests_make_gallery", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(gallery):
    with Image.open(gallery.PICTURE) as made:
        return gallery.cut(made.convert("RGB"))


def test_what_it_is_drawn_with_ships(gallery):
    assert gallery.MODEL in bundled_models()
    refs = [locate_adapter(text) for adapters in gallery.COLUMNS.values() for text in adapters]
    assert {ref.path for ref in refs} == set(bundled_adapters().values())
    assert sum(ref.blocks is not None for ref in refs) == 2


def test_the_picture_is_small_and_of_these_rows_and_columns(gallery, pictures):
    assert gallery.PICTURE.stat().st_size < 300_000
    with Image.open(gallery.PICTURE) as made:
        assert made.size == gallery.place(len(gallery.PROMPTS), len(gallery.COLUMNS))
    assert all(images.std(axis=(1, 2, 3)).min() > 1 for images in pictures.values()), "a cell is empty"


def test_the_tables_are_those_of_the_picture(gallery, pictures):
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.render(page, pictures) == page, "run python tools/make_gallery.py --tables"


@pytest.mark.parametrize("column", ["no adapter", "flat 1"])
def test_the_picture_is_what_is_drawn_today(gallery, pictures, column, kiln_cache, monkeypatch):
    """One prompt of two columns; on other processors float32 rounds otherwise, so not to the bit."""
    monkeypatch.setenv("KILN_CACHE", str(kiln_cache))
    drawn = gallery.draw(column, gallery.PROMPTS[:1])[0]
    assert gallery.change(drawn, pictures[column][0]) < 1.0
    other = "flat 1" if column == "no adapter" else "no adapter"
    assert gallery.change(drawn, pictures[other][0]) > 10.0


def test_a_change_is_measured_in_percent(gallery):
    white = np.full((4, 4, 3), 255, np.uint8)
    assert gallery.change(white, np.zeros_like(white)) == pytest.approx(100)
    assert gallery.change(white, white) == 0

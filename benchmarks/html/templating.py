"""The templates and what they may call."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...errors import KilnError

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, **values: Any) -> str:
    """A template with its values; whatever stands in them is text, never markup.

    Raises:
        KilnError: a template is not there, as in an installation that lost its data files.
    """
    try:
        return _environment().get_template(name).render(**values)
    except jinja2.TemplateNotFound as error:
        raise KilnError(f"{TEMPLATES / str(error)} is missing; install Kiln anew") from error


def inline(name: str) -> Markup:
    """A style sheet or script of our own, to stand inside the page as it is."""
    text = (TEMPLATES / name).read_text(encoding="utf-8").strip()
    # Markup, because it is a file of this package; it must not end the element that it stands in.
    assert "</s" not in text.lower(), name
    return Markup(text)


def script_hash(text: str) -> str:
    """What a content security policy calls a script by: CSP level 3, section 2.3.1."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )

"""What every page has in common: its style, its one script, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from dkdm.evaluation.numbers import count, duration, number, percent
from dkdm.reading.files import render

TEMPLATES = "dkdm.report"


def sentence(words: str) -> str:
    """Words with a capital at the start; those inside, such as FID, stay as they are."""
    return words[:1].upper() + words[1:]


FILTERS: dict[str, Callable[..., Any]] = {
    "count": count,
    "number": number,
    "percent": percent,
    "duration": duration,
    "sentence": sentence,
}


def render_page(template: str, **values: Any) -> str:
    """A page of a template that extends `base.html.j2`; every text in `values` is escaped.

    The page is one file: its content security policy allows no address, only `data:` images and the
    script of this package, by its hash.
    """
    style, script = (render(TEMPLATES, name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fixed = {"style": Markup(style), "script": Markup(script)}  # nosec: files of the package
    return render(TEMPLATES, template, FILTERS, script_hash=digest, **fixed, **values)

"""What every page shares: the skeleton, its style and script, and how numbers are written.

``render(template, **values)`` fills a template that extends ``base.html``. Style and scripts are
written into the page; its content security policy forbids any request.
"""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import opkit
from opkit.reports.facts import LEVEL_SIGN, OUTCOME_SIGN, modes_text, two_counts

HERE = Path(__file__).parent
NOTHING = "–"
COMMENTS = {
    ".css": re.compile(r"/\*.*?\*/", re.DOTALL),
    ".js": re.compile(r"^\s*//.*$", re.MULTILINE),
}


def render(template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        template: file in this folder that extends ``base.html``.
        values: what it shows; ``base.html`` asks for ``title`` (text) and ``sections``
            (id and text of each part, for the list of contents).
    """
    return environment().get_template(template).render(**values)


@functools.cache
def environment() -> Environment:
    """The templates of this folder; everything that is written into a page is escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "us": us,
        "percent": percent,
        "count": count,
        "ratio": ratio,
        "bytes": size,
        "prose": prose,
        "sign": OUTCOME_SIGN.__getitem__,
        "level_sign": LEVEL_SIGN.__getitem__,
        "modes": modes_text,
        "dims": dims,
        "command": shlex.join,
    }
    made.globals |= {
        "inlined": inlined,
        "opkit_version": opkit.__version__,
        "NOTHING": NOTHING,
        "two": two_counts,
    }
    return made


def inlined(name: str) -> Markup:
    """A stylesheet or script of this folder, to stand inside its element: without indentation, and
    without comments (of a script those that have a line of their own)."""
    path = HERE / name
    text = COMMENTS[path.suffix].sub("", path.read_text("utf-8"))
    lines = (line.strip() for line in text.splitlines())
    # Own files: nothing in them ends the element.
    return Markup("\n".join(line for line in lines if line))


def us(ns: float | None, digits: int = 1) -> str:
    """Nanoseconds as microseconds: ``1,234.5``."""
    return NOTHING if ns is None else f"{ns / 1000:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction of 1: ``99.8 %``."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def count(number: int | None) -> str:
    """``1,234``."""
    return NOTHING if number is None else f"{number:,}"


def ratio(value: float | None) -> str:
    """``0.97``."""
    return NOTHING if value is None else f"{value:.2f}"


def prose(text: str) -> Markup:
    """A sentence whose parts in `back quotes` are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def dims(dimensions: tuple[int, int, int] | None) -> str:
    """Launch dimensions as CUDA's dim3 is written: ``2×66``, what is 1 behind them left out."""
    if dimensions is None:
        return NOTHING
    x, y, z = dimensions
    return f"{x}×{y}×{z}" if z != 1 else f"{x}×{y}" if y != 1 else str(x)


def size(count: int | None) -> str:
    """Bytes as ``1.2 MB`` (10⁶ bytes) or ``34 kB``."""
    if count is None:
        return NOTHING
    return f"{count / 1e6:,.1f} MB" if count >= 1_000_000 else f"{count / 1e3:,.0f} kB"

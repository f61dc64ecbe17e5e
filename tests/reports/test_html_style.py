"""Contrast of the style's colours (WCAG 2.2, 1.4.3 and 1.4.11), light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opkit.reports.html import page as page_module

FOLDER = Path(page_module.__file__).parent
SCHEMES = ("light", "dark")
TEXTS = ("text", "quiet", "link", "good", "bad", "warn")
GRAPHICS = ("mock", "e2e", "third")


def properties(name: str) -> dict[str, tuple[str, str]]:
    """Custom properties of a stylesheet: light and dark value."""
    css = (FOLDER / name).read_text("utf-8")
    both = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)
    same = re.findall(r"--(\w+): (#\w{6});", css)
    return {key: (light, dark) for key, light, dark in both} | {key: (v, v) for key, v in same}


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ground", ["page", "panel"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_can_be_read(name: str, ground: str, scheme: str) -> None:
    known, at = properties("style.css"), SCHEMES.index(scheme)
    assert contrast(known[name][at], known[ground][at]) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", GRAPHICS)
def test_marks_can_be_seen(name: str, scheme: str) -> None:
    known, at = properties("style.css"), SCHEMES.index(scheme)
    assert contrast(known[name][at], known["page"][at]) >= 3.0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("hue", range(7))
def test_labels_on_blocks_can_be_read(hue: int, scheme: str) -> None:
    known, at = properties("align.css"), SCHEMES.index(scheme)
    assert contrast(known["ink"][at], known[f"h{hue}"][at]) >= 4.5


@pytest.mark.parametrize("at", [0, 1], ids=SCHEMES)
def test_labels_on_the_pattern_of_a_mismatch_can_be_read(at: int) -> None:
    known = {name: values[at] for name, values in properties("style.css").items()}
    assert "color-mix(in srgb, var(--bad) 45%, var(--page)) 4px" in (
        FOLDER / "align.css"
    ).read_text("utf-8")
    bad, page = (bytes.fromhex(known[name][1:]) for name in ("bad", "page"))
    mixed = "#" + bytes(round(0.45 * b + 0.55 * p) for b, p in zip(bad, page, strict=True)).hex()
    assert contrast(known["text"], mixed) >= 4.5
    assert contrast(known["text"], known["page"]) >= 4.5


def test_charts_know_the_colours_of_the_style() -> None:
    from opkit.reports.html.charts import PROPERTIES

    light = {colour: name for name, (colour, _) in properties("style.css").items()}
    assert light.items() >= PROPERTIES.items()

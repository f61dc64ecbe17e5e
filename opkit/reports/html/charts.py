"""Charts: matplotlib's SVG, made part of a page.

Colours are the page's custom properties, so that a chart follows light and dark; text stays text;
every mark that is named can be hovered, focused and read aloud (``page.js`` does the rest).

    chart = Chart("latency", 720, 240, "Latency against batch size")
    [line] = chart.axes.plot(batches, latencies, "o-", color=MOCK)
    chart.mark(line, ["batch 1: 12.3 µs", "batch 2: 14.1 µs"])
    svg = chart.svg()
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler

# What is drawn in one of these colours is drawn in the custom property of that name (style.css).
TEXT, QUIET, LINE, PAGE = "#1b1f24", "#59626e", "#d5d9df", "#ffffff"
MOCK, E2E, THIRD, GLUE = "#3a6ea5", "#b8860b", "#228833", "#c3c9d1"
GOOD, BAD, WARN = "#1b7340", "#b3204d", "#835300"
PROPERTIES = {
    TEXT: "text", QUIET: "quiet", LINE: "line", PAGE: "page", MOCK: "mock", E2E: "e2e",
    THIRD: "third", GLUE: "glue", GOOD: "good", BAD: "bad", WARN: "warn",
}  # fmt: skip
DPI = 72  # one unit of the SVG is one pixel of the page
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.hashsalt": "opkit",  # equal charts are equal text
    "font.size": 11.0,
    "text.color": TEXT,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.prop_cycle": cycler(color=[MOCK, E2E, THIRD, QUIET]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
# The styles that STYLE makes most often, as classes of style.css.
CLASSES = {
    "fill:none;stroke:var(--line);stroke-width:0.6": "grid",
    "fill:none;stroke:var(--line);stroke-width:0.8": "edge",
    "font-size:11px;text-anchor:middle;fill:var(--quiet)": "tick",
    "font-size:11px;text-anchor:end;fill:var(--quiet)": "tick end",
    "font-size:11px;text-anchor:start;fill:var(--quiet)": "tick start",
    "font-size:11px;font-family:var(--mono);text-anchor:end;fill:var(--quiet)": "tick end mono",
    "fill:var(--mock)": "mock",
    "fill:var(--e2e)": "e2e",
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


class Chart:
    """A figure that becomes part of a page.

    Args:
        name: unique in the page: begins the ids inside the SVG.
        width, height: in pixels at the page's full width.
        label: what the chart shows, in a sentence, for who cannot see it.
        rows, columns: of axes; ``grid`` (other keywords) goes to ``Figure.subplots``.
        fixed: the caller places the axes. To have matplotlib find where they go, by measuring every
            text, takes longer than drawing them.

    Attributes:
        figure: matplotlib's.
        axes: the only axes, or the first of several.
        panels: all axes, row by row.
    """

    def __init__(
        self,
        name: str,
        width: int,
        height: int,
        label: str,
        *,
        rows: int = 1,
        columns: int = 1,
        fixed: bool = False,
        **grid: Any,
    ) -> None:
        self.name, self.label = name, label
        self._tips: dict[str, str | Sequence[str]] = {}
        self._dots: set[str] = set()
        with matplotlib.rc_context(STYLE):
            layout: Any = None if fixed else "constrained"
            self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)
            made = self.figure.subplots(rows, columns, squeeze=False, **grid)
        self.panels = list(made.flat)
        self.axes = self.panels[0]

    def mark(self, artist: Artist, tip: str | Sequence[str]) -> None:
        """Name what an artist shows: one text for all of it (a bar, a line), or one for each of
        its points in order (a line with markers, a scatter); empty where a script of the page
        knows it."""
        gid = f"tip{len(self._tips)}"
        artist.set_gid(gid)
        self._tips[gid] = tip

    def dots(self, line: Line2D, tip: str) -> None:
        """Many points of one line under one text, drawn as a single path of round dots.

        A tenth of the size of markers: for hundreds of samples, whose numbers a table gives.
        """
        self.mark(line, tip)
        self._dots.add(str(line.get_gid()))

    def margins(self, left: float, right: float, top: float, bottom: float, gap: float = 0) -> None:
        """Set the space around the axes of a ``fixed`` chart, and between columns, in pixels."""
        width, height = self.figure.get_size_inches() * DPI
        columns = self.panels[0].get_gridspec().ncols
        inner = (width - left - right - gap * (columns - 1)) / columns
        self.figure.subplots_adjust(
            left=left / width, right=1 - right / width, bottom=bottom / height,
            top=1 - top / height, wspace=gap / inner,
        )  # fmt: skip

    def svg(self) -> Markup:
        """The ``<svg>`` element.

        Raises:
            ValueError: a mark's texts are not as many as its points, or it was not drawn.
        """
        drawn = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(drawn, format="svg", dpi=DPI, metadata={"Date": None})
        root = ElementTree.fromstring(drawn.getvalue())
        _tidy(root)
        self._join_dots(root)
        focusable = self._name_marks(root)
        _own_ids(root, self.name)
        _flatten(root)
        for attribute in ("width", "height", "version"):
            root.attrib.pop(attribute, None)
        root.set("class", "chart")
        root.set("style", f"max-width:{self.figure.get_figwidth() * DPI:.0f}px")
        root.set("role", "group" if focusable else "img")
        root.set("aria-label", self.label)
        if focusable:
            root.set("data-roving", "")
        return Markup(_text(root))

    def _name_marks(self, root: ElementTree.Element) -> int:
        """Give marks their texts; return how many there are."""
        by_id = {found.get("id"): found for found in root.iter()}
        named = 0
        for gid, tips in self._tips.items():
            group = by_id.get(gid)
            if group is None:
                raise ValueError(f"{self.name}: a mark of {tips!r} was not drawn")
            if isinstance(tips, str):
                targets, texts = [group], [tips]
            else:
                targets, texts = list(group.iter(f"{_SVG}use")), list(tips)
            if len(targets) != len(texts):
                raise ValueError(f"{self.name}: {len(texts)} texts for {len(targets)} points")
            for target, text in zip(targets, texts, strict=True):
                if len(target) == 1:  # a bar: the group around its path says nothing
                    [path] = target
                    target.tag, target.attrib, target[:] = path.tag, path.attrib, list(path)
                    target.text = None
                target.set("class", f"{target.get('class', '')} mark".strip())
                if text:  # page.js gives it its role and its place
                    target.set("aria-label", text)
                named += 1
        return named

    def _join_dots(self, root: ElementTree.Element) -> None:
        for group in root.iter():
            if group.get("id") not in self._dots:
                continue
            uses = list(group.iter(f"{_SVG}use"))
            path = ElementTree.Element(f"{_SVG}path", {"class": "dots"})
            path.set("d", "".join(f"M{use.get('x')} {use.get('y')}h0" for use in uses))
            if uses and (colour := re.search(r"fill:([^;]+)", uses[0].get("style", ""))):
                path.set("style", f"stroke:{colour[1]}")
            group[:] = [path]


def _tidy(root: ElementTree.Element) -> None:
    """Drop what a page does not need, and put custom properties for colours."""
    for parent in list(root.iter()):
        for child in list(parent):
            styles = child.tag == f"{_SVG}defs" and child.find(f"{_SVG}style") is not None
            if styles or child.tag == f"{_SVG}metadata":
                parent.remove(child)
    for found in root.iter():
        for attribute in ("d", "x", "y", "transform", "points", "width", "height"):
            if attribute in found.attrib:
                found.set(attribute, _rounded(found.attrib[attribute]))
        if "d" in found.attrib:
            found.set("d", _straight(found.attrib["d"]))
        style = _restyled(found.attrib.pop("style", ""))
        if style in CLASSES:
            found.set("class", CLASSES[style])
        elif style:
            found.set("style", style)
        if found.get("class") == "grid":
            found.attrib.pop("clip-path", None)
        if found.get("transform", "").startswith("rotate(-0 "):
            del found.attrib["transform"]


def _rounded(text: str) -> str:
    """Coordinates to a tenth of a pixel."""
    short = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"\s*([MLCQz])\s*", r"\1", short).strip()


def _straight(path: str) -> str:
    """A path whose level and upright lines are ``H`` and ``V``: they name one number, not two."""
    made, at = [], ("", "")
    for letter, x, y in re.findall(r"([A-Za-z])(?:(-?[\d.]+) (-?[\d.]+))?", path):
        if letter == "z":
            made.append(letter)
        elif letter == "L" and y == at[1]:
            made.append(f"H{x}")
        elif letter == "L" and x == at[0]:
            made.append(f"V{y}")
        else:
            made.append(f"{letter}{x} {y}")
        at = (x, y) if x else at
    straight = "".join(made)
    return straight if set(path) <= set("MLz-. 0123456789") else path


def _restyled(style: str) -> str:
    for colour, name in PROPERTIES.items():
        style = style.replace(colour, f"var(--{name})")
    style = re.sub(r"font-family: [^;]*Mono[^;]*; ", "font-family: var(--mono); ", style)
    style = re.sub(r"font-family: '[^;]*; ", "", style)
    style = re.sub(r"; stroke-line(join|cap): (miter|butt|square)", "", style)
    return style.replace("; ", ";").replace(": ", ":")


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Keep only ids that something points at, and make them the page's own."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        (found.get(_HREF) or "#")[1:] for found in root.iter()
    }
    renamed: dict[str, str] = {}
    for found in root.iter():
        old = found.attrib.pop("id", None)
        if old is not None and old in used:
            renamed[old] = f"{name}-{len(renamed)}"
            found.set("id", renamed[old])
    for found in root.iter():
        if _HREF in found.attrib:
            found.set("href", f"#{renamed[found.attrib.pop(_HREF)[1:]]}")
        for attribute in ("clip-path", "style", "fill"):
            if "url(#" in found.get(attribute, ""):
                found.set(
                    attribute,
                    re.sub(
                        r"url\(#([^)]+)\)",
                        lambda m: f"url(#{renamed[m[1]]})",
                        found.attrib[attribute],
                    ),
                )


def _flatten(parent: ElementTree.Element) -> None:
    """Take out groups that say nothing and shapes that cannot be seen."""
    kept: list[ElementTree.Element] = []
    for child in parent:
        _flatten(child)
        if child.tag == f"{_SVG}g" and not child.attrib:
            kept += list(child)
        elif child.get("style") != "fill:none":  # an invisible background
            kept.append(child)
    parent[:] = kept


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", _SVG[1:-1])
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return re.sub(r">\s+<", "><", text).replace(" />", "/>")

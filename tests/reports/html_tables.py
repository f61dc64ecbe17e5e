"""Reads a page of opkit without a browser: its tables, its tags, its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

Attributes = dict[str, str]


@dataclass
class Table:
    """Rows of cell texts, heading rows included."""

    attributes: Attributes
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)

    @property
    def css(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Reading(HTMLParser):
    """All of a page in one pass; ``td``, ``th`` and ``tr`` may leave out their end tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, Attributes]] = []
        self.tables: list[Table] = []
        self.texts: list[str] = []
        self._open: list[Table] = []
        self._cell: list[str] | None = None
        self._raw = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag in ("style", "script"):
            self._raw = tag
        if tag == "table":
            self.tables.append(Table(attributes))
            self._open.append(self.tables[-1])
        elif tag in ("tr", "td", "th", "tbody", "tfoot"):
            self._end_cell()
            if tag == "tr":
                self._open[-1].rows.append([])
            elif tag in ("td", "th"):
                self._cell = []
        elif tag == "caption":
            self._cell = []
        elif tag in ("br", "dt", "dd", "li", "p"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._raw:
            self._raw = ""
        if tag == "caption":
            self._open[-1].caption = "".join(self._cell or [])
            self._cell = None
        elif tag in ("tr", "td", "th", "table"):
            self._end_cell()
            if tag == "table":
                self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._raw:
            return
        self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def _end_cell(self) -> None:
        if self._cell is not None:
            self._open[-1].rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def of_class(self, name: str) -> list[Table]:
        return [table for table in self.tables if name in table.css]

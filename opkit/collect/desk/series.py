"""How the rows of a table are laid out as curves: which column runs along x, what makes a panel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opkit.collect.desk.point import NAMES
from opkit.collect.tables.validate import Value, is_text

# Columns along which a curve runs, best first: the first that varies is x. A decode row's new
# tokens are always 1, so that its curve runs over the tokens that it has cached.
ALONG = ("message_size", "num_tokens", "m", "isl", "step", "batch_size", "num_gpus")
# What makes a panel of its own: the first of these of which a column varies, else all that vary.
PANELS = (("batch_size",), ("n", "k"), ("distribution",), ("num_gpus",), ("isl",))
# Columns as people call them, and what runs along x.
WORDS = {
    "batch_size": "batch",
    "message_size": "size",
    "num_tokens": "tokens",
    "num_gpus": "GPUs",
    "num_heads": "heads",
    "num_key_value_heads": "KV heads",
    "tp_size": "tp",
}
AXES = {
    "isl": "isl: new tokens of each request",
    "step": "step: cached tokens of each request",
    "m": "m: rows of the product",
    "num_tokens": "tokens of the step",
    "message_size": "message size, elements",
    "batch_size": "requests",
    "num_gpus": "GPUs",
}
SEPARATOR = " · "


@dataclass(frozen=True)
class Layout:
    """Which of a table's columns are what.

    Attributes:
        x: the column along which curves run.
        panel: columns whose values make a panel: one curve.
        groups: the other columns that vary: their values make a group of panels.
        fixed: columns that have one value in the whole table, with it.
    """

    x: str
    panel: tuple[str, ...]
    groups: tuple[str, ...]
    fixed: Mapping[str, Value]

    @property
    def sizes(self) -> tuple[str, ...]:
        """The columns that tell one row from another."""
        return (*self.groups, *self.panel, self.x)

    def group(self, columns: Mapping[str, Value]) -> str:
        """The group of a row, in words; empty where there is only one."""
        return words(self.groups, columns)

    def panel_of(self, columns: Mapping[str, Value]) -> str:
        """The panel of a row, in words; empty where there is only one."""
        return words(self.panel, columns)

    def label(self, columns: Mapping[str, Value]) -> str:
        """The sizes of a row within its group, in words."""
        return words((*self.panel, self.x), columns)

    def place(self, columns: Mapping[str, Value]) -> str:
        """All that tells a row from others, in words."""
        return words(self.sizes, columns)

    def order(self, rows: Iterable[Mapping[str, Value]]) -> list[str]:
        """The groups of rows, in words, in the order of their values."""
        return ordered(self.groups, rows)


def layout_of(rows: Sequence[Mapping[str, Value]]) -> Layout:
    """The layout for the columns of rows; at least one row.

    Columns that not every row has (a case that failed before its build knows its sizes only) decide
    nothing.
    """
    known = [name for name in rows[0] if name not in NAMES and all(name in row for row in rows)]
    values = {name: {row[name] for row in rows} for name in known}
    varying = [name for name in known if len(values[name]) > 1]
    x = next((name for name in ALONG if name in varying), None) or next(
        (name for name in ALONG if name in known), known[0] if known else ""
    )
    rest = [name for name in varying if name != x]
    panel = next(
        (tuple(name for name in made if name in rest) for made in PANELS
         if any(name in rest for name in made)), tuple(rest),
    )  # fmt: skip
    groups = tuple(name for name in rest if name not in panel)
    fixed = {name: next(iter(values[name])) for name in known if name not in varying and name != x}
    return Layout(x, panel, groups, fixed)


def words(names: Sequence[str], columns: Mapping[str, Value]) -> str:
    """Columns with their values as a reader says them: ``heads 128 · step 4,096``."""
    return SEPARATOR.join(
        f"{word(name)} {number(columns[name])}".strip() for name in names if name in columns
    )


def number(value: Value) -> str:
    """A column's value as a reader writes it."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def ordered(names: Sequence[str], rows: Iterable[Mapping[str, Value]]) -> list[str]:
    """What rows are called by ``names``, each once, in the order of their values."""
    found: dict[str, tuple[tuple[bool, Value], ...]] = {}
    for row in rows:
        # Numbers before text: the two do not compare.
        place = tuple((is_text(name), row[name]) for name in names if name in row)
        found.setdefault(words(names, row), place)
    return sorted(found, key=lambda name: found[name])


def word(name: str) -> str:
    """What stands before a column's value; nothing before text that says itself what it is."""
    if is_text(name) and not name.endswith("type"):
        return ""
    return WORDS.get(name, name)

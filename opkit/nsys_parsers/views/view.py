"""A view, and the selection that narrows it: rank, step, module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from opkit.errors import BadInput
from opkit.nsys_parsers.export import first_line, quoted
from opkit.nsys_parsers.reading import PARQUET, utf8
from opkit.nsys_parsers.table import KernelTable, iterate


@dataclass(frozen=True)
class View:
    """An answer.

    Attributes:
        name: what is listed: ``kernels``, ``steps`` …; the JSON schema is ``opkit.trace.NAME/1``.
        sql: one row a listed thing; its columns are the answer's.
        about: what goes with the list: counts of what could not be attributed, warnings.
    """

    name: str
    sql: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> str:
        """Name and version of the JSON form."""
        return f"opkit.trace.{self.name}/1"


@dataclass(frozen=True)
class Selection:
    """Which part of a trace.

    Attributes:
        rank: one rank only.
        step: a step's number, as ``steps`` shows it, or a regular expression of its label.
        module: regular expression of the module path.
        kernels_only: leave out copies and fills.
    """

    rank: int | None = None
    step: str = ""
    module: str = ""
    kernels_only: bool = False

    def __post_init__(self) -> None:
        utf8("the step", self.step)
        utf8("the module", self.module)

    def __str__(self) -> str:
        parts = [
            f"rank {self.rank}" if self.rank is not None else "",
            f"step {self.step}" if self.step else "",
            f"module {self.module}" if self.module else "",
        ]
        return ", ".join(part for part in parts if part) or "all"

    def where(self, table: KernelTable) -> str:
        """SQL condition over ``kernel k``.

        Raises:
            BadInput: no such rank or step, or an expression that is none.
        """
        conditions = ["true"]
        if self.rank is not None:
            known = [rank.rank for rank in table.ranks]
            if self.rank not in known:
                raise BadInput(f"there is no rank {self.rank}; ranks are {_few(known)}")
            conditions.append(f"k.rank = {self.rank}")
        if self.step:
            conditions.append(
                f"(k.file, k.step) IN (SELECT file, id FROM step WHERE {self._step(table)})"
            )
        if self.module:
            matches = regex(table, "path", self.module)
            conditions.append(f"k.path_id IN (SELECT id FROM path WHERE path <> '' AND {matches})")
        if self.kernels_only:
            conditions.append("k.kind = 'kernel'")
        return " AND ".join(conditions)

    def _step(self, table: KernelTable) -> str:
        number = self.step.isascii() and self.step.isdecimal() and len(self.step) < 10
        where = f"number = {self.step}" if number else regex(table, "label", self.step)
        if not table.rows(f"SELECT 1 FROM step WHERE {where} LIMIT 1"):
            count = table.rows("SELECT count(DISTINCT number) FROM step")[0][0]
            raise BadInput(
                f"no step {'has the number' if number else 'has a label like'} {self.step}; "
                f"{f'steps are 0 to {count - 1:,}' if count else 'no step is labelled'}",
                "`opkit trace steps` lists them; `--step-pattern` names ranges that are steps",
            )
        return where


def regex(table: KernelTable, column: str, pattern: str) -> str:
    """SQL that holds where ``column`` matches; RE2 syntax.

    Raises:
        BadInput: the pattern is no regular expression.
    """
    try:
        table.rows("SELECT regexp_matches('', ?)", [pattern])
    except duckdb.Error as error:
        raise BadInput(f"{pattern!r} is no regular expression ({first_line(error)})") from error
    return f"regexp_matches({column}, {literal(pattern)})"


def literal(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def answer(table: KernelTable, view: View) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Columns and rows of a view, streamed."""
    cursor = table.db.execute(view.sql)
    return [column[0] for column in cursor.description], iterate(cursor)


def write_parquet(table: KernelTable, view: View, path: Path) -> None:
    """The view's rows as a parquet file, put in place at once.

    Raises:
        OSError: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        table.db.execute(f"COPY ({view.sql}) TO '{quoted(part)}' ({PARQUET})")
        part.replace(path)
    except duckdb.IOException as error:  # `IO Error: Cannot open file "….part": Permission denied`
        raise OSError(0, first_line(error).rpartition(": ")[2], str(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")

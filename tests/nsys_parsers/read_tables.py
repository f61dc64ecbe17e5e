"""Open made exports as kernel tables and look at what each kernel was given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple, TypeVar

from gpu_export import Export
from made_export import TID

from opkit.nsys_parsers.reading import Options, Reading, Via
from opkit.nsys_parsers.table import KernelTable, open_table

Result = TypeVar("Result")
Rows = list[tuple[Any, ...]]
NO_CACHE = Reading(use_cache=False)


class Given(NamedTuple):
    """What one kernel was given; ``step`` is the label of its step, None without one."""

    path: str = ""
    module: str = ""
    step: str | None = None
    via: Via = Via.NONE
    step_via: Via = Via.NONE


GIVEN = """
SELECT {columns}, p.path, p.module, s.label, k.via, k.step_via
FROM kernel k JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id
LEFT JOIN step s ON s.file = k.file AND s.id = k.step
ORDER BY ALL
"""


def launched(*ranges: tuple[str, int, int | None], at: int = 150, tid: int = TID) -> Export:
    """Ranges of the main thread, and a kernel ``k`` launched at a moment."""
    made = Export()
    for text, start, end in ranges:
        made.range(text, start, end)
    made.launch("k", at, 9_000, tid=tid)
    return made


def opened(
    export: Export, folder: Path, without: Iterable[str] = (), **options: Any
) -> KernelTable:
    """The table of a made export, parsed without a cache; ``options`` are those of ``Options``."""
    path = export.write(folder / "made.sqlite", without)
    return open_table([path], Reading(Options(**options), use_cache=False))


def every(table: KernelTable, columns: str) -> list[tuple[tuple[Any, ...], Given]]:
    """Columns of each kernel (``k``, its name ``n``) and what it was given, ordered."""
    return [
        (row[:-5], Given(row[-5], row[-4], row[-3], Via(row[-2]), Via(row[-1])))
        for row in table.rows(GIVEN.format(columns=columns))
    ]


def given(
    export: Export, folder: Path, without: Iterable[str] = (), **options: Any
) -> dict[str, Given]:
    """What each kernel of a made export was given, by its name; names must differ."""
    with opened(export, folder, without, **options) as table:
        rows = every(table, "n.name")
    found = {name: what for (name,), what in rows}
    assert len(found) == len(rows), "kernels of one name cannot be told apart here"
    return found


def paths(
    export: Export, folder: Path, without: Iterable[str] = (), **options: Any
) -> dict[str, str]:
    """The path of each kernel, by its name."""
    return {name: what.path for name, what in given(export, folder, without, **options).items()}


def rows(path: Path, sql: str, reading: Reading = NO_CACHE) -> Rows:
    """Rows of a query over the table of one file."""
    with open_table([path], reading) as table:
        return table.rows(sql)


def lines_run(call: Callable[[], Result], *modules: ModuleType) -> tuple[int, Result]:
    """How many lines of these modules a call runs: what loops in Python shows, on any machine."""
    files = {module.__file__ for module in modules}
    count = 0

    def line(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def entered(frame: FrameType, _event: str, _arg: object) -> Any:
        return line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        return_value = call()
    finally:
        sys.settrace(before)
    return count, return_value

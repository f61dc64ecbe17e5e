"""How traces are read: what a user may set. Plain data, quick to import."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from opkit.errors import BadInput

# DuckDB's share of memory before it spills to disk; what else a process needs comes on top.
MEMORY_LIMIT = "1GB"
# Version 2 of the format stores differences: half the time and a third of the size of version 1.
PARQUET = "FORMAT parquet, COMPRESSION lz4_raw, PARQUET_VERSION v2"

Tell = Callable[[str, float], None]


class Via(enum.IntEnum):
    """How a kernel's step or module was found."""

    NONE = 0
    THREAD = 1  # a range of the launching thread, open at the launch
    NODE = 2  # a range open when the graph node was created
    TIME = 3  # a range of another thread of the process, open at the launch


class CannotWrite(OSError):
    """A parsed table cannot be written where it was to be: no room, or no right."""


def silent(_what: str, _done: float) -> None:
    """Tell nobody."""


def utf8(what: str, text: str) -> None:
    """Refuse what DuckDB cannot be told.

    Raises:
        BadInput: the text holds bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} {text!r} is no UTF-8", "rename it, or write it anew") from error


@dataclass(frozen=True)
class Options:
    """What changes the table, so that each combination is cached on its own.

    Attributes:
        step_pattern: regular expression (RE2) of ranges that are steps; empty: known engines'.
        other_threads: give unlabelled threads what other threads had open.
    """

    step_pattern: str = ""
    other_threads: bool = True

    def __post_init__(self) -> None:
        utf8("the step pattern", self.step_pattern)


@dataclass(frozen=True)
class Reading:
    """How traces are read.

    Attributes:
        options: what the parsed table depends on.
        memory: DuckDB's limit before it spills to disk.
        use_cache: keep parsed tables beside the exports, and use those that are there.
        families: a user's table of kernel families, read before the built-in one.
        partial: the files need not be all ranks of a run.
        tell: is told what is read, and how much of that file is done, 0 to 1.
    """

    options: Options = field(default_factory=Options)
    memory: str = MEMORY_LIMIT
    use_cache: bool = True
    families: Path | None = None
    partial: bool = False
    tell: Tell = silent

    def told(self, tell: Tell) -> Reading:
        """The same, telling ``tell``."""
        return replace(self, tell=tell)

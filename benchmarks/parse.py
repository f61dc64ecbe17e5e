"""Time and memory of reading big exports: opkit, ``nsys stats`` and plain SQLite side by side.

    python benchmarks/parse.py [--kernels 5000000] [--eager] [--sizes 1,2,5,10]
                               [--memory 256MB,512MB,1GB] [--markdown | --json]

A real serving recording (tests/traces) is replicated in its own schema (``big_export.py``). All
tools read the same file, alternating within a round, the file read once before (page cache warm).
*Cold* means without opkit's cache, which lies beside the export and is removed before each cold
run; *cached* is the same command again, with what its own cold run left.

Wall time is of the whole process, start of the interpreter included: median and range. Memory is
the largest resident set of any one process of the tree (``ru_maxrss`` of ``os.wait4``: the child
and all it waited for), the most of all runs. What a child counts begins with what this program held
when it started it ("floor" in the facts): less than that cannot be seen.

Exit code: 0; 1 when a command of opkit failed or the sums of two tools differ; 2 for bad arguments;
130 when interrupted (all that was made is removed).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from big_export import GRAPH_NODES, KERNEL, NVTX, replicate
from parse_tools import (
    MIB,
    PLAIN,
    ROOT,
    Sums,
    Tool,
    cache_mib,
    drop_cache,
    machine,
    measure,
    nsys_tools,
    opkit_tools,
    plain_tool,
)

from opkit.errors import ToolMissing
from opkit.nsys_parsers.tool import Nsys, find_nsys

RECORDING = ROOT / "tests/traces/h100-process-e2e.sqlite.gz"
MILLION = 1_000_000
HEADINGS = (
    "case", "tool", "wall s", "range (runs)", "peak MiB", "s / M kernels", "nsys stats / this",
    "cache MiB",
)  # fmt: skip
COUNTED = (KERNEL, "CUPTI_ACTIVITY_KIND_RUNTIME", NVTX, GRAPH_NODES)


@dataclass(frozen=True)
class Export:
    """A big export: where it lies, how many kernels it holds, and facts to print."""

    path: Path
    kernels: int
    facts: str


@dataclass(frozen=True)
class Plan:
    """How often, how long and where."""

    repeat: int
    slow_repeat: int
    limit_s: float
    folder: Path
    keep: bool
    scratch: Path


@dataclass
class Row:
    """What was measured of one tool on one export; ``failure`` as in ``parse_tools.Run``."""

    case: str
    tool: str
    command: str
    kernels: int
    against: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    failure: str = ""
    cache_mib: float | None = None  # what a cold run left beside the export
    sums: Sums = field(default_factory=dict)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Section:
    """One table, what it was measured on, and what comparing the sums gave."""

    title: str
    exports: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


# --- measuring ----------------------------------------------------------------------------------


@contextmanager
def exported(mix: str, kernels: int, plan: Plan) -> Iterator[Export]:
    """Make a big export, on disk and in the page cache; remove it (unless kept) and its cache."""
    path = plan.folder / f"{mix}-{kernels}.sqlite"
    began = time.perf_counter()
    try:
        made = replicate(RECORDING, path, kernels, eager=mix == "eager")
        with path.open("rb") as file:
            os.fsync(file.fileno())  # its writing must not go on while others are timed
            while file.read(MIB):
                pass
        say(f"{path.name}: made in {time.perf_counter() - began:.1f} s")
        with closing(sqlite3.connect(path)) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            rows = ", ".join(
                f"{db.execute(f'SELECT count(*) FROM {t}').fetchone()[0]:,} {t}"
                for t in COUNTED if t in names
            )  # fmt: skip
        yield Export(path, made, f"{mix}: {path.stat().st_size / MIB:,.0f} MiB; rows: {rows}")
    finally:
        drop_cache(path)
        if not plan.keep:
            path.unlink(missing_ok=True)


def run_rounds(tools: list[Tool], export: Export, case: str, plan: Plan) -> list[Row]:
    """All tools in turn, ``plan.repeat`` times; a tool that failed is not tried again."""
    rows = [Row(case, t.name, shlex.join(t.command), export.kernels, t.against) for t in tools]
    for turn in range(plan.repeat):
        for tool, row in zip(tools, rows, strict=True):
            if row.failure or (tool.slow and turn >= plan.slow_repeat):
                continue
            if tool.cold:
                drop_cache(export.path)
            run = measure(tool.command, plan.scratch, plan.limit_s)
            row.peak_mib = max(row.peak_mib, run.peak_mib)
            row.failure = run.failure or _read(tool, run.printed, row)
            if not row.failure:
                row.seconds.append(run.seconds)
            if tool.cold:
                row.cache_mib = cache_mib(export.path)
            took = f"{run.seconds:.2f} s, {run.peak_mib:,.0f} MiB"
            say(f"{case}: round {turn + 1}: {tool.name}: {row.failure or took}")
    return rows


def _read(tool: Tool, printed: Path, row: Row) -> str:
    """Take the sums from what was printed; says what is wrong with it."""
    try:
        if tool.printed(printed) == 0:
            return "ended with 0, but printed no rows"
        if tool.sums is not None:
            row.sums = tool.sums(printed)
            return "" if row.sums else "printed no kernels"
    except (ValueError, KeyError, TypeError) as error:
        return f"printed something unexpected ({type(error).__name__}: {error})"
    return ""


def side_by_side(
    mix: str, kernels: int, nsys: Nsys | None, memory: list[str], plan: Plan
) -> list[Section]:
    """All tools on one export; and on the same one opkit under several memory limits."""
    sections = []
    with exported(mix, kernels, plan) as export:
        of_nsys = nsys_tools(export.path, nsys) if nsys else []
        summary, summary_again, full, full_again = opkit_tools(export.path)
        tools = [
            summary, *of_nsys[:1], plain_tool(export.path), summary_again,
            full, *of_nsys[1:2], full_again, *of_nsys[2:],
        ]  # fmt: skip
        title = f"{export.kernels:,} kernels, {mix} mix"
        section = Section(title, [export.facts], run_rounds(tools, export, mix, plan))
        sections.append(section)
        if memory:
            limited = Section(f"{title}, by memory limit", [export.facts])
            limited.rows += run_rounds([plain_tool(export.path)], export, "no limit", plan)
            for limit in memory:
                tools = opkit_tools(export.path, cached=False, memory=limit)
                limited.rows += run_rounds(tools, export, f"--memory {limit}", plan)
            sections.append(limited)
    return sections


def by_size(millions: list[float], plan: Plan) -> Section:
    """opkit against rows, with plain SQLite for its sums."""
    section = Section("by size, serving mix")
    for size in millions:
        with exported("serving", round(size * MILLION), plan) as export:
            section.exports.append(export.facts)
            tools = [*opkit_tools(export.path), plain_tool(export.path)]
            section.rows += run_rounds(tools, export, f"{export.kernels / MILLION:.2f} M", plan)
    return section


def compare(section: Section) -> None:
    """Hold all sums over one export against nsys' (else plain SQLite's): calls, total, min, max."""
    for kernels in dict.fromkeys(row.kernels for row in section.rows):
        rows = [row for row in section.rows if row.sums and row.kernels == kernels]
        rows.sort(key=lambda row: (not row.tool.startswith("nsys"), row.tool != PLAIN))
        for row in rows[1:]:
            first = rows[0]
            label = f"{row.tool} ({row.case})"
            wrong = [
                f"{label} has {row.sums.get(name)}, {first.tool} {first.sums.get(name)}: {name}"
                for name in first.sums | row.sums
                if row.sums.get(name) != first.sums.get(name)
            ]
            section.differences += wrong
            if not wrong:
                section.equal.append(f"{label} = {first.tool}: {len(row.sums)} names")


# --- saying it ----------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ratio(row: Row, section: Section) -> str:
    """How many times as long the ``nsys stats`` report took that this row is held against."""
    other = next((o for o in section.rows if row.against and o.tool == row.against), None)
    if other is None or row.median_s is None:
        return ""
    if other.failure.startswith("over"):
        return f">{float(other.failure.split()[1]) / row.median_s:.1f}×"
    return f"{other.median_s / row.median_s:.1f}×" if other.median_s is not None else ""


def cells(row: Row, section: Section) -> list[str]:
    wall, spread, rate = row.failure if row.failure.startswith("over") else "failed", "", ""
    if row.median_s is not None:
        wall, rate = f"{row.median_s:.2f}", f"{row.median_s / row.kernels * MILLION:.3f}"
        spread = f"{min(row.seconds):.2f}–{max(row.seconds):.2f} ({len(row.seconds)})"
    cache = "" if row.cache_mib is None else f"{row.cache_mib:,.0f}"
    memory = f"{row.peak_mib:,.0f}"
    return [row.case, row.tool, wall, spread, memory, rate, ratio(row, section), cache]


def show(section: Section, markdown: bool) -> None:
    """Print the table and, below it, what it was measured on and what failed."""
    from rich import box  # only now: what this program holds is what every child begins with
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    shown: list[int] = []
    rows = [cells(row, section) for row in section.rows]
    for number, heading in enumerate(HEADINGS):
        said = {row[number] for row in rows}
        if said != {""} and (number > 0 or len(said) > 1):  # the title names the only case
            table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
            shown.append(number)
    for row in rows:
        table.add_row(*[row[number] for number in shown])
    print(f"{'### ' * markdown}{section.title}\n")
    Console(width=200, no_color=True).print(table)
    failed = [f"{r.tool} ({r.case}): {r.failure}\n  {r.command}" for r in section.rows if r.failure]
    sums = section.differences[:20] or section.equal or ["nothing to compare"]
    if section.differences:
        sums.append(f"{len(section.differences)} differences in all")
    for line in [*section.exports, *failed, *(f"sums: {line}" for line in sums)]:
        print(f"- {line}")
    print()


def as_json(section: Section) -> dict[str, object]:
    rows = [asdict(row) | {"median_s": row.median_s} for row in section.rows]
    for row, measured in zip(rows, section.rows, strict=True):
        row["names"] = len(row.pop("sums"))
        row["nsys_stats_takes"] = ratio(measured, section)
    return asdict(section) | {"rows": rows}


# --- the command --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--kernels", type=int, default=5 * MILLION, help="of the side-by-side table")
    add("--eager", action="store_true", help="also the mix without graphs (slow)")
    add("--sizes", type=numbers, default=[], metavar="M,…", help="opkit at so many million kernels")
    add("--memory", type=words, default=[], metavar="SIZE,…", help="opkit under such limits")
    add("--repeat", type=positive, default=3, help="rounds")
    add("--slow-repeat", type=positive, default=1, help="rounds with nsys' NVTX reports")
    add("--timeout", type=float, default=600.0, metavar="S", help="for each command")
    add("--no-nsys", action="store_true", help="leave nsys stats out")
    add("--folder", type=Path, help="keep the exports here instead of a folder that is removed")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true")
    form.add_argument("--json", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    given = arguments()
    signal.signal(signal.SIGTERM, interrupt)
    nsys = None
    try:
        nsys = None if given.no_nsys else find_nsys()
    except ToolMissing as error:
        say(f"without nsys stats: {error}")
    facts = machine(nsys)
    sections = []
    with tempfile.TemporaryDirectory(prefix="opkit-parse-") as scratch:
        folder = given.folder.absolute() if given.folder else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            given.repeat, given.slow_repeat, given.timeout, folder,
            keep=given.folder is not None, scratch=Path(scratch),
        )  # fmt: skip
        sections += side_by_side("serving", given.kernels, nsys, given.memory, plan)
        if given.eager:
            sections += side_by_side("eager", given.kernels, nsys, [], plan)
        if given.sizes:
            sections.append(by_size(given.sizes, plan))
    for section in sections:
        compare(section)
    facts["floor"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    if given.json:
        document = {"schema": "opkit.benchmark.parse/1", "machine": facts}
        json.dump(document | {"sections": [as_json(s) for s in sections]}, sys.stdout, indent=1)
        print()
    else:
        for section in sections:
            show(section, given.markdown)
        print("; ".join(f"{name}: {fact}" for name, fact in facts.items()))
    failed = any(row.failure for s in sections for row in s.rows if row.tool.startswith("opkit"))
    return 1 if failed or any(section.differences for section in sections) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; all that was started and made is gone")
        sys.exit(130)
    except (OSError, sqlite3.Error) as error:  # a full disk, a folder that may not be written
        sys.exit(f"{error}")

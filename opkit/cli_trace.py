"""The commands that read traces: options in, one call, a report out, an exit code."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import duckdb
from rich.console import Console

from opkit.cli_output import PathType, show, show_parts, shown
from opkit.errors import EXIT_FAIL, EXIT_PASS, BadInput
from opkit.nsys_parsers.export import first_line
from opkit.nsys_parsers.reading import MEMORY_LIMIT, Options, Reading
from opkit.nsys_parsers.table import KernelTable, open_table
from opkit.nsys_parsers.views.diff import diff
from opkit.nsys_parsers.views.kernels import LEVELS, kernels_view, quick
from opkit.nsys_parsers.views.modules import modules_view
from opkit.nsys_parsers.views.sequence import sequence_view
from opkit.nsys_parsers.views.steps import steps_view
from opkit.nsys_parsers.views.summary import summary
from opkit.nsys_parsers.views.view import Selection, View, answer, write_parquet
from opkit.reports import trace as reports
from opkit.reports.parse_bar import ParseBar

Command = Callable[..., Any]
Row = dict[str, Any]
Draw = Callable[[Sequence[Row], Row, int, Console], None]
SHOWN = 40  # rows on a terminal


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


files = click.argument("files", nargs=-1, required=True, metavar="FILE…", type=PathType)
reading = _options(
    click.option("--memory", default=MEMORY_LIMIT, show_default=True, metavar="SIZE",
                 help="DuckDB's memory; beyond it, it spills to disk."),
    click.option("--no-cache", is_flag=True,
                 help="Neither use nor keep a parsed table in FILE.opkit/."),
    click.option("--families", type=PathType,
                 help="TOML file of kernel families, read before the built-in one."),
    click.option("--step-pattern", default="", metavar="REGEX",
                 help="Ranges that are forward steps, instead of the labels of known engines."),
    click.option("--same-thread", is_flag=True,
                 help="Do not give threads without ranges what other threads had open."),
    click.option("--partial", is_flag=True, help="The files need not be all ranks of the run."),
)  # fmt: skip
selection = _options(
    click.option("--rank", type=click.IntRange(min=0), help="This rank only."),
    click.option("--step", default="", metavar="N|REGEX",
                 help="A step's number, or steps whose label matches."),
    click.option("--module", default="", metavar="REGEX", help="Modules whose path matches."),
)  # fmt: skip
output = _options(
    click.option("--top", type=click.IntRange(min=0), default=None,
                 help=f"Rows to print; 0: all. Default: {SHOWN} in the report, all elsewhere."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("--csv", "as_csv", is_flag=True, help="Print rows as CSV."),
    click.option("--parquet", type=PathType, metavar="PATH", help="Also write all rows there."),
    click.option("--perfetto", type=PathType, metavar="PATH",
                 help="Also write a trace of the selected kernels for ui.perfetto.dev."),
)  # fmt: skip


def _reading(given: Row) -> Reading:
    """The reading options, taken out of ``given``."""
    options = Options(given.pop("step_pattern"), not given.pop("same_thread"))
    return Reading(
        options, given.pop("memory"), not given.pop("no_cache"), given.pop("families"),
        given.pop("partial"),
    )  # fmt: skip


@contextmanager
def _opened(paths: Sequence[Path], how: Reading) -> Iterator[KernelTable]:
    """The table; reading it shows a bar, using it does not."""
    with ParseBar() as bar:
        table = open_table(paths, how.told(bar))
    with table:
        try:
            yield table
        except duckdb.OutOfMemoryException as error:
            raise BadInput(
                f"{paths[0]}: the question needs more than {how.memory} of memory",
                "give more by --memory, or ask about less by --step, --module or --rank",
            ) from error
        except duckdb.Error as error:
            # Rows were typed and checked when they were parsed, so what is left is their file.
            raise BadInput(
                f"{paths[0]}: the parsed table cannot be read ({first_line(error)})",
                f"remove {paths[0]}.opkit, or read without it by --no-cache",
            ) from error


@click.group()
def trace() -> None:
    """Read traces: what ran, in which step and module; or make one that may be shared."""


@trace.command("summary")
@files
@reading
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--perfetto", type=PathType, metavar="PATH",
              help="Also write a trace for ui.perfetto.dev.")  # fmt: skip
def trace_summary(
    files: tuple[Path, ...], as_json: bool, perfetto: Path | None, **given: Any
) -> None:
    """What is in the trace, and how much of it is attributed. Several FILEs: ranks of one run."""
    with _opened(files, _reading(given)) as table:
        found = summary(table)
        _write(table, Selection(), None, None, perfetto)
    if as_json:
        data = {"schema": "opkit.trace.summary/1", **asdict(found)}
        show(json.dumps(data, indent=1, default=_plain) + "\n")
    else:
        show(shown(lambda console: reports.print_summary(found, console)))


@trace.command("kernels")
@files
@click.option(
    "--by",
    "level",
    type=click.Choice(LEVELS),
    default=LEVELS[0],
    show_default=True,
    help="Names to group by.",
)
@click.option("--copies", is_flag=True, help="Copies and fills, too.")
@selection
@output
@reading
def trace_kernels(
    files: tuple[Path, ...],
    level: str,
    copies: bool,
    rank: int | None,
    step: str,
    module: str,
    **given: Any,
) -> None:
    """Kernels by name, longest total first: the columns of nsys' cuda_gpu_kern_sum and more."""
    how, chosen = _reading(given), Selection(rank, step, module)
    plain = chosen == Selection() and level == LEVELS[0] and not copies and how.families is None
    wants_table = given["parquet"] is not None or given["perfetto"] is not None
    if plain and len(files) == 1 and not wants_table:
        with ParseBar() as bar:
            bar(f"{files[0].name}: kernels", 0.3)
            found = quick(files[0], how)
        _print("kernels", found.columns, found.rows, found.about, reports.print_kernels, **given)
        return
    with _opened(files, how) as table:
        view = kernels_view(table, chosen, level, copies)
        _answer(table, chosen, view, partial(reports.print_kernels, level=level), **given)


@trace.command("steps")
@files
@click.option("--per-rank", is_flag=True, help="A row a rank, also where ranks step together.")
@click.option(
    "--gap-us",
    type=click.FloatRange(min=0),
    metavar="US",
    help="Steps are what runs between pauses of at least so many µs.",
)
@selection
@output
@reading
def trace_steps(
    files: tuple[Path, ...],
    per_rank: bool,
    gap_us: float | None,
    rank: int | None,
    step: str,
    module: str,
    **given: Any,
) -> None:
    """Forward steps with requests and tokens, and the GPU's time on each."""
    chosen = Selection(rank, step, module)
    with _opened(files, _reading(given)) as table:
        view = steps_view(table, chosen, per_rank, gap_us)
        _answer(table, chosen, view, reports.print_steps, **given)


@trace.command("modules")
@files
@click.option("--fold", is_flag=True, help="Count layers.0, layers.1 … as layers.*")
@click.option("--depth", type=click.IntRange(min=1), help="Only paths of so many parts or fewer.")
@selection
@output
@reading
def trace_modules(
    files: tuple[Path, ...],
    fold: bool,
    depth: int | None,
    rank: int | None,
    step: str,
    module: str,
    **given: Any,
) -> None:
    """GPU time by module path, of the module alone and with all below it."""
    chosen = Selection(rank, step, module)
    with _opened(files, _reading(given)) as table:
        view = modules_view(table, chosen, fold, depth)
        _answer(table, chosen, view, reports.print_modules, **given)


@trace.command("sequence")
@files
@click.option(
    "--all", "everything", is_flag=True, help="All that is selected, not the first region only."
)
@selection
@output
@reading
def trace_sequence(
    files: tuple[Path, ...],
    everything: bool,
    rank: int | None,
    step: str,
    module: str,
    **given: Any,
) -> None:
    """What one region launched, in capture order. With --all: the whole table."""
    chosen = Selection(rank, step, module)
    with _opened(files, _reading(given)) as table:
        view = sequence_view(table, chosen, everything)
        _answer(table, chosen, view, reports.print_sequence, **given)


@trace.command("diff")
@click.argument("a", type=PathType)
@click.argument("b", type=PathType)
@_options(
    *(
        click.option(
            f"--{what}-{side}",
            default=None,
            metavar=metavar,
            type=kind,
            help=f"{text} of {side.upper()} only.",
        )
        for what, metavar, kind, text in (
            ("rank", "N", click.IntRange(min=0), "A rank"),
            ("step", "N|REGEX", str, "Steps"),
            ("module", "REGEX", str, "Modules"),
        )
        for side in "ab"
    )
)
@selection
@click.option("--all", "everything", is_flag=True, help="Show what is equal, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reading
def trace_diff(
    a: Path,
    b: Path,
    rank: int | None,
    step: str,
    module: str,
    everything: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Compare what two traces, or two regions, launch.

    Exit code: 0 the same kernels equally often, 1 not; others: nothing was compared.
    """
    how = _reading(given)
    of_a, of_b = (
        Selection(
            given[f"rank_{side}"] if given[f"rank_{side}"] is not None else rank,
            given[f"step_{side}"] or step,
            given[f"module_{side}"] or module,
        )
        for side in "ab"
    )
    with _opened([a], how) as left, _opened([b], how) as right:
        found = diff(left, right, of_a, of_b)
    names = (f"{a}  {of_a}", f"{b}  {of_b}")
    if as_json:
        data = {
            "schema": "opkit.trace.diff/1",
            "a": names[0],
            "b": names[1],
            "equal": found.equal,
            "same_order": found.same_order,
            "losses": found.losses,
            "kernels": [asdict(row) | {"equal": row.equal} for row in found.rows],
        }
        show(json.dumps(data, indent=1) + "\n")
    else:
        show(shown(lambda console: reports.print_diff(found, names, everything, console)))
    return EXIT_PASS if found.equal else EXIT_FAIL


@trace.command("slim")
@click.argument("source", metavar="IN", type=PathType)
@click.argument("target", metavar="OUT", type=PathType)
@click.option("--modules", help="Keep only module ranges whose path matches this expression.")
@click.option("--steps", type=int, help="Keep the first N steps of each label.")
@click.option("--iterations", type=int, help="Keep the first N iterations of each mock case.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def trace_slim(
    source: Path,
    target: Path,
    modules: str | None,
    steps: int | None,
    iterations: int | None,
    as_json: bool,
) -> None:
    """Copy what alignment needs of IN to OUT (.sqlite or .sqlite.gz); drop and scrub the rest."""
    from opkit.nsys_parsers.keep import Keep
    from opkit.nsys_parsers.slim import slim

    report = slim(source, target, keep=Keep(modules=modules, steps=steps, iterations=iterations))
    if as_json:
        data = {"schema": "opkit.trace.slim/1", "target": str(target), **asdict(report)}
        show(json.dumps(data, indent=1) + "\n")
        return
    kept = sum(after for _, after in report.rows.values())
    show(
        f"{target}: {report.target_bytes:,} bytes of {report.source_bytes:,}; {kept:,} rows in "
        f"{len(report.rows)} tables kept, {len(report.dropped)} tables dropped, "
        f"{sum(report.scrubbed.values())} private values scrubbed\n"
    )


def _answer(
    table: KernelTable,
    chosen: Selection,
    view: View,
    draw: Draw,
    parquet: Path | None,
    perfetto: Path | None,
    **given: Any,
) -> None:
    """Write what was asked for, then print the view."""
    _write(table, chosen, view, parquet, perfetto)
    columns, rows = answer(table, view)
    _print(view.name, columns, rows, view.about, draw, **given)


def _write(
    table: KernelTable,
    chosen: Selection,
    view: View | None,
    parquet: Path | None,
    perfetto: Path | None,
) -> None:
    for path in (parquet, perfetto):
        if path is not None and (path.is_dir() or not path.name):
            raise BadInput(f"{path}: is a folder, not a file to write")
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"{path}: no such folder as {path.parent}")
    if parquet is not None and view is not None:
        write_parquet(table, view, parquet)
    if perfetto is not None:
        from opkit.nsys_parsers.views.perfetto import write_perfetto

        write_perfetto(table, chosen, perfetto)


def _print(
    name: str,
    columns: Sequence[str],
    rows: Iterable[tuple[Any, ...]],
    about: Row,
    draw: Draw,
    top: int | None,
    as_json: bool,
    as_csv: bool,
    **_files: Any,
) -> None:
    """Rows as JSON, CSV or a report."""
    if as_json or as_csv:
        kept = itertools.islice(rows, top) if top else rows
        show_parts(_json(name, columns, kept, about) if as_json else _csv(columns, kept))
        return
    limit, rows = SHOWN if top is None else top, iter(rows)
    listed = [dict(zip(columns, row, strict=True)) for row in itertools.islice(rows, limit or None)]
    more = sum(1 for _ in rows) if limit else 0
    show(shown(lambda console: draw(listed, about, more, console)))


def _json(
    name: str, columns: Sequence[str], rows: Iterable[tuple[Any, ...]], about: Row
) -> Iterator[str]:
    """One object, a row a line, as it is read."""
    yield f'{{"schema": "opkit.trace.{name}/1",\n"{name}": ['
    for number, row in enumerate(rows):
        yield (",\n" if number else "\n") + json.dumps(dict(zip(columns, row, strict=True)))
    rest = json.dumps(about)[1:-1]
    yield f"\n]{', ' if rest else ''}{rest}}}\n"


def _csv(columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    for row in itertools.chain([columns], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        yield line.getvalue()


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else str(value)

"""`opkit report`: show again what was stored, as text, HTML, Markdown or JSON, and compare two."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from opkit.cli_output import PathType, show, shown, write_file
from opkit.errors import EXIT_FAIL, EXIT_PASS, WrongUsage
from opkit.reports.progress import Progress
from opkit.reports.stored import (
    Stored,
    StoredAlignment,
    StoredBench,
    StoredCollection,
    find_stored,
)


@click.command()
@click.argument("asked", metavar="[ID]", default="")
@click.option(
    "--html",
    type=PathType,
    metavar="FILE",
    help="Write one page that opens offline, also of --compare; - is stdout.",
)
@click.option("--markdown", is_flag=True, help="Print Markdown, as a pull request takes it.")
@click.option("--json", "as_json", is_flag=True, help="Print the stored result as one JSON object.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="What differs from A to B: two alignments, or two collections, of one op.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="With --compare of alignments: share by which a kernel's time may differ (0.15), a whole "
    "shape's by half of it.",
)
@click.option(
    "--shipped",
    type=PathType,
    multiple=True,
    metavar="FILE",
    help="A perf table to hold a collection's rows against; once a table.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--verbose", "-v", is_flag=True, help="Show the kernel table of every case.")
def report(
    asked: str,
    html: Path | None,
    markdown: bool,
    as_json: bool,
    compare: tuple[str, str] | None,
    tolerance: float | None,
    shipped: tuple[Path, ...],
    force: bool,
    out: Path,
    verbose: bool,
) -> int:
    """Show a stored result again: the newest verdict, or ID.

    ID is an id that `opkit status` shows or its last letters, an op, a run's folder, a file of
    `opkit align --json`, or a collection (dsa-vllm, or its folder).

    Exit code: 0 shown; with --compare 0 nothing differs, 1 a verdict, shape, kernel or time does.
    """
    _check(asked, html, markdown, as_json, compare, tolerance, shipped)
    form = "markdown" if markdown else "json" if as_json else "terminal"
    if compare:
        left, right = (find_stored(name, out) for name in compare)
        page = Page(html, force) if html is not None else None
        return _compare(left, right, page or form, tolerance, verbose)
    found = find_stored(asked, out)
    if shipped and not isinstance(found, StoredCollection):
        raise WrongUsage(f"--shipped is for collections, and {found.name} is {_kind(found)}")
    if html is not None:
        _write_html(found, html, shipped, force)
    elif isinstance(found, StoredAlignment):
        show(_alignment(found, form, verbose))
    elif isinstance(found, StoredBench):
        show(_bench(found, form))
    else:
        show(_collection(found, form, shipped, verbose))
    return EXIT_PASS


def _check(
    asked: str,
    html: Path | None,
    markdown: bool,
    as_json: bool,
    compare: tuple[str, str] | None,
    tolerance: float | None,
    shipped: tuple[Path, ...],
) -> None:
    if sum((html is not None, markdown, as_json)) > 1:
        raise WrongUsage("--html, --markdown and --json exclude each other")
    if compare and asked:
        raise WrongUsage(f"--compare takes A and B, and nothing beside them: {asked!r}")
    if compare and shipped:
        raise WrongUsage(
            "--compare takes no --shipped table",
            "`opkit report COLLECTION --shipped FILE` shows it",
        )
    if tolerance is not None and not compare:
        raise WrongUsage("--tolerance is for --compare")
    if tolerance is not None and not math.isfinite(tolerance):
        raise WrongUsage(f"--tolerance is a share, as 0.15, and not {tolerance}")


def _alignment(found: StoredAlignment, form: str, verbose: bool) -> str:
    if form == "json":
        from opkit.align.result_json import align_json

        return _dump(align_json(found.result))
    if form == "markdown":
        from opkit.reports.markdown import align_markdown

        return align_markdown(found.result)
    from opkit.reports.terminal import print_align

    return shown(lambda console: print_align(found.result, console, verbose=verbose))


def _collection(
    found: StoredCollection, form: str, shipped: tuple[Path, ...], verbose: bool
) -> str:
    from opkit.collect.desk.desk import desk_of
    from opkit.collect.desk.read import read_collection

    desk = desk_of(read_collection(found.folder), shipped)
    if form == "json":
        from opkit.collect.desk.desk_json import desk_json

        return _dump(desk_json(desk))
    if form == "markdown":
        from opkit.reports.desk import desk_markdown

        return desk_markdown(desk)
    from opkit.reports.desk import print_desk

    return shown(lambda console: print_desk(desk, console, verbose=verbose))


def _bench(found: StoredBench, form: str) -> str:
    """Its table is Markdown already."""
    from opkit.reports.bench import render_bench

    return render_bench(found.bench, "json" if form == "json" else "md")


def _write_html(found: Stored, html: Path, shipped: tuple[Path, ...], force: bool) -> None:
    """Write the page; into a folder, under the stored result's name."""
    if isinstance(found, StoredBench):
        raise WrongUsage(
            f"{found.name} is a benchmark, which has no page", "--markdown and --json show it"
        )
    path = html / f"{found.name}.html" if html.is_dir() else html
    if isinstance(found, StoredAlignment):
        from opkit.reports.html.align import align_page

        page = align_page(found.result, name=found.id, folder=found.folder)
        write_file(path, page, force=force)
        return
    from opkit.collect.desk.desk import desk_of
    from opkit.collect.desk.read import read_collection
    from opkit.reports.html.collection import collection_page

    with Progress() as say:  # its charts take seconds
        say(f"drawing the page of {found.name}")
        page = collection_page(desk_of(read_collection(found.folder), shipped))
    write_file(path, page, force=force)


@dataclass(frozen=True)
class Page:
    """A form of a comparison: a file, and whether it may be overwritten."""

    path: Path
    force: bool

    def write(self, left: Stored, right: Stored, text: str) -> None:
        """Write the page; into a folder, under both names."""
        name = f"{left.name}-{right.name}.html"
        path = self.path / name if self.path.is_dir() else self.path
        write_file(path, text, force=self.force)


def _compare(
    left: Stored, right: Stored, form: str | Page, tolerance: float | None, verbose: bool
) -> int:
    if isinstance(left, StoredAlignment) and isinstance(right, StoredAlignment):
        return _compare_alignments(left, right, form, tolerance, verbose)
    if isinstance(left, StoredCollection) and isinstance(right, StoredCollection):
        if tolerance is not None:
            raise WrongUsage("--tolerance is for alignments: rows hold their own intervals")
        return _compare_collections(left, right, form, verbose)
    raise WrongUsage(
        f"{left.name} is {_kind(left)} and {right.name} is {_kind(right)}",
        "--compare takes two alignments or two collections of one op",
    )


def _kind(found: Stored) -> str:
    kinds = {StoredAlignment: "an alignment", StoredCollection: "a collection"}
    return kinds.get(type(found), "a benchmark")


def _compare_alignments(
    left: StoredAlignment,
    right: StoredAlignment,
    form: str | Page,
    tolerance: float | None,
    verbose: bool,
) -> int:
    from opkit.align.compare import KERNEL, compare_alignments
    from opkit.align.comparison import comparison_json
    from opkit.reports.compare import comparison_markdown, print_comparison

    limit = KERNEL if tolerance is None else tolerance
    found = compare_alignments(left.result, right.result, (left.name, right.name), limit)
    if isinstance(form, Page):
        from opkit.reports.html.compare import compare_page

        form.write(left, right, compare_page(found))
    elif form == "json":
        show(_dump(comparison_json(found)))
    elif form == "markdown":
        show(comparison_markdown(found))
    else:
        show(shown(lambda console: print_comparison(found, console, verbose=verbose)))
    return EXIT_FAIL if found.differs else EXIT_PASS


def _compare_collections(
    left: StoredCollection, right: StoredCollection, form: str | Page, verbose: bool
) -> int:
    from opkit.collect.compare import compare_collections
    from opkit.collect.desk.read import read_collection
    from opkit.reports.compare_rows import print_rows, rows_markdown

    found = compare_collections(read_collection(left.folder), read_collection(right.folder))
    if isinstance(form, Page):
        from opkit.reports.html.compare_rows import compare_rows_page

        with Progress() as say:
            say(f"drawing the page of {left.name} and {right.name}")
            page = compare_rows_page(found)
        form.write(left, right, page)
    elif form == "json":
        show(_dump(found.to_json()))
    elif form == "markdown":
        show(rows_markdown(found))
    else:
        show(shown(lambda console: print_rows(found, console, verbose=verbose)))
    return EXIT_FAIL if found.differs else EXIT_PASS


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"

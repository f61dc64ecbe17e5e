"""The commands that read traces: options in, one call, a report out, an exit code."""

from __future__ import annotations

from pathlib import Path

import click

from opkit.cli_output import PathType, show
from opkit.nsys_parsers.keep import Keep
from opkit.nsys_parsers.slim import slim


@click.group()
def trace() -> None:
    """Make recordings that one may share."""


@trace.command("slim")
@click.argument("source", metavar="IN", type=PathType)
@click.argument("target", metavar="OUT", type=PathType)
@click.option("--modules", help="Keep only module ranges whose path matches this expression.")
@click.option("--steps", type=int, help="Keep the first N steps of each label.")
@click.option("--iterations", type=int, help="Keep the first N iterations of each mock case.")
def trace_slim(
    source: Path, target: Path, modules: str | None, steps: int | None, iterations: int | None
) -> None:
    """Copy what alignment needs of IN to OUT (.sqlite or .sqlite.gz); drop and scrub the rest."""
    report = slim(source, target, keep=Keep(modules=modules, steps=steps, iterations=iterations))
    kept = sum(after for _, after in report.rows.values())
    show(
        f"{target}: {report.target_bytes:,} bytes of {report.source_bytes:,}; {kept:,} rows in "
        f"{len(report.rows)} tables kept, {len(report.dropped)} tables dropped, "
        f"{sum(report.scrubbed.values())} private values scrubbed\n"
    )

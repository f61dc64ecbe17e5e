"""The commands of alignment: options in, one call, a report out, an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from opkit.align import options as asked
from opkit.align.ledger import Ledger
from opkit.align.profile.command_line import read_command
from opkit.align.profile.e2e import Collect, Mode
from opkit.align.result import Outcome
from opkit.align.result_json import align_json
from opkit.align.run import LiveRequest
from opkit.cli_doctor import look_before_run
from opkit.cli_output import PathType, show, shown
from opkit.collect.record import find_records
from opkit.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS
from opkit.layers.op import Phase
from opkit.layers.plan import INPUTS
from opkit.layers.registry import find_op
from opkit.reports.collecting import print_collections
from opkit.reports.progress import Progress
from opkit.reports.terminal import print_align, print_status

EXIT_CODES = {
    Outcome.PASS: EXIT_PASS,
    Outcome.FAIL: EXIT_FAIL,
    Outcome.INCONCLUSIVE: EXIT_INCONCLUSIVE,
}

Seconds = click.FloatRange(min=0)


@click.command()
@click.argument("op")
@click.option("--recorded", is_flag=True, help="Judge the bundled H100 recording.")
@click.option(
    "--mock-trace", type=PathType, help="The mock's trace (.sqlite, .sqlite.gz, .nsys-rep)."
)
@click.option("--e2e-trace", type=PathType, multiple=True, help="The engine's trace; one per rank.")
@click.option("--strict-trace", type=PathType, help="Trace of the mock's strict variant.")
@click.option("--backend", default="", help="Engine whose classes build the mock (vllm, …).")
@click.option("--model", type=PathType, help="Folder with the model's config.json.")
@click.option("--e2e-cmd", default="", help="The real serving command, quoted.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    help="How the engine is profiled; default: server for a known serving command, else program.",
)
@click.option(
    "--window",
    type=click.Choice([collect.value for collect in Collect]),
    default=Collect.WAVES.value,
    show_default=True,
    help="Record the requests only, or from the process's start (graph nodes then carry modules).",
)
@click.option("--requests", multiple=True, metavar="NxP+O", help="Requests to send, as 4x1024+12.")
@click.option(
    "--phase",
    "phases",
    multiple=True,
    type=click.Choice([phase.value for phase in Phase]),
    help="Judge this phase only.",
)
@click.option("--policy", type=PathType, help="TOML file that changes thresholds.")
@click.option(
    "--strict", is_flag=True, help="Also judge the engine's own decoder layer, within 1 %."
)
@click.option(
    "--regions",
    type=click.Choice(list(asked.METHODS)),
    default="auto",
    show_default=True,
    help="How to find regions in trace files; nvtx: by module ranges only.",
)
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Measured iterations of a mock case.",
)
@click.option(
    "--inputs",
    type=click.Choice(INPUTS),
    default=INPUTS[0],
    show_default=True,
    help="The mock's activations: prompts through the engine's own layers before the op; normal "
    "values; or the engine's own, captured in a run of their own. zeros, rows: degenerate.",
)
@click.option("--captured", type=PathType, help="Captured inputs to use instead of a new run.")
@click.option(
    "--layer", type=click.IntRange(min=0), default=0, show_default=True, help="Layer to capture."
)
@click.option("--python", default=sys.executable, help="Interpreter that has the framework.")
@click.option("--engine", default="", help="What the command serves, when it is not recognised.")
@click.option("--url", default="", help="Where the server listens, when the command does not say.")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks, for --mode per-rank.")
@click.option(
    "--delay",
    type=Seconds,
    default=300,
    show_default=True,
    help="Seconds before system-wide recording.",
)
@click.option(
    "--duration",
    type=Seconds,
    default=60,
    show_default=True,
    help="Seconds of system-wide recording.",
)
@click.option(
    "--ready-limit",
    type=Seconds,
    default=900,
    show_default=True,
    help="Seconds to wait for the server's health.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the prompts.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--no-doctor", is_flag=True, help="Run whatever `opkit doctor` would say.")
@click.option("--dry-run", is_flag=True, help="Print every command that would run, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--verbose", "-v", is_flag=True, help="Show the kernel table of every case.")
def align(no_doctor: bool, dry_run: bool, as_json: bool, verbose: bool, **given: Any) -> int:
    """Compare OP's kernels in the mock and in the real engine.

    Exit code: 0 pass, 1 fail, 3 inconclusive; others: nothing was compared.
    """
    options = asked.AlignOptions(**given)
    if dry_run:
        text = asked.dry_run(options)
        data = {"schema": "opkit.dry_run/1", "lines": text.splitlines()}
        show(json.dumps(data, indent=1) + "\n" if as_json else text)
        return 0
    ledger = Ledger(options.out / "ledger.db")
    if options.mock_trace or options.e2e_trace or options.e2e_cmd:
        ledger.try_out()
    with Progress() as progress:
        found = asked.answer(options, progress, None if no_doctor else _look_first(progress))
    if as_json:
        show(json.dumps(align_json(found.result), indent=1) + "\n")
    else:
        show(shown(lambda console: print_align(found.result, console, verbose=verbose)))
    if found.keep:
        name = ledger.record(found.result, found.folder)
        print(f"recorded as {name}; files in {found.folder}", file=sys.stderr)
    elif options.recorded:
        print("a bundled recording enters no ledger; a run with --e2e-cmd does", file=sys.stderr)
    return EXIT_CODES[found.result.verdict]


def _look_first(progress: Progress) -> Callable[[LiveRequest], None]:
    """The doctor's look at the machine before a run, with the serving command's variables."""

    def look(request: LiveRequest) -> None:
        e2e = request.e2e
        env = read_command(e2e.command, e2e.engine, e2e.url).env
        look_before_run(request.e2e.out_dir, progress.aside, env=env)

    return look


@click.command()
@click.argument("op", required=False)
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the entries as one JSON object.")
def status(op: str | None, out: Path, as_json: bool) -> None:
    """What is aligned and collected, for which versions and GPU, when, and with which waivers."""
    entries = Ledger(out / "ledger.db").entries(find_op(op).name if op else None)
    collections = find_records(out, op)
    if as_json:
        rows = [entry.as_json() for entry in entries]
        made = [{"folder": str(folder), **asdict(record)} for folder, record in collections]
        found = {"schema": "opkit.status/2", "entries": rows, "collections": made}
        show(json.dumps(found, indent=1) + "\n")
        return

    def draw(console: Console) -> None:
        print_status(entries, console)
        print_collections(collections, console)

    show(shown(draw))

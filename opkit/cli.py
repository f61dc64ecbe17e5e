"""The commands: options in, one call, a report out, an exit code. No logic lives here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from opkit import __version__
from opkit.align import run
from opkit.align.judge import Question, judge
from opkit.align.ledger import Ledger
from opkit.align.policy import load_policy
from opkit.align.profile.e2e import Collect, E2ERequest, Mode, parse_wave
from opkit.align.result import AlignResult, Method, Outcome
from opkit.errors import (
    EXIT_FAIL,
    EXIT_INCONCLUSIVE,
    EXIT_INTERRUPTED,
    EXIT_PASS,
    BadInput,
    OpkitError,
)
from opkit.layers.op import Phase
from opkit.layers.registry import find_op
from opkit.nsys_parsers.keep import Keep
from opkit.nsys_parsers.slim import slim
from opkit.reports.json_report import align_json
from opkit.reports.terminal import print_align, print_status

EXIT_CODES = {
    Outcome.PASS: EXIT_PASS,
    Outcome.FAIL: EXIT_FAIL,
    Outcome.INCONCLUSIVE: EXIT_INCONCLUSIVE,
}
METHODS = {
    "auto": None,
    "nvtx": Method.LAUNCH_NVTX,
    "sequence": Method.SEQUENCE,
}
RECORDED = ("dsa-vllm-h100-mock.sqlite.gz", "dsa-vllm-h100-e2e.sqlite.gz")

PathType = click.Path(path_type=Path)


def main() -> None:
    """Entry point: turns every failure into one sentence on stderr and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("opkit: interrupted; everything that was started has been ended", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OpkitError as error:
        print(f"opkit: {error}", file=sys.stderr)
        for line in (error.hint or "").splitlines():
            print(f"  {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has gone, as `| head` does: no failure of ours.
        sys.stderr.close()
        sys.exit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="opkit")
def cli() -> None:
    """Prove that a mock layer launches what the serving engine launches, then measure it."""


@cli.command()
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
    help="How the engine is profiled; default: server when the command is a known one, else program.",
)
@click.option(
    "--window",
    type=click.Choice([collect.value for collect in Collect]),
    default=Collect.WAVES.value,
    help="Record the requests only, or from the process's start (graph nodes then carry modules).",
)
@click.option("--requests", multiple=True, metavar="NxP+O", help="Requests to send, as 4x1024+12.")
@click.option("--phase", "phases", multiple=True, type=click.Choice([p.value for p in Phase]))
@click.option("--policy", type=PathType, help="TOML file that changes thresholds.")
@click.option(
    "--strict", is_flag=True, help="Also judge the engine's own decoder layer, within 1 %."
)
@click.option(
    "--regions", type=click.Choice(list(METHODS)), default="auto", help="How to find regions."
)
@click.option(
    "--iterations", default=20, show_default=True, help="Measured iterations of a mock case."
)
@click.option("--python", default=sys.executable, help="Interpreter that has the framework.")
@click.option("--engine", default="", help="What the command serves, when it is not recognised.")
@click.option("--url", default="", help="Where the server listens, when the command does not say.")
@click.option("--ranks", type=int, help="Ranks, for --mode per-rank.")
@click.option(
    "--delay", default=300, show_default=True, help="Seconds before system-wide recording."
)
@click.option("--duration", default=60, show_default=True, help="Seconds of system-wide recording.")
@click.option("--ready-limit", default=900.0, show_default=True, help="Seconds to wait for health.")
@click.option("--seed", default=0, show_default=True, help="Seed of the prompts.")
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--dry-run", is_flag=True, help="Print every command that would run, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--verbose", "-v", is_flag=True, help="Show the kernel table of every case.")
def align(op: str, **options: Any) -> None:
    """Compare OP's kernels in the mock and in the real engine: PASS (0), FAIL (1), INCONCLUSIVE (3)."""
    chosen = find_op(op)
    phases = tuple(Phase(p) for p in options["phases"]) or chosen.phases
    policy = load_policy(options["policy"])
    files = _trace_files(options)
    folder = options["out"]
    if files is not None:
        mock, e2e, strict = files
        result = judge(
            Question(
                chosen,
                mock,
                e2e,
                options["backend"],
                policy,
                phases,
                strict,
                METHODS[options["regions"]],
            )
        )
    else:
        if not options["e2e_cmd"]:
            raise BadInput(
                "nothing to align: no command and no traces were given",
                f'give --e2e-cmd "…", or --mock-trace and --e2e-trace, or try '
                f"`opkit align {op} --recorded`",
            )
        folder = folder / f"align-{op}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        request = _live_request(chosen, options, folder, policy, phases)
        if options["dry_run"]:
            click.echo(run.dry_run(request))
            return
        result = run.align_live(request, _progress())
        (folder / "result.json").write_text(json.dumps(align_json(result), indent=1) + "\n")
    if not options["recorded"]:
        name = Ledger(options["out"] / "ledger.db").record(result, folder)
        print(f"recorded as {name}; files in {folder}", file=sys.stderr)
    _print(result, options["as_json"], options["verbose"])
    sys.exit(EXIT_CODES[result.verdict])


def _trace_files(options: dict[str, Any]) -> tuple[Path, tuple[Path, ...], Path | None] | None:
    """The files to judge, or None for a live run."""
    if options["recorded"]:
        folder = Path(str(resources.files("opkit") / "recorded"))
        return folder / RECORDED[0], (folder / RECORDED[1],), None
    if not options["mock_trace"] and not options["e2e_trace"]:
        return None
    if not options["mock_trace"] or not options["e2e_trace"]:
        raise BadInput("both --mock-trace and --e2e-trace are needed to compare files")
    return options["mock_trace"], options["e2e_trace"], options["strict_trace"]


def _live_request(
    op: Any, options: dict[str, Any], folder: Path, policy: Any, phases: tuple[Phase, ...]
) -> run.LiveRequest:
    e2e = E2ERequest(
        command=options["e2e_cmd"],
        out_dir=folder,
        op=op.name,
        mode=Mode(options["mode"]) if options["mode"] else None,
        window=Collect(options["window"]),
        waves=tuple(parse_wave(text) for text in options["requests"]),
        engine=options["engine"],
        url=options["url"],
        model_dir=options["model"],
        seed=options["seed"],
        ready_limit_s=options["ready_limit"],
        ranks=options["ranks"],
        delay_s=options["delay"],
        duration_s=options["duration"],
    )
    return run.LiveRequest(
        op,
        options["backend"] or "vllm",
        e2e,
        policy,
        phases,
        options["strict"],
        options["python"],
        options["iterations"],
    )


def _progress() -> Callable[[str], None]:
    """Progress lines on stderr, stamped; the same line again (a wait) is rewritten on a terminal."""
    console = Console(stderr=True, highlight=False)
    started = datetime.now(UTC)

    def show(message: str) -> None:
        seconds = (datetime.now(UTC) - started).total_seconds()
        console.print(f"[dim]{seconds:6.1f} s[/dim]  {message}", soft_wrap=True)

    return show


def _print(result: AlignResult, as_json: bool, verbose: bool) -> None:
    if as_json:
        click.echo(json.dumps(align_json(result), indent=1))
    else:
        print_align(result, Console(highlight=False), verbose=verbose)


@cli.command()
@click.argument("op", required=False)
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the entries as one JSON object.")
def status(op: str | None, out: Path, as_json: bool) -> None:
    """What is aligned, for which versions and GPU, when, from which files."""
    entries = Ledger(out / "ledger.db").entries(op)
    if as_json:
        rows = [{k: v for k, v in vars(entry).items() if k != "result"} for entry in entries]
        click.echo(json.dumps({"schema": "opkit.status/1", "entries": rows}, indent=1, default=str))
    else:
        print_status(entries, Console(highlight=False))


@cli.group()
def trace() -> None:
    """Look into nsys exports, and make recordings one may share."""


@trace.command("slim")
@click.argument("source", type=PathType)
@click.argument("target", type=PathType)
@click.option("--modules", help="Keep only module ranges whose path matches this expression.")
@click.option("--steps", type=int, help="Keep the first N steps of each label.")
@click.option("--iterations", type=int, help="Keep the first N iterations of each mock case.")
def trace_slim(
    source: Path, target: Path, modules: str | None, steps: int | None, iterations: int | None
) -> None:
    """Copy what alignment needs of SOURCE to TARGET (.sqlite or .sqlite.gz); drop and scrub the rest."""
    report = slim(source, target, keep=Keep(modules=modules, steps=steps, iterations=iterations))
    kept = sum(after for _, after in report.rows.values())
    click.echo(
        f"{target}: {report.target_bytes:,} bytes of {report.source_bytes:,}; {kept:,} rows in "
        f"{len(report.rows)} tables kept, {len(report.dropped)} tables dropped, "
        f"{sum(report.scrubbed.values())} private values scrubbed"
    )

"""The command that looks at a mock before it is aligned."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from opkit.cli_output import PathType, show, shown
from opkit.errors import EXIT_FAIL, EXIT_PASS
from opkit.layers.available import default_backend, frameworks
from opkit.layers.check import run
from opkit.layers.check.asked import CheckPlan
from opkit.layers.plan import INPUTS
from opkit.layers.registry import find_op, require_mock
from opkit.reports.layers import print_check
from opkit.reports.progress import Progress


@click.command()
@click.argument("op")
@click.option(
    "--backend",
    default="",
    help="Whose classes build the mock; default: the serving engine that is installed, else torch.",
)
@click.option(
    "--model", type=PathType, help="Folder with a config.json; default: a bundled one for the op."
)
@click.option("--serve-args", default="", metavar='"…"', help="Flags of the serving command.")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tensor-parallel ranks to simulate.",
)
@click.option(
    "--inputs",
    type=click.Choice(INPUTS),
    default="tokens",
    show_default=True,
    help="How activations are made; zeros and rows are degenerate on purpose.",
)
@click.option("--captured", type=PathType, help="Folder of the capture, for --inputs captured.")
@click.option("--python", default=sys.executable, help="Interpreter that has the framework.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the prompts.")
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=1800,
    show_default=True,
    help="Seconds that all of it may take.",
)
@click.option(
    "--out", type=PathType, default=Path("opkit-out"), show_default=True, help="Output folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def check(
    op: str, backend: str, model: Path | None, serve_args: str, tp: int, inputs: str,
    captured: Path | None, python: str, seed: int, limit: float, out: Path, as_json: bool,
) -> int:  # fmt: skip
    """Is the mock of OP sound? Runs the checklist that comes before alignment.

    Exit code: 0 all passed, 1 some failed; others: it did not run to its end.
    """
    known = find_op(op)
    backend = backend or default_backend(known, frameworks(python))
    require_mock(known, backend)
    run.require_capture(inputs, captured)
    folder = out / f"check-{op}-{backend}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    plan = CheckPlan(
        op=op,
        backend=backend,
        model=str(model) if model else "",
        result="",
        engine_args=run.split_args(serve_args),
        tp_size=tp,
        seed=seed,
        inputs=inputs,
        captured=str(captured) if captured else "",
    )
    with Progress() as progress:
        ready = run.prepare(plan, folder)
        done = run.run_check(ready, folder, python, limit, progress)
    if as_json:
        show(done.result.to_json())
    else:
        failure = str(done.failure or "")
        show(shown(lambda console: print_check(done.result, console, failure)))
    print(f"files in {folder}", file=sys.stderr)
    if done.failure is not None:
        raise done.failure
    return EXIT_PASS if done.result.passed else EXIT_FAIL

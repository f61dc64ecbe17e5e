"""The commands around mocks: which there are, and how to begin a new one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from opkit.cli_output import PathType, show, shown
from opkit.layers.available import availabilities, frameworks, gpu_name
from opkit.layers.skeleton.new import write_op
from opkit.reports.layers import print_layers, print_new


@click.command()
@click.option("--python", default=sys.executable, help="Interpreter that has the frameworks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def layers(python: str, as_json: bool) -> None:
    """Which mocks there are, by op, backend and phase; which can run here, and why not."""
    gpu = gpu_name()
    found = availabilities(frameworks(python), gpu)
    if as_json:
        data = {"schema": "opkit.layers/1", "gpu": gpu, "mocks": [asdict(item) for item in found]}
        show(json.dumps(data, indent=1) + "\n")
        return
    show(shown(lambda console: print_layers(found, gpu, console)))


@click.command()
@click.argument("op")
@click.option("--title", default="", help="What the op is, in one line.")
@click.option(
    "--into",
    type=PathType,
    default=Path(),
    help="The checkout to write into; default: this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def new(op: str, title: str, into: Path, as_json: bool) -> None:
    """Write a working op OP into a checkout: definition, torch mock, sweep, tests, page."""
    written = write_op(op, into, title)
    if as_json:
        data = {"schema": "opkit.new/1", "op": op, **asdict(written)}
        show(json.dumps(data, indent=1, default=str) + "\n")
        return
    show(shown(lambda console: print_new(op, written, console)))

"""``opkit model``: configurations and checkpoints of models that are small and random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from opkit.cli_output import PathType, show, show_parts
from opkit.errors import EXIT_PASS
from opkit.layers.checkpoint import (
    DTYPES,
    Checkpoint,
    bundled_models,
    find_config,
    plan_checkpoint,
    write_checkpoint,
)
from opkit.reports.parse_bar import ParseBar

LINE_S = 5.0  # between lines on a stderr that is no terminal


@click.group()
def model() -> None:
    """Make model folders for mocks and servers: a config.json, and random weights."""


@model.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_models(as_json: bool) -> int:
    """List the configurations that come with opkit."""
    found = [_summary(plan_checkpoint(config, name), name)
             for name, config in bundled_models().items()]  # fmt: skip
    if as_json:
        show(json.dumps({"schema": "opkit.models/1", "models": found}, indent=1) + "\n")
        return EXIT_PASS
    width = max(len(item["name"]) for item in found)
    show_parts(
        f"{item['name']:{width}}  {item['architecture']:<24}{item['layers']:>3} layers"
        f"{item['bytes'] / 1e9:8.1f} GB\n"
        for item in found
    )
    return EXIT_PASS


@model.command()
@click.argument("config")
@click.option("--out", type=PathType, help="Folder to make; needed unless --dry-run.")
@click.option(
    "--layers",
    type=click.IntRange(1, 1000),
    help="Decoder layers; default: the configuration's.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of values.")
@click.option(
    "--dtype",
    type=click.Choice(tuple(DTYPES)),
    default="bfloat16",
    show_default=True,
    help="Element type of the weights.",
)
@click.option("--no-weights", is_flag=True, help="Only the config.json, as dummy weights need it.")
@click.option("--force", is_flag=True, help="Replace a checkpoint that is there.")
@click.option("--dry-run", is_flag=True, help="Print names, shapes and sizes, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def make(
    config: str,
    out: Path | None,
    layers: int | None,
    seed: int,
    dtype: str,
    no_weights: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make a checkpoint of random weights from CONFIG.

    CONFIG is a config.json, its folder, or the name of one that comes with opkit (`opkit model
    list`). Weights are drawn so that activations keep a deviation near 1.
    """
    if out is None and not dry_run:
        raise click.UsageError("--out is missing: the folder to make")
    data, origin = find_config(config)
    found = plan_checkpoint(data, origin, layers, seed, dtype)
    if no_weights:
        found = Checkpoint(found.config, dtype, seed, ())
    summary = _summary(found, origin)
    if dry_run:
        if as_json:
            tensors = {item.name: list(item.shape) for item in found.weights()}
            show(json.dumps({**summary, "tensors": tensors}, indent=1) + "\n")
        else:
            show_parts(_listed(found, summary))
        return EXIT_PASS
    assert out is not None
    with ParseBar(every_s=LINE_S) as bar:

        def say(file: str, done: float) -> None:
            whole = found.total_bytes / 1e9
            bar(f"{file}: {done * whole:.1f} of {whole:.1f} GB", done)

        write_checkpoint(found, out, force=force, say=say)
    if as_json:
        show(json.dumps({**summary, "folder": str(out)}, indent=1) + "\n")
    else:
        show(f"{out}: {_told(summary)}\n")
    return EXIT_PASS


def _summary(found: Checkpoint, name: str) -> dict[str, Any]:
    return {
        "schema": "opkit.model/1",
        "name": name,
        "architecture": found.config["architectures"][0],
        "layers": found.config["num_hidden_layers"],
        "dtype": found.dtype,
        "seed": found.seed,
        "tensors": sum(1 for _ in found.weights()),
        "files": len(found.shards),
        "bytes": found.total_bytes,
    }


def _told(summary: dict[str, Any]) -> str:
    """One line: what the checkpoint is."""
    kind = f"{summary['architecture']}, {summary['layers']} layers"
    if not summary["files"]:
        return f"{kind}, no weights"
    return (
        f"{kind}, {summary['tensors']:,} tensors of {summary['dtype']} in {summary['files']} "
        f"file{'s' if summary['files'] > 1 else ''}, {summary['bytes'] / 1e9:,.1f} GB"
    )


def _listed(found: Checkpoint, summary: dict[str, Any]) -> Iterator[str]:
    """A line for each tensor, and the whole."""
    width = max((len(item.name) for item in found.weights()), default=0)
    for item in found.weights():
        shape = " × ".join(f"{size:,}" for size in item.shape)
        yield f"{item.name:{width}}  {shape:<18}{found.bytes_of(item):>16,} bytes\n"
    yield f"{_told(summary)}\n"

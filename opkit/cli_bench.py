"""The serving benchmark: options in, one call, a report out, an exit code."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from opkit.bench.backends.make import make_backend
from opkit.bench.clock import Clock
from opkit.bench.plan import BACKENDS
from opkit.bench.recorder import recording
from opkit.bench.run import run_bench
from opkit.bench.scenario import make_options, read_scenario
from opkit.bench.sensing import SENSORS, Sensing
from opkit.cli_output import PathType, show
from opkit.errors import RunFailed
from opkit.reports.bench import FORMATS, render_bench
from opkit.reports.progress import Progress

Command = Callable[..., Any]
# Options that take several values, and what a value of theirs looks like.
_SEVERAL = {
    r"-p|--n-prompt|-n|--n-gen|-b|--batch|-pg|--prompt-gen": re.compile(r"\d[\d,+*-]*"),
    r"--engine-args": re.compile(r"\w+=.*", re.DOTALL),
}
_DASHES = re.compile(r"^--[a-z_-]+")  # an option's name, up to = where its value follows
NAMED = 4  # failed tests that the last sentence names
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class SeveralValues(click.Command):
    """A command whose options may be given as ``-p 512 1024``, as the field's tools have it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat an option before each value after its first, then let click parse."""
        return super().parse_args(ctx, repeated(args))


def repeated(args: list[str]) -> list[str]:
    """``-p 512 1024`` as ``-p 512 -p 1024``, and ``--engine_dir`` as ``--engine-dir``.

    No value of another option is touched. The field's benchmark writes underscores.
    """
    made: list[str] = []
    option, value, served = "", None, True
    for given in args:
        word = _DASHES.sub(lambda name: name[0].replace("_", "-"), given)
        if value is not None and value.fullmatch(word):
            made += [option, word] if served else [word]
            served = True
            continue
        known = [look for names, look in _SEVERAL.items() if re.fullmatch(names, word)]
        option, value, served = word, known[0] if known else None, False
        made.append(word)
    return made


def models(command: Command) -> Command:
    """The options that say what runs."""
    for option in reversed(
        (
            click.option("--backend", type=click.Choice(BACKENDS), help="What serves the model."),
            click.option("--model", "-m", help="Folder (or name) of the model."),
            click.option("--engine-dir", type=PathType, help="A built TensorRT-LLM engine."),
            click.option("--url", help="An OpenAI-compatible server, for openai-url."),
            click.option("--served-model", help="Its name on the server, if not the first listed."),
            click.option("--name", help="What the results call the model."),
            click.option("--engine-args", multiple=True, metavar="NAME=VALUE …",
                         help="Keywords for the engine's constructor, as load_format=dummy."),
            click.option("--python", help="Interpreter that has the engine; default: this one."),
            click.option("--tokenizer-dir", type=PathType,
                         help="Send English words through this tokenizer, not random token ids."),
            click.option("--vocab-size", type=click.IntRange(min=1),
                         help="Token ids lie below this; default: from the model."),
            click.option("--seed", type=click.IntRange(min=0),
                         help="Seed of the prompts; default: 0, for a server the time."),
            click.option("--scenario", type=PathType,
                         help="TOML or YAML file with several models and their options."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def tests(command: Command) -> Command:
    """The options that say what is measured, and how often."""
    seconds = click.FloatRange(min=0)
    for option in reversed(
        (
            click.option("--n-prompt", "-p", multiple=True, metavar="N …", default=("512",),
                         show_default=True, help="Prompt tokens of prompt tests; 0: none."),
            click.option("--n-gen", "-n", multiple=True, metavar="N …", default=("128",),
                         show_default=True, help="Output tokens of generation tests; 0: none."),
            click.option("--prompt-gen", "-pg", multiple=True, metavar="P,N …",
                         help="Prompt and output tokens of combined tests."),
            click.option("--batch", "-b", multiple=True, metavar="N …", default=("1",),
                         show_default=True, help="Requests at a time."),
            click.option("--repetitions", "-r", type=click.IntRange(min=1), default=5,
                         show_default=True, help="Timed runs of each test."),
            click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True,
                         help="Untimed runs before, at least."),
            click.option("--max-input-length", type=click.IntRange(min=1),
                         help="Longest prompt, tokens; a longer one is refused."),
            click.option("--clip", is_flag=True, default=None,
                         help="Shorten prompts to --max-input-length instead."),
            click.option("--delay", type=seconds, default=0, show_default=True,
                         help="Seconds of rest between tests."),
            click.option("--cool-to", type=float, metavar="°C",
                         help="Between tests, wait until the GPU is this cool."),
            click.option("--cool-limit", type=seconds, default=600, show_default=True,
                         help="Seconds to wait for that, at most."),
            click.option("--start-limit", type=seconds, default=1800, show_default=True,
                         help="Seconds that loading may take."),
            click.option("--limit", type=seconds, default=300, show_default=True,
                         help="Seconds that one run may take."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def sensors(command: Command) -> Command:
    """The options that say how power, heat and clocks are read."""
    for option in reversed(
        (
            click.option("--sensors", "kind", type=click.Choice(SENSORS), default="auto",
                         show_default=True, help="What tells power, heat and clocks."),
            click.option("--gpus", default="", metavar="0,1",
                         help="GPUs whose sensors are read (NVML index or UUID)."),
            click.option("--rails", default="", metavar="A,B",
                         help="Jetson: power rails whose sum is the power."),
            click.option("--sample-ms", type=click.IntRange(min=1), default=100, show_default=True,
                         help="Time between two readings of all sensors."),
            click.option("--power-seconds", type=click.FloatRange(min=0), default=2.0,
                         show_default=True, help="A test goes on this long for its power."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=SeveralValues)
@models
@tests
@sensors
@click.option(
    "--output", "-o", "form", type=click.Choice(FORMATS), default="md", show_default=True,
    help="What is printed.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.option(
    "--output-dir", type=PathType, default=Path("opkit-out/bench"), show_default=True,
    help="Each run writes a folder of its own here.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS, case_sensitive=False), default="WARNING",
    show_default=True, help="How much opkit (stderr) and the engine (its log) say.",
)  # fmt: skip
def bench(
    scenario: Path | None,
    kind: str,
    gpus: str,
    rails: str,
    form: str,
    as_json: bool,
    output_dir: Path,
    **given: Any,
) -> int:
    """Measure how fast an engine serves a model, and at what power.

    Prompt tests (-p), generation tests (-n) and both in one request (-pg), as llama-bench has them.
    """
    logging.basicConfig(level=given["log_level"].upper(), stream=sys.stderr, format="%(message)s")
    asked = read_scenario(scenario, given) if scenario else [make_options(given)]
    sensing = Sensing(kind, gpus, tuple(filter(None, rails.split(","))))
    clock = Clock()
    with Progress() as progress:
        found = run_bench(
            asked,
            make_backend,
            lambda options: sensing.open(options, progress),
            recording(clock),
            output_dir,
            clock,
            progress,
        )
    show(render_bench(found, "json" if as_json else form))
    print(f"files in {found.folder}", file=sys.stderr)
    if found.interrupted:
        raise click.Abort
    if found.failures:
        # Each was told when it happened, and stands in the result.
        failed = list(dict.fromkeys(each.test or each.model for each in found.failures))
        more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        raise RunFailed(f"failed, as told above: {', '.join(failed[:NAMED])}{more}")
    return 0

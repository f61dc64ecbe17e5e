"""What the command files share: how a result reaches stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

PathType = click.Path(path_type=Path)


def show(text: str) -> None:
    """Print a result. A reader who has gone, as in `| head`, changes no exit code."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(draw: Callable[[Console], None]) -> str:
    """What ``draw`` prints on a console as wide as stdout."""
    console = Console(highlight=False)
    with console.capture() as report:
        draw(console)
    return report.get()

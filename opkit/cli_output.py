"""What the command files share: how a result reaches stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from rich.console import Console

PathType = click.Path(path_type=Path)


def show(text: str) -> None:
    """Print a result. A reader who has gone, as in `| head`, changes no exit code."""
    show_parts([text])


def show_parts(parts: Iterable[str]) -> None:
    """Print a long result as it is made; stop making it when its reader has gone."""
    try:
        for part in parts:
            sys.stdout.write(part)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(draw: Callable[[Console], None]) -> str:
    """What ``draw`` prints on a console as wide as stdout."""
    console = Console(highlight=False)
    with console.capture() as report:
        draw(console)
    return report.get()

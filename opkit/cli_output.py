"""What the command files share: how a result reaches stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import click
from rich.console import Console

from opkit.errors import BadInput

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


def write_file(path: Path, text: str, *, force: bool) -> None:
    """Write a result to a file, in one step, and say so on stderr; ``-`` is stdout.

    Raises:
        BadInput: the file exists and is not to be overwritten, there is no such folder, or it
            cannot be written.
    """
    if str(path) == "-":
        show(text)
        return
    target = path.resolve()  # a link stays one
    if not target.parent.is_dir():
        raise BadInput(f"{path}: no such folder as {path.parent}")
    if target.exists() and not target.is_file():  # a pipe or a device takes the text as it is
        target.write_text(text, "utf-8")
        return
    if target.exists() and not force:
        raise BadInput(f"{path}: exists already", "--force overwrites it")
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_text(text, "utf-8")
        part.replace(target)
    except OSError as error:  # it names a file that nobody asked for
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    print(f"wrote {path} ({len(text.encode()) / 1000:,.0f} kB)", file=sys.stderr)

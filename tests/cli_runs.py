"""Run opkit's command line: in this process, or as a program; what came of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import opkit
from opkit import cli

PROGRAM = [sys.executable, "-m", "opkit"]


def command(name: str) -> click.Command:
    """A command of the program, as `opkit NAME` finds it."""
    found = cli.cli.get_command(click.Context(cli.cli), name)
    assert found is not None
    return found


@dataclass(frozen=True)
class Ran:
    """Exit code and output."""

    code: int
    out: str
    err: str

    def said(self) -> list[str]:
        """What stderr holds beside progress lines and what the ledger took."""
        return [
            line
            for line in self.err.splitlines()
            if line.strip() and not re.match(r" *\d+\.\d s  |recorded as ", line)
        ]

    def complaint(self) -> str:
        """The one sentence of a failure; anything below it is an indented hint."""
        assert not any(line.startswith("Traceback") for line in self.err.splitlines()), self.err
        first, *hints = self.said()
        assert first.startswith("opkit: "), self.err
        assert all(line.startswith("  ") for line in hints), self.err
        assert self.out == ""
        return first.removeprefix("opkit: ")


def run_main(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> Ran:
    """``opkit WORDS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["opkit", *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in cli.HEARD}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return Ran(int(ended.value.code or 0), out, err)


def environment() -> dict[str, str]:
    """The environment in which a child finds this opkit wherever it starts."""
    path = os.pathsep.join([str(Path(opkit.__file__).parents[1]), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path}


def run_program(*words: object, cwd: Path) -> Ran:
    """``opkit WORDS`` as a program."""
    done = subprocess.run(
        [*PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)

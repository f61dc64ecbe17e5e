"""The commands: options in, one call, a report out, an exit code. No logic lives here."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from types import FrameType

import click

from opkit import __version__
from opkit.errors import EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, OpkitError

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends opkit as Ctrl-C does


def main() -> None:
    """Entry point: turns every failure into one sentence on stderr and an exit code."""
    heard: list[str] = []
    try:
        _listen(heard)
        sys.exit(cli.main(prog_name="opkit", standalone_mode=False))
    except (click.Abort, KeyboardInterrupt):
        code = _interrupted()
    except Exception as error:
        # A compiled library may answer a signal in its own words: DuckDB raises RuntimeError
        # ("Query interrupted"), one that is being imported ImportError.
        code = _interrupted() if heard else _say(error)
    sys.exit(code)


def _listen(heard: list[str]) -> None:
    """Let SIGTERM and SIGHUP do what Ctrl-C does: all that was started is ended first.

    Args:
        heard: takes the name of every signal that came.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        raise KeyboardInterrupt(heard[-1])

    for number in HEARD:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, interrupt)


def _interrupted() -> int:
    _complain("interrupted; everything that was started has been ended")
    return EXIT_INTERRUPTED


def _say(error: Exception) -> int:
    """The failure in one sentence, and its exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "opkit"
        _complain(error.format_message(), f"`{command} --help` lists the options")
        return error.exit_code
    if isinstance(error, OpkitError):
        _complain(str(error), error.hint or "")
        return error.exit_code
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        _complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
        return EXIT_BAD_INPUT
    traceback.print_exception(error)
    _complain("this is a bug in opkit; please report it with the lines above")
    return EXIT_BUG


def _complain(sentence: str, hint: str = "") -> None:
    # A file's name may hold anything; what is said stays one line.
    line = "".join(letter if letter.isprintable() else "�" for letter in sentence)
    print(f"opkit: {line}", *(f"  {line}" for line in hint.splitlines()), sep="\n",
          file=sys.stderr)  # fmt: skip


# Where each command lives. Only the one that runs is imported: `opkit trace` needs no ledger, and
# reading them all takes longer than most answers.
COMMANDS = {
    "align": "opkit.cli_align",
    "bench": "opkit.cli_bench",
    "check": "opkit.cli_check",
    "collect": "opkit.cli_collect",
    "comm": "opkit.cli_comm",
    "doctor": "opkit.cli_doctor",
    "install": "opkit.cli_collect",
    "layers": "opkit.cli_layers",
    "model": "opkit.cli_model",
    "new": "opkit.cli_layers",
    "report": "opkit.cli_report",
    "status": "opkit.cli_align",
    "trace": "opkit.cli_trace",
    "verify": "opkit.cli_collect",
}


class Commands(click.Group):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command, or None when there is none of that name."""
        home = COMMANDS.get(cmd_name)
        # Signals wait meanwhile: a compiled library that is half imported may crash at the end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            command = getattr(importlib.import_module(home), cmd_name) if home else None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return command if isinstance(command, click.Command) else None


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="opkit")
def cli() -> None:
    """Prove that a mock layer launches what the serving engine launches, then measure it."""

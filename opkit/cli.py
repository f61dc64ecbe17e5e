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


def main() -> None:
    """Entry point: turns every failure into one sentence on stderr and an exit code."""
    # Whoever ends opkit politely gets what Ctrl-C gets: all that was started is ended first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, _interrupt)
    try:
        sys.exit(cli.main(prog_name="opkit", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "opkit"
        _complain(error.format_message(), f"`{command} --help` lists the options")
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted; everything that was started has been ended")
        sys.exit(EXIT_INTERRUPTED)
    except OpkitError as error:
        _complain(str(error), error.hint or "")
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        _complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(EXIT_BAD_INPUT)
    except Exception:
        traceback.print_exc()
        _complain("this is a bug in opkit; please report it with the lines above")
        sys.exit(EXIT_BUG)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


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
        command = getattr(importlib.import_module(home), cmd_name) if home else None
        return command if isinstance(command, click.Command) else None


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="opkit")
def cli() -> None:
    """Prove that a mock layer launches what the serving engine launches, then measure it."""

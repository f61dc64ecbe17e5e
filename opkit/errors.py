"""The one exception type that becomes a sentence and an exit code, and the exit codes themselves.

Exit codes of ``opkit align``: 0 pass, 1 fail, 3 inconclusive. Everything that could not run uses
another number, so that a script can tell "the mock is wrong" from "nothing was compared".
"""

from __future__ import annotations

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_USAGE = 2  # click's own code for a wrong command line
EXIT_INCONCLUSIVE = 3
EXIT_BAD_INPUT = 4  # a file or folder given by the user cannot be used
EXIT_TOOL_MISSING = 5  # nsys, a framework or a GPU is not there
EXIT_RUN_FAILED = 6  # a server, a mock or nsys was started and failed
EXIT_REFUSED = 7  # no verdict admits what was to be collected
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h: opkit itself is wrong; Python's own code would be 1
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it


class OpkitError(Exception):
    """A failure told to the user as one sentence.

    Args:
        message: the sentence: what is wrong, with the file or command named.
        exit_code: one of the ``EXIT_*`` constants.
        hint: what to do next; printed on its own line.
    """

    def __init__(
        self, message: str, exit_code: int = EXIT_BAD_INPUT, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.hint = hint


def what_is_wrong(error: Exception) -> str:
    """What the reader of a JSON file stumbled over: Python's own words are about its types."""
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]} is missing"
    return str(error) if isinstance(error, ValueError) else "a part of it has another form"


class WrongUsage(OpkitError):
    """Options that do not go together (exit 2)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, EXIT_USAGE, hint)


class BadInput(OpkitError):
    """A file or value that the user gave cannot be used (exit 4)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, EXIT_BAD_INPUT, hint)


class ToolMissing(OpkitError):
    """Something that must be installed is not there (exit 5)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, EXIT_TOOL_MISSING, hint)


class Refused(OpkitError):
    """No verdict admits what was to be collected (exit 7)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, EXIT_REFUSED, hint)


class RunFailed(OpkitError):
    """Something opkit started has failed (exit 6)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, EXIT_RUN_FAILED, hint)

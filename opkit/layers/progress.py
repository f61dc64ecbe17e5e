"""What a mock says while it is built or prepared; the process that runs it decides where to.

Building may take minutes in which nothing else is said: engines compile kernels at first use.
"""

from __future__ import annotations

from collections.abc import Callable

_told: list[Callable[[str], object]] = []


def listen(told: Callable[[str], object]) -> None:
    """Have every later line given to ``told`` alone."""
    _told[:] = [told]


def say(message: str) -> None:
    """One line for whoever watches; nobody hears it where no process listens."""
    for told in _told:
        told(message)

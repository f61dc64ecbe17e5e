"""Named ranges around a mock's iterations, written so that the nsys at hand records them.

``torch.cuda.nvtx`` is recorded by every nsys; a torch without CUDA has none, and there the package
``nvtx`` writes them. Measured with nsys 2024.2.3: ranges of ``nvtx`` up to 0.2.11 are in the
recording, from 0.2.12 on (tried: 0.2.12, 0.2.17) they are missing without a word. Newer nsys
records them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opkit.errors import ToolMissing

# Set by ``align`` for the process that it profiles: what ``nsys --version`` says.
NSYS_VERSION = "OPKIT_NSYS_VERSION"
OLD_NSYS = (2024, 2)  # the newest known to miss the newer package's ranges
LAST_RECORDED = (0, 2, 11)  # the newest package whose ranges it records
INSTALL = "pip install 'nvtx<=0.2.11'"

Marked = Callable[[str], AbstractContextManager[None]]


def recorded_problem(nsys_version: str, nvtx_version: str) -> str | None:
    """Why an nsys would lose the ranges of a version of the package ``nvtx``; None when it keeps
    them.

    Args:
        nsys_version: as ``nsys --version`` says it, e.g. ``2024.2.3.38-242334140272v0``.
        nvtx_version: of the package; empty when it is not installed.
    """
    if not nvtx_version:
        return "the package nvtx is not installed, so no range is written"
    if _numbers(nsys_version)[:2] > OLD_NSYS or _numbers(nvtx_version)[:3] <= LAST_RECORDED:
        return None
    return f"nsys {nsys_version} does not record the ranges of nvtx {nvtx_version}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("-")[0]))


def nvtx_version() -> str:
    """The installed package's version; empty when there is none."""
    if importlib.util.find_spec("nvtx") is None:
        return ""
    return importlib.metadata.version("nvtx")


def marker(torch: Any, told: Callable[[str], None]) -> Marked:
    """What writes the ranges here: a function that takes a range's text to a context manager.

    Args:
        torch: the module.
        told: takes a line for whoever watches, when ranges would be lost.

    Raises:
        ToolMissing: nsys watches this process and would not record its ranges.
    """
    if torch.cuda.is_available():
        return _torch_ranges(torch)
    watching = os.environ.get(NSYS_VERSION, "")
    installed = nvtx_version()
    # An unknown nsys is taken for an old one: it costs a word, not a recording.
    problem = recorded_problem(watching or "2024.2", installed)
    if problem and watching:
        raise ToolMissing(f"this torch has no CUDA, and {problem}", hint=INSTALL)
    if problem:
        told(f"{problem} (should nsys be watching): {INSTALL}")
    return _package_ranges() if installed else _no_ranges


def _torch_ranges(torch: Any) -> Marked:
    @contextmanager
    def marked(text: str) -> Iterator[None]:
        torch.cuda.nvtx.range_push(text)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    return marked


def _package_ranges() -> Marked:
    package = importlib.import_module("nvtx")

    @contextmanager
    def marked(text: str) -> Iterator[None]:
        package.push_range(text)
        try:
            yield
        finally:
            package.pop_range()

    return marked


@contextmanager
def _no_ranges(_: str) -> Iterator[None]:
    yield

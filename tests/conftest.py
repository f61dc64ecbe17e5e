"""Shared fixtures: of ``profile_bench`` a fake engine and nsys, fake or real; of ``trace_runs``."""

import signal

from profile_bench import bench, either_nsys, fake_nsys, no_nsys
from skips import pytest_terminal_summary
from trace_runs import recording, trace

# A shell that starts tests in the background lets them ignore Ctrl-C, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = [
    "bench",
    "either_nsys",
    "fake_nsys",
    "no_nsys",
    "pytest_terminal_summary",
    "recording",
    "trace",
]

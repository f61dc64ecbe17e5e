"""Shared fixtures: of ``profile_bench`` a fake engine and nsys, fake or real; of ``trace_runs``."""

from profile_bench import bench, either_nsys, fake_nsys, no_nsys
from skips import pytest_terminal_summary
from trace_runs import recording, trace

__all__ = [
    "bench",
    "either_nsys",
    "fake_nsys",
    "no_nsys",
    "pytest_terminal_summary",
    "recording",
    "trace",
]

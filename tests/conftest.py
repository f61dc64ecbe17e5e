"""The fixtures of ``profile_bench`` (a fake engine, a fake nsys, the real one) and ``trace_runs``."""

from profile_bench import bench, either_nsys, fake_nsys, no_nsys
from trace_runs import recording, trace  # noqa: F401 - fixtures

__all__ = ["bench", "either_nsys", "fake_nsys", "no_nsys"]

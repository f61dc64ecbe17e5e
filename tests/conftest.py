"""The fixtures of ``profile_bench``: a fake engine, a fake nsys, and the real one."""

from profile_bench import bench, either_nsys, fake_nsys, no_nsys

__all__ = ["bench", "either_nsys", "fake_nsys", "no_nsys"]

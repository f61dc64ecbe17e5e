"""The fixtures of ``profile_bench``, for every test of this folder."""

from profile_bench import bench, either_nsys, fake_nsys, no_nsys

__all__ = ["bench", "either_nsys", "fake_nsys", "no_nsys"]

"""The least time a GPU could take for a case: no correct measurement is shorter.

A roofline (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009) with everything rounded in the measurement's favour: the
fastest rate that the row's element types allow, only the bytes that cannot lie in the L2 cache.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

# Element types whose products run at the rate of bf16 or slower.
_WIDE = ("bfloat16", "float16", "half", "float32", "tfloat32")
_NARROW = {"fp8": "fp8", "float8": "fp8", "int8": "int8", "nvfp4": "fp4", "fp4": "fp4"}


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do at most.

    Attributes:
        tflops: dense matrix products, 10^12 operations a second, by width of the elements.
        bandwidth: of its memory, GB/s.
        l2: size of its L2 cache, MiB.
        source: where the numbers are from.
    """

    tflops: dict[str, float]
    bandwidth: float
    l2: float
    source: str

    def rate(self, dtypes: Iterable[str]) -> float:
        """Operations a second, at most, when a forward uses ``dtypes`` as a table spells them."""
        rates = []
        for dtype in dtypes:
            narrow = next((v for k, v in _NARROW.items() if dtype.startswith(k)), "")
            if dtype in _WIDE or (narrow and narrow not in self.tflops):
                rates.append(self.tflops["bf16"])  # what is not there is computed wider
            else:
                rates.append(self.tflops[narrow] if narrow else max(self.tflops.values()))
        return max(rates, default=max(self.tflops.values())) * 1e12

    def bound_ms(
        self, flops: float, least_bytes: float, dtypes: Iterable[str], *, cold: bool
    ) -> float:
        """The least time of a forward, milliseconds.

        Args:
            flops: its floating-point operations, at least.
            least_bytes: bytes it must read or write, at least.
            dtypes: element types of its operands, as a table spells them.
            cold: whether the L2 cache was emptied before; else it may hold as much as fits.
        """
        cached = 0.0 if cold else self.l2 * 2**20
        moving = max(0.0, least_bytes - cached) / (self.bandwidth * 1e9)
        return max(flops / self.rate(dtypes), moving) * 1e3


@cache
def _known() -> tuple[tuple[tuple[str, ...], Peaks], ...]:
    text = resources.files("opkit.collect.tables").joinpath("gpus.toml").read_text("utf-8")
    return tuple(
        (
            tuple(item["names"]),
            Peaks(item["tflops"], item["bandwidth"], item["l2"], item["source"]),
        )
        for item in tomllib.loads(text)["gpu"]
    )


def peaks_of(device: str) -> Peaks | None:
    """The peaks of the GPU that calls itself ``device``; None when they are not known."""
    for names, peaks in _known():
        for name in names:
            if device == name or (name.endswith("*") and device.startswith(name[:-1])):
                return peaks
    return None

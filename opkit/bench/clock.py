"""Time, injected: what a benchmark measures with and waits by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The clocks of this machine.

    Attributes:
        now_ns: monotonic; on Linux one clock for all processes, which a child's times rely on.
        unix_ns: since 1970, for files that others read.
        sleep: seconds.
    """

    now_ns: Callable[[], int] = time.monotonic_ns
    unix_ns: Callable[[], int] = time.time_ns
    sleep: Callable[[float], None] = time.sleep

"""How a collection's numbers are written, the same in tips and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opkit.collect.desk.desk import Mark
from opkit.collect.desk.series import number
from opkit.collect.tables.validate import Value

NOTHING = "–"


def milliseconds(ms: float | None) -> str:
    """Milliseconds with four significant digits: ``0.2088``, ``36.92``, ``1,235``."""
    if ms is None:
        return NOTHING
    value = float(f"{ms:.4g}")  # first, so that 999.96 is 1,000
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, min(digits, 7))}f}"


def share(value: float | None) -> str:
    """A share as a percentage: ``0.19 %``."""
    return NOTHING if value is None else f"{100 * value:.2f} %"


def times(value: float | None) -> str:
    """A ratio with three significant digits: ``0.597 ×``, ``2.29 ×``, ``14.7 ×``."""
    if value is None:
        return NOTHING
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} ×"


def short_number(value: Value) -> str:
    """A size: ``4,096``, and from 65,536 on in whole Ki or Mi where it is that: ``128 Ki``."""
    if isinstance(value, int) and value >= 2**16:
        for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
            if value % size == 0:
                return f"{value // size:,} {unit}"
    return number(value)


def kernel_words(mark: Mark, most: int | None = None) -> str:
    """The kernels that changed at a point, with their sign: ``+ a, + b, − c``."""
    named = [*(f"+ {name}" for name in mark.new), *(f"− {name}" for name in mark.gone)]
    return _list(named, most)


def _list(named: Sequence[str], most: int | None) -> str:
    if most is None or len(named) <= most:
        return ", ".join(named)
    return f"{', '.join(named[:most])} and {len(named) - most} more"

"""Rest between tests: a time, or until the GPU is as cool as asked."""

from __future__ import annotations

from opkit.bench.clock import Clock
from opkit.bench.measure import Say
from opkit.bench.plan import BenchOptions
from opkit.sensors.levels import Sensors

_LOOK_S = 1.0  # between looks at the temperature


def cool(options: BenchOptions, sensors: Sensors, clock: Clock, say: Say) -> float | None:
    """Wait ``delay_s``, then until every GPU is at ``cool_to_c`` or the limit has passed.

    Returns:
        The hottest GPU's °C at the end; None when nothing was waited for or it is not known.
    """
    if options.delay_s:
        say(f"waiting {options.delay_s:g} s")
        clock.sleep(options.delay_s)
    if options.cool_to_c is None:
        return None
    end = clock.now_ns() + options.cool_limit_s * 1e9
    while True:
        levels = sensors.levels()
        known = [levels.temp[name] for name in sensors.heat if name in levels.temp]
        if not known:
            say("no temperature is known here: not waiting for the GPU to cool")
            return None
        if max(known) <= options.cool_to_c:
            return max(known)
        if clock.now_ns() >= end:
            say(
                f"still {max(known):g} °C after {options.cool_limit_s:g} s "
                f"(asked for {options.cool_to_c:g} °C): going on"
            )
            return max(known)
        say(f"waiting to cool: {max(known):g} °C, to {options.cool_to_c:g} °C")
        clock.sleep(_LOOK_S)

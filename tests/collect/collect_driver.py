"""``python collect_driver.py ROOT LANES BEHAVIOUR…``: a collector to be killed, run as the CLI is.

LANES is a number, or ``ray`` for a local cluster of two workers.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from collecting import Field
from fake_mocks import group_of

from opkit.collect.workers.pool import RunOptions
from opkit.collect.workers.ray_engine import RayOptions, run_on_ray


def interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    field, lanes, groups = Field(Path(sys.argv[1])), sys.argv[2], [group_of(*sys.argv[3:])]
    options = RunOptions(reread_s=0.0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if lanes == "ray":
            ray = RayOptions(workers=2, lane=field.options())
            outcome = run_on_ray(groups, ray, field.out, options)
        else:
            outcome = field.run(groups, int(lanes), options, on_event=lambda _: None)
    except KeyboardInterrupt:
        sys.exit(130)
    print(outcome.done, outcome.skipped)


if __name__ == "__main__":
    main()

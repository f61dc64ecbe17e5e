"""``python collect_driver.py ROOT LANES BEHAVIOUR…``: a collector to be killed, run as the CLI is."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from collecting import Field
from fake_mocks import group_of

from opkit.collect.pool import RunOptions


def interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    root, lanes, behaviours = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        outcome = Field(root).run(
            [group_of(*behaviours)], lanes, RunOptions(reread_s=0.0), on_event=lambda _: None
        )
    except KeyboardInterrupt:
        sys.exit(130)
    print(outcome.done, outcome.skipped)


if __name__ == "__main__":
    main()

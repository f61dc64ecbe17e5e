"""``python -m opkit.layers.check PLAN.json``: see :mod:`opkit.layers.check.child`."""

import faulthandler
import signal
import sys

from opkit.layers.check.child import main


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _interrupt)  # a polite end is that of Ctrl-C
    sys.exit(main(sys.argv[1:]))

"""``python -m opkit.layers.check PLAN.json``: see :mod:`opkit.layers.check.child`."""

import sys

from opkit.layers.check.child import main

sys.exit(main(sys.argv[1:]))

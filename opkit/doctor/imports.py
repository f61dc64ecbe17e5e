"""Import the mocks of a backend and say of each whether it went well. Run under ``--python``.

Arguments: the backend, then ops. Says a line of JSON an op on stdout, as soon as it is known: a
crash then tells how far it came.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(backend: str, ops: list[str]) -> None:
    """Import ``opkit.layers.OP.BACKEND`` for every op."""
    for op in ops:
        error = ""
        try:
            importlib.import_module(f"opkit.layers.{op}.{backend}")
        except Exception as raised:  # a framework may raise anything when it is imported
            lines = str(raised).strip().splitlines()
            error = f"{type(raised).__name__}: {lines[0] if lines else 'no message'}"
        print(json.dumps({"opkit_import": op, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

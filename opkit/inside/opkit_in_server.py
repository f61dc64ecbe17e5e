"""What a serving engine's own interpreter imports of opkit: nothing but this opkit itself.

The server is started with this folder on PYTHONPATH, and with names of this module in its flags.
The folder holds nothing else, so that none of the packages beside opkit hides one of the server's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

# Name in this module → where it is defined; imported when the server asks for it.
_NAMES = {
    "step_ranges": "opkit.layers.backends.sglang.labels",
    "CaptureExtension": "opkit.layers.backends.vllm.capture",
}


def _load() -> None:
    """Make exactly the opkit around this file importable as ``opkit``."""
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "opkit", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["opkit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["opkit"])


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"{__name__} has no {name}")
    if "opkit" not in sys.modules:
        _load()
    return getattr(importlib.import_module(_NAMES[name]), name)

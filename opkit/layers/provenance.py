"""What a mock is made of: versions of the software, digests of the layer's sources."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterable
from pathlib import Path

import opkit


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_digests(classes: Iterable[type], packages: tuple[str, ...]) -> dict[str, str]:
    """Digest the source file of every class that comes from one of ``packages``.

    Returns:
        ``"vllm/model_executor/models/deepseek_v2.py"`` → SHA-256, sorted by path.
    """
    modules = {cls.__module__: cls for cls in classes if cls.__module__.split(".")[0] in packages}
    found = {}
    for module, cls in modules.items():
        path = inspect.getsourcefile(cls)
        if path is None:  # a compiled module has no source to digest
            found[f"{module} (no source)"] = ""
            continue
        depth = module.count(".") + (1 if Path(path).name != "__init__.py" else 2)
        found["/".join(Path(path).parts[-depth:])] = file_digest(Path(path))
    return dict(sorted(found.items()))


def base_versions() -> dict[str, str]:
    """opkit's and Python's own versions; a backend adds its framework's."""
    return {"opkit": opkit.__version__, "python": platform.python_version()}

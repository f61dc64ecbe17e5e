"""What a mock is made of: versions, digests of sources, and the manifest that tells them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import opkit
from opkit.layers.manifest import Manifest
from opkit.layers.model_config import read_config
from opkit.layers.plan import Plan

# Named here too: the registry, which has them, loads every op.
_BACKENDS = ("vllm", "sglang", "trtllm", "torch")
_OF_ALL = ("geometry.py", "graphs.py", "model_config.py")


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


def loaded_below(prefixes: tuple[str, ...]) -> list[ModuleType]:
    """The loaded modules whose names begin with one of ``prefixes`` and that come from a file."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if prefixes and name.startswith(prefixes) and getattr(module, "__file__", None)
    ]


def module_digests(modules: Iterable[ModuleType]) -> dict[str, str]:
    """Digests of whole modules, for what a layer owes to functions instead of classes.

    Returns:
        ``"opkit/layers/prompts.py"`` → SHA-256.
    """
    found = {}
    for module in modules:
        path = Path(str(module.__file__))
        depth = module.__name__.count(".") + (2 if path.name == "__init__.py" else 1)
        found["/".join(path.parts[-depth:])] = file_digest(path)
    return found


def op_digests(op: str, backend: str) -> dict[str, str]:
    """Digests of opkit's files that decide what any mock of an op on a backend is.

    They are the op's own (which modules, what is told of them, how cases are driven) and those that
    share sizes among ranks and launch forwards; classes alone do not lead to them.

    Returns:
        ``"opkit/layers/mla/vllm.py"`` → SHA-256.
    """
    layers = Path(__file__).parent
    others = {f"{name}.py" for name in _BACKENDS if name != backend}
    files = [layers / name for name in _OF_ALL]
    files += [path for path in (layers / op).glob("*.py") if path.name not in others]
    return {f"opkit/{path.relative_to(layers.parent)}": file_digest(path) for path in files}


def gpu_versions(torch: Any) -> dict[str, str]:
    """Versions of torch, and where there is a GPU of CUDA and the driver, and the GPU's name."""
    found = {"torch": str(torch.__version__)}
    if not torch.cuda.is_available():
        return found
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    driver = nvml.nvmlSystemGetDriverVersion()
    return {
        **found,
        "cuda": str(torch.version.cuda),
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "gpu": torch.cuda.get_device_name(0),
    }


def mock_manifest(
    plan: Plan,
    *,
    versions: Mapping[str, str],
    model: Mapping[str, Any],
    dtypes: Mapping[str, str],
    sources: Mapping[str, str],
    recipe: Mapping[str, str],
    notes: Sequence[str],
) -> Manifest:
    """What a mock tells of itself, with what every mock tells alike.

    Args:
        plan: what it was built for; of its model the stored number of layers and the digest of the
            configuration are told.
        versions: of the framework and the GPU; opkit's and Python's are added.
        model, dtypes, sources, recipe, notes: fields of the manifest.

    Raises:
        BadInput: the model's configuration cannot be read.
    """
    stored, origin = read_config(plan.model)
    return Manifest(
        side="mock",
        op=plan.op,
        backend=plan.backend,
        command=tuple(sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={**base_versions(), **versions},
        model={
            **model,
            "num_hidden_layers": stored["num_hidden_layers"],
            "config_sha256": file_digest(Path(origin)),
        },
        dtypes=dict(dtypes),
        tp_size=plan.tp_size,
        engine_args=plan.engine_args,
        layer_source=dict(sorted({**sources, **op_digests(plan.op, plan.backend)}.items())),
        recipe=dict(recipe),
        notes=tuple(notes),
    )

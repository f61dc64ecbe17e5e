"""Where TensorRT-LLM keeps what the mocks need, and which keywords it takes in this version.

Up to about 1.3.0rc23 attention lies in ``_torch.attention_backend``, later in
``_torch.attention.backends``; keywords change more often. Nothing is assumed: a name is looked for
in every place it has had, a keyword is passed when the signature has it, and every error names the
version found.

Source: NVIDIA/TensorRT-LLM at the commits of ``tests/layers/trtllm_signatures.json``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from opkit.errors import ToolMissing

PACKAGE = "tensorrt_llm"
WRITTEN_AGAINST = (
    "written against the sources of TensorRT-LLM (1.2 to mid-2026, commits in "
    "docs/backend-trtllm.md); not run by opkit's developers"
)

# Modules below tensorrt_llm that have held a name, newest first.
_ATTENTION = ("_torch.attention.backends", "_torch.attention_backend")
_PLACES: dict[str, tuple[str, ...]] = {
    "get_attention_backend": tuple(f"{place}.utils" for place in _ATTENTION),
    "TrtllmAttention": tuple(f"{place}.trtllm" for place in _ATTENTION),
    "AttentionRuntimeFeatures": tuple(f"{place}.interface" for place in _ATTENTION),
    "KVCacheParams": ("_torch.metadata",),
    "ModelLoader": ("_torch.pyexecutor.model_loader",),
    "_construct_checkpoint_loader": ("_torch.pyexecutor.model_loader",),
    "get_kv_cache_manager_cls": ("_torch.pyexecutor._util",),
    "model_extra_attrs": ("_torch.utils",),
    "get_model_extra_attrs": ("_torch.utils",),
    "autotune": ("_torch.autotuner",),
    "Linear": ("_torch.linear", "_torch.modules.linear"),
    "TorchLlmArgs": ("llmapi.llm_args",),
    "KvCacheConfig": ("llmapi.llm_args",),
    "Mapping": ("mapping",),
    "QuantConfig": ("models.modeling_utils", "quantization"),
    "QuantAlgo": ("quantization.mode", "quantization"),
    "CacheType": ("bindings.internal.batch_manager",),
    "DataType": ("bindings",),
    "torch_dtype_to_binding": ("_utils",),
}


def root() -> Any:
    """The package, which takes long to import.

    Raises:
        ImportError: it is not installed, or what it is linked with is missing.
    """
    try:
        return importlib.import_module(PACKAGE)
    except (OSError, RuntimeError) as error:  # a library or a driver that it loads is not there
        raise ImportError(f"{PACKAGE} cannot be loaded: {error}") from error


class Upstream:
    """The TensorRT-LLM that is installed.

    Attributes:
        version: as it says of itself.

    Raises:
        ImportError: see :func:`root`.
    """

    def __init__(self) -> None:
        self.version = str(getattr(root(), "__version__", "of unknown version"))
        self._found: dict[str, tuple[str, Any]] = {}

    def get(self, name: str) -> Any:
        """The class or function called ``name``, from the first place that has it.

        Raises:
            ToolMissing: none has it; the message names the version and the places.
        """
        if name not in self._found:
            self._found[name] = self._look_up(name)
        return self._found[name][1]

    def places(self) -> dict[str, str]:
        """Where each name asked for was found."""
        return {name: place for name, (place, _) in sorted(self._found.items())}

    def drift(self, message: str) -> ToolMissing:
        """The error for something that this version does not have as opkit knows it."""
        return ToolMissing(
            f"TensorRT-LLM {self.version}: {message}",
            hint="opkit's trtllm backend is written against the sources that "
            "docs/backend-trtllm.md lists; use such a version, or extend "
            "opkit/layers/backends/trtllm",
        )

    def keywords(
        self,
        function: Callable[..., Any],
        *,
        must: Mapping[str, Any] | None = None,
        may: Mapping[str, Any] | None = None,
        one_of: Mapping[str, Callable[[], Any]] | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments that ``function`` takes in this version.

        Args:
            function: a function or class.
            must: what it has to take.
            may: what is left out where it is unknown.
            one_of: names of one argument, newest first, and how its value is made for each.

        Raises:
            ToolMissing: it lacks something; the message names the version, the function and what
                it does take.
        """
        try:
            known = parameters(function)
        except ValueError as error:  # compiled, without a signature
            raise self.drift(f"{function!r} does not tell what it takes") from error
        missing = sorted(set(must or {}) - known)
        if missing:
            raise self._lacks(function, ", ".join(missing), known)
        found = dict(must or {})
        found |= {name: value for name, value in (may or {}).items() if name in known}
        if one_of:
            chosen = next((name for name in one_of if name in known), None)
            if chosen is None and takes_any(function):
                chosen = next(iter(one_of))
            if chosen is None:
                raise self._lacks(function, " or ".join(one_of), known)
            found[chosen] = one_of[chosen]()
        return found

    def call(self, name: str, *args: Any, **choice: Mapping[str, Any] | None) -> Any:
        """Call what is called ``name`` with the keywords of ``choice``, see :meth:`keywords`."""
        function = self.get(name)
        return function(*args, **self.keywords(function, **choice))

    def _look_up(self, name: str) -> tuple[str, Any]:
        tried = [f"{PACKAGE}.{place}" for place in _PLACES[name]]
        for place in tried:
            try:
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                if not _is_of(error.name, place):
                    raise self.drift(f"{place} needs {error.name}, which is missing") from error
                continue
            except (ImportError, OSError, RuntimeError) as error:
                raise self.drift(f"{place} cannot be imported ({error})") from error
            if hasattr(module, name):
                return place, getattr(module, name)
        raise self.drift(f"no {name} in {' or '.join(tried)}")

    def _lacks(self, function: Callable[..., Any], what: str, known: frozenset[str]) -> ToolMissing:
        name = getattr(function, "__qualname__", repr(function))
        return self.drift(f"{name} takes no {what}; it takes {', '.join(sorted(known))}")


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names that ``function`` takes by keyword; not what its ``**kwargs`` would swallow.

    Of a class: the fields of a pydantic model or of a dataclass, whose ``__init__`` may hide them
    (``DSAtrtllmAttentionMetadata`` does), else those of its ``__init__`` and, as long as that
    passes ``**kwargs`` on, of its bases'. ``__new__`` says nothing (``Mapping`` has a catch-all).
    """
    if not isinstance(function, type):
        return _named(function)
    fields = getattr(function, "model_fields", None)
    if isinstance(fields, Mapping):
        return frozenset(fields)
    if dataclasses.is_dataclass(function):
        return frozenset(item.name for item in dataclasses.fields(function) if item.init)
    found: frozenset[str] = frozenset()
    for base in function.__mro__[:-1]:  # without object
        if "__init__" in vars(base):
            found |= _named(vars(base)["__init__"])
            if not takes_any(vars(base)["__init__"]):
                break
    return found - {"self"}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether it has ``**kwargs``."""
    return any(
        item.kind is inspect.Parameter.VAR_KEYWORD
        for item in inspect.signature(function).parameters.values()
    )


def _named(function: Callable[..., Any]) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(
        item.name for item in inspect.signature(function).parameters.values() if item.kind in kinds
    )


def _is_of(missing: str | None, place: str) -> bool:
    """Whether the module that is missing is ``place`` or lies above it."""
    return missing is not None and (place == missing or place.startswith(f"{missing}."))

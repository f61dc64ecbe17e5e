"""What a TensorRT-LLM of paper is made of: upstream's signatures, tensors, torch.

Every function and class takes exactly the parameters that the sources have, and writes down each
call; a call with any other parameter fails, also where upstream's ``**kwargs`` would swallow it.
What they do is the least that the next step needs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "trtllm_signatures.json"
LAYOUTS = ("old", "new")


def signatures(layout: str) -> dict[str, Any]:
    """The recorded signatures of one layout."""
    version: dict[str, Any] = json.loads(FILE.read_text())["versions"][layout]
    return version


def signature(parameters: list[str], *, bound: bool = False) -> inspect.Signature:
    """A signature from names as the file writes them; with ``self`` first where not bound."""
    kinds = inspect.Parameter
    kind, found = kinds.POSITIONAL_OR_KEYWORD, []
    for text in parameters if bound else ["self", *parameters]:
        if text == "*":
            kind = kinds.KEYWORD_ONLY
        elif text.startswith("**"):
            found.append(kinds(text[2:], kinds.VAR_KEYWORD))
        else:
            # Upstream's dataclasses mix fields with and without defaults: by keyword only.
            name, has_default = text.removesuffix("="), text.endswith("=")
            late = bool(found) and found[-1].default is not kinds.empty and not has_default
            kind = kinds.KEYWORD_ONLY if late else kind
            found.append(kinds(name, kind, default=None if has_default else kinds.empty))
    return inspect.Signature(found)


class Tensor:
    """A tensor that knows its shape and element type, and what was done to it.

    As torch has it, one that was made in inference mode may not be written to outside.
    """

    modes = 0  # how many inference modes are open

    def __init__(self, shape: tuple[int, ...], dtype: str = "torch.bfloat16", data: Any = None):
        self.shape, self.dtype, self.data = tuple(shape), dtype, data
        self.device, self.done = "cuda", []
        self.inference = bool(Tensor.modes)

    ndim = property(lambda self: len(self.shape))

    def is_floating_point(self) -> bool:
        return "float" in str(self.dtype)

    def to(self, *args: Any, **_: Any) -> Tensor:
        dtype = next((item for item in args if str(item).startswith("torch.")), self.dtype)
        return Tensor(self.shape, dtype)

    def tolist(self) -> Any:
        return self.data

    def copy_(self, other: Tensor) -> Tensor:
        return self._written("copy_", other)

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, slice):
            length = len(range(*key.indices(self.shape[0])))
            part = Tensor((length, *self.shape[1:]), self.dtype)
        else:
            part = Tensor(self.shape[1:], self.dtype, data=key)
        part.done, part.inference = self.done, self.inference
        return part

    def zero_(self) -> Tensor:
        return self._written("zero_", None)

    def _written(self, how: str, other: Any) -> Tensor:
        if self.inference and not Tensor.modes:
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode")
        self.done.append((how, other))
        return self

    def same(self, *_: Any, **__: Any) -> Tensor:
        return self

    float = abs = max = reshape = flatten = mul_ = detach = clone = expand_as = same
    __truediv__ = same


class Module:
    """What fake layers share with ``torch.nn.Module``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def modules(self) -> Iterator[Any]:
        yield self

    def parameters(self) -> Iterator[Tensor]:
        yield Tensor((8, 16, 16))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield "w3_w1_weight", Tensor((8, 16, 16))


class Fake:
    """One installed fake: what was called, and what it shall do."""

    def __init__(self, layout: str, sm: tuple[int, int]) -> None:
        self.layout, self.sm, self.spec = layout, sm, signatures(layout)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.modules: dict[str, types.ModuleType] = {}
        self.version = self.spec["fake_version"]
        self.cache_algorithm: str | None = None
        self.attention: Callable[[], Any] = lambda: self.named("TrtllmAttention")()
        self.rooms = True  # whether the cache manager has room
        self.extra: Any = None

    def named(self, name: str) -> Any:
        """The fake class or function of that name."""
        for module in self.modules.values():
            if hasattr(module, name):
                return getattr(module, name)
        raise KeyError(name)

    def made(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of a name."""
        return [arguments for called, arguments in self.calls if called == name]

    def entry(self, name: str) -> dict[str, Any]:
        """What the file says of a name."""
        for names in self.spec["modules"].values():
            if name in names:
                found: dict[str, Any] = names[name]
                return found
        raise KeyError(name)

    def strict(
        self, name: str, parameters: list[str], body: Callable[..., Any], *, bound: bool = False
    ) -> Callable[..., Any]:
        """A function that takes these parameters and no others, writes down and does ``body``."""
        known = signature(parameters, bound=bound)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = known.bind(*args, **kwargs).arguments
            swallowed = next(
                (p.name for p in known.parameters.values() if p.kind == p.VAR_KEYWORD), ""
            )
            if found.get(swallowed):
                raise TypeError(f"{name}() would swallow {', '.join(found[swallowed])}")
            self.calls.append((name, {key: value for key, value in found.items() if key != "self"}))
            return body(**found)

        call.__signature__ = known  # type: ignore[attr-defined]
        call.__name__ = call.__qualname__ = name
        return call


def torch_of(fake: Fake) -> types.ModuleType:
    """A torch that has what the backend uses."""
    torch = types.ModuleType("torch")
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda: fake.sm,
        get_device_name=lambda *_: "Paper GPU",
        synchronize=lambda: None,
        empty_cache=lambda: fake.calls.append(("empty_cache", {})),
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: fake.calls.append(("replay", {}))),
        graph=lambda _: contextlib.nullcontext(),
    )

    def tensor(data: Any, dtype: str, device: str = "cpu") -> Tensor:
        rows = (1, len(data[0])) if data and isinstance(data[0], list) else (len(data),)
        made = Tensor(rows, dtype, data)
        made.device = device
        return made

    @contextlib.contextmanager
    def inference_mode() -> Iterator[None]:
        Tensor.modes += 1
        try:
            yield
        finally:
            Tensor.modes -= 1

    def drawn(*shape: Any, dtype: str = "torch.float32", **_: Any) -> Tensor:
        return Tensor(shape[0] if isinstance(shape[0], tuple) else shape, dtype)

    contents = {
        "Tensor": Tensor,
        "cuda": cuda,
        "version": types.SimpleNamespace(cuda="13.0"),
        "__version__": "2.13.0",
        "int": "torch.int32",
        "int32": "torch.int32",
        "bfloat16": "torch.bfloat16",
        "float8_e4m3fn": "torch.float8_e4m3fn",
        "tensor": tensor,
        "randn": drawn,
        "Generator": lambda *_: types.SimpleNamespace(manual_seed=lambda seed: seed),
        "inference_mode": inference_mode,
        "cat": lambda parts: Tensor((sum(item.shape[0] for item in parts), *parts[0].shape[1:])),
        "save": lambda stored, path: Path(path).write_text(
            json.dumps({name: value.shape for name, value in stored.items()})
        ),
    }
    for name, value in contents.items():
        setattr(torch, name, value)
    return torch

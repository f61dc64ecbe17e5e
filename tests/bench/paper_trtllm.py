"""A TensorRT-LLM of paper: upstream's signatures, and the least that an answer needs.

Every call is bound to the recorded signature; a call with any other parameter fails.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).parent / "trtllm_signatures.json"
VERSIONS: dict[str, Any] = json.loads(FILE.read_text())["versions"]


def signature(parameters: list[str], *, bound: bool = False) -> inspect.Signature:
    """A signature from names as the file writes them."""
    kind, found = inspect.Parameter.POSITIONAL_OR_KEYWORD, []
    for text in parameters if bound else ["self", *parameters]:
        if text == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif text.startswith("**"):
            found.append(inspect.Parameter(text[2:], inspect.Parameter.VAR_KEYWORD))
        else:
            default = None if text.endswith("=") else inspect.Parameter.empty
            found.append(inspect.Parameter(text.removesuffix("="), kind, default=default))
    return inspect.Signature(found)


def bound(where: dict[str, Any], name: str) -> Any:
    """A callable that takes what upstream's takes, and gives the arguments back by name."""
    made = signature(where[name]["parameters"], bound=True)

    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments = dict(made.bind(*args, **kwargs).arguments)
        return {
            **{k: v for k, v in arguments.items() if k != "kwargs"},
            **arguments.get("kwargs", {}),
        }

    call.__signature__ = made  # type: ignore[attr-defined]
    call.__qualname__ = name
    return call


class Answers:
    """``RequestOutput`` in a stream: its tokens grow by ``per_step``, and it gives itself."""

    def __init__(self, tokens: int, per_step: int) -> None:
        self.outputs = [SimpleNamespace(token_ids=[])]
        self._left, self._per_step = tokens, per_step

    async def __aiter__(self) -> AsyncIterator[Answers]:
        while self._left > 0:
            step = min(self._per_step, self._left)
            self._left -= step
            self.outputs[0].token_ids += [1] * step
            yield self


class Paper:
    """The modules of one version; ``calls`` holds what was called with what."""

    def __init__(self, version: str, *, per_step: int = 1, short: int = 0) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.per_step, self.short = per_step, short
        self._recorded = VERSIONS[version]
        self.modules = {name: ModuleType(name) for name in self._recorded if name != "what"}
        root = self._recorded["tensorrt_llm"]
        package: Any = self.modules["tensorrt_llm"]
        package.__version__ = f"of paper ({version})"
        package.SamplingParams = self._noted(root, "SamplingParams")
        package.LLM = self._llm(root)
        llmapi = self._recorded["tensorrt_llm.llmapi"]
        vars(self.modules["tensorrt_llm.llmapi"])["KvCacheConfig"] = self._noted(
            llmapi, "KvCacheConfig"
        )
        if built := self._recorded["tensorrt_llm.runtime"]:
            runtime: Any = self.modules["tensorrt_llm.runtime"]
            runtime.SamplingConfig = bound(built, "SamplingConfig")
            runtime.ModelRunner = self._runner(built)
        self.modules["torch"] = paper_torch(self.calls)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Paper:
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def called(self, name: str) -> list[dict[str, Any]]:
        return [arguments for each, arguments in self.calls if each == name]

    def _noted(self, where: dict[str, Any], name: str) -> Any:
        inner = bound(where, name)

        def call(*args: Any, **kwargs: Any) -> SimpleNamespace:
            arguments = inner(*args, **kwargs)
            self.calls.append((name, arguments))
            return SimpleNamespace(**arguments)

        call.__signature__ = inner.__signature__  # type: ignore[attr-defined]
        call.__qualname__ = name
        return call

    def _llm(self, where: dict[str, Any]) -> Any:
        noted = {name: self._noted(where, name) for name in where}

        class LLM:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                noted["LLM.__init__"](*args, **kwargs)
                self.args = SimpleNamespace(max_seq_len=2048, backend="pytorch")

        def generate_async(*args: Any, **kwargs: Any) -> Answers:
            asked = noted["LLM.generate_async"](*args, **kwargs)
            return Answers(asked.sampling_params.max_tokens - self.short, self.per_step)

        generate_async.__signature__ = noted["LLM.generate_async"].__signature__  # type: ignore
        generate_async.__qualname__ = "LLM.generate_async"
        LLM.generate_async = staticmethod(generate_async)  # type: ignore[attr-defined]
        LLM.shutdown = staticmethod(noted["LLM.shutdown"])  # type: ignore[attr-defined]
        return LLM

    def _runner(self, where: dict[str, Any]) -> Any:
        from_dir = self._noted(where, "ModelRunner.from_dir")
        generate = self._noted(where, "ModelRunner.generate")
        sampling = bound(where, "SamplingConfig")

        class ModelRunner:
            vocab_size, max_seq_len, max_input_len, max_batch_size = 32000, 1024, 512, 8

        def make(*args: Any, **kwargs: Any) -> ModelRunner:
            from_dir(*args, **kwargs)
            return ModelRunner()

        def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
            asked = vars(generate(*args, **kwargs))
            named = signature(where["ModelRunner.generate"]["parameters"], bound=True).parameters
            # What is left is handed to SamplingConfig.update: it must know every name.
            config = sampling(**{k: v for k, v in asked.items() if k not in named})
            ended = [
                len(prompt.values) + config["max_new_tokens"] - self.short
                for prompt in asked["batch_input_ids"]
            ]
            return {"sequence_lengths": SimpleNamespace(tolist=lambda: [[n] for n in ended])}

        for function, noted in ((make, from_dir), (run, generate)):
            function.__signature__ = noted.__signature__  # type: ignore[attr-defined]
            function.__qualname__ = noted.__qualname__
        ModelRunner.from_dir = staticmethod(make)  # type: ignore[attr-defined]
        ModelRunner.generate = staticmethod(run)  # type: ignore[attr-defined]
        return ModelRunner


def paper_torch(calls: list[tuple[str, dict[str, Any]]]) -> Any:
    """The few of torch's that a built engine needs."""
    import contextlib

    torch: Any = ModuleType("torch")
    torch.int32 = "int32"
    torch.tensor = lambda values, dtype: SimpleNamespace(values=values, dtype=dtype)
    torch.no_grad = contextlib.nullcontext
    torch.cuda = SimpleNamespace(synchronize=lambda: calls.append(("synchronize", {})))
    return torch

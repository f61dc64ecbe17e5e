"""TensorRT-LLM: the LLM API, and built engines through ``ModelRunner``. Never run by the authors.

``tests/bench/trtllm_signatures.json`` names file and commit of each call, and the tests hold this
file against them. Versions move fast, so what is called is looked for first, and what is missing
is said with the version.

* LLM API: ``llmapi/llm.py`` (``generate_async`` with ``streaming``), ``sampling_params.py``
  (without a tokenizer ``end_id`` must be given; upstream's own benchmark gives -1),
  ``executor/result.py`` (``__aiter__``; ``outputs[0].token_ids`` grows), and as a whole like
  ``bench/benchmark/utils/asynchronous.py``.
* Built engines, up to 1.2 or early 1.3: ``runtime/model_runner.py`` (``from_dir``, ``generate``;
  temperature 0 is turned into top_k 1 with a warning), ``runtime/generation.py``
  (``SamplingConfig``).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import time
from typing import Any

STREAMED_BY = "this engine's process (answers of generate_async as they arrive)"
# ModelRunner can stream, but then gathers all beams after every step, which is what is timed.
WHOLE_BY = "this engine's process (end of ModelRunner.generate; no time of a first token)"
NO_END = -1  # an end token that no model has


class Unfit(Exception):
    """This TensorRT-LLM lacks what the benchmark calls."""


class LlmApi:
    """One ``LLM``."""

    def __init__(self, options: dict[str, Any]) -> None:
        package = importlib.import_module("tensorrt_llm")
        version = _version(package)
        for name in ("LLM", "SamplingParams"):
            if not hasattr(package, name):
                raise Unfit(f"TensorRT-LLM {version} has no tensorrt_llm.{name}")
        wanted = {
            "model": options["model"],
            # Prompts are token ids, and nothing reads the text.
            "skip_tokenizer_init": True,
        }
        given = dict(options.get("engine_args") or {})
        # A prompt that was seen before would not be computed.
        cache = {"enable_block_reuse": False, **(given.pop("kv_cache_config", None) or {})}
        wanted["kv_cache_config"] = importlib.import_module("tensorrt_llm.llmapi").KvCacheConfig(
            **cache
        )
        wanted.update(given)
        self._sampling = package.SamplingParams
        needs(self._sampling, SAMPLING, version)
        self._llm = package.LLM(**wanted)
        needs(self._llm.generate_async, ("inputs", "sampling_params", "streaming"), version)
        self._loop = asyncio.new_event_loop()
        arguments = getattr(self._llm, "args", None)
        self.served = {
            "model": options["model"],
            "version": version,
            "max_length": int(getattr(arguments, "max_seq_len", None) or 0),
            "timed_by": STREAMED_BY,
            "facts": {"backend": str(getattr(arguments, "backend", "")), "kv_cache": cache},
        }

    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        """One repetition: all prompts at once, each answer streamed."""
        return self._loop.run_until_complete(self._generate(prompts, output))

    async def _generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        sampling = [
            self._sampling(
                max_tokens=output,
                end_id=NO_END,
                pad_id=NO_END,
                ignore_eos=True,
                temperature=0.0,
                detokenize=False,
            )
            for _ in prompts
        ]
        began = time.monotonic_ns()
        streams = [
            self._llm.generate_async(prompt, sampling_params=params, streaming=True)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        replies = await asyncio.gather(*[follow(stream) for stream in streams])
        ended = time.monotonic_ns()
        return {"began_ns": began, "ended_ns": ended, "replies": list(replies)}

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()
        self._loop.close()


async def follow(stream: Any) -> dict[str, Any]:
    """One request's answer, dated as it grows."""
    first = last = tokens = first_tokens = 0
    gaps: list[list[int]] = []
    async for answer in stream:
        now, so_far = time.monotonic_ns(), len(answer.outputs[0].token_ids)
        if so_far <= tokens:
            continue
        if not first:
            first, first_tokens = now, so_far
        else:
            gaps.append([now - last, so_far - tokens])
        last, tokens = now, so_far
    return {
        "first_ns": first or None, "last_ns": last or None, "tokens": tokens,
        "first_tokens": first_tokens, "gaps": gaps,
    }  # fmt: skip


class BuiltEngine:
    """An engine folder of ``trtllm-build``, on one GPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        package = importlib.import_module("tensorrt_llm")
        version = _version(package)
        runtime = importlib.import_module("tensorrt_llm.runtime")
        if not hasattr(runtime, "ModelRunner"):
            raise Unfit(
                f"TensorRT-LLM {version} has no ModelRunner: built engines run up to 1.2 or early "
                "1.3; --model DIR uses the LLM API"
            )
        given = dict(options.get("engine_args") or {})
        needs(runtime.ModelRunner.from_dir, ("engine_dir", "rank", *given), version)
        needs(runtime.ModelRunner.generate, ("batch_input_ids",), version)
        needs(runtime.SamplingConfig, GENERATING, version)
        self._torch = importlib.import_module("torch")
        self._runner = runtime.ModelRunner.from_dir(
            **{"engine_dir": options["engine_dir"], "rank": 0, **given}
        )
        self.served = {
            "model": options["engine_dir"],
            "version": version,
            "vocab": int(getattr(self._runner, "vocab_size", 0)),
            "max_length": int(getattr(self._runner, "max_seq_len", 0)),
            "timed_by": WHOLE_BY,
            "facts": {
                "max_input_length": getattr(self._runner, "max_input_len", None),
                "max_batch_size": getattr(self._runner, "max_batch_size", None),
            },
        }

    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        """One repetition: one batch, timed as a whole."""
        torch = self._torch
        batch = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
        torch.cuda.synchronize()
        began = time.monotonic_ns()
        with torch.no_grad():
            told = self._runner.generate(
                batch_input_ids=batch,
                max_new_tokens=output,
                end_id=NO_END,
                pad_id=0,
                temperature=1.0,
                top_k=1,
                output_sequence_lengths=True,
                return_dict=True,
            )
        torch.cuda.synchronize()
        ended = time.monotonic_ns()
        lengths = told["sequence_lengths"].tolist()  # of each prompt and beam, prompt included
        replies = [
            reply(int(beams[0]) - len(prompt), output, ended)
            for prompt, beams in zip(prompts, lengths, strict=True)
        ]
        return {"began_ns": began, "ended_ns": ended, "replies": replies}

    def close(self) -> None:
        """The engine lives in this process."""


def reply(tokens: int, asked: int, ended: int) -> dict[str, Any]:
    """One request's answer: of a single token it is known when it was there."""
    when = ended if asked == 1 else None
    return {"first_ns": when, "last_ns": when, "tokens": tokens}


SAMPLING = ("max_tokens", "end_id", "pad_id", "ignore_eos", "temperature", "detokenize")
GENERATING = (
    "end_id", "pad_id", "max_new_tokens", "temperature", "top_k", "output_sequence_lengths",
    "return_dict",
)  # fmt: skip


def needs(called: Any, names: tuple[str, ...], version: str) -> None:
    """Look whether a callable takes parameters of these names.

    Raises:
        Unfit: one is missing.
    """
    parameters = inspect.signature(called).parameters
    missing = [name for name in names if name not in parameters]
    if missing:
        raise Unfit(f"TensorRT-LLM {version}: {called.__qualname__} takes no {', '.join(missing)}")


def start(options: dict[str, Any]) -> Any:
    """An engine that is ready."""
    return BuiltEngine(options) if options.get("engine_dir") else LlmApi(options)


def _version(package: Any) -> str:
    return str(getattr(package, "__version__", "of unknown version"))

"""vLLM's offline engine, timed by its own clock.

Sources (vLLM 0.24.0): ``entrypoints/llm.py`` (``LLM``, ``generate``), ``sampling_params.py``,
``v1/metrics/stats.py`` (``RequestStateStats``: ``first_token_ts`` and ``last_token_ts``, seconds of
``time.monotonic`` in the engine core, set when a step's output is made; ``RequestOutput.metrics``
holds them with ``disable_log_stats=False``). Linux has one monotonic clock for all processes, so
they compare with this process's.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

TIMED_BY = "vLLM's engine core (RequestOutput.metrics: first_token_ts, last_token_ts)"


class Engine:
    """One ``LLM``: what a benchmark needs is set here, the caller's own keywords come last."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._vllm = importlib.import_module("vllm")
        wanted = {
            "model": options["model"],
            # Prompts are token ids, and nothing reads the text.
            "skip_tokenizer_init": True,
            # A prompt that was seen before would not be computed.
            "enable_prefix_caching": False,
            # Without statistics a request carries no times.
            "disable_log_stats": False,
        }
        wanted.update(options.get("engine_args") or {})
        self._llm = self._vllm.LLM(**wanted)
        config = self._llm.llm_engine.vllm_config
        self.served = {
            "model": options["model"],
            "version": str(self._vllm.__version__),
            "vocab": int(config.model_config.get_vocab_size()),
            "max_length": int(config.model_config.max_model_len),
            "timed_by": TIMED_BY,
            "facts": facts(config),
        }

    def generate(self, prompts: list[list[int]], output: int) -> dict[str, Any]:
        """One repetition: all prompts in one call. Times are ns of the monotonic clock."""
        # min_tokens would need the tokenizer's end token in some versions; ignore_eos is enough.
        params = self._vllm.SamplingParams(
            max_tokens=output, ignore_eos=True, temperature=0.0, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.monotonic_ns()
        answers = self._llm.generate(requests, params, use_tqdm=False)
        ended = time.monotonic_ns()
        replies = [reply(each, began, ended) for each in answers]
        return {"began_ns": began, "ended_ns": ended, "replies": replies}

    def close(self) -> None:
        """vLLM ends its processes when this one ends."""


def start(options: dict[str, Any]) -> Engine:
    """An engine that is ready."""
    return Engine(options)


def reply(answer: Any, began: int, ended: int) -> dict[str, Any]:
    """A ``RequestOutput`` as plain data."""
    told: dict[str, Any] = {"tokens": sum(len(each.token_ids) for each in answer.outputs)}
    told["cached"] = getattr(answer, "num_cached_tokens", None)
    first = int(getattr(answer.metrics, "first_token_ts", 0.0) * 1e9)
    last = int(getattr(answer.metrics, "last_token_ts", 0.0) * 1e9)
    # Of another clock, or none: better no time than a wrong one.
    if began <= first <= last <= ended:
        told.update(first_ns=first, last_ns=last)
    return told


def _name(mode: Any) -> str:
    """An enum's member by its name alone."""
    return str(getattr(mode, "name", mode))


def facts(config: Any) -> dict[str, Any]:
    """What a number depends on beside the model, from a ``VllmConfig``."""
    torch = importlib.import_module("torch")
    return {
        "dtype": str(config.model_config.dtype),
        "quantization": config.model_config.quantization,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "load_format": str(config.load_config.load_format),
        "enforce_eager": bool(config.model_config.enforce_eager),
        "compilation_mode": _name(config.compilation_config.mode),
        "cudagraph_mode": _name(config.compilation_config.cudagraph_mode),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
    }

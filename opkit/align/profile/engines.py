"""The serving engines known: how each is recognised, reached, asked, and made to emit NVTX ranges.

Sources: vLLM 0.24.0 (``entrypoints/``, ``v1/worker/gpu_worker.py``,
``v1/worker/gpu_model_runner.py``, ``config/profiler.py``), SGLang 0.5.14 as run on an H100,
TensorRT-LLM main of mid-2026 (``commands/serve.py``, ``serve/openai_protocol.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.sglang.labels import FORWARD_HOOKS

Body = dict[str, Any]


@dataclass(frozen=True)
class Switch:
    """A flag that a recording needs: for NVTX ranges, or for steps of known shape.

    Attributes:
        flag: added unless the command has it already.
        value: its value; empty for a flag without one.
        needs: added only when the command has one of these flags; empty: always.
        without: the note when ``needs`` is not met.
        unless: not added when the command has one of these flags.
        note: what to tell when it was added.
    """

    flag: str
    value: str = ""
    needs: tuple[str, ...] = ()
    without: str = ""
    unless: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """One serving engine. In its flags, dashes and underscores count as the same.

    Attributes:
        name: the backend's name in opkit.
        heads: runs of words that begin its command; the first is compared by file name.
        host, port: where it listens by default.
        health, version, completions: URL paths.
        model_flags: flags that name the model; ``positional``: or the first word after the head.
        tp_flags: flags of tensor parallelism.
        frontend: flags of the HTTP server, which mean nothing to the engine itself.
        switches: see :class:`Switch`.
        labels_on: URL path that switches step labels on (POST), where a flag alone does not.
        env: variables it needs for NVTX, set when the user has not set them, with the reason.
        config_flags: flags that name a YAML file; what goes there: ``config_nvtx`` and, since the
            file's section replaces the command's own, unless one of ``config_clash`` is in it,
            ``config_cache``.
        imports_opkit: a switch names code of opkit, which the server's interpreter must find.
        asks: what else a request says, so that the answer names its tokens.
    """

    name: str
    heads: tuple[tuple[str, ...], ...]
    host: str
    port: int
    health: str
    version: str
    completions: str
    model_flags: tuple[str, ...]
    positional: bool
    tp_flags: tuple[str, ...]
    frontend: tuple[str, ...]
    switches: tuple[Switch, ...] = ()
    labels_on: str = ""
    env: Mapping[str, tuple[str, str]] | None = None
    config_flags: tuple[str, ...] = ()
    config_nvtx: str = ""
    config_cache: str = ""
    config_clash: tuple[str, ...] = ()
    imports_opkit: bool = False
    asks: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str, prompts: list[list[int]], output: int) -> Body:
        """The JSON of one request for all ``prompts``, so that the scheduler sees them together."""
        if self.completions == "/generate":
            # A least number of tokens is refused without a tokenizer; nothing ends them early.
            sampling = {"max_new_tokens": output, "temperature": 0.0, "ignore_eos": True}
            return {
                "input_ids": prompts,
                "sampling_params": sampling,
                "stream": False,
            }
        return {
            "model": model,
            "prompt": prompts,
            "max_tokens": output,
            "min_tokens": output,
            "ignore_eos": True,
            "temperature": 0.0,
            "detokenize": False,
            "stream": False,
            **self.asks,
        }


def tokens_out(answer: Any) -> int | None:
    """The output tokens that an answer reports for all its requests; None when it tells none."""
    if isinstance(answer, list):  # SGLang: one object a prompt
        counts = [tokens_out(item) for item in answer]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None
    if not isinstance(answer, dict):
        return None
    place = answer.get("usage") or answer.get("meta_info") or {}
    count = place.get("completion_tokens") if isinstance(place, dict) else None
    return count if isinstance(count, int) else None


def token_ids(answer: Any) -> tuple[tuple[int, ...], ...]:
    """The output tokens of each request, in the order of the prompts; empty when not all are told.

    vLLM 0.24 (``entrypoints/openai/completion/protocol.py``): ``choices`` with ``index`` and
    ``token_ids``. SGLang 0.5.14 (``managers/tokenizer_manager.py``): ``output_ids``.
    """
    if isinstance(answer, dict):
        choices = answer.get("choices")
        told = choices if isinstance(choices, list) else [answer]
    else:
        told = answer if isinstance(answer, list) else []
    if not told or not all(isinstance(item, dict) for item in told):
        return ()
    told = sorted(told, key=lambda item: item.get("index") or 0)
    found = [item.get("token_ids") or item.get("output_ids") for item in told]
    if not all(isinstance(ids, list) and all(isinstance(i, int) for i in ids) for ids in found):
        return ()
    return tuple(tuple(ids) for ids in found if ids)


_V2_NOTE = "vLLM's V2 model runner has no module ranges (0.24.0); the V1 runner serves this run"
_CACHE_NOTE = "so that every prompt is computed whole: prompts of the waves begin alike"
_SGLANG_NOTE = (
    "no module ranges: SGLang's layerwise marker cannot be traced by its piecewise prefill graphs "
    "(compiler error at start); add --disable-piecewise-cuda-graph for a run with them"
)

_LABELS_NOTE = "to make SGLang's step names NVTX ranges"
ENGINES = (
    Engine(
        name="vllm",
        heads=(
            ("vllm", "serve"),
            ("-m", "vllm.entrypoints.cli.main", "serve"),
            ("-m", "vllm.entrypoints.openai.api_server"),
        ),
        host="127.0.0.1",
        port=8000,
        health="/health",
        version="/version",
        completions="/v1/completions",
        model_flags=("--model",),
        positional=True,
        tp_flags=("--tensor-parallel-size", "-tp"),
        frontend=("--host", "--port", "--api-key", "--uvicorn-log-level", "--root-path"),
        switches=(
            Switch("--enable-layerwise-nvtx-tracing"),
            # Step labels exist only once a configured profiler was started (gpu_worker.py, profile
            # and annotate_profile); cudaProfilerStart means nothing to a session of nsys launch.
            Switch("--profiler-config", '{"profiler":"cuda"}'),
            Switch(
                "--no-enable-prefix-caching", unless=("--enable-prefix-caching",), note=_CACHE_NOTE
            ),
        ),
        labels_on="/start_profile",
        env={"VLLM_USE_V2_MODEL_RUNNER": ("0", _V2_NOTE)},
        asks={"return_token_ids": True},
    ),
    Engine(
        name="trtllm",
        heads=(("trtllm-serve", "serve"), ("trtllm-serve",)),
        host="127.0.0.1",
        port=8000,
        health="/health",
        version="/version",
        completions="/v1/completions",
        model_flags=(),
        positional=True,
        tp_flags=("--tp-size", "--tensor-parallel-size"),
        frontend=("--host", "--port"),
        env={"TLLM_LLMAPI_ENABLE_NVTX": ("1", "")},
        config_flags=("--extra_llm_api_options", "--config"),
        config_nvtx="enable_layerwise_nvtx_marker: true\n",
        config_cache="kv_cache_config:\n  enable_block_reuse: false\n",
        config_clash=(
            "--free_gpu_memory_fraction",
            "--kv_cache_free_gpu_memory_fraction",
            "--kv_cache_dtype",
        ),
    ),
    Engine(
        name="sglang",
        heads=(("-m", "sglang.launch_server"), ("sglang", "serve")),
        host="127.0.0.1",
        port=30000,
        # /health_generate would send a request of its own through the engine; warm-up does that.
        health="/health",
        version="/server_info",
        completions="/generate",
        imports_opkit=True,
        model_flags=("--model-path", "--model"),
        positional=False,
        tp_flags=("--tp-size", "--tensor-parallel-size", "--tp"),
        frontend=("--host", "--port", "--api-key", "--log-level-http"),
        switches=(
            Switch(
                "--enable-layerwise-nvtx-marker",
                needs=("--disable-piecewise-cuda-graph",),
                without=_SGLANG_NOTE,
            ),
            Switch("--disable-radix-cache", note=_CACHE_NOTE),
            # Called once in every scheduler process; it registers no hook (docs/backend-sglang.md).
            Switch("--forward-hooks", FORWARD_HOOKS, note=_LABELS_NOTE),
        ),
    ),
)


def engine_named(name: str) -> Engine:
    """The engine of that backend name.

    Raises:
        BadInput: there is none.
    """
    for engine in ENGINES:
        if engine.name == name:
            return engine
    known = ", ".join(engine.name for engine in ENGINES)
    raise BadInput(f"{name}: not a known serving engine ({known})")


def find_head(words: list[str]) -> tuple[Engine, int, int] | None:
    """The engine whose command stands in ``words``, and where its head begins and ends."""
    for start in range(len(words)):
        for engine in ENGINES:
            for head in sorted(engine.heads, key=len, reverse=True):
                found = words[start : start + len(head)]
                if len(found) == len(head) and [Path(found[0]).name, *found[1:]] == list(head):
                    return engine, start, start + len(head)
    return None

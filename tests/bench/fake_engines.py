"""Stand-ins for ``vllm`` and ``torch``, written into a folder for a child process to import.

Their signatures are those that opkit calls in vLLM 0.24.0; what they do besides is told by
variables of the environment. For tests of the process around an engine, never for a number.
"""

from __future__ import annotations

from pathlib import Path

VLLM = """
import os, signal, subprocess, sys, time
from types import SimpleNamespace as Some

__version__ = "0.24.0"
DO = os.environ.get("FAKE_DO", "")


class SamplingParams:
    def __init__(self, *, max_tokens, ignore_eos, temperature, detokenize):
        assert ignore_eos is True and temperature == 0.0 and detokenize is False
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, *, skip_tokenizer_init, enable_prefix_caching, disable_log_stats,
                 load_format="auto", **more):
        assert skip_tokenizer_init and not enable_prefix_caching and not disable_log_stats
        print("the fake engine prints", flush=True)
        if DO == "invalid":
            class ValidationError(ValueError):
                pass
            raise ValidationError("1 validation error for ModelConfig\\n  Value error, Invalid "
                                  "repository ID or local directory specified: 'dir'")
        if DO == "no model":
            raise ValueError("no such model\\nand a second line")
        if DO == "core fails":
            for line in ("EngineCore failed to start.", "Traceback (most recent call last):",
                         '  File "/x/core.py", line 1, in run',
                         "ValueError: Free memory is too small"):
                print("(EngineCore pid=7) ERROR 11-21 23:37:08 [core.py:1231]", line,
                      file=sys.stderr, flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if DO == "slow start":
            time.sleep(600)
        if DO == "worker":  # a process that does not end by itself, as an engine's may not
            self.worker = subprocess.Popen(
                [sys.executable, "-c", "import time, signal\\n"
                 "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(600)"])
            print("worker", self.worker.pid, flush=True)
        config = Some(
            model_config=Some(get_vocab_size=lambda: 1000, max_model_len=4096, dtype="bf16",
                              quantization=type if DO == "odd facts" else None,
                              enforce_eager=False),
            parallel_config=Some(tensor_parallel_size=1),
            scheduler_config=Some(max_num_batched_tokens=8192),
            cache_config=Some(cache_dtype="auto"),
            load_config=Some(load_format=load_format),
            compilation_config=Some(mode=Some(name="NONE"), cudagraph_mode=None),
        )
        self.llm_engine = Some(vllm_config=config)
        self.calls = 0

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.calls += 1
        if DO == "die" and self.calls == 2:
            print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if DO == "exit" and self.calls == 2:
            print("RuntimeError: EngineCore died", file=sys.stderr, flush=True)
            os._exit(3)
        if DO == "core dies" and self.calls == 2:
            class EngineDeadError(Exception):
                pass
            raise EngineDeadError("EngineCore encountered an issue. See stack trace (above) for "
                                  "the root cause.")
        if DO == "raise" and self.calls == 2:
            raise RuntimeError("CUDA out of memory")
        if DO == "hang" and self.calls == 2:
            time.sleep(600)
        if DO == "hang at tg" and sampling_params.max_tokens == 4:
            time.sleep(600)
        tokens = sampling_params.max_tokens - (1 if DO == "short" else 0)
        first = time.monotonic()
        times = Some(first_token_ts=first, last_token_ts=first + 1e-6 * (tokens - 1))
        if DO == "other clock":
            times = Some(first_token_ts=1.0, last_token_ts=2.0)
        if DO == "no times":
            times = None
        time.sleep(1e-3)
        assert all(set(prompt) == {"prompt_token_ids"} for prompt in prompts)
        return [Some(outputs=[Some(token_ids=[1] * tokens)], metrics=times, num_cached_tokens=0)
                for _ in prompts]
"""
TORCH = """
__version__ = "2.11.0"


class version:
    cuda = "13.0"
"""


def write_engines(folder: Path) -> dict[str, str]:
    """Write the stand-ins; the environment in which a child finds them."""
    for name, text in (("vllm", VLLM), ("torch", TORCH)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return {"PYTHONPATH": str(folder)}

"""The backend that the options ask for."""

from __future__ import annotations

import os
from pathlib import Path

from opkit.bench.backends.backend import Backend
from opkit.bench.backends.child import Child
from opkit.bench.backends.openai_url import OpenAiUrl
from opkit.bench.plan import BenchOptions
from opkit.bench.prompts import vocabulary

LOG_LEVEL_OF = ("VLLM_LOGGING_LEVEL", "TLLM_LOG_LEVEL")  # variables that the engines read


def make_backend(options: BenchOptions, folder: Path) -> Backend:
    """The engine, not started yet; ``folder`` takes its log."""
    if options.backend == "openai-url":
        vocab = options.vocab_size or (vocabulary(Path(options.model)) if options.model else 0)
        return OpenAiUrl(
            options.url,
            model=options.served_model,
            vocab=vocab,
            limit_s=options.limit_s,
            api_key=os.environ.get("OPENAI_API_KEY", "").strip(),  # from a file: with a line's end
        )
    levels = dict.fromkeys(LOG_LEVEL_OF, options.log_level.upper())
    return Child(
        options.backend,
        options.python,
        {
            "model": options.model,
            "engine_dir": str(options.engine_dir) if options.engine_dir else "",
            "engine_args": dict(options.engine_args),
        },
        folder / "engine.log",
        env={name: level for name, level in levels.items() if name not in os.environ},
        start_limit_s=options.start_limit_s,
        limit_s=options.limit_s,
    )

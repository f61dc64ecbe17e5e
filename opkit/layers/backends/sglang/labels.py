"""Step labels of SGLang, as NVTX ranges.

SGLang names every forward step (``step[EXTEND bs=4 toks=4096]``, ``step[DECODE bs=16]``: requests,
and new tokens of a prefill, before any padding), but only for torch's profiler. Its server option
``--forward-hooks`` imports a hook factory in every scheduler process once all graphs are captured;
:func:`step_ranges` is such a factory. Source: SGLang 0.5.14, ``model_executor/model_runner.py``
(``forward``, ``_build_step_span_name``) and ``model_executor/hook_manager.py``.

The server imports this module, and ``align`` reads :data:`FORWARD_HOOKS` from it: frameworks are
imported when a server calls the factory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The value of --forward-hooks that has a server label its steps. No module is hooked.
FORWARD_HOOKS = (
    '[{"name":"opkit","target_modules":["opkit.none"],'
    '"hook_factory":"opkit_in_server:step_ranges"}]'
)
_RUNNER = "sglang.srt.model_executor.model_runner"


def step_ranges(config: Any) -> None:  # noqa: ARG001  # the signature of a hook factory
    """Put every later step of this process into an NVTX range of its name; hook no module.

    Raises:
        AttributeError: this SGLang names no steps; the server does not start.
    """
    runner: Any = importlib.import_module(_RUNNER)
    nvtx = importlib.import_module("torch").cuda.nvtx
    runner._build_step_span_name  # noqa: B018  # without it there is nothing to write
    original = runner.profile_range

    @contextmanager
    def labelled(name: str, **options: Any) -> Iterator[None]:
        nvtx.range_push(name)
        try:
            with original(name, **options):
                yield
        finally:
            nvtx.range_pop()

    runner.profile_range = labelled

"""A worker extension of vLLM that stores what an op's modules are called with.

    vllm serve … --worker-extension-cls opkit_in_server.CaptureExtension
    POST /collective_rpc {"method": "opkit_capture_start", "args": ["{…}"]}

The second needs VLLM_SERVER_DEV_MODE=1 in the server's environment.

Source: vLLM 0.24.0, ``v1/worker/worker_base.py`` (extensions),
``entrypoints/serve/dev/rpc/api_router.py``, ``v1/worker/gpu_model_runner.py`` (``input_batch``,
``query_start_loc``). Hooks run in eager steps only: the server is started with --enforce-eager.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import vllm

from opkit.layers.backends.vllm.models import watched
from opkit.layers.captured import CaptureInfo, Key, in_order, key_text
from opkit.layers.prompts import prompt_tokens
from opkit.layers.provenance import base_versions

_KNOWN_BY = 8  # tokens of a prompt that tell its request
_MAX_REQUESTS = 1024  # of a wave


class CaptureExtension:
    """Methods that vLLM's worker gains; they are called through ``collective_rpc``."""

    model_runner: Any
    rank: int

    def opkit_capture_start(self, spec: str) -> dict[str, Any]:
        """Begin to store inputs.

        Args:
            spec: JSON: op, backend, layer, seed, command, created, model_sha256, region (the
                pattern of the op's modules) and folder.

        Returns:
            The modules that are watched.
        """
        if self.rank:  # every worker is called; a mock stands for the first
            return {"modules": []}
        self._opkit = _Capture(self.model_runner, json.loads(spec))
        return {"modules": sorted(self._opkit.modules)}

    def opkit_capture_stop(self) -> dict[str, Any]:
        """Write what was stored; returns the tokens of each sequence."""
        if self.rank:
            return {}
        lengths = self._opkit.stop()
        del self._opkit
        return lengths


class _Capture:
    """What is stored, and where it will go."""

    def __init__(self, runner: Any, spec: dict[str, Any]) -> None:
        self.runner, self.spec = runner, spec
        self.modules = _modules(runner.model, spec["region"], spec["layer"])
        if not self.modules:
            raise ValueError(f"no module of layer {spec['layer']} matches {spec['region']}")
        vocab = runner.model_config.get_vocab_size()
        self._numbers = {
            tuple(prompt_tokens(spec["seed"], number, _KNOWN_BY, vocab)): number
            for number in range(_MAX_REQUESTS)
        }
        self._parts: dict[Key, dict[str, list[tuple[int, Any]]]] = {}
        self._hooks = ExitStack()
        self._hooks.enter_context(watched(self.modules, self._tell))

    def stop(self) -> dict[str, int]:
        """Take the hooks away and write the folder."""
        self._hooks.close()
        folder = Path(self.spec["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        lengths = {}
        for key, inputs in self._parts.items():
            whole = {name: in_order(parts) for name, parts in inputs.items()}
            stored = {name: torch.cat(rows) for name, rows in whole.items() if rows}
            if not stored:  # its beginning was cached before
                continue
            lengths[key_text(key)] = min(value.shape[0] for value in stored.values())
            torch.save(stored, folder / f"sequence-{key_text(key)}.pt")
        known = {"op", "backend", "layer", "seed", "model_sha256", "command", "created"}
        CaptureInfo(
            **{name: value for name, value in self.spec.items() if name in known},
            versions={**base_versions(), "vllm": vllm.__version__},
            lengths=lengths,
        ).write(folder)
        return lengths

    def _tell(self, name: str, value: Any) -> None:
        """Store the rows of each known request of the step that is running."""
        batch = self.runner.input_batch
        bounds = self.runner.query_start_loc.np
        if not isinstance(value, torch.Tensor) or value.ndim != 2:
            return
        if value.shape[0] < bounds[batch.num_reqs] or not value.is_floating_point():
            return
        for index, identifier in enumerate(batch.req_ids[: batch.num_reqs]):
            prompt = self.runner.requests[identifier].prompt_token_ids or []
            number = self._numbers.get(tuple(prompt[:_KNOWN_BY]))
            if number is None:  # not one of the waves
                continue
            rows = value[int(bounds[index]) : int(bounds[index + 1])].detach().to("cpu", copy=True)
            start = int(batch.num_computed_tokens_cpu[index])
            inputs = self._parts.setdefault((len(prompt), number), {})
            inputs.setdefault(name, []).append((start, rows))


def _modules(model: Any, region: str, layer: int) -> dict[str, Any]:
    """The op's modules of a layer, by their path below it."""
    found = {}
    for name, module in model.named_modules():
        match = re.search(region, name)
        if match and int(match["layer"]) == layer:
            found[name.partition(f"layers.{layer}.")[2]] = module
    return found

"""Storing what an op is called with in a running TensorRT-LLM engine, for ``inputs = captured``.

``trtllm-serve`` offers no way into the process that holds the model, so this is for the LLM API, in
a run of its own that is not timed, with CUDA graphs off (a replayed graph calls no module):

    TLLM_WORKER_USE_SINGLE_PROCESS=1, one GPU:   store_inputs(model_of(llm), …)
    orchestrator_type="ray":                     ray_worker_extension_cls=CaptureExtension

Source: NVIDIA/TensorRT-LLM, ``llmapi/rlhf_utils.py`` (``WorkerExtension`` reaches the model as
``self.engine.model_engine.model``). Not run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from opkit.errors import ToolMissing
from opkit.layers.backends.trtllm.layer import Call, Seam, recording, seams_of
from opkit.layers.backends.trtllm.probe import Upstream
from opkit.layers.captured import CaptureInfo, Key, in_order, key_text
from opkit.layers.manifest import Wave
from opkit.layers.provenance import base_versions

EXTENSION = "opkit.layers.backends.trtllm.capture.CaptureExtension"
_PATH = ("_executor", "engine", "model_engine", "model")


def model_of(llm: Any, upstream: Upstream) -> Any:
    """The model of an LLM-API engine that runs in this process.

    Raises:
        ToolMissing: it runs in another one; the message says what can be done.
    """
    found = llm
    for name in _PATH:
        found = getattr(found, name, None)
        if found is None:
            raise ToolMissing(
                f"TensorRT-LLM {upstream.version} keeps this engine's model in another process, "
                "where opkit cannot store its inputs",
                hint="set TLLM_WORKER_USE_SINGLE_PROCESS=1 (one GPU), or use "
                f"orchestrator_type='ray' with ray_worker_extension_cls={EXTENSION!r}; "
                "trtllm-serve has no such way",
            )
    return found


class InputRecorder:
    """The inputs of an op in one layer, as they come.

    Args:
        model: the engine's.
        upstream: the version that is installed.
        layer: number of the decoder layer.
        seams: the op.
    """

    def __init__(self, model: Any, upstream: Upstream, layer: int, seams: Sequence[Seam]) -> None:
        self.upstream = upstream
        self._parts: dict[int, dict[str, list[tuple[int, Any]]]] = {}
        self._hooks = ExitStack()
        self._hooks.enter_context(recording(upstream, model.model.layers[layer], seams, self._tell))

    def stop(self) -> None:
        """Take the hooks away."""
        self._hooks.close()

    def write(self, folder: Path, info: CaptureInfo, waves: Sequence[Wave]) -> dict[str, int]:
        """Write the inputs of the waves' requests, as :mod:`opkit.layers.captured` reads them.

        The engine numbers requests in the order in which they were sent: wave after wave.

        Returns:
            The tokens stored of each sequence.
        """
        torch = importlib.import_module("torch")
        folder.mkdir(parents=True, exist_ok=True)
        keys: list[Key] = [
            (wave.prompt, number) for wave in waves for number in range(wave.requests)
        ]
        lengths = {}
        for key, request in zip(keys, sorted(self._parts), strict=False):
            stored = {
                name: torch.cat(in_order(parts)) for name, parts in self._parts[request].items()
            }
            lengths[key_text(key)] = min(value.shape[0] for value in stored.values())
            torch.save(stored, folder / f"sequence-{key_text(key)}.pt")
        versions = {**base_versions(), "tensorrt_llm": self.upstream.version}
        replace(info, versions=versions, lengths=lengths).write(folder)
        return lengths

    def _tell(self, call: Call) -> None:
        """Keep the rows of each request of the step that is running."""
        attributes = self.upstream.get("get_model_extra_attrs")()
        metadata = attributes["attention_metadata"]()
        starts = metadata.kv_cache_params.num_cached_tokens_per_seq
        steps = list(zip(metadata.request_ids, starts, metadata.seq_lens.tolist(), strict=True))
        for name, value in call.tensors().items():
            if value.ndim != 2 or not value.is_floating_point():
                continue
            row = 0
            for request, start, count in steps:
                part = value[row : row + count].detach().to("cpu", copy=True)
                inputs = self._parts.setdefault(int(request), {})
                inputs.setdefault(name, []).append((int(start), part))
                row += count


@contextmanager
def store_inputs(
    model: Any, info: CaptureInfo, architecture: str, waves: Sequence[Wave], folder: Path
) -> Iterator[InputRecorder]:
    """Store an op's inputs while the waves are sent, and write them at the end.

    Args:
        model: the engine's, see :func:`model_of`.
        info: what is captured; its op and layer say where.
        architecture: of the model.
        waves: the requests that will be sent, in order.
        folder: to write.
    """
    recorder = InputRecorder(model, Upstream(), info.layer, seams_of(info.op, architecture))
    try:
        yield recorder
    finally:
        recorder.stop()
    recorder.write(folder, info, waves)


class CaptureExtension:
    """Methods that TensorRT-LLM's Ray worker gains; they are called through its collective RPC."""

    engine: Any

    def opkit_capture_start(self, op: str, architecture: str, layer: int) -> None:
        """Begin to store the inputs of an op in a layer."""
        model = self.engine.model_engine.model
        self._opkit = InputRecorder(model, Upstream(), layer, seams_of(op, architecture))

    def opkit_capture_stop(
        self, folder: str, info: dict[str, Any], waves: list[tuple[int, int, int]]
    ) -> dict[str, int]:
        """Write what was stored; returns the tokens of each sequence."""
        self._opkit.stop()
        return self._opkit.write(
            Path(folder), CaptureInfo(**info), [Wave(*numbers) for numbers in waves]
        )

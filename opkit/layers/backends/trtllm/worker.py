"""One layer of a model in TensorRT-LLM's own classes, run step by step.

The model is made by the engine's ``ModelLoader`` from a folder whose config.json has one layer and
one rank's sizes: quantisation, its excluded modules, dummy weights and what follows loading are the
engine's own steps. opkit takes the scheduler's place: it says which tokens of which request a step
has.

Source: NVIDIA/TensorRT-LLM: ``tools/layer_wise_benchmarks/runner.py`` at 020cbd8 (upstream's own
way to run single layers), ``_torch/pyexecutor/model_loader.py`` at 004b733 and 1f41a4c,
``_torch/pyexecutor/model_engine.py`` at 001e670 and 1f41a4c (position ids, tuning).
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opkit.errors import BadInput, RunFailed, ToolMissing
from opkit.layers.backends.trtllm.caches import LayerCache, server_features
from opkit.layers.backends.trtllm.config import (
    Request,
    one_layer_folder,
    read_server,
    requests_of,
)
from opkit.layers.backends.trtllm.layer import Call, Seam, recording
from opkit.layers.backends.trtllm.probe import Upstream
from opkit.layers.geometry import read_geometry
from opkit.layers.op import AnyCase, Case, Op, Phase
from opkit.layers.plan import Plan
from opkit.layers.prompts import Sequences

TUNER_CACHE = "TLLM_AUTOTUNER_CACHE_PATH"
# Tokens of the request whose blocks fill pooled caches: four times what DSA's top-k picks.
_POOL_TOKENS = 8192


class LayerWorker:
    """Holds the model of one layer, and runs steps of it.

    Args:
        plan: what to run.
        op: which sizes a rank has its share of.
        overrides: further values for config.json.
        upstream: the version that is installed.

    Attributes:
        model: the engine's model.
        layer: its decoder layer.
        geometry: one rank's share of the model's sizes.
        cache: of the layer.
        metadata: of the step that ran last.

    Raises:
        BadInput: flags or cases that this server could not run.
        ToolMissing: no GPU is visible, or this version lacks what opkit uses.
        RunFailed: the engine cannot make this model.
    """

    def __init__(
        self, plan: Plan, op: Op, overrides: Mapping[str, Any], upstream: Upstream
    ) -> None:
        self.plan, self.upstream = plan, upstream
        self.torch = require_gpu()
        self.server = read_server(plan)
        self.geometry = read_geometry(plan.model).local(plan.tp_size, op.shares)
        self._check_lengths()
        self.metadata: Any = None
        self.sequences = Sequences(plan.seed, self.geometry.vocab_size, plan.answers)
        self._folder = one_layer_folder(plan, op, overrides)
        try:
            self.mapping = upstream.call(
                "Mapping", must={"world_size": 1, "rank": 0, "tp_size": 1, "pp_size": 1}
            )
            self.args = self._arguments()
            self.model = self._load()
            self.layer = self.model.model.layers[0]
            self._check_features()
            self.cache = LayerCache(
                upstream, plan, self.geometry, self.args, self.model, self.mapping
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def prepare(self, case: AnyCase, seams: Sequence[Seam], *, graph: bool) -> list[Call]:
        """Fill the caches for a case, run its step, and return the calls of the seams in it.

        Args:
            case: any but a single product.
            seams: the op, in the order of the calls; each is called once.
            graph: whether the step's metadata is to stand a CUDA graph.

        Raises:
            BadInput: the cache cannot hold the case.
            ToolMissing: the layer does not call the seams so.
        """
        requests = requests_of(case)
        if isinstance(case, Case):
            self.sequences.select(case)
        phase = case.phase if isinstance(case, Case) else Phase.CONTEXT
        self.cache.hold(requests, generation=phase is Phase.GENERATION)
        self._fill(requests)
        calls = self._step(requests, phase, seams, graph=graph)
        made = [call.seam.name for call in calls]
        if made != [seam.name for seam in seams]:
            raise self.upstream.drift(
                f"{type(self.layer).__name__} calls {', '.join(made) or 'nothing of the op'}; "
                f"expected {', '.join(seam.name for seam in seams)}"
            )
        return calls

    @contextmanager
    def engine_context(self) -> Iterator[None]:
        """What the engine has around a forward: no gradients, and the step's metadata."""
        attributes = self.model.model_config.extra_attrs
        with self.upstream.get("model_extra_attrs")(attributes), self.torch.inference_mode():
            current = self.upstream.get("get_model_extra_attrs")()
            current["attention_metadata"] = weakref.ref(self.metadata)
            yield

    def check_graph(self, case: AnyCase) -> None:
        """Refuse a case whose step this server would not replay from a CUDA graph.

        Raises:
            BadInput: the message says why.
        """
        if not isinstance(case, Case):
            return
        if case.phase is Phase.CONTEXT:
            raise BadInput("TensorRT-LLM replays no full CUDA graph in context: use mode eager")
        graphs = getattr(self.args, "cuda_graph_config", None)
        if graphs is None:
            raise BadInput("the plan asks for mode graph, the server's options switch graphs off")
        sizes = list(getattr(graphs, "batch_sizes", None) or ())
        if self.plan.limits == "server" and sizes and case.batch not in sizes:
            raise BadInput(
                f"the server has CUDA graphs for batches of {', '.join(map(str, sizes))}, not of "
                f"{case.batch}",
                "name it in cuda_graph_config.batch_sizes in the file of --config",
            )

    def tune(self) -> None:
        """Let the engine's tuner choose tactics, in a step as large as the cases and limits allow.

        The file in TLLM_AUTOTUNER_CACHE_PATH, which the server is to share, is read and written.
        """
        if not getattr(self.args, "enable_autotuner", True):
            return
        steps = [requests_of(item.case) for item in self.plan.cases]
        largest = max(steps, key=lambda step: sum(part.length for part in step))
        parts, left = [], self.cache.max_tokens
        for part in largest:
            if left:
                parts.append(Request(part.number, 0, min(part.length, left)))
                left -= parts[-1].tokens
        self.cache.hold(parts, generation=False)
        tune = self.upstream.get("autotune")
        known = {"cache_path": os.environ.get(TUNER_CACHE), "rank": 0}
        with tune(**self.upstream.keywords(tune, may=known)):
            self._step(parts, Phase.CONTEXT, (), graph=False)
            self.torch.cuda.synchronize()

    def close(self) -> None:
        """Give the GPU's memory and the temporary folder back."""
        self.cache.release()
        self.cache.manager.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("metadata", "layer", "model", "cache"):
            self.__dict__.pop(name, None)
        gc.collect()
        self.torch.cuda.empty_cache()

    def _arguments(self) -> Any:
        """The engine's arguments: the server's options, one rank, dummy weights."""
        known = self.upstream.get("TorchLlmArgs")
        fixed = self.upstream.keywords(
            known,
            must={
                "model": str(self._folder),
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "tensor_parallel_size": 1,
            },
        )
        try:
            return known(**{**self.server.options, **fixed})
        except (ValueError, TypeError) as error:  # pydantic's own errors are ValueErrors
            raise BadInput(
                f"TensorRT-LLM {self.upstream.version} refuses the server's options: {error}"
            ) from error

    def _load(self) -> Any:
        """The model, its weights drawn, as the engine's executor loads one."""
        folder = str(self._folder)
        checkpoints = self.upstream.get("_construct_checkpoint_loader")("pytorch", None, "HF")
        loader = self.upstream.get("ModelLoader")
        if hasattr(loader, "load_config_and_apply_defaults"):  # what options leave to the model
            self.args = loader.load_config_and_apply_defaults(folder, self.args, checkpoints)
        sparse = getattr(self.args, "sparse_attention_config", None)
        made = self.upstream.call(
            "ModelLoader",
            must={
                "llm_args": self.args,
                "mapping": self.mapping,
                "spec_config": None,
                "sparse_attention_config": sparse,  # None: made from config.json
                "max_num_tokens": self.args.max_num_tokens,
                "max_seq_len": self.args.max_seq_len,
            },
        )
        try:
            model, _ = made.load(folder, checkpoints)
        except (ValueError, NotImplementedError, KeyError, AssertionError) as error:
            raise RunFailed(
                f"TensorRT-LLM {self.upstream.version} cannot make this model: "
                f"{type(error).__name__}: {error}"
            ) from error
        return model

    def _check_lengths(self) -> None:
        """Refuse, before anything is built, what this server's scheduler would never run."""
        options = self.server.options
        longest = int(options.get("max_seq_len") or self.geometry.max_position)
        for item in self.plan.cases:
            requests = requests_of(item.case)
            limits = (
                (len(requests), int(options["max_batch_size"]), "max_batch_size"),
                (
                    sum(part.tokens for part in requests),
                    int(options["max_num_tokens"]),
                    "max_num_tokens",
                ),
                (max((part.length for part in requests), default=0), longest, "max_seq_len"),
            )
            for value, limit, name in limits:
                if value > limit:
                    raise BadInput(
                        f"{item.case.label()} needs {value:,}, the server's {name} is {limit:,}"
                    )

    def _check_features(self) -> None:
        """Refuse context after cached tokens where the server never has it."""
        if any(server_features(self.args)):
            return
        for item in self.plan.cases:
            case = item.case
            if isinstance(case, Case) and case.phase is Phase.CONTEXT and case.past:
                raise BadInput(
                    f"{case.label()}: with block reuse and chunked prefill both off the server "
                    "has no context step after cached tokens"
                )

    def _fill(self, requests: Sequence[Request]) -> None:
        """Cache what the requests have behind them, in steps that the server allows."""
        pooled, limit = self.plan.caches == "pooled", self.cache.max_tokens
        for request in requests[:1] if pooled else requests:
            past = min(request.past, _POOL_TOKENS) if pooled else request.past
            for start in range(0, past, limit):
                part = Request(request.number, start, min(limit, past - start))
                self._step([part], Phase.CONTEXT, (), graph=False)
        if pooled and requests[0].past:
            whole = min(requests[0].past, _POOL_TOKENS) // self.cache.tokens_per_block
            self.cache.repeat_first(len(requests), whole)

    def _step(
        self, requests: Sequence[Request], phase: Phase, seams: Sequence[Seam], *, graph: bool
    ) -> list[Call]:
        """One step of the whole model; the calls of the seams in it."""
        torch = self.torch
        self.metadata = self.cache.metadata(requests, phase, graph=graph)
        ids = [token for request in requests for token in self._tokens(request)]
        places = [place for item in requests for place in range(item.past, item.length)]
        calls: list[Call] = []
        with recording(self.upstream, self.layer, seams, calls.append), self.engine_context():
            self.model.model(
                attn_metadata=self.metadata,
                input_ids=torch.tensor(ids, dtype=torch.int32, device="cuda"),
                position_ids=torch.tensor([places], dtype=torch.int32, device="cuda"),
            )
        return calls

    def _tokens(self, request: Request) -> list[int]:
        """A request's new token ids."""
        return self.sequences.tokens(request.number, request.length)[request.past :]


def require_gpu() -> Any:
    """torch, with a GPU.

    Raises:
        ToolMissing: torch sees none.
    """
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ToolMissing("no CUDA GPU is visible to torch on this host")
    return torch


def sm_version(torch: Any) -> int:
    """The GPU's compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return int(major) * 10 + int(minor)

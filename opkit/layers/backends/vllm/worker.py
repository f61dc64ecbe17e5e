"""vLLM's own worker and model runner, driven step by step around a model of one layer.

Everything around the op is the engine's own code: its argument parser and configuration, its
worker (device, process group, workspace, seeds), its dummy weights, its KV cache groups and
tensors, its metadata builders, its CUDA graph capture and dispatch. opkit only takes the
scheduler's place: it says which tokens of which request run in a step.

Source: vLLM 0.24.0, ``v1/worker/gpu_worker.py``, ``v1/worker/gpu_model_runner.py`` (model runner
V1), and ``v1/engine/core.py`` for the order of start-up.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.warmup.kernel_warmup import kernel_warmup
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.worker.worker_base import WorkerWrapperBase

from opkit.errors import BadInput, ToolMissing
from opkit.layers.backends.vllm.config import layer_config, server_args
from opkit.layers.backends.vllm.models import OneLayerModel, Step
from opkit.layers.captured import Captured
from opkit.layers.mock import CacheView, Forward
from opkit.layers.op import Case, LaunchMode, Op, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.prompts import Sequences

# Left free beside the caches for activations and workspaces, whose largest use has been seen and
# is in torch's own pool by then; this is what graphs and libraries take.
_WORKING_BYTES = 6 * 2**30
# Tokens of the request whose blocks fill pooled caches: four times what DSA's top-k picks.
_POOL_TOKENS = 8192
# Gives the one-layer model's class once the server's configuration is known.
ModelOf = Callable[[VllmConfig], type[OneLayerModel]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The case that was made ready last, and its step."""

    case: Case
    step: Step


class LayerWorker:
    """A vLLM worker that holds one layer and runs the cases of a plan through it."""

    def __init__(
        self, plan: Plan, op: Op, model_of: ModelOf, overrides: Mapping[str, Any] | None = None
    ) -> None:
        """Bring the worker up to where the engine begins to serve.

        Args:
            plan: the cases, and the server to be.
            op: whose share of the model a rank has.
            model_of: gives the one-layer model's class for the server's configuration.
            overrides: further values for the model's ``config.json``.

        Raises:
            BadInput: flags or cases that this server could not run.
            ToolMissing: no GPU is visible.
        """
        if not torch.cuda.is_available():
            raise ToolMissing("no CUDA GPU is visible to torch on this host")
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the runner that this file drives
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.plan = plan
        self._steps = 0
        self._live: set[str] = set()
        self.args = server_args(plan)
        self.config = layer_config(plan, self.args, op.shares, overrides or {})
        vocab = self.config.model_config.get_vocab_size()
        self.sequences = Sequences(plan.seed, vocab, plan.answers)
        self.steps = [item for item in plan.cases if isinstance(item.case, Case)]
        self._check_cases()
        self.worker = WorkerWrapperBase(rpc_rank=0)
        self.worker.init_worker([self._worker_arguments()])
        self.worker.init_device()
        self.runner = self.worker.worker.model_runner
        self.model = self.load(model_of(self.config))
        self.model.recipe = plan.inputs
        if plan.inputs == "captured":
            self.model.captured = Captured(Path(plan.captured), plan.op, plan.backend)
        self.runner.model = self.model
        # Like the engine's memory profiling: the largest step fixes the size of all workspaces.
        self.runner._dummy_run(self.runner.max_num_tokens, is_profile=True)
        self._allocate_caches()
        if plan.caches == "pooled":
            self._fill_pool()
        kernel_warmup(self.worker.worker)  # kernels that are tuned at start-up are tuned here too
        if any(item.mode is LaunchMode.GRAPH for item in self.steps):
            self._capture_graphs()

    def load(self, model_class: type[OneLayerModel]) -> OneLayerModel:
        """Build the model and draw its weights, in the order of the engine's ``load_model``."""
        model_config = self.config.model_config
        device = torch.device(self.config.device_config.device)
        loader = get_model_loader(self.config.load_config)
        with set_current_vllm_config(self.config), set_default_torch_dtype(model_config.dtype):
            with device:
                model: OneLayerModel = initialize_model(
                    self.config, model_class=model_class, model_config=model_config
                )
            loader.load_weights(model, model_config)
            process_weights_after_loading(model, model_config, device)
        current_platform.update_block_size_for_backend(self.config)
        model.eval()
        return model

    def prepare(self, planned: PlannedCase[Case]) -> Forward:
        """Fill the caches, run the step once, and return a function that runs the op again.

        Raises:
            BadInput: the server's flags launch this case in another mode.
        """
        case = planned.case
        self._check_room(case)
        self.sequences.select(case)
        if self.model.captured is not None:
            self.model.captured.select(case)
        if self.plan.caches == "prefilled":
            with self._eager_launches():
                self._fill_caches(case)
        requests = range(case.batch)
        if planned.mode is LaunchMode.EAGER:
            with self._eager_launches():
                step = self._step(case, requests, case.past, case.tokens)
        else:
            step = self._step(case, requests, case.past, case.tokens)
            if step.context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
                raise BadInput(
                    f"with the server's flags {case.phase} {case.label()} is not replayed from a "
                    f"full CUDA graph, but the plan asks for mode graph"
                )
        torch.cuda.synchronize()
        launch, tokens = self.model.launch, case.batch * case.tokens
        self.prepared = Prepared(case, step)

        def forward() -> Any:
            with torch.inference_mode(), override_forward_context(step.context):
                output = launch(**step.arguments)
            return output[:tokens]  # a graph's batch may be padded

        return forward

    def inputs(self) -> dict[str, Any]:
        """The tensors that the op of the case prepared last is called with, without padding."""
        tokens = self.prepared.case.batch * self.prepared.case.tokens
        return {
            name: value[:tokens]
            for name, value in self.prepared.step.arguments.items()
            if isinstance(value, torch.Tensor)
        }

    def caches(self) -> tuple[CacheView, ...]:
        """The caches of the case prepared last, by block."""
        case, size = self.prepared.case, self.block_size
        found = []
        for number, group in enumerate(self.cache_groups):
            new: list[int] = []
            past: list[int] = []
            for request in range(case.batch):
                first = self._first_block(case, request, number)
                new += range(first + case.past // size, first + _blocks(case, size))
                past += range(first, first + case.past // size)
            layers = self.config.compilation_config.static_forward_context
            found += [
                CacheView(name, layers[name].kv_cache, tuple(new), tuple(past))
                for name in group.layer_names
            ]
        return tuple(found)

    def close(self) -> None:
        """End the process group and give the GPU's memory back, for the next build."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self.worker.shutdown()  # the engine's own way to free weights and caches in a process
        CUDAGraphWrapper.clear_all_graphs()
        del self.model, self.runner, self.worker
        destroy_model_parallel()
        destroy_distributed_environment()
        gc.collect()
        torch.cuda.empty_cache()

    def _worker_arguments(self) -> dict[str, Any]:
        """What the engine's single-process executor gives its worker."""
        return {
            "vllm_config": self.config,
            "local_rank": 0,
            "rank": 0,
            "distributed_init_method": get_distributed_init_method("127.0.0.1", get_open_port()),
            "is_driver_worker": True,
            "shared_worker_lock": Lock(),
        }

    def _check_cases(self) -> None:
        """Refuse, before the GPU is touched, what this server's scheduler would never run."""
        scheduler = self.config.scheduler_config
        longest = self.config.model_config.max_model_len
        for item in self.steps:
            case = item.case
            limits = (
                (case.batch, scheduler.max_num_seqs, "max_num_seqs"),
                (
                    case.batch * case.tokens,
                    scheduler.max_num_batched_tokens,
                    "max_num_batched_tokens",
                ),
                (case.past + case.tokens, longest, "max_model_len"),
            )
            for value, limit, name in limits:
                if value > limit:
                    raise BadInput(
                        f"{case.phase} {case.label()} needs {value:,}, the server's {name} "
                        f"is {limit:,}"
                    )

    def _allocate_caches(self) -> None:
        """KV caches in the engine's groups, shapes and dtypes, with as many blocks as needed.

        Where they do not fit, as many as do; :meth:`prepare` refuses the cases that need more.
        """
        register_all_kvcache_specs(self.config)
        specs = self.worker.get_kv_cache_spec()
        size = self.config.cache_config.block_size
        longest = -(-self.config.model_config.max_model_len // size)
        need = max((x.case.batch * _blocks(x.case, size) for x in self.steps), default=0)
        # Block 0 is the engine's null block; each group of layers has blocks of its own.
        self.config.cache_config.num_gpu_blocks_override = 1 + longest
        self.groups = len(get_kv_cache_configs(self.config, [specs], [0])[0].kv_cache_groups)
        page = sum(
            spec.page_size_bytes for spec in specs.values()
        )  # bytes of a block in all layers
        torch.cuda.empty_cache()
        room = int((torch.cuda.mem_get_info()[0] - _WORKING_BYTES) // page)
        self.blocks = 1 + min(max(need, longest) * self.groups, max(room, longest * self.groups))
        self.config.cache_config.num_gpu_blocks_override = self.blocks
        caches = get_kv_cache_configs(self.config, [specs], [0])[0]
        self.cache_groups = caches.kv_cache_groups
        sizes = {group.kv_cache_spec.block_size for group in caches.kv_cache_groups}
        self.block_size = self.config.cache_config.block_size = min(sizes)
        self.config.validate_block_size()
        self.worker.initialize_from_config([caches])

    def _check_room(self, case: Case) -> None:
        """Raise BadInput when the caches cannot hold the case."""
        need = 1 + case.batch * _blocks(case, self.block_size) * self.groups
        if need > self.blocks:
            raise BadInput(
                f"{case.phase} {case.label()} needs {need:,} cache blocks, this GPU's memory holds "
                f"{self.blocks:,}"
            )

    def _fill_pool(self) -> None:
        """Prefill one long request and repeat its blocks over all caches.

        The values are the module's own, so nothing that depends on them (top-k, gathers) sees zeros
        or ties; a block's rotary phase is that of its place in the long request.
        """
        limit = self.config.scheduler_config.max_num_batched_tokens
        longest = self.config.model_config.max_model_len
        length = min(_POOL_TOKENS, longest, (self.blocks - 1) // self.groups * self.block_size)
        case = Case(Phase.CONTEXT, 1, length, 0)
        with self._eager_launches():
            for start in range(0, length, limit):
                self._step(case, [0], start, min(limit, length - start))
        base = length // self.block_size
        for cache in self.runner.kv_caches:
            if cache.shape[0] != self.blocks:
                raise BadInput(f"a cache of shape {tuple(cache.shape)} does not begin with blocks")
            for group in range(self.groups):  # groups share a cache's memory, blocks are disjoint
                first = 1 + group * _blocks(case, self.block_size)
                source = cache[first : first + base]
                rest = 1 + self.groups * _blocks(case, self.block_size)
                for start in range(rest + group * base, self.blocks, base * self.groups):
                    part = cache[start : start + base]
                    part.copy_(source[: part.shape[0]])
        torch.cuda.synchronize()

    def _capture_graphs(self) -> None:
        """Let the runner capture all its graphs; each holds the op's module alone."""
        mode = self.config.compilation_config.cudagraph_mode
        if self.config.model_config.enforce_eager or not mode.has_full_cudagraphs():
            raise BadInput("the plan asks for mode graph, the server's flags allow no full graphs")
        self.model.launch = CUDAGraphWrapper(
            self.model.module_forward, self.config, runtime_mode=CUDAGraphMode.FULL
        )
        self.runner.capture_model()

    @contextmanager
    def _eager_launches(self) -> Iterator[None]:
        """Make the runner's dispatcher choose no graph."""
        dispatcher = self.runner.cudagraph_dispatcher
        mode, dispatcher.cudagraph_mode = dispatcher.cudagraph_mode, CUDAGraphMode.NONE
        try:
            yield
        finally:
            dispatcher.cudagraph_mode = mode

    def _fill_caches(self, case: Case) -> None:
        """Prefill what the case has behind it, request by request, in steps the server allows."""
        limit = self.config.scheduler_config.max_num_batched_tokens
        for request in range(case.batch):
            for start in range(0, case.past, limit):
                self._step(case, [request], start, min(limit, case.past - start))

    def _step(self, case: Case, requests: Sequence[int], computed: int, tokens: int) -> Step:
        """One step of the runner: ``tokens`` new tokens of each request after ``computed``.

        Every step brings its requests as new ones whose first ``computed`` tokens are cached; the
        caches stay valid because within a case a request's blocks depend only on its number.
        """
        self._steps += 1
        names = {f"{self._steps}-{request}": request for request in requests}
        output = dataclasses.replace(
            SchedulerOutput.make_empty(),
            scheduled_new_reqs=[
                self._request(case, name, request, computed, tokens)
                for name, request in names.items()
            ],
            num_scheduled_tokens=dict.fromkeys(names, tokens),
            total_num_scheduled_tokens=tokens * len(names),
            num_common_prefix_blocks=[0] * self.groups,
            finished_req_ids=self._live,
        )
        self._live = set(names)
        self.model.rows = [(request, computed, tokens) for request in requests]
        self.runner.execute_model(output)
        self.model.rows = ()
        self.runner.execute_model_state = None  # nothing is sampled from it
        assert self.model.last is not None
        return self.model.last

    def _request(
        self, case: Case, name: str, request: int, computed: int, tokens: int
    ) -> NewRequestData:
        """A request as the scheduler describes it, its blocks in a fresh allocator's order."""
        count = _blocks(case, self.block_size)
        first = [self._first_block(case, request, group) for group in range(self.groups)]
        return NewRequestData(
            req_id=name,
            prompt_token_ids=self._prompt(request, computed, tokens),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            pooling_params=None,
            block_ids=tuple(list(range(start, start + count)) for start in first),
            num_computed_tokens=computed,
            lora_request=None,
        )

    def _first_block(self, case: Case, request: int, group: int) -> int:
        """The first cache block of a request in a group of layers."""
        return 1 + (request * self.groups + group) * _blocks(case, self.block_size)

    def _prompt(self, request: int, computed: int, tokens: int) -> Any:
        """The first ``computed + tokens`` token ids of a request.

        With pooled caches nothing before ``computed`` is read again, so one id stands for all.
        """
        if self.plan.caches == "pooled" and computed:
            known = self.sequences.tokens(request, tokens)
            ids = np.full(computed + tokens, known[0], dtype=np.int32)
            ids[computed:] = known
            return ids
        return self.sequences.tokens(request, computed + tokens)


def _blocks(case: Case, block_size: int) -> int:
    """KV cache blocks of ``block_size`` tokens that one request of ``case`` fills."""
    return -(-(case.past + case.tokens) // block_size)

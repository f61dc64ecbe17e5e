"""The implementations: how a rank joins its world, and what makes a collective of a case.

Written against vLLM 0.24.0 (``vllm/distributed``) and TensorRT-LLM 1.x
(``tensorrt_llm/_torch/distributed/ops.py``, ``_ipc_utils.py``). **The TensorRT-LLM one has never
run**: no machine with it was at hand.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from opkit.collect.comm.collectives import Collective, EngineAllReduce, TorchCollective
from opkit.collect.comm.plan import CommCase
from opkit.collect.workers.faults import describe
from opkit.errors import ToolMissing

# What an engine's backend needs; the probe imports them before anything is started.
ENGINE_MODULES = {
    "vllm": ("vllm.distributed.parallel_state", "vllm.distributed.communication_op"),
    "trtllm": ("tensorrt_llm", "tensorrt_llm._torch.distributed", "mpi4py"),
}
PACKAGES = {"vllm": "vllm", "trtllm": "tensorrt_llm"}


class Backend(Protocol):
    """One implementation, at one rank, after the process group exists."""

    def collective(self, case: CommCase) -> Collective:
        """Buffers and launches of a case."""

    def capturing(self) -> AbstractContextManager[Any]:
        """Surrounds the capture of a graph; gives the stream to capture on, or None for any."""

    def served_by(self, collective: Any) -> str:
        """Which of its algorithms answers one of its collectives, where it has several."""


class TorchBackend:
    """NCCL or gloo, through ``torch.distributed``."""

    def __init__(self, torch: Any, device: Any, name: str) -> None:
        self._torch, self._device, self._name = torch, device, name

    def collective(self, case: CommCase) -> Collective:
        return TorchCollective(self._torch, case, self._device)

    def capturing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def served_by(self, _collective: Any) -> str:
        return self._name


class VllmBackend:
    """vLLM's tensor-parallel all-reduce, in vLLM's own groups.

    vLLM decides per message who answers: above some megabytes its custom kernel hands over to
    others. :meth:`served_by` asks the same questions in the same order as
    ``CudaCommunicator.all_reduce`` of vLLM 0.24.0.
    """

    def __init__(self, torch: Any, device: Any, rank: int, cases: Sequence[CommCase]) -> None:
        self._torch, self._device = torch, device
        self._arena = _arena(torch, device, cases)
        ranks = cases[0].ranks
        self._state = importlib.import_module("vllm.distributed.parallel_state")
        config = importlib.import_module("vllm.config")
        self._stack = ExitStack()
        # Model-parallel groups can only be made within a configuration.
        self._stack.enter_context(config.set_current_vllm_config(config.VllmConfig()))
        self._state.init_distributed_environment(
            world_size=ranks, rank=rank, local_rank=rank, backend="nccl"
        )
        self._state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        communication = importlib.import_module("vllm.distributed.communication_op")
        self._reduce: Callable[[Any], Any] = communication.tensor_model_parallel_all_reduce

    def collective(self, case: CommCase) -> Collective:
        return EngineAllReduce(self._torch, case, self._arena, self._reduce)

    @contextmanager
    def capturing(self) -> Iterator[Any]:
        # Registers the captured buffers with the other ranks when it is left.
        with self._state.graph_capture(device=self._device) as context:
            yield context.stream

    def served_by(self, collective: Any) -> str:
        communicator = self._state.get_tp_group().device_communicator
        shaped = collective.shaped
        utils = importlib.import_module("vllm.distributed.device_communicators.all_reduce_utils")
        pynccl = communicator.pynccl_comm
        if pynccl is not None and utils.should_nccl_symm_mem_allreduce(pynccl.world_size, shaped):
            return "nccl symmetric memory"
        for attribute, question, name in (
            ("qr_comm", "should_quick_allreduce", "quick reduce"),
            ("fi_ar_comm", "should_use_fi_ar", "flashinfer"),
            ("ca_comm", "should_custom_ar", "custom"),
            ("symm_mem_comm", "should_use_symm_mem", "torch symmetric memory"),
        ):
            candidate = getattr(communicator, attribute, None)
            if candidate is None or candidate.disabled:
                continue
            if getattr(candidate, question)(shaped):
                return name
        return "nccl" if pynccl is not None and not pynccl.disabled else "torch.distributed"


class TrtllmBackend:
    """TensorRT-LLM's ``AllReduce`` module with strategy AUTO. Its ranks are started by mpirun:
    its buffers are exchanged over MPI. Never run, see the module's docstring.
    """

    def __init__(self, torch: Any, device: Any, rank: int, cases: Sequence[CommCase]) -> None:
        # As the field's collector does: else the tuner may choose another strategy than the
        # look-up table of the C++ side does.
        os.environ.setdefault("TLLM_DISABLE_ALLREDUCE_AUTOTUNE", "1")
        self._torch = torch
        self._arena = _arena(torch, device, cases)
        ranks = cases[0].ranks
        tensorrt_llm = importlib.import_module("tensorrt_llm")
        distributed = importlib.import_module("tensorrt_llm._torch.distributed")
        mapping = tensorrt_llm.Mapping(
            world_size=ranks, rank=rank, gpus_per_node=ranks, tp_size=ranks
        )
        self._module = distributed.AllReduce(mapping=mapping).to(device)

    def collective(self, case: CommCase) -> Collective:
        return EngineAllReduce(self._torch, case, self._arena, self._module)

    def capturing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def served_by(self, _collective: Any) -> str:
        return "AUTO"  # chosen within its C++ library, which does not say


def _arena(torch: Any, device: Any, cases: Sequence[CommCase]) -> Any:
    """Bytes for the largest message of all cases."""
    most = max(case.total_bytes for case in cases)
    return torch.empty(most, dtype=torch.uint8, device=device)


def make_backend(torch: Any, device: Any, rank: int, cases: Sequence[CommCase]) -> Backend:
    """The implementation that a world's cases name; the default process group must exist."""
    implementation = cases[0].implementation
    if implementation == "vllm":
        return VllmBackend(torch, device, rank, cases)
    if implementation == "trtllm":
        return TrtllmBackend(torch, device, rank, cases)
    return TorchBackend(torch, device, implementation)


def require_engine(implementation: str) -> str:
    """Import what an engine's all-reduce needs, and return the engine's version.

    Raises:
        ToolMissing: it cannot be imported here; says why.
    """
    for name in ENGINE_MODULES[implementation]:
        try:
            importlib.import_module(name)
        # A wheel for another CUDA or Python fails with OSError, AttributeError and others.
        except Exception as error:
            raise ToolMissing(
                f"the all-reduce of {implementation} needs {name}, which cannot be imported here "
                f"({describe(error).splitlines()[0]})",
                "install it, or name an interpreter that has it with --python",
            ) from error
    try:
        return version(PACKAGES[implementation])
    except PackageNotFoundError:
        module = importlib.import_module(PACKAGES[implementation])
        return str(getattr(module, "__version__", "unknown"))

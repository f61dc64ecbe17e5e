"""What kind of failure an exception is, and whether the process can go on after it.

No framework is imported here: exceptions are told apart by class name and text.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Any

from opkit.collect.work import Fault
from opkit.collect.workers.parts import FULL
from opkit.errors import BadInput

# ``torch.OutOfMemoryError`` (also ``torch.cuda.OutOfMemoryError``); the texts are those of CUDA
# (cudaErrorMemoryAllocation), cuBLAS and the driver, which torch raises as plain RuntimeError.
_MEMORY_CLASSES = {"OutOfMemoryError", "MemoryError"}
_MEMORY_TEXT = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.IGNORECASE
)
# After these the CUDA context is lost, and so is the process. ``AcceleratorError`` is torch 2.8's
# and later class for "CUDA error: …"; the others are what engines' own kernels and cuBLAS say.
_CUDA_CLASSES = {"AcceleratorError"}
_CUDA_TEXT = re.compile(
    r"CUDA error|CUDA driver error|cudaError|device-side assert|illegal memory access|"
    r"illegal instruction|misaligned address|unspecified launch failure|"
    r"CUBLAS_STATUS_|CUDNN_STATUS_|NCCL Error",
    re.IGNORECASE,
)
_TEXT_LIMIT = 300  # torch follows "out of memory" with a page of advice


def fault_of(error: BaseException) -> Fault:
    """The kind of failure that ``error`` is."""
    classes = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if isinstance(error, BadInput):
        return Fault.REFUSED
    if classes & _MEMORY_CLASSES or (isinstance(error, RuntimeError) and _MEMORY_TEXT.search(text)):
        return Fault.MEMORY
    if classes & _CUDA_CLASSES or (isinstance(error, RuntimeError) and _CUDA_TEXT.search(text)):
        return Fault.CUDA
    return Fault.ERROR


def disk_full(error: BaseException) -> OSError | None:
    """The full disk, quota or file that ``error`` comes from, if it does."""
    for item in _chain(error):
        if isinstance(item, OSError) and item.errno in FULL:
            return item
    return None


def describe(error: BaseException) -> str:
    """The error with its class, in a row's words."""
    text = str(error).strip()
    name = type(error).__name__
    told = text if isinstance(error, BadInput) else f"{name}: {text or 'no message'}"
    return told[:_TEXT_LIMIT]


def recover() -> None:
    """Give unused GPU memory back and see whether CUDA still works.

    Raises:
        RuntimeError: it does not; the process is of no further use.
    """
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    if int(torch.ones(1024, device="cuda").sum().item()) != 1024:
        raise RuntimeError("a sum on the GPU is wrong")


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it."""
    found = [error]
    while (before := found[-1].__cause__ or found[-1].__context__) and before not in found:
        found.append(before)
    return found

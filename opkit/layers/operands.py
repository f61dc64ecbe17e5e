"""Sample the operands of a module's large kernels, to show that their values are not degenerate.

A GEMM over zeros, or over rows that are all equal, runs 10 to 15 % too fast (less power, higher
clock), so a mock says what its GEMMs were really given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opkit.layers.manifest import Operand

_ROWS, _COLUMNS = 64, 512  # of a sample
_LARGE = 2**20  # elements of a weight from which its GEMM counts as large

# When an operand counts as degenerate: mostly zeros, mostly equal rows, or next to no different
# values. All zero or all equal rows run 10 to 15 % too fast on an H100; where between sound and
# such data that begins was not measured. FP8 has at most 256 values: 0.66 % distinct ones are sound
# (docs/development.md).
MAX_ZEROS = 0.5
MAX_EQUAL_ROWS = 0.5
MIN_DISTINCT = 0.001


def degenerate(
    operand: Operand,
    max_zeros: float = MAX_ZEROS,
    max_equal_rows: float = MAX_EQUAL_ROWS,
    min_distinct: float = MIN_DISTINCT,
) -> str:
    """Why an operand is degenerate, with its name and numbers; empty when it is not."""
    shown = f"{operand.name} {list(operand.shape)} {operand.dtype}"
    # Asked so that nan, which compares as false, is degenerate too.
    if not operand.zeros <= max_zeros:
        return f"{shown}: {operand.zeros:.0%} zeros"
    if not operand.equal_rows <= max_equal_rows:
        return f"{shown}: {operand.equal_rows:.0%} of the sampled rows are equal"
    if not operand.distinct >= min_distinct:
        return f"{shown}: {operand.distinct:.2%} distinct values"
    return ""


def dtype_name(dtype: Any) -> str:
    """An element type as torch writes it, without the ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")


def sample(name: str, tensor: Any) -> Operand:
    """Describe ``tensor`` by evenly spaced rows and columns of it (at most 64 × 512).

    Args:
        name: what the operand is called.
        tensor: any tensor of at least one dimension; leading dimensions but the first are folded
            into the columns.
    """
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    row_step = max(1, rows.shape[0] // _ROWS)
    column_step = max(1, rows.shape[1] // _COLUMNS)
    part = rows[::row_step, ::column_step][:_ROWS, :_COLUMNS].float().cpu()
    others = part[1:]
    equal = (others == part[0]).all(dim=1).float().mean().item() if len(others) else 0.0
    return Operand(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        distinct=part.unique().numel() / part.numel(),
        zeros=(part == 0).float().mean().item(),
        equal_rows=equal,
    )


def sample_experts(path: str, module: Any) -> list[Operand]:
    """The weights of experts below ``module``: parameters [experts, output, input].

    Args:
        path: the module's, written before their names.
        module: any module; without such parameters nothing is sampled.
    """
    return [
        sample(f"{path}.{name}", value.flatten(0, 1))
        for name, value in module.named_parameters()
        if value.ndim == 3 and value.is_floating_point()
    ]


def watch(
    module: Any, forward: Callable[[], None], phase: str, extra: Mapping[str, Mapping[str, int]]
) -> tuple[Operand, ...]:
    """Run ``forward`` once and sample what the large GEMMs below ``module`` were given.

    Args:
        module: the op's module; every submodule with a two-dimensional weight of at least 2^20
            elements counts as a large GEMM.
        forward: launches one forward of ``module`` so that its submodules are really called.
        phase: written before the inputs' names, which differ by phase; weights do not.
        extra: further modules by name, with the names and positions of the arguments to sample.

    Returns:
        ``NAME.weight`` and ``PHASE NAME.input`` for each large GEMM called, in the order of the
        calls, and ``PHASE NAME.ARGUMENT`` for each extra one.
    """
    import torch  # here: who reads a manifest's operands has no framework

    found: list[Operand] = []
    hooks = []

    def large(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(called: Any, arguments: Any, keywords: Any) -> None:
            given = arguments[0] if arguments else next(iter(keywords.values()))
            found.append(sample(f"{name}.weight", called.weight))
            found.append(sample(f"{phase} {name}.input", given))

        return hook

    def named(name: str, wanted: Mapping[str, int]) -> Callable[[Any, Any], None]:
        def hook(_: Any, arguments: Any) -> None:
            for argument, position in wanted.items():
                found.append(sample(f"{phase} {name}.{argument}", arguments[position]))

        return hook

    for name, submodule in module.named_modules():
        weight = getattr(submodule, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.numel() >= _LARGE:
            hooks.append(submodule.register_forward_pre_hook(large(name), with_kwargs=True))
        if name in extra:
            hooks.append(submodule.register_forward_pre_hook(named(name, extra[name])))
    try:
        forward()
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(found)

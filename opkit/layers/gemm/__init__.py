"""Matrix product: one linear layer without bias, activations [m, k] by the transpose of [n, k]."""

from __future__ import annotations

from opkit.layers.manifest import Manifest
from opkit.layers.op import GemmCase, Op, Table

# Element types of the operands: torch's name, and that of the field's tables.
DTYPES = {"bfloat16": "bfloat16", "float8_e4m3fn": "fp8"}
BYTES = {"bfloat16": 2, "float8_e4m3fn": 1}
OUTPUT_BYTES = 2  # the output is bfloat16, whatever the operands are


def columns(case: GemmCase, manifest: Manifest) -> dict[str, str | int]:  # noqa: ARG001
    """The gemm table's own columns."""
    return {"gemm_dtype": DTYPES[case.dtype], "m": case.m, "n": case.n, "k": case.k}


def work(case: GemmCase, manifest: Manifest) -> tuple[float, float]:  # noqa: ARG001
    """Floating-point operations, and bytes when every operand is moved once."""
    operands = (case.m * case.k + case.n * case.k) * BYTES[case.dtype]
    return 2.0 * case.m * case.n * case.k, float(operands + case.m * case.n * OUTPUT_BYTES)


GEMM = Op(
    name="gemm",
    title="Matrix product of a linear layer",
    phases=(),
    region={},
    tables={
        "": Table(
            name="gemm",
            family="gemm",
            columns=("gemm_dtype", "m", "n", "k"),
            # As the shipped tables have it. For gemm the column selects nothing; vLLM's has since
            # 0.24 the kernel's class, of which torch's own linear is the bfloat16 one.
            kernel_source={
                "torch": "torch",
                "vllm": "vllm_default",
                "sglang": "sglang",
                "trtllm": "torch_flow",
            },
        )
    },
    columns=columns,
    work=work,
)

"""Linear layers: activations [m, k] by the transpose of weights [n, k], without bias.

Aligned as a layer's linear modules at the engine's steps (one region: all of them, in launch
order); collected as single products.
"""

from __future__ import annotations

from opkit.layers.manifest import Manifest
from opkit.layers.op import GemmCase, Op, Phase, RegionPattern, Table

# The linear modules of a dense layer, by the engine's own fused names.
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_LAYER = r"layers\.(?P<layer>\d+)\.(?:" + "|".join(LINEARS).replace(".", r"\.") + r")$"

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
    title="Linear layers: matrix products",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={name: RegionPattern(_LAYER) for name in ("vllm", "sglang", "trtllm")},
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
    shares=("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
)

"""Which estimate asks for a table's rows: arguments of ``aiconfigurator cli estimate``.

The estimate is static, with two output tokens, so that it asks for one context shape and one
decode step. Its shape is one that the table holds, so that no row of another source is mixed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opkit.collect.tables.validate import Value
from opkit.errors import BadInput

Found = Mapping[str, Value]

OSL = 2  # one token from the prompt, one decoded at isl cached tokens
# A shape of this many tokens is asked for where there is a choice: large enough that rounding to a
# thousandth of a millisecond does not matter, small enough that it is on every grid.
USUAL_TOKENS = 4096
# For a DSA architecture: a model whose configuration aiconfigurator brings, and its heads.
_DSA_MODELS = {
    "DeepseekV32ForCausalLM": ("deepseek-ai/DeepSeek-V3.2", 128),
    "GlmMoeDsaForCausalLM": ("zai-org/GLM-5", 64),
}
_DENSE_MODEL = "Qwen/Qwen3-32B"
_DENSE_SHAPES = {(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)}  # n, k at tp 1


@dataclass(frozen=True)
class Asked:
    """What the user wants of the estimate; what is left empty follows from the table.

    Attributes:
        model_path: a model that aiconfigurator knows, or a folder with ``config.json``.
        tp_size: tensor-parallel ranks.
        batch_size, isl: shape.
        more: further arguments, as they are.
    """

    model_path: str = ""
    tp_size: int = 0
    batch_size: int = 0
    isl: int = 0
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """An estimate that asks for a row.

    Attributes:
        table: the row's.
        row: it; None when the user's shape is in no row.
        arguments: of the estimate, but for the folder, the system and the backend.
        entries: regular expression of the operations that such rows may be in.
    """

    table: str
    row: Found | None
    arguments: tuple[str, ...]
    entries: str


def questions(tables: Mapping[str, Sequence[Found]], asked: Asked) -> list[Question]:
    """One question for each table, the same for several where their rows allow it.

    Args:
        tables: rows with ``latency``, by the table's name.
        asked: what the user wants.

    Raises:
        BadInput: no question is known for a table, or the user must say more.
    """
    known = {
        "dsa_context_module": lambda rows: _context(rows, tables, asked),
        "dsa_generation_module": lambda rows: _generation(rows, tables, asked),
        "gemm": lambda rows: _gemm(rows, asked),
    }
    unknown = sorted(set(tables) - set(known))
    if unknown:
        raise BadInput(
            f"opkit knows no estimate that asks for {unknown[0]}", "install it without the proof"
        )
    return [known[name](rows) for name, rows in tables.items()]


def _context(
    rows: Sequence[Found], tables: Mapping[str, Sequence[Found]], asked: Asked
) -> Question:
    decoded = {_shape(row, int(row["step"])) for row in tables.get("dsa_generation_module", ())}
    row, found = _pick(rows, asked, lambda row: int(row["isl"]) + int(row["step"]), decoded)
    arguments = _dsa(row, asked, int(row["isl"]) + int(row["step"]), int(row["step"]))
    return Question("dsa_context_module", found, arguments, r"context_attention")


def _generation(
    rows: Sequence[Found], tables: Mapping[str, Sequence[Found]], asked: Asked
) -> Question:
    prompts = {
        _shape(row, int(row["isl"]))
        for row in tables.get("dsa_context_module", ())
        if not row["step"]
    }
    row, found = _pick(rows, asked, lambda row: int(row["step"]), prompts)
    arguments = _dsa(row, asked, int(row["step"]), 0)
    return Question("dsa_generation_module", found, arguments, r"generation_attention")


def _shape(row: Found, isl: int) -> tuple[Value, ...]:
    """What an estimate of DSA is about; equal for a prompt and the first token after it."""
    names = ("architecture", "mla_dtype", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size")
    return (*(row[name] for name in names), isl)


def _pick(
    rows: Sequence[Found],
    asked: Asked,
    isl: Callable[[Found], int],
    other: set[tuple[Value, ...]],
) -> tuple[Found, Found | None]:
    """The row to ask for, twice; with None when the user's shape is in no row, and one is lent.

    Rows whose shape the other phase has too come first, then those without a cached prefix.
    """
    heads = _DSA_MODELS.get(str(rows[0]["architecture"]), ("", 0))[1]
    wanted = {
        "batch_size": asked.batch_size,
        "num_heads": heads // asked.tp_size if asked.tp_size else 0,
    }
    fit = [
        row
        for row in rows
        if all(value in (0, row[name]) for name, value in wanted.items())
        and asked.isl in (0, isl(row))
    ]

    def place(row: Found) -> tuple[bool, bool, float, int]:
        tokens = int(row["batch_size"]) * isl(row)
        far = abs(math.log2(max(tokens, 1) / USUAL_TOKENS))
        cached = isl(row) != int(row["isl"]) and int(row["isl"]) > 1
        return _shape(row, isl(row)) not in other, cached, far, -int(row["num_heads"])

    if fit:
        best = min(fit, key=place)
        return best, best
    return min(rows, key=place), None


def _dsa(row: Found, asked: Asked, isl: int, prefix: int) -> tuple[str, ...]:
    model, heads = _DSA_MODELS.get(str(row["architecture"]), ("", 0))
    ranks = asked.tp_size or heads // int(row["num_heads"])
    if not (asked.model_path or model) or not ranks:
        raise BadInput(
            f"no model is known whose heads are those of {row['architecture']}",
            "name it: --model-path and --tp-size",
        )
    return (
        "--model-path", asked.model_path or model,
        *_static(asked.batch_size or int(row["batch_size"]), asked.isl or isl),
        *(("--prefix", str(prefix)) if prefix else ()),
        "--tp-size", str(ranks), "--moe-tp-size", "1", "--moe-ep-size", str(ranks),
        "--gemm-quant-mode", str(row["gemm_type"]),
        "--kvcache-quant-mode", str(row["kv_cache_dtype"]),
        "--fmha-quant-mode", str(row["mla_dtype"]),
        *asked.more,
    )  # fmt: skip


def _gemm(rows: Sequence[Found], asked: Asked) -> Question:
    """A dense model's linear layers. Which of their shapes are in the table, the proof shows."""

    def place(row: Found) -> tuple[bool, float]:
        return (row["n"], row["k"]) not in _DENSE_SHAPES, abs(
            math.log2(int(row["m"]) / USUAL_TOKENS)
        )

    tokens = (asked.batch_size or 1) * asked.isl
    fit = [row for row in rows if tokens in (0, row["m"])]
    row = min(fit or rows, key=place)
    arguments = (
        "--model-path", asked.model_path or _DENSE_MODEL,
        *_static(asked.batch_size or 1, asked.isl or int(row["m"])),
        "--tp-size", str(asked.tp_size or 1),
        "--gemm-quant-mode", str(row["gemm_dtype"]),
        *asked.more,
    )  # fmt: skip
    return Question("gemm", row if fit else None, arguments, r".*_gemm")


def _static(batch: int, isl: int) -> tuple[str, ...]:
    return (
        "--estimate-mode", "static", "--batch-size", str(batch), "--isl", str(isl),
        "--osl", str(OSL),
    )  # fmt: skip

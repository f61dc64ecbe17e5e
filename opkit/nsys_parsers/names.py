"""Kernel names: demangled → short → family, and how well two of them agree.

Everything that is known of particular kernels stands in ``families.toml``; this file only parses
demangled C++ names and applies that table.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from opkit.errors import BadInput


@dataclass(frozen=True)
class Family:
    """One row of ``families.toml``."""

    family: str
    pattern: re.Pattern[str]
    glue: bool = False
    full: bool = False
    tile: re.Pattern[str] | None = None
    dtype: re.Pattern[str] | None = None
    wrapper: bool = False


@dataclass(frozen=True)
class KernelName:
    """A demangled name taken apart.

    Attributes:
        demangled: as nsys gives it.
        short: what a reader recognises.
        family: see ``families.toml``; ``other`` when none fits.
        glue: elementwise, copy, fill or cast.
        stem: what stays equal between variants (other tile, stage or integer template arguments).
        dtypes: element types named by the template arguments or the base name.
        typed: those of the template arguments in their order (which operand has which type), and
            enumerations among the arguments. Empty for a kernel behind a wrapper, whose schedule
            may name a type more or less often.
    """

    demangled: str
    short: str
    family: str
    glue: bool
    stem: str
    dtypes: tuple[str, ...]
    typed: tuple[str, ...] = ()


# Element types as the field's kernels spell them, longest first.
_DTYPES = {
    "bf16": r"__nv_bfloat162?|nv_bfloat162?|c10::BFloat16|cutlass::bfloat16_t|bfloat16_t|BFloat16",
    "fp8_e4m3": r"__nv_fp8_e4m3|c10::Float8_e4m3fn|float_e4m3_t|Float8_e4m3fn|fp8e4nv",
    "fp8_e5m2": r"__nv_fp8_e5m2|c10::Float8_e5m2|float_e5m2_t|fp8e5",
    "fp16": r"__half2?|c10::Half|cutlass::half_t|\bhalf_t\b|\bhalf2?\b",
    "fp64": r"\bdouble\b",
    "fp32": r"\bfloat\b",
    "int8": r"\bu?int8_t\b|\b(?:un)?signed char\b",
    # torch moves data of any type as an opaque one of its size.
    **{f"bytes{size}": rf"OpaqueType<{size}>" for size in (1, 2, 4, 8, 16)},
}
_DTYPE = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _DTYPES.items()))
# Casts of template numbers; the parameters of a lambda look the same and must stay.
_CAST = re.compile(r"(?<!lambda)\((?:unsigned )?(?:int|long|long long|short|char|bool)\)")
# A return type that nsys demangles with a lone bracket: enable_if<T2>(int)0&&…>::type name<…>(…)
_ENABLE_IF = re.compile(r"^std::enable_if<.*?>::type ")
_FUNCTOR = re.compile(r"(\w*Functor\w*|\w+_kernel_cuda|\w+_kernel_impl|\w+_functor|\w+Ops)\b")
_GENERIC_FUNCTORS = {"gpu_kernel_impl", "gpu_kernel_impl_nocast"}
# A template argument of an enumeration says what is computed (format, mask, kind of GEMM), no tile.
_ENUM = re.compile(r"\((?:\w+::)+\w+\)\d+")
_NUMBER = re.compile(r"\b\d+\b")


@lru_cache(maxsize=8)
def load_families(extra: Path | None = None) -> tuple[Family, ...]:
    """The family table; rows of ``extra`` (a user's TOML file of the same form) come first.

    Raises:
        BadInput: ``extra`` is missing, is not TOML, or has a row without a valid pattern.
    """
    own = resources.files(__package__).joinpath("families.toml").read_text("utf-8")
    rows = tomllib.loads(own)["family"]
    if extra is not None:
        try:
            rows = tomllib.loads(extra.read_text("utf-8")).get("family", []) + rows
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise BadInput(f"{extra}: not a readable families file ({error})") from error
    return tuple(_family(row, extra) for row in rows)


def _family(row: dict[str, Any], origin: Path | None) -> Family:
    try:
        return Family(
            family=str(row["family"]),
            pattern=re.compile(row["pattern"]),
            glue=bool(row.get("glue", False)),
            full=bool(row.get("full", False)),
            tile=re.compile(row["tile"]) if "tile" in row else None,
            dtype=re.compile(row["dtype"]) if "dtype" in row else None,
            wrapper=bool(row.get("wrapper", False)),
        )
    except (KeyError, re.error, TypeError) as error:
        raise BadInput(f"{origin or 'families.toml'}: bad row {row!r} ({error})") from error


@lru_cache(maxsize=65536)
def parse_name(demangled: str, families: tuple[Family, ...] | None = None) -> KernelName:
    """Take a demangled kernel name apart."""
    table = families if families is not None else load_families()
    plain = _plain(demangled)
    base, arguments = _split(plain)
    family = wrapper = _find(table, plain, base)
    wrapped = wrapper is not None and wrapper.wrapper
    while wrapper is not None and wrapper.wrapper and arguments:
        base, arguments = _split(arguments)
        wrapper = _find(table, plain, base)
        family = wrapper or family
    base = base or demangled
    functor = _functor(base, arguments)
    typed = tuple(match.lastgroup or "" for match in _DTYPE.finditer(arguments))
    dtypes = set(typed)
    stem = base
    if family is not None and family.dtype is not None and (code := family.dtype.search(base)):
        dtypes.add(code.group(1))
        stem = stem.replace(f"_{code.group(1)}_", "_", 1)
    if family is not None and family.tile is not None:
        stem = family.tile.sub("", stem)
    if functor or (family is not None and family.glue):
        # Element-wise kernels are told apart by what they compute, not by the loop around it.
        stem += "<" + _NUMBER.sub("#", _DTYPE.sub("T", arguments)) + ">"
    last = base.rsplit("::", 1)[-1] or base
    return KernelName(
        demangled=demangled,
        short=f"{last}({functor})" if functor else last,
        family=family.family if family is not None else "other",
        glue=family.glue if family is not None else False,
        stem=stem,
        dtypes=tuple(sorted(dtypes)),
        typed=() if wrapped else (*typed, *_ENUM.findall(arguments)),
    )


def _find(table: tuple[Family, ...], plain: str, base: str) -> Family | None:
    return next((f for f in table if f.pattern.search(plain if f.full else base)), None)


def _plain(demangled: str) -> str:
    """The name with what would confuse bracket counting spelled without brackets."""
    text = demangled.replace("(anonymous namespace)", "unnamed").replace("<unnamed>", "unnamed")
    text = re.sub(r"operator ?\(\)", "operator_call", text)
    return _ENABLE_IF.sub("", _CAST.sub("", text))


def _split(plain: str) -> tuple[str, str]:
    """Base name and template arguments: ``void a::b<c, d>(e)`` → ``a::b``, ``c, d``."""
    name = _without_signature(plain.strip())
    cut = name.find("<")
    if cut < 0:
        return name, ""
    return name[:cut], name[cut + 1 : name.rfind(">") if ">" in name[cut:] else len(name)]


def _without_signature(text: str) -> str:
    """The qualified name with its template arguments: no return type, no parameters, no commas."""
    depth = begin = 0
    for i, char in enumerate(text):
        if char in "<[{" or (char == "(" and depth):
            depth += 1
        elif char in "]})" or (char == ">" and text[i - 1] != "-"):
            depth -= 1
        elif depth == 0 and char == " ":
            begin = i + 1
        elif depth == 0 and char in "(,":
            return text[begin:i]
    return text[begin:]


def _functor(base: str, arguments: str) -> str:
    """What an element-wise or reduce kernel computes, from its template arguments."""
    if not arguments or not ("elementwise" in base or base.endswith("reduce_kernel")):
        return ""
    named = [f for f in _FUNCTOR.findall(arguments) if f not in _GENERIC_FUNCTORS]
    # The innermost functor says most: BUnaryFunctor<…, MulFunctor<float>> is a multiplication.
    return named[-1] if named else ""

"""Kernel names: demangled → short → family, and how well two of them agree.

Everything that is known of particular kernels stands in ``families.toml``; this file only takes
C++ names apart and applies that table. Each step is one pass over the name, so a name of a hundred
thousand characters costs no more than a thousand short ones.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from opkit.errors import BadInput


@dataclass(frozen=True, eq=False)
class Family:
    """One row of ``families.toml``, which says what each key means. Compared by identity."""

    family: str
    pattern: re.Pattern[str]
    full: bool = False
    glue: bool = False
    communication: bool = False
    wrapper: bool = False
    short: str | None = None
    computes: re.Pattern[str] | None = None
    tile: re.Pattern[str] | None = None
    dtype: re.Pattern[str] | None = None


@dataclass(frozen=True)
class KernelName:
    """A demangled name taken apart.

    Attributes:
        demangled: as nsys gives it.
        short: what a reader recognises; never empty.
        family: see ``families.toml``; ``other`` when none fits.
        glue: elementwise, copy, fill or cast.
        stem: what stays equal between variants (other tile, stage or integer template arguments).
        dtypes: element types named by the template arguments or the base name.
        typed: those of the template arguments in their order (which operand has which type), and
            enumerations among the arguments. Empty for a kernel behind a wrapper, whose schedule
            may name a type more or less often.
        communication: talks to other GPUs and computes nothing of the layer by itself.
    """

    demangled: str
    short: str
    family: str
    glue: bool
    stem: str
    dtypes: tuple[str, ...]
    typed: tuple[str, ...] = ()
    communication: bool = False


# Element types as the field's kernels spell them, without their namespaces.
_SPELLINGS = {
    "bf16": "__nv_bfloat16 __nv_bfloat162 nv_bfloat16 nv_bfloat162 BFloat16 bfloat16_t",
    "fp16": "__half __half2 half half2 Half half_t",
    "fp32": "float",
    "fp64": "double",
    "tf32": "tfloat32_t",
    "fp8_e4m3": "__nv_fp8_e4m3 Float8_e4m3fn float_e4m3_t fp8e4nv",
    "fp8_e5m2": "__nv_fp8_e5m2 Float8_e5m2 float_e5m2_t fp8e5",
    "fp8_e8m0": "__nv_fp8_e8m0 Float8_e8m0fnu float_ue8m0_t",
    "fp4_e2m1": "__nv_fp4_e2m1 __nv_fp4x2_e2m1 __nv_fp4x4_e2m1 Float4_e2m1fn_x2 float_e2m1_t",
    "int4": "int4b_t uint4b_t",
    "int8": "int8_t uint8_t",
}
_DTYPES = {word: name for name, words in _SPELLINGS.items() for word in words.split()}
_DTYPES |= {"unsigned char": "int8", "signed char": "int8"}
# torch moves data of any type as an opaque one of its size.
_DTYPES |= {f"OpaqueType<{size}>": f"bytes{size}" for size in (1, 2, 4, 8, 16)}
_WORD = re.compile(
    r"(?:\b(?:c10|cutlass|at)::)?(OpaqueType<\d+>|(?:un)?signed char\b|\b[A-Za-z_]\w*)"
)

# How one namespace is spelled by nsys, c++filt, MSVC and inside a mangled name.
_NAMELESS = re.compile(
    r"\(anonymous namespace\)|<unnamed>|\{anonymous\}|`anonymous namespace'|\b_GLOBAL__N_\w*"
)
# Namespaces that only carry a version, a list of architectures or a file's hash.
_VERSIONS = re.compile(r"\b(?:(?:CUB|THRUST|_V)_\d\w*|_INTERNAL_\w+)::")
_OPERATOR = re.compile(r"\boperator ?(?:(\(\))|\[\]|<<=?|>>=?|<=>|[<>]=?|->\*?)")
_CAST = re.compile(r"\((?:(?:un)?signed )?(?:int|long|long long|short|char|bool)\)(?=-?\d)")
_MSVC = re.compile(r"\b(?:struct|class|enum) | __ptr64\b")
# A template argument of an enumeration says what is computed (format, mask, kind of GEMM), no tile.
_ENUM = re.compile(r"\((?:\w+::)+\w+\)\d+")
# So does a function given by its address: &ns::silu<float>, &(float ns::silu<float>(float const&)).
_ADDRESS = re.compile(r"(?<!&)&\(?(?:[\w:]+ )*(?:\w+::)*([A-Za-z_]\w*)")
_NUMBER = re.compile(r"\b\d+(?:u?l{0,2})\b")
_TOKEN = re.compile(r"->|[<>(){}\[\], ]")
_PAIRS = {">": "<", ")": "(", "}": "{", "]": "["}
_PLAIN_WORD = re.compile(r"[a-z]+|[A-Z]?[a-z]+|operator_call")

_SEEN = 8192  # characters that patterns of the table search, so that a slow one stays bearable
_LONGEST = 160  # characters of a short name
_NESTING = 4  # wrappers within wrappers


@lru_cache(maxsize=8)
def load_families(extra: Path | None = None) -> tuple[Family, ...]:
    """The family table; rows of ``extra`` (a user's TOML file of the same form) come first.

    Raises:
        BadInput: ``extra`` is missing, is not TOML, or has a row that is not valid.
    """
    own = resources.files(__package__).joinpath("families.toml").read_text("utf-8")
    table = _rows(tomllib.loads(own), "families.toml")
    if extra is None:
        return table
    try:
        read = tomllib.loads(extra.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{extra}: not a readable families file ({error})") from error
    return _rows(read, str(extra)) + table


def _rows(read: dict[str, Any], origin: str) -> tuple[Family, ...]:
    rows = read.get("family", [])
    if set(read) - {"family"} or not isinstance(rows, list):
        raise BadInput(f"{origin}: a families file holds [[family]] rows and nothing else")
    return tuple(_row(row, f"{origin}: family row {i}") for i, row in enumerate(rows, 1))


def _row(row: Any, place: str) -> Family:
    """One row of a table, checked."""
    if not isinstance(row, dict):
        raise BadInput(f"{place}: not a [[family]] table")
    made: dict[str, Any] = {}
    kinds = {field.name: str(field.type) for field in fields(Family)}
    for key, value in row.items():
        if key not in kinds:
            raise BadInput(f"{place}: unknown key {key!r}; known are {', '.join(kinds)}")
        if not isinstance(value, bool if kinds[key] == "bool" else str) or value == "":
            wanted = "true or false" if kinds[key] == "bool" else "a text that is not empty"
            raise BadInput(f"{place}: {key} is {value!r}, not {wanted}")
        made[key] = _regex(key, value, place) if "Pattern" in kinds[key] else value
    if missing := [key for key in ("family", "pattern") if key not in made]:
        raise BadInput(f"{place}: lacks {' and '.join(missing)}")
    if "dtype" in made and not made["dtype"].groups:
        raise BadInput(f"{place}: dtype {row['dtype']!r} has no group that holds the type's code")
    try:
        made["pattern"].sub(made.get("short", ""), "")
    except (re.error, IndexError) as error:
        raise BadInput(f"{place}: short {row['short']!r} does not fit pattern ({error})") from error
    return Family(**made)


def _regex(key: str, value: str, place: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"{place}: {key} {value!r} is no regular expression ({error})") from error


@lru_cache(maxsize=65536)
def parse_name(demangled: str, families: tuple[Family, ...] | None = None) -> KernelName:
    """Take a demangled kernel name apart. Any text is a name; none raises.

    Args:
        demangled: as the export has it; names left mangled (``_Z…``) are read as far as needed.
        families: a table of :func:`load_families`; the built-in one by default.
    """
    table = families if families is not None else load_families()
    plain = _plain(demangled)
    base, arguments, exact = _mangled(plain) or (*_split(plain), "")
    found = _find(table, plain, base or demangled, arguments)
    row, base, arguments = found.row, found.base, found.arguments
    functor = _functor(row, arguments)
    addresses = _ADDRESS.findall(arguments) if "&" in arguments else []
    typed = [name for word in _words(arguments) if (name := _DTYPES.get(word))]
    dtypes = set(typed)
    stem = base
    if row is not None and row.dtype is not None and (code := row.dtype.search(base[:_SEEN])):
        dtypes.add(code.group(1))
        stem = stem.replace(f"_{code.group(1)}_", "_", 1)
    if row is not None and row.tile is not None:
        stem = row.tile.sub("", stem[:_SEEN]) + stem[_SEEN:]
    if functor or (row is not None and row.glue):
        # Element-wise kernels are told apart by what they compute, not by the loop around it.
        stem += f"<{_NUMBER.sub('#', _WORD.sub(_typeless, arguments))}>"
    elif exact or addresses:
        stem += f"<{exact or ','.join(addresses)}>"
    return KernelName(
        demangled=demangled,
        short=_short(found.shown, functor or (addresses[0] if addresses else "")),
        family=row.family if row is not None else "other",
        glue=row is not None and row.glue,
        stem=stem,
        dtypes=tuple(sorted(dtypes)),
        typed=() if found.wrapped else (*typed, *_ENUM.findall(arguments)),
        communication=row is not None and row.communication,
    )


@dataclass(frozen=True)
class _Found:
    """The row that fits a name, and the name behind its wrappers."""

    row: Family | None
    base: str
    arguments: str
    shown: str
    wrapped: bool


def _find(table: tuple[Family, ...], plain: str, base: str, arguments: str) -> _Found:
    """Look the name up; behind a wrapper the kernel that it carries, if that has a row."""
    row = best = _first_row(table, plain, base)
    shown = _shown(row, plain, base)
    wrapped = False
    for _ in range(_NESTING):
        if row is None or not row.wrapper:
            break
        if row.short is not None:
            row = _first_row(table, plain, shown)
        elif arguments:
            base, arguments = _split(arguments, inner=True)
            row, wrapped = _first_row(table, plain, base), True
            shown = _shown(row, plain, base)
        else:
            break
        best = row or best
    return _Found(best, base, arguments, shown or base, wrapped)


def _first_row(table: tuple[Family, ...], plain: str, base: str) -> Family | None:
    plain, base = plain[:_SEEN], base[:_SEEN]
    return next((f for f in table if f.pattern.search(plain if f.full else base)), None)


def _shown(row: Family | None, plain: str, base: str) -> str:
    """What the short name is made of: the base, or what the row makes of it."""
    if row is None or row.short is None:
        return base
    match = row.pattern.search((plain if row.full else base)[:_SEEN])
    return match.expand(row.short) if match else base


def _short(shown: str, detail: str) -> str:
    """The last part of a qualified name; with the part before it where that is one plain word."""
    parts = shown.split("::")
    last = parts.pop() or shown
    if _PLAIN_WORD.fullmatch(last):
        named = [part for part in parts if part not in ("unnamed", "detail", "impl", "")]
        last = "::".join((*named[-1:], last))
    last = f"{last}({detail})" if detail else last
    if len(last) > _LONGEST:
        last = f"{last[: _LONGEST - 40]}…{last[-39:]}"
    return last if last.strip() else "(no name)"


def _words(arguments: str) -> Iterator[str]:
    return (match.group(1) for match in _WORD.finditer(arguments))


def _typeless(word: re.Match[str]) -> str:
    return "T" if word.group(1) in _DTYPES else word.group()


def _functor(row: Family | None, arguments: str) -> str:
    """What an element-wise, reduce or scan kernel computes, from its template arguments."""
    if row is None or row.computes is None:
        return ""
    found = [m.group(m.lastindex or 0) for m in row.computes.finditer(arguments[:_SEEN])]
    # The innermost functor says most: BUnaryFunctor<…, MulFunctor<float>> is a multiplication.
    return found[-1] if found else ""


def _plain(demangled: str) -> str:
    """The name in one spelling, without what would confuse bracket counting."""
    text = _NAMELESS.sub("unnamed", demangled.strip().partition(" [clone ")[0])
    text = _OPERATOR.sub(lambda m: "operator_call" if m.group(1) else "operator_sign", text)
    return _MSVC.sub("", _CAST.sub("", _VERSIONS.sub("", text)))


def _split(text: str, *, inner: bool = False) -> tuple[str, str]:
    """Base name and template arguments: ``void a::b<c>::d<e>(f)`` → ``a::b::d``, ``c, e``.

    A bracket is closed by its own kind only, so that ``(8 > 0)`` and an unbalanced ``T2>0`` in a
    return type do no harm. With ``inner`` the text is a list of arguments of which the first is
    meant; else what stands before a comma or a space outside brackets is a return type.
    """
    begin, end, opened = 0, len(text), 0
    open_brackets: list[str] = []
    count = dict.fromkeys(_PAIRS.values(), 0)
    groups: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text):
        mark, at = token.group(), token.start()
        if mark in count:
            if not open_brackets:
                opened = at
                if mark == "(" and text.find("):", at) < 0:
                    end = at
                    break
            open_brackets.append(mark)
            count[mark] += 1
        elif mark in ", ":
            if open_brackets or (mark == " " and text[at + 1 : at + 2] in ("<", "(")):
                continue
            if mark == "," and inner:
                end = at
                break
            begin, groups = at + 1, []
        elif mark != "->":
            begin, groups, done = _close(mark, at, open_brackets, count, opened, begin, groups)
            if done and text[at + 1 : at + 3] != "::":
                end = opened
                break
    return "", ""

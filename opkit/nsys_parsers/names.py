"""Kernel names: demangled → short → family, and how well two of them agree.

Everything that is known of particular kernels stands in ``families.toml``; this file only takes
C++ names apart and applies that table. Each step is one pass over the name, however long.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from opkit.errors import BadInput

_SEEN = 4096  # characters that the table's patterns search, so that a slow one stays bearable
_LONGEST = 160  # characters of a short name
_NESTING = 4  # wrappers within wrappers


@dataclass(frozen=True, eq=False)
class Family:
    """One row of ``families.toml``, which says what each key means. Compared by identity."""

    family: str
    pattern: re.Pattern[str]
    full: bool = False
    lower: bool = False
    glue: bool = False
    communication: bool = False
    wrapper: bool = False
    short: str | None = None
    computes: re.Pattern[str] | None = None
    detail: re.Pattern[str] | None = None
    tile: re.Pattern[str] | None = None
    dtype: re.Pattern[str] | None = None

    def match(self, plain: str, base: str) -> re.Match[str] | None:
        """Where the pattern fits the base name or, for a ``full`` row, the whole name."""
        text = (plain if self.full else base)[:_SEEN]
        return self.pattern.search(text.lower() if self.lower else text)


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


_OTHER = Family("other", re.compile(""))

# Element types as the field's kernels spell them, without their namespaces.
_SPELLINGS = {
    "bf16": "__nv_bfloat16 __nv_bfloat162 nv_bfloat16 nv_bfloat162 BFloat16 bfloat16_t",
    "fp16": "__half __half2 half half2 nv_half Half half_t",
    "fp32": "float",
    "fp64": "double",
    "tf32": "tfloat32_t",
    "fp8_e4m3": "__nv_fp8_e4m3 __nv_fp8x2_e4m3 __nv_fp8x4_e4m3 Float8_e4m3fn float_e4m3_t fp8e4nv",
    "fp8_e5m2": "__nv_fp8_e5m2 __nv_fp8x2_e5m2 __nv_fp8x4_e5m2 Float8_e5m2 float_e5m2_t fp8e5",
    "fp8_e4m3fnuz": "Float8_e4m3fnuz",
    "fp8_e5m2fnuz": "Float8_e5m2fnuz",
    "fp8_e8m0": "__nv_fp8_e8m0 Float8_e8m0fnu float_ue8m0_t",
    "fp8_ue4m3": "float_ue4m3_t",
    "fp4_e2m1": "__nv_fp4_e2m1 __nv_fp4x2_e2m1 __nv_fp4x4_e2m1 Float4_e2m1fn_x2 float_e2m1_t",
    "int4": "int4b_t uint4b_t",
    "int8": "int8_t uint8_t",
}
_DTYPES = {word: name for name, words in _SPELLINGS.items() for word in words.split()}
# torch moves data of any type as an opaque one of its size.
_DTYPES |= {f"OpaqueType<{size}>": f"bytes{size}" for size in (1, 2, 4, 8, 16)}
_DTYPES |= {"unsigned char": "int8", "signed char": "int8"}
_WORD = re.compile(
    r"(?:\b(?:c10|cutlass|at)::)?(OpaqueType<\d+>|(?:un)?signed char\b|\b[A-Za-z_]\w*)"
)

# Where a word occurs, its pattern is respelled: unnamed namespaces, which nsys, c++filt, gcc, MSVC
# and mangled names each write in their own way; namespaces that only carry a version, a list of
# architectures or a file's hash; operators; casts of template numbers; MSVC's keywords.
_RESPELL = [
    (word, re.compile(pattern), spelling)
    for word, pattern, spelling in (
        ("(anonymous", r"\(anonymous namespace\)", "unnamed"),
        ("<unnamed>", "<unnamed>", "unnamed"),
        ("{anonymous}", r"\{anonymous\}", "unnamed"),
        ("`anonymous", "`anonymous[ -]namespace'", "unnamed"),
        ("_GLOBAL__N_", r"\b_GLOBAL__N_\w*", "unnamed"),
        ("_V_", r"\b_V_\d\w*::", ""),
        ("CUB_", r"\bCUB_\d\w*::", ""),
        ("THRUST_", r"\bTHRUST_\d\w*::", ""),
        ("_INTERNAL_", r"\b_INTERNAL_\w+::", ""),
        ("operator", r"\boperator ?\(\)", "operator_call"),
        ("operator", r"\boperator ?(?:\[\]|<<=?|>>=?|<=>|[<>]=?|->\*?)", "operator_sign"),
        (")", r"\((?:(?:un)?signed )?(?:int|long|long long|short|char|bool)\)(?=-?\d)", ""),
        ("__cdecl ", "__cdecl ", ""),
        ("struct ", r"\bstruct ", ""),
        ("class ", r"\bclass ", ""),
        ("enum ", r"\benum ", ""),
    )
]
# A template argument of an enumeration says what is computed (format, mask, kind of GEMM), no tile.
_ENUM = re.compile(r"\((?:\w+::)*\w+\)\d+")
# So does a function given by its address: &ns::silu<float>, &(float ns::silu<float>(float const&)).
_ADDRESS = re.compile(r"(?<!&)&\(?(?:[\w:]+[ *&]+)*(?:\w+::)*(operator[^\w\s,()]+|[A-Za-z_]\w*)")
_NUMBER = re.compile(r"\b\d+u?l{0,2}\b")
_BRACKET = re.compile(r"[<({\[)}\]]|(?<!-)>")
_PAIRS = {">": "<", ")": "(", "}": "{", "]": "["}
_PLAIN_WORD = re.compile(r"[A-Z]?[a-z]+|operator_call")
# Mangled: what may stand before the first name, a name's length, and the names among the rest.
_QUALIFIERS = re.compile(r"_ZN?[KVrRO]*(?:St|L)?")
_LENGTH = re.compile(r"L?(\d{1,4})(?=[A-Za-z_])")
_NAME_OR_NUMBER = re.compile(r"L[a-z]n?\d+E|(?<![ST\d])(\d{1,4})(?=[A-Za-z_])")


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
    except (OSError, ValueError) as error:  # not TOML, not UTF-8
        raise BadInput(f"{extra}: not a readable families file ({error})") from error
    return _rows(read, str(extra)) + table


def _rows(read: dict[str, Any], origin: str) -> tuple[Family, ...]:
    rows = read.get("family", [])
    if set(read) - {"family"} or not isinstance(rows, list):
        raise BadInput(f"{origin}: a families file holds [[family]] rows and nothing else")
    return tuple(_row(row, f"{origin}: family row {i}") for i, row in enumerate(rows, 1))


def _row(row: Any, place: str) -> Family:
    """One row of a table, checked."""
    try:
        made = {key: _value(key, value) for key, value in dict(row).items()}
        if missing := {"family", "pattern"} - made.keys():
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        if "dtype" in made and not made["dtype"].groups:
            raise ValueError(f"dtype {row['dtype']!r} has no group for the type's code")
        if made.get("lower") and re.search(r"(?<!\\)[A-Z]", row["pattern"]):
            raise ValueError("lower is true but pattern has capitals, so it never fits")
        made["pattern"].sub(made.get("short", ""), "")  # short refers to groups that exist
    except (ValueError, TypeError, IndexError, re.error) as error:
        raise BadInput(f"{place}: bad row, {error}") from error
    return Family(**made)


def _value(key: str, value: Any) -> Any:
    """One key of a row: a text, a switch, or a compiled regular expression."""
    kinds = {field.name: str(field.type) for field in fields(Family)}
    if key not in kinds:
        raise ValueError(f"unknown key {key!r}; known are {', '.join(kinds)}")
    if not isinstance(value, bool if kinds[key] == "bool" else str) or value == "":
        wanted = "true or false" if kinds[key] == "bool" else "a text that is not empty"
        raise ValueError(f"{key} is {value!r}, not {wanted}")
    try:
        return re.compile(value) if "Pattern" in kinds[key] else value
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key} {value!r} is no regular expression ({error})") from error


@lru_cache(maxsize=65536)
def parse_name(demangled: str, families: tuple[Family, ...] | None = None) -> KernelName:
    """Take a demangled kernel name apart. Any text is a name; none raises.

    Args:
        demangled: as the export has it; names left mangled (``_Z…``) are read as far as needed.
        families: a table of :func:`load_families`; the built-in one by default.
    """
    plain = _plain(demangled)
    base, arguments, mangled = _mangled(plain) or (*_split(plain), "")
    if mangled:
        plain = f"{base}<{arguments}>"
    table = families or load_families()
    row, base, arguments, shown, wrapped = _look_up(table, plain, base or plain, arguments)
    functor = _last(row.computes, arguments)
    addresses = _ADDRESS.findall(arguments) if "&" in arguments else []
    typed = [_DTYPES[word] for word in _WORD.findall(arguments) if word in _DTYPES]
    dtypes = set(typed)
    stem = base
    if row.dtype is not None and (code := row.dtype.search(base[:_SEEN])):
        dtypes.add(code.group(1))
        stem = stem.replace(f"_{code.group(1)}_", "_", 1)
    if row.tile is not None:
        stem = row.tile.sub("", stem[:_SEEN]) + stem[_SEEN:]
    if mangled:
        stem += f"<{mangled}>"
    elif functor or row.glue or "lambda" in arguments:
        # Element-wise kernels are told apart by what they compute, not by the loop around it.
        typeless = _WORD.sub(lambda m: "T" if m.group(1) in _DTYPES else m.group(), arguments)
        stem += f"<{_NUMBER.sub('#', typeless)}>"
    elif addresses:
        stem += f"<{','.join(addresses)}>"
    said = functor or _last(row.detail, arguments) or (addresses[0] if addresses else "")
    return KernelName(
        demangled=demangled,
        short=_short(shown, said),
        family=row.family,
        glue=row.glue,
        stem=stem,
        dtypes=tuple(sorted(dtypes)),
        typed=() if wrapped else (*typed, *_ENUM.findall(arguments)),
        communication=row.communication,
    )


def _look_up(
    table: tuple[Family, ...], plain: str, base: str, arguments: str
) -> tuple[Family, str, str, str, bool]:
    """The row that fits a name or, behind a wrapper, the kernel that it carries; that kernel's base
    and arguments; what to show of it; whether it was behind a wrapper."""
    row = best = _first_row(table, plain, base)
    shown, wrapped = _shown(row, plain, base), False
    for _ in range(_NESTING):
        if not row.wrapper or not (row.short or arguments):
            break
        if row.short is not None:
            row = _first_row(table, plain, shown)
        else:
            base, arguments = _split(arguments, inner=True)
            row, wrapped = _first_row(table, plain, base), True
            shown = _shown(row, plain, base)
        best = best if row is _OTHER else row
    return best, base, arguments, shown, wrapped


def _first_row(table: tuple[Family, ...], plain: str, base: str) -> Family:
    """The first row that fits."""
    place = _place(table, base[:_SEEN])
    for row in table[:place]:
        if row.full and row.match(plain, base):
            return row
    return table[place] if place < len(table) else _OTHER


@lru_cache(maxsize=65536)
def _place(table: tuple[Family, ...], base: str) -> int:
    """Where the first row stands that fits the base name, which many names share."""
    lower = base.lower()
    for place, search, lowered in _searches(table):
        if search(lower if lowered else base):
            return place
    return len(table)


@lru_cache(maxsize=8)
def _searches(table: tuple[Family, ...]) -> list[tuple[int, Any, bool]]:
    """What :func:`_place` tries, looked up once: place, the pattern's search, in lower case."""
    return [(i, row.pattern.search, row.lower) for i, row in enumerate(table) if not row.full]


def _shown(row: Family, plain: str, base: str) -> str:
    """What to show of a name: what the row makes of it; else its last part, with the part before
    it where that is one plain word."""
    match = row.match(plain, base) if row.short is not None else None
    if match is not None:
        return match.expand(row.short or "")
    *parts, last = base.split("::")
    named = [part for part in parts if part not in ("", "unnamed", "detail", "impl")]
    return f"{named[-1]}::{last}" if named and _PLAIN_WORD.fullmatch(last) else last or base


def _short(shown: str, said: str) -> str:
    short = f"{shown}({said})" if said else shown
    if len(short) > _LONGEST:
        short = f"{short[: _LONGEST - 40]}…{short[-39:]}"
    short = "".join(char if char.isprintable() else "?" for char in short)
    return short if short.strip() else "(no name)"


def _last(pattern: re.Pattern[str] | None, arguments: str) -> str:
    """The last match, its group where it has one: of BUnaryFunctor<MulFunctor> the innermost."""
    matches = list(pattern.finditer(arguments[:_SEEN])) if pattern is not None else []
    return matches[-1].group(matches[-1].lastindex or 0) if matches else ""


def _plain(demangled: str) -> str:
    """The name in one spelling, without what would confuse bracket counting."""
    text = demangled.strip().partition(" [clone ")[0]
    for word, pattern, spelling in _RESPELL:
        if word in text:
            text = pattern.sub(spelling, text)
    # Its condition may hold a lone bracket: std::enable_if<T2>0&&…, void>::type name<…>(…)
    return text.partition(">::type ")[2] or text if text.startswith("std::enable_if<") else text


def _mangled(plain: str) -> tuple[str, str, str] | None:
    """Base, identifiers of the arguments, and the raw rest of a name that nobody demangled.

    Reads the qualified name of the Itanium C++ ABI (``_ZN4vllm8rms_normIfEEvPf``) and no more:
    the raw rest, which holds every template argument, then stands for them in comparisons.
    """
    start = _QUALIFIERS.match(plain)
    parts: list[str] = []
    at = start.end() if start is not None else len(plain)
    while (length := _LENGTH.match(plain, at)) is not None:
        at = length.end() + int(length.group(1))
        part = plain[length.end() : at]
        parts.append("unnamed" if part.startswith("_GLOBAL__N_") else part)
    if not parts:
        return None
    rest, words, at = plain[at:], [], 0
    while (piece := _NAME_OR_NUMBER.search(rest, at)) is not None:
        at = piece.end() + int(piece.group(1) or 0)
        words.append(rest[piece.end() : at])
    return "::".join(parts), ", ".join(filter(None, words)), rest


def _split(text: str, *, inner: bool = False) -> tuple[str, str]:
    """Base name and template arguments: ``void a::b<c>::d<e>(f)`` → ``a::b::d``, ``c, e``.

    With ``inner`` the text is a list of arguments of which the first is meant; else what stands
    before a comma or a space outside brackets is a return type.
    """
    text = text.strip()
    base, arguments, at = "", list[str](), 0
    for mark, first, last in chain(_groups(text), [("", len(text), len(text))]):
        outside = text[at:first]
        if inner and "," in outside:
            base += outside.partition(",")[0]
            break
        words = (outside.rstrip() if mark else outside).replace(",", " ").split(" ")
        if len(words) > 1 or mark == ">":
            base, arguments = "", []
        base += words[-1] if mark != ">" else ""
        if mark == "(" and text[last + 1 : last + 3] != "::":
            break
        if mark == "<":
            arguments.append(text[first + 1 : last])
        elif mark != ">":
            base += text[first : last + 1]
        at = last + 1
    return base, ", ".join(arguments)


def _groups(text: str) -> Iterator[tuple[str, int, int]]:
    """The outermost brackets and stray ``>``: the mark, its place and that of its end.

    A bracket is closed by its own kind only, so that ``(8 > 0)`` within one and an unbalanced
    ``T2>0`` in a return type do no harm.
    """
    stack: list[str] = []
    count = dict.fromkeys("<({[", 0)
    opened = 0
    for token in _BRACKET.finditer(text):
        mark, at = token.group(), token.start()
        if mark in count:
            if not stack:
                opened = at
                if mark == "(" and text.find("):", at) < 0:  # parameters: no name comes after
                    yield mark, at, len(text)
                    return
            stack.append(mark)
            count[mark] += 1
        elif not stack:
            if mark == ">":
                yield mark, at, at
        elif count[_PAIRS[mark]] and (mark != ">" or stack[-1] == "<"):
            while (top := stack.pop()) != _PAIRS[mark]:
                count[top] -= 1  # an operator, not a bracket
            count[top] -= 1
            if not stack:
                yield top, opened, at
    if stack:
        yield stack[0], opened, len(text)

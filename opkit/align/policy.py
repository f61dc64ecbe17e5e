"""The policy: every threshold a verdict rests on, with its reason. Stored with the verdict.

A TOML file changes single values (``opkit align --policy FILE``); unknown keys are refused, and no
file can lift the hard ceiling on latency.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from opkit.errors import BadInput
from opkit.layers import operands

# A mock whose GPU time is off by more than this factor measures something else, whatever a policy
# says.
HARD_CEILING = 2.0


@dataclass(frozen=True)
class Role:
    """Two kernels declared equivalent: regular expressions over demangled names of each side."""

    mock: str
    e2e: str


@dataclass(frozen=True)
class Policy:
    """Thresholds of the checks. Shares and tolerances are fractions (0.1 is 10 %).

    Attributes:
        min_attributed: least share of a step's kernels that is linked to a launch.
        min_regions: least regions of a case on each side.
        max_odd_share: largest share of regions whose kernel sequence differs from the most
            frequent one. An op's module launches one sequence at one shape; loss and mix-ups show
            here first.
        key_share: a kernel from this share of the region's GPU time on is key, glue or not.
        glue_share: glue on one side only may take this share of GPU time in all. The default
            allows none: a mock of the engine's own class has no reason for another launch.
        launches: tolerance on all launches of a region.
        latency: tolerance on a region's GPU time.
        kernel_latency: least tolerance on one kernel's time; its own spread widens it.
        kernel_spread: how many median absolute deviations (both sides added) a kernel's median may
            differ.
        kernel_floor_us: differences below this are within what cache state and clock do to a short
            kernel.
        heavy_share: a kernel from this share of the region's GPU time on is heavy.
        heavy_scale: when all heavy kernels differ the same way by more than this, operand data or
            clock is the cause (degenerate operands run 10 to 15 % too fast on an H100:
            ``docs/development.md``).
        odd_kernel_ratio: a matched kernel of any family may not take this many times as long as
            its peer, whatever its spread.
        odd_kernel_floor_us: differences below this are never odd.
        strict: tolerance of ``--strict`` on GPU time against the module of the engine's decoder
            layer.
        require_operands: an alignment without a record of the mock's operands is inconclusive.
        max_zeros, max_equal_rows, min_distinct: when an operand counts as degenerate.
        roles: kernels declared equivalent.
    """

    min_attributed: float = 0.95
    min_regions: int = 3
    max_odd_share: float = 0.0
    key_share: float = 0.01
    glue_share: float = 0.0
    launches: float = 0.10
    latency: float = 0.10
    kernel_latency: float = 0.15
    kernel_spread: float = 4.0
    kernel_floor_us: float = 1.5
    heavy_share: float = 0.05
    heavy_scale: float = 0.07
    odd_kernel_ratio: float = 2.0
    odd_kernel_floor_us: float = 1.0
    strict: float = 0.01
    require_operands: bool = True
    max_zeros: float = operands.MAX_ZEROS
    max_equal_rows: float = operands.MAX_EQUAL_ROWS
    min_distinct: float = operands.MIN_DISTINCT
    roles: tuple[Role, ...] = ()

    def digest(self) -> str:
        """Short digest of all thresholds."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def changes(values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a verdict's policy, as it is stored, differs from the default: its value, the default.

    Thresholds that its time did not know, or that are no more, are left out.
    """
    default = json.loads(json.dumps(asdict(Policy())))
    return {
        name: (values[name], default[name])
        for name in default
        if name in values and json.loads(json.dumps(values[name])) != default[name]
    }


def load_policy(path: Path | None) -> Policy:
    """The default policy, changed by a TOML file.

    Raises:
        BadInput: the file cannot be read, has an unknown key, a value of another type or out of
            range.
    """
    if path is None:
        return Policy()
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: not a readable policy ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path}: not a readable policy ({error})") from error
    return replace(Policy(), **{key: _value(path, key, value) for key, value in data.items()})


def _value(path: Path, key: str, value: Any) -> Any:
    known = {item.name: getattr(Policy(), item.name) for item in fields(Policy)}
    if key not in known:
        raise BadInput(f"{path}: unknown key {key!r}", f"known keys: {', '.join(sorted(known))}")
    if key == "roles":
        try:
            roles = tuple(Role(str(item["mock"]), str(item["e2e"])) for item in value)
            for pattern in (p for role in roles for p in (role.mock, role.e2e)):
                re.compile(pattern)
        except (TypeError, KeyError) as error:
            raise BadInput(f"{path}: roles need `mock` and `e2e` patterns") from error
        except re.error as error:
            raise BadInput(f"{path}: no regular expression: {error.pattern!r} ({error})") from error
        return roles
    default = known[key]
    if isinstance(default, bool) != isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{path}: {key} must be a {'truth value' if default is True else 'number'}")
    if not math.isfinite(value):  # nan would pass every comparison
        raise BadInput(f"{path}: {key} must be a finite number")
    if isinstance(default, float):
        value = float(value)
    elif isinstance(value, float):
        raise BadInput(f"{path}: {key} must be a whole number")
    if key == "latency" and value > HARD_CEILING - 1:
        raise BadInput(f"{path}: latency {value} lies above the hard ceiling of {HARD_CEILING}×")
    if value < 0:
        raise BadInput(f"{path}: {key} must not be negative")
    return value

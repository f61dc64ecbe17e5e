"""What several reports say the same way, in a line."""

from __future__ import annotations

from typing import Any

WIDEST = 120  # a wider table only moves its numbers away from its names
SEPARATOR = " · "


def pairs_text(values: dict[str, Any] | None) -> str:
    """Names with their values, one after the other."""
    # The GPU has a line of its own.
    return SEPARATOR.join(
        f"{name} {value}" for name, value in (values or {}).items() if value and name != "gpu"
    )


def model_text(known: dict[str, Any]) -> str:
    """The model in a line, from what is known of an alignment or a mock."""
    model = dict(known.get("model") or {})
    parts = [str(model.pop("architecture", "") or "")]
    # Digests identify, they do not inform; lists and objects are for the JSON.
    parts += [
        f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"
        for name, value in model.items()
        if isinstance(value, (int, str)) and "digest" not in name and "sha256" not in name
    ]
    if known.get("tp_size"):
        parts.append(f"tp {known['tp_size']}")
    return SEPARATOR.join(part for part in parts if part)

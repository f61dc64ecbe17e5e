"""A model's ``config.json``: read, its values checked as they are taken, shared among ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opkit.errors import BadInput


class ModelConfig:
    """A configuration whose values are checked as they are taken."""

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        self._data, self._origin = data, origin

    def has(self, key: str) -> bool:
        """Whether it says anything of ``key``; null says nothing."""
        return self._data.get(key) is not None

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from ``least`` on."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, f"a whole number from {least} on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise self._wrong(key, "a number above zero")
        return float(value)

    def word(self, key: str, known: Sequence[str] = ()) -> str:
        """A word, one of ``known`` where those are given."""
        value = self._value(key, None)
        if not isinstance(value, str) or (known and value not in known):
            raise self._wrong(key, f"one of {', '.join(known)}" if known else "a word")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty when missing."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
        ):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(value)

    def rope_theta(self, default: float | None = None) -> float:
        """The rotary base, which newer files hold in ``rope_parameters``."""
        inner = self._data.get("rope_parameters")
        if isinstance(inner, Mapping) and not self.has("rope_theta"):
            return ModelConfig(inner, f"{self._origin}, rope_parameters").number(
                "rope_theta", default
            )
        return self.number("rope_theta", default)

    def _value(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self._data[key]
        if default is None:
            raise BadInput(f"{self._origin}: {key} is missing")
        return default

    def _wrong(self, key: str, wanted: str) -> BadInput:
        return BadInput(f"{self._origin}: {key} must be {wanted}, not {self._data[key]!r}")


def read_config(path: str | Path) -> tuple[dict[str, Any], str]:
    """The model's configuration and its file's name.

    Args:
        path: a folder with a ``config.json``, or such a file.

    Raises:
        BadInput: there is none, or it is not a JSON object.
    """
    file = Path(path)
    if file.suffix != ".json" or file.is_dir():
        file = file / "config.json"
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: no readable model configuration ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"{file}: not a JSON object")
    return data, str(file)


def local_overrides(
    config: Mapping[str, Any], tp_size: int, shares: Sequence[str], origin: str
) -> dict[str, int]:
    """What to write over a config.json so that one rank's part is the whole model.

    Args:
        config: the content of the config.json.
        tp_size: tensor-parallel ranks.
        shares: keys that a rank has its share of; those that ``config`` lacks are left out. With
            the heads ``head_dim`` is written too, as the model's: where a configuration leaves it
            out, it follows from the number of heads, which is another one then. (Latent attention
            has its own sizes and never gets one.)
        origin: the file's name, for errors.

    Returns:
        Key and local value of each; nothing for one rank.

    Raises:
        BadInput: the message names what cannot be shared, or a value that is no size.
    """
    if tp_size == 1:
        return {}
    known = ModelConfig(config, origin)
    found = {
        key: share(key, known.whole(key), tp_size, origin)
        for key in shares
        if key != "head_dim" and known.has(key)
    }
    if {"head_dim", "num_attention_heads"} & {*shares} and not known.has("kv_lora_rank"):
        heads = known.whole("num_attention_heads")
        found["head_dim"] = known.whole("head_dim", known.whole("hidden_size") // heads or None)
    if known.has("kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = share(
            "num_attention_heads", known.whole("num_attention_heads"), tp_size, origin
        )
    return found


def share(key: str, value: int, tp_size: int, origin: str) -> int:
    """One rank's share of ``value``, the configuration's ``key``.

    Key and value heads are copied where there are more ranks than heads.

    Raises:
        BadInput: the message names what cannot be shared.
    """
    if tp_size < 1:
        raise BadInput(f"{origin}: {tp_size} tensor-parallel ranks are none")
    if key == "num_key_value_heads" and value < tp_size and tp_size % value == 0:
        return 1
    if value % tp_size:
        raise BadInput(f"{origin}: {key} {value} cannot be shared by {tp_size} ranks")
    return value // tp_size

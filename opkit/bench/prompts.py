"""Prompts of known length: token ids from a seed, or text through a tokenizer."""

from __future__ import annotations

import importlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opkit.errors import BadInput, ToolMissing

Prompts = Callable[[str, int], list[int]]  # name and length of a prompt -> its token ids

_ID = "I"  # drawn for one id, 4 bytes: a bias of the vocabulary over 2^32 is nothing
# Common English words; any text would do, as long as a tokenizer makes ordinary tokens of it.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many"
)


def synthetic(seed: int, vocab: int) -> Prompts:
    """Token ids uniform over the vocabulary. Prompts of other names share no beginning.

    Args:
        seed: the run's.
        vocab: ids are 0 to ``vocab - 1``.
    """

    def prompt(name: str, length: int) -> list[int]:
        # Seeding with a string goes through SHA-512: alike on every platform and Python.
        layout = struct.Struct(f"<{length}{_ID}")  # quick: the GPU idles meanwhile
        drawn = random.Random(f"opkit bench {seed} {name}").randbytes(layout.size)
        return [number % vocab for number in layout.unpack(drawn)]

    return prompt


def encoded(seed: int, folder: Path) -> Prompts:
    """Random English words, encoded by the tokenizer in ``folder`` and cut to length.

    Raises:
        ToolMissing: the package ``tokenizers`` is not there.
        BadInput: the folder holds no ``tokenizer.json``, or one that cannot be read.
    """
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ToolMissing(
            "--tokenizer-dir: the package tokenizers is not installed beside opkit",
            "pip install tokenizers, or leave the option out: token ids need no tokenizer",
        ) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"--tokenizer-dir: {path} is not there")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"--tokenizer-dir: {path} is no tokenizer ({error})") from error

    words = _TEXT.split()

    def prompt(name: str, length: int) -> list[int]:
        stream = random.Random(f"opkit bench {seed} {name}")
        ids: list[int] = []
        while len(ids) < length:
            text = " " + " ".join(stream.choices(words, k=max(16, length - len(ids))))
            ids += tokenizer.encode(text, add_special_tokens=False).ids
        return ids[:length]

    return prompt


def vocabulary(folder: Path) -> int:
    """The vocabulary's size by the ``config.json`` in ``folder``; 0 when it does not say.

    A built TensorRT-LLM engine has it below ``pretrained_config``, a model of several kinds of
    input below ``text_config``.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    if not isinstance(config, dict):
        return 0
    for place in (config, config.get("pretrained_config"), config.get("text_config")):
        if isinstance(place, dict) and isinstance(place.get("vocab_size"), int):
            return int(place["vocab_size"])
    return 0

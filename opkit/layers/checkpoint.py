"""A checkpoint of random weights with sane scales, from a ``config.json``.

For runs where mock and engine shall share weights, and where an engine's dummy weights (uniform in
±1e-3 for vLLM) would make activations vanish. What is drawn is told in
:mod:`opkit.layers.weights`; a tensor's values follow from the seed and its name alone, so that a
checkpoint of fewer layers is the beginning of one of more.

Files are written as https://github.com/huggingface/safetensors describes the format (8 bytes with
the header's length, a JSON header, the values). Written here and not by that library, because it
wants a whole shard in memory, and numpy has no bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from opkit.errors import BadInput
from opkit.layers.geometry import geometry_of
from opkit.layers.model_config import read_config
from opkit.layers.weights import Weight, weights_of

# Name of an element type in safetensors, and its bytes.
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
SHARD_BYTES = 4_000_000_000
CHUNK = 1 << 20  # values drawn at a time, each chunk from a stream of its own
# What a configuration may say only thus: otherwise its checkpoint has tensors not known here.
_NEEDED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "index_topk_freq": (1, None),
    "index_topk_pattern": (None,),
}
# Lists with an entry for each layer.
_BY_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")
Say = Callable[[str, float], None]  # what is being written, and the share that is done


@dataclass(frozen=True)
class Checkpoint:
    """What is to be written, or was.

    Attributes:
        config: the content of its config.json.
        dtype: element type of its tensors, but for those that have their own.
        seed: of its values.
        shards: its tensors, by file.
    """

    config: dict[str, Any]
    dtype: str
    seed: int
    shards: tuple[tuple[Weight, ...], ...]

    def bytes_of(self, weight: Weight) -> int:
        """Size of a tensor in the file."""
        return weight.elements * DTYPES[weight.dtype or self.dtype][1]

    def weights(self) -> Iterator[Weight]:
        """All tensors in their order."""
        for shard in self.shards:
            yield from shard

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(map(self.bytes_of, self.weights()))

    def file_of(self, shard: int) -> str:
        """Name of a shard's file."""
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"


def bundled_models() -> dict[str, dict[str, Any]]:
    """The configurations that come with opkit, by name."""
    folder = resources.files("opkit.layers").joinpath("models")
    return {
        item.name.removesuffix(".json"): json.loads(item.read_text("utf-8"))
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".json")
    }


def find_config(given: str) -> tuple[dict[str, Any], str]:
    """A configuration by the path of its file or folder, or by the name of a bundled one.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    bundled = bundled_models()
    if given in bundled and not Path(given).exists():
        return bundled[given], given
    if not Path(given).exists():
        raise BadInput(f"{given}: no such configuration", f"known by name: {', '.join(bundled)}")
    return read_config(given)


def cut_config(config: Mapping[str, Any], layers: int | None, dtype: str) -> dict[str, Any]:
    """The configuration of the checkpoint: fewer layers, plain element type, nothing quantised.

    Of the leading dense layers of a model with experts as many stay as leave a layer with experts.

    Args:
        config: the model's.
        layers: decoder layers; None: as many as the model has.
        dtype: element type of its tensors.
    """
    cut = {
        key: value
        for key, value in config.items()
        # Code and quantised tensors that the checkpoint does not hold.
        if key not in ("auto_map", "quantization_config", "dtype")
    }
    cut["torch_dtype"] = dtype
    if layers is not None:
        cut["num_hidden_layers"] = layers
    count = cut.get("num_hidden_layers", 0)
    if cut.get("num_nextn_predict_layers"):
        cut["num_nextn_predict_layers"] = 0
    if "first_k_dense_replace" in cut:
        cut["first_k_dense_replace"] = max(0, min(cut["first_k_dense_replace"], count - 1))
    if isinstance(cut.get("max_window_layers"), int):
        cut["max_window_layers"] = min(cut["max_window_layers"], count)
    for key in _BY_LAYER:
        if isinstance(cut.get(key), list):
            cut[key] = cut[key][:count]
    return cut


def plan_checkpoint(
    config: Mapping[str, Any],
    origin: str,
    layers: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Checkpoint:
    """Lay a checkpoint out; writes nothing.

    Args:
        config: the model's config.json.
        origin: its file's name, for errors.
        layers: decoder layers; None: as many as the model has.
        seed: of the values.
        dtype: one of ``DTYPES``.

    Raises:
        BadInput: an unknown architecture or element type, a missing or impossible value, or
            tensors that are not known here.
    """
    if dtype not in DTYPES:
        raise BadInput(f"unknown element type {dtype!r}; known: {', '.join(DTYPES)}")
    for key, allowed in _NEEDED.items():
        if config.get(key) not in allowed:
            raise BadInput(f"{origin}: {key} {config[key]!r} has tensors that opkit does not know")
    geometry_of(config, origin)  # what is wrong is wrong in the file that was given
    cut = cut_config(config, layers, dtype)
    shards: list[list[Weight]] = []
    filled = 0
    for weight in weights_of(geometry_of(cut, origin)):
        size = weight.elements * DTYPES[weight.dtype or dtype][1]
        if not shards or filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return Checkpoint(cut, dtype, seed, tuple(map(tuple, shards)))


def write_checkpoint(
    checkpoint: Checkpoint, out: Path, *, force: bool = False, say: Say | None = None
) -> None:
    """Write a checkpoint; the folder appears when all of it is there.

    Args:
        checkpoint: what to write.
        out: folder to make.
        force: replace a checkpoint that is there.
        say: told what is written and how much is done, 0 to 1.

    Raises:
        BadInput: the folder is there, is no checkpoint that could be replaced, or does not fit on
            the disk.
    """
    out = Path(os.path.abspath(out))  # "." and "x/.." have no name to go by
    _check_place(checkpoint, out, force)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        (part / "config.json").write_text(json.dumps(checkpoint.config, indent=1) + "\n")
        if checkpoint.shards:
            _write_index(checkpoint, part)
        done, total = 0, checkpoint.total_bytes
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for number, shard in enumerate(checkpoint.shards):
                name = checkpoint.file_of(number)
                with open(part / name, "wb") as file:
                    for size in _write_shard(checkpoint, shard, file, pool):
                        done += size
                        if say is not None:
                            say(name, done / total)
        _swap(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_place(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise BadInput(f"{out} is there already", "replace it with --force, or choose another")
    if out.exists() and not (out / "config.json").is_file():
        raise BadInput(f"{out} is no checkpoint; only one is replaced")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < checkpoint.total_bytes:
        raise BadInput(
            f"{parent}: {free / 1e9:.1f} GB are free, the checkpoint has "
            f"{checkpoint.total_bytes / 1e9:.1f} GB",
            "fewer layers need less: --layers",
        )


def _swap(part: Path, out: Path) -> None:
    """Put the finished folder in its place; what was there goes last."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_index(checkpoint: Checkpoint, folder: Path) -> None:
    """Which file holds a tensor, as transformers and the engines read it."""
    where = {
        weight.name: checkpoint.file_of(number)
        for number, shard in enumerate(checkpoint.shards)
        for weight in shard
    }
    index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_shard(
    checkpoint: Checkpoint, shard: Sequence[Weight], file: BinaryIO, pool: ThreadPoolExecutor
) -> Iterator[int]:
    """Write one file; yields the bytes of values written since."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for weight in shard:
        end = begin + checkpoint.bytes_of(weight)
        header[weight.name] = {
            "dtype": DTYPES[weight.dtype or checkpoint.dtype][0],
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin aligned
    file.write(len(text).to_bytes(8, "little") + text)
    chunks = _chunks(shard)
    # As many at a time as bound the memory, however large the shard.
    while some := list(islice(chunks, 2 * (os.cpu_count() or 1))):
        for data in pool.map(lambda item: _draw(checkpoint, *item), some):
            file.write(data)
            yield len(data)


def _chunks(shard: Iterable[Weight]) -> Iterator[tuple[Weight, int]]:
    for weight in shard:
        for number in range(-(-weight.elements // CHUNK)):
            yield weight, number


def _draw(checkpoint: Checkpoint, weight: Weight, number: int) -> bytes:
    """Chunk ``number`` of a tensor's values, as they stand in the file (little-endian)."""
    import numpy as np

    text = f"opkit weight {checkpoint.seed} {weight.name} {number}"
    stream = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    count = min(CHUNK, weight.elements - number * CHUNK)
    values = stream.standard_normal(count, dtype=np.float32)
    values *= np.float32(weight.deviation)
    values += np.float32(weight.mean)
    dtype = weight.dtype or checkpoint.dtype
    if dtype == "bfloat16":  # the upper half of a float32, rounded to nearest, ties to even
        bits = values.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()

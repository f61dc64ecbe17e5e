"""What is asked of an engine: the tests, and the options of a run.

Tests and their names are those of llama.cpp's ``llama-bench`` (``tools/llama-bench/README.md``):
prompt processing (pp), text generation (tg), and both in one request (pg).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from opkit.errors import WrongUsage

BACKENDS = ("vllm", "trtllm", "openai-url")
_COUNT = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST_VALUES = 1000  # of one range; more is a slip of the pen


class Kind(StrEnum):
    """The three tests, by the field's names."""

    PROMPT = "prompt"
    GENERATION = "generation"
    BOTH = "both"


@dataclass(frozen=True)
class BenchTest:
    """One test: what each of its requests holds.

    Attributes:
        n_prompt: prompt tokens that count; 0 for generation, which is sent one.
        n_gen: output tokens that count; 0 for a prompt test, which asks for one.
        n_batch: requests at a time, each with its own prompt.
    """

    kind: Kind
    n_prompt: int
    n_gen: int
    n_batch: int = 1

    @property
    def sent(self) -> int:
        """Prompt tokens of a request: an engine needs one to begin with."""
        return max(1, self.n_prompt)

    @property
    def asked(self) -> int:
        """Output tokens of a request: an engine answers with one at least."""
        return max(1, self.n_gen)

    @property
    def n_tokens(self) -> int:
        """Tokens that a repetition counts, of all its requests together."""
        return self.n_batch * (self.n_prompt + self.n_gen)

    @property
    def label(self) -> str:
        """As ``pp512``, ``tg128``, ``pp512+tg128``; with its batch where that is not 1."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(
            self.n_gen
        )
        return "+".join(parts) + (f" b{self.n_batch}" if self.n_batch > 1 else "")


@dataclass(frozen=True)
class BenchOptions:
    """What was asked for one model. Checked when made; nobody checks again.

    Attributes:
        name: what the results call the model; empty: from its folder or the server.
        model: folder (or name) of the model; ``engine_dir``: a built TensorRT-LLM engine.
        url: of an OpenAI-compatible server, without path.
        n_prompt, n_gen, pairs, n_batch: see :func:`tests_of`.
        repetitions: timed runs of each test.
        warmup: untimed runs before, at least.
        delay_s: seconds of rest before each test but the first.
        power_s: seconds that a test lasts at least when power is measured.
        cool_to_c: °C to wait for before each test; None: no waiting. ``cool_limit_s``: no longer.
        max_input_length: longest prompt, tokens; 0: no limit. ``clip``: shorten, do not refuse.
        seed: of the prompts; None: 0, but the time for a server, whose prefix cache may hold those
            of the run before.
        engine_args: keywords for the engine's constructor.
        start_limit_s, limit_s: seconds for loading, and for one run.
    """

    backend: str
    name: str = ""
    model: str = ""
    engine_dir: Path | None = None
    url: str = ""
    served_model: str = ""
    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    pairs: tuple[tuple[int, int], ...] = ()
    n_batch: tuple[int, ...] = (1,)
    repetitions: int = 5
    warmup: int = 1
    delay_s: float = 0.0
    power_s: float = 2.0
    sample_ms: int = 100
    cool_to_c: float | None = None
    cool_limit_s: float = 600.0
    max_input_length: int = 0
    clip: bool = False
    seed: int | None = None
    vocab_size: int = 0
    tokenizer_dir: Path | None = None
    python: str = sys.executable
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    start_limit_s: float = 1800.0
    limit_s: float = 300.0
    log_level: str = "WARNING"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise WrongUsage(f"--backend {self.backend}: one of {', '.join(BACKENDS)}")
        if self.backend == "openai-url" and not self.url:
            raise WrongUsage("--backend openai-url needs --url", "e.g. --url http://127.0.0.1:8000")
        if self.backend != "openai-url" and self.url:
            raise WrongUsage("--url goes with --backend openai-url")
        if self.engine_dir is not None and self.backend != "trtllm":
            raise WrongUsage("--engine-dir is a built TensorRT-LLM engine: --backend trtllm")
        if self.backend != "openai-url" and not self.model and self.engine_dir is None:
            raise WrongUsage("nothing to run: give --model DIR, or --engine-dir DIR for trtllm")
        if self.backend == "openai-url" and self.engine_args:
            raise WrongUsage(
                "--engine-args go to an engine that opkit starts; a server was given its own",
                "in a scenario, put engine_args into the model that they are for",
            )
        if self.backend != "openai-url" and self.served_model:
            raise WrongUsage("--served-model goes with --backend openai-url")
        if self.clip and not self.max_input_length:
            raise WrongUsage("--clip needs --max-input-length: to how many tokens?")
        if self.model and self.engine_dir is not None:
            raise WrongUsage("--model and --engine-dir are two ways to name one thing: give one")

    def tests(self) -> list[BenchTest]:
        """The tests in the order in which they run.

        Raises:
            WrongUsage: none is left, or a prompt is longer than ``max_input_length``.
        """
        found = list(tests_of(self.n_prompt, self.n_gen, self.pairs, self.n_batch))
        if not found:
            raise WrongUsage("no test is left: -p, -n and -pg ask for nothing but 0")
        limit = self.max_input_length
        too_long = [test for test in found if limit and test.n_prompt > limit]
        if too_long and not self.clip:
            raise WrongUsage(
                f"{too_long[0].label}: a prompt of {too_long[0].n_prompt:,} tokens is over "
                f"--max-input-length {limit:,}",
                "leave it out, raise the limit, or --clip prompts to it",
            )
        clipped = [
            BenchTest(t.kind, min(t.n_prompt, limit), t.n_gen, t.n_batch) if limit else t
            for t in found
        ]
        return list(dict.fromkeys(clipped))


def tests_of(
    prompts: Iterable[int],
    gens: Iterable[int],
    pairs: Iterable[tuple[int, int]],
    batches: Iterable[int],
) -> Iterator[BenchTest]:
    """Prompt tests, then generation, then pairs, each with every batch; zeros ask for nothing."""
    wanted = [(Kind.PROMPT, n, 0) for n in prompts] + [(Kind.GENERATION, 0, n) for n in gens]
    for prompt, gen in pairs:
        kind = Kind.BOTH if prompt and gen else Kind.PROMPT if prompt else Kind.GENERATION
        wanted.append((kind, prompt, gen))
    for kind, prompt, gen in wanted:
        for batch in batches:
            if prompt or gen:
                yield BenchTest(kind, prompt, gen, batch)


def parse_counts(words: Iterable[str], option: str) -> tuple[int, ...]:
    """Numbers from ``512``, ``512,1024``, and llama-bench's ranges.

    A range is ``first-last``, ``first-last+step`` or ``first-last*factor``.

    Raises:
        WrongUsage: not a number of tokens.
    """
    return tuple(
        number for word in words for part in word.split(",") for number in _range(part, option)
    )


def parse_pairs(words: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """Pairs from ``512,128``: prompt tokens, output tokens.

    Raises:
        WrongUsage: not two numbers.
    """
    found = []
    for word in words:
        match = re.fullmatch(r"(\d+),(\d+)", word)
        if match is None:
            raise WrongUsage(f"-pg {word}: give prompt and output tokens, as 512,128")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def _range(text: str, option: str) -> Iterator[int]:
    match = _COUNT.fullmatch(text)
    if match is None:
        raise WrongUsage(f"{option} {text}: give numbers, as 512 or 512,1024 or 128-1024*2")
    first, last = int(match[1]), int(match[2] or match[1])
    step = int(match[4] or 1)
    grows = step > 1 and first > 0 if match[3] == "*" else step > 0
    if last < first or not grows:
        raise WrongUsage(f"{option} {text}: this range does not end")
    number, given = first, 0
    while number <= last:
        given += 1
        if given > _MOST_VALUES:
            raise WrongUsage(f"{option} {text}: more than {_MOST_VALUES} values")
        yield number
        number = number * step if match[3] == "*" else number + step

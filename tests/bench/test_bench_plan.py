"""What is asked for: tests, their names, and options that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_world import options

from opkit.bench.plan import BenchTest, Kind, parse_counts, parse_pairs
from opkit.bench.prompts import synthetic, vocabulary
from opkit.bench.scenario import make_options, parse_engine_args, read_scenario
from opkit.errors import BadInput, WrongUsage


def test_tests_in_their_order() -> None:
    """Prompts, generation, pairs; each with every batch."""
    asked = options(n_prompt=(512, 1024), n_gen=(128,), pairs=((512, 128),), n_batch=(1, 4))
    assert [test.label for test in asked.tests()] == [
        "pp512", "pp512 b4", "pp1024", "pp1024 b4", "tg128", "tg128 b4",
        "pp512+tg128", "pp512+tg128 b4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("test", "sent", "asked", "tokens"),
    [
        (BenchTest(Kind.PROMPT, 512, 0), 512, 1, 512),
        (BenchTest(Kind.GENERATION, 0, 128), 1, 128, 128),
        (BenchTest(Kind.BOTH, 512, 128, 4), 512, 128, 2560),
    ],
)
def test_what_a_request_holds_and_what_counts(
    test: BenchTest, sent: int, asked: int, tokens: int
) -> None:
    assert (test.sent, test.asked, test.n_tokens) == (sent, asked, tokens)


def test_zero_leaves_a_kind_out() -> None:
    assert [test.label for test in options(n_prompt=(0,), n_gen=(64,)).tests()] == ["tg64"]


def test_a_pair_with_a_zero_is_the_other_kind() -> None:
    asked = options(n_prompt=(), n_gen=(), pairs=((0, 64), (64, 0)))
    assert [test.kind for test in asked.tests()] == [Kind.GENERATION, Kind.PROMPT]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(WrongUsage, match="no test is left"):
        options(n_prompt=(0,), n_gen=(0,)).tests()


def test_a_prompt_over_the_limit_is_refused_with_its_test() -> None:
    asked = options(n_prompt=(512, 4096), max_input_length=2048)
    with pytest.raises(WrongUsage, match=r"pp4096: .*4,096 tokens is over --max-input-length 2,04"):
        asked.tests()


def test_clipped_prompts_are_run_once() -> None:
    asked = options(n_prompt=(2048, 4096, 8192), n_gen=(8,), max_input_length=2048, clip=True)
    assert [test.label for test in asked.tests()] == ["pp2048", "tg8"]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["512"], (512,)),
        (["512,1024", "1"], (512, 1024, 1)),
        (["128-512*2"], (128, 256, 512)),
        (["100-350+100"], (100, 200, 300)),
        (["3-5"], (3, 4, 5)),
    ],
)
def test_numbers_as_llama_bench_takes_them(words: list[str], numbers: tuple[int, ...]) -> None:
    assert parse_counts(words, "-p") == numbers


@pytest.mark.parametrize("word", ["", "x", "512,", "5-1", "0-8*2", "1-8*1", "1-8+0", "1-99999"])
def test_numbers_that_are_none(word: str) -> None:
    with pytest.raises(WrongUsage, match=r"^-p "):
        parse_counts([word], "-p")


def test_pairs() -> None:
    assert parse_pairs(["512,128", "1,2"]) == ((512, 128), (1, 2))
    with pytest.raises(WrongUsage, match="as 512,128"):
        parse_pairs(["512"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"backend": "openai-url", "model": ""}, "needs --url"),
        ({"url": "http://h"}, "--url goes with"),
        ({"engine_dir": Path("e"), "model": ""}, "--backend trtllm"),
        ({"model": ""}, "nothing to run"),
        ({"backend": "openai-url", "url": "http://h", "engine_args": {"a": 1}}, "--engine-args go"),
        ({"served_model": "x"}, "--served-model goes with"),
        ({"clip": True}, "--clip needs --max-input-length"),
        ({"backend": "trtllm", "engine_dir": Path("e")}, "two ways to name one thing"),
        ({"backend": "onnx"}, "one of vllm, trtllm, openai-url"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WrongUsage, match=sentence):
        options(**given)


def test_engine_arguments_are_json_or_text() -> None:
    words = ["load_format=dummy", "max_model_len=4096", "enforce_eager=true", 'x={"a": [1]}', "e="]
    assert parse_engine_args(words) == {
        "load_format": "dummy", "max_model_len": 4096, "enforce_eager": True, "x": {"a": [1]},
        "e": "",
    }  # fmt: skip
    with pytest.raises(WrongUsage, match="name=value"):
        parse_engine_args(["dummy"])


TOML = """
cool_to = 45
n_prompt = [64, 128]
[[models]]
name = "a"
backend = "vllm"
model = "dir/a"
engine_args = { load_format = "dummy" }
[[models]]
backend = "openai-url"
url = "http://h:1"
n_prompt = 32
prompt_gen = ["8,4"]
"""
YAML = """
cool_to: 45
n_prompt: [64, 128]
models:
- {name: a, backend: vllm, model: dir/a, engine_args: {load_format: dummy}}
- {backend: openai-url, url: "http://h:1", n_prompt: 32, prompt_gen: [[8, 4]]}
"""


@pytest.mark.parametrize(("name", "text"), [("s.toml", TOML), ("s.yaml", YAML)])
def test_a_scenario_of_two_models(tmp_path: Path, name: str, text: str) -> None:
    """A model's own values win over the file's, and these over the command line's."""
    (tmp_path / name).write_text(text)
    first, second = read_scenario(tmp_path / name, {"repetitions": 3, "n_prompt": ("512",)})
    assert (first.name, first.n_prompt, first.repetitions) == ("a", (64, 128), 3)
    assert (first.engine_args, first.cool_to_c) == ({"load_format": "dummy"}, 45.0)
    assert (second.n_prompt, second.pairs, second.cool_to_c) == ((32,), ((8, 4),), 45.0)


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("models = []", BadInput, "no list of models"),
        ("models = [1]", BadInput, "a model is a table"),
        ("nonsense", BadInput, "not TOML"),
        ("[[models]]\nrepetition = 3", BadInput, "no option 'repetition'; repetitions is one"),
        ("[[models]]\nmodel = 'm'", WrongUsage, "which backend"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nrepetitions = 'x'", WrongUsage, "a number"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nrepetitions = 0", WrongUsage, "1 or more"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nbatch = 0", WrongUsage, "one request at"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nclip = 1", WrongUsage, "true or false"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nprompt_gen = 5", WrongUsage, "-pg 5: give"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\npower_seconds = inf", WrongUsage, "a number"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\ncool_to = nan", WrongUsage, "a number"),
        ("[[models]]\nbackend = 'vllm'\nmodel = 'm'\nlimit = 0", WrongUsage, "more than 0"),
    ],
)
def test_scenarios_that_cannot_be_run(
    tmp_path: Path, text: str, error: type[Exception], sentence: str
) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(error, match=sentence):
        read_scenario(path, {})


def test_a_scenario_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_scenario(tmp_path / "none.toml", {})


def test_what_is_not_given_is_the_default() -> None:
    asked = make_options({"backend": "vllm", "model": "m", "cool_to": None})
    assert (asked.n_prompt, asked.n_gen, asked.repetitions, asked.cool_to_c) == (
        (512,), (128,), 5, None,
    )  # fmt: skip


def test_prompts_are_the_seed_s_and_lie_in_the_vocabulary() -> None:
    prompts = synthetic(7, 50)
    assert prompts("a", 2000) == synthetic(7, 50)("a", 2000)
    assert set(prompts("a", 2000)) == set(range(50))
    assert prompts("a", 16) != prompts("b", 16)
    assert prompts("a", 16) != synthetic(8, 50)("a", 16)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ('{"vocab_size": 9}', 9),
        ('{"text_config": {"vocab_size": 8}}', 8),
        ('{"pretrained_config": {"vocab_size": 7}}', 7),
        ("{}", 0),
        ("[]", 0),
        ("no json", 0),
    ],
)
def test_the_vocabulary_of_a_folder(tmp_path: Path, config: str, size: int) -> None:
    (tmp_path / "config.json").write_text(config)
    assert vocabulary(tmp_path) == size


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    assert vocabulary(tmp_path) == 0

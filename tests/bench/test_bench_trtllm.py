"""The TensorRT-LLM worker against upstream's signatures. It has never been run for real."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from paper_trtllm import VERSIONS, Paper

import opkit.bench.inside
from opkit.bench.inside import engine_trtllm, worker
from opkit.bench.plan import BACKENDS

MODEL = {"model": "dir", "engine_dir": ""}
ENGINE = {"model": "", "engine_dir": "built"}


@pytest.fixture(params=["old", "new"])
def paper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Paper:
    return Paper(request.param).install(monkeypatch)


def test_every_signature_names_file_and_commit() -> None:
    found = [
        call
        for version in VERSIONS.values()
        for name, module in version.items()
        if name != "what"
        for call in module.values()
    ]
    assert len(found) == 13
    for call in found:
        assert call["path"].startswith("tensorrt_llm/")
        assert len(call["commit"]) == 40


def test_the_llm_is_made_without_tokenizer_and_reuse(paper: Paper) -> None:
    engine = engine_trtllm.start({**MODEL, "engine_args": {"max_seq_len": 99}})
    made = paper.called("LLM.__init__")[0]
    assert (made["model"], made["skip_tokenizer_init"], made["max_seq_len"]) == ("dir", True, 99)
    assert vars(made["kv_cache_config"]) == {"enable_block_reuse": False}
    assert engine.served["max_length"] == 2048
    assert engine.served["version"].startswith("of paper")
    engine.close()


def test_the_caller_s_cache_configuration_is_kept(paper: Paper) -> None:
    arguments = {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    engine_trtllm.start({**MODEL, "engine_args": arguments}).close()
    assert paper.called("KvCacheConfig") == [
        {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.5}
    ]


def test_a_run_through_the_llm_api(paper: Paper) -> None:
    engine = engine_trtllm.start(MODEL)
    turn = engine.generate([[1, 2], [3, 4, 5]], 4)
    asked = paper.called("LLM.generate_async")
    assert [call["inputs"] for call in asked] == [[1, 2], [3, 4, 5]]
    assert all(call["streaming"] is True for call in asked)
    assert paper.called("SamplingParams")[0] == {
        "max_tokens": 4, "end_id": -1, "pad_id": -1, "ignore_eos": True, "temperature": 0.0,
        "detokenize": False,
    }  # fmt: skip
    for reply in turn["replies"]:
        assert (reply["tokens"], reply["first_tokens"], len(reply["gaps"])) == (4, 1, 3)
        assert turn["began_ns"] <= reply["first_ns"] <= reply["last_ns"] <= turn["ended_ns"]
    engine.generate([[6]], 1)  # the same event loop again
    engine.close()
    assert len(paper.called("LLM.shutdown")) == 1


def test_answers_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    Paper("new", per_step=3).install(monkeypatch)
    engine = engine_trtllm.start(MODEL)
    reply = engine.generate([[1]], 8)["replies"][0]
    engine.close()
    assert (reply["tokens"], reply["first_tokens"]) == (8, 3)
    assert [count for _, count in reply["gaps"]] == [3, 2]


def test_a_built_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper("old").install(monkeypatch)
    engine = engine_trtllm.start({**ENGINE, "engine_args": {"gpu_weights_percent": 0.5}})
    assert paper.called("ModelRunner.from_dir") == [
        {"engine_dir": "built", "rank": 0, "gpu_weights_percent": 0.5}
    ]
    assert (engine.served["vocab"], engine.served["max_length"]) == (32000, 1024)
    turn = engine.generate([[1, 2], [3]], 5)
    asked = paper.called("ModelRunner.generate")[0]
    assert [(each.values, each.dtype) for each in asked["batch_input_ids"]] == [
        ([1, 2], "int32"), ([3], "int32"),
    ]  # fmt: skip
    assert {k: v for k, v in asked.items() if k != "batch_input_ids"} == {
        "max_new_tokens": 5, "end_id": -1, "pad_id": 0, "temperature": 1.0, "top_k": 1,
        "output_sequence_lengths": True, "return_dict": True,
    }  # fmt: skip
    # The GPU is waited for before either look at the clock.
    assert [name for name, _ in paper.calls][-3:] == [
        "synchronize", "ModelRunner.generate", "synchronize",
    ]  # fmt: skip
    assert turn["replies"] == [{"first_ns": None, "last_ns": None, "tokens": 5}] * 2


def test_a_built_engine_s_only_token_was_there_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    Paper("old").install(monkeypatch)
    turn = engine_trtllm.start(ENGINE).generate([[1, 2]], 1)
    assert turn["replies"][0]["first_ns"] == turn["ended_ns"]


def test_a_built_engine_that_stopped_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Paper("old", short=2).install(monkeypatch)
    assert engine_trtllm.start(ENGINE).generate([[1, 2]], 5)["replies"][0]["tokens"] == 3


def test_no_model_runner_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    Paper("new").install(monkeypatch)
    with pytest.raises(engine_trtllm.Unfit, match=r"of paper \(new\) has no ModelRunner.*--model"):
        engine_trtllm.start(ENGINE)


def test_a_keyword_that_from_dir_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Paper("old").install(monkeypatch)
    with pytest.raises(engine_trtllm.Unfit, match="from_dir takes no nonsense"):
        engine_trtllm.start({**ENGINE, "engine_args": {"nonsense": 1}})


@pytest.mark.parametrize("name", ["SamplingParams", "LLM"])
def test_a_version_that_lacks_a_name(paper: Paper, name: str) -> None:
    delattr(paper.modules["tensorrt_llm"], name)
    with pytest.raises(engine_trtllm.Unfit, match=f"has no tensorrt_llm.{name}"):
        engine_trtllm.start(MODEL)


def test_a_version_that_lacks_a_parameter(paper: Paper) -> None:
    package: Any = paper.modules["tensorrt_llm"]

    def lacking(*, max_tokens: int) -> int:
        return max_tokens

    package.SamplingParams = lacking
    with pytest.raises(engine_trtllm.Unfit, match="takes no end_id, pad_id, ignore_eos"):
        engine_trtllm.start(MODEL)


def test_the_worker_s_files_import_no_opkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in an interpreter that has none, with their own folder first on the path."""
    folder = Path(opkit.bench.inside.__file__).parent
    monkeypatch.syspath_prepend(str(folder))
    for path in folder.glob("[!_]*.py"):
        assert "opkit." not in path.read_text().replace("opkit bench", "")
        assert importlib.import_module(path.stem).__file__ == str(path)
        monkeypatch.delitem(sys.modules, path.stem)


def test_each_offline_backend_has_its_worker_s_file() -> None:
    folder = Path(opkit.bench.inside.__file__).parent
    assert {*worker.ENGINES, "openai-url"} == set(BACKENDS)
    assert all((folder / f"{name}.py").is_file() for name in worker.ENGINES.values())

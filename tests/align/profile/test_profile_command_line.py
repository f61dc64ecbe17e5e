"""What is read from ``--e2e-cmd``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opkit.align.profile.command_line import has_flag, model_folder, read_command, vllm_compiles
from opkit.align.profile.engines import ENGINES, token_ids, tokens_out
from opkit.errors import BadInput


@pytest.mark.parametrize(
    ("command", "engine", "model", "url", "tp_size"),
    [
        ("vllm serve /m", "vllm", "/m", "http://127.0.0.1:8000", 1),
        ("/opt/v/bin/vllm serve org/m --port=81 -tp 4", "vllm", "org/m", "http://127.0.0.1:81", 4),
        (
            "python3 -m vllm.entrypoints.cli.main serve /m --host gpu1 --tensor_parallel_size 2",
            "vllm",
            "/m",
            "http://gpu1:8000",
            2,
        ),
        (
            "python -m vllm.entrypoints.openai.api_server --model /m --port 7",
            "vllm",
            "/m",
            "http://127.0.0.1:7",
            1,
        ),
        (
            "python3 -m sglang.launch_server --model-path /m --tp 8 --host 0.0.0.0",
            "sglang",
            "/m",
            "http://127.0.0.1:30000",
            8,
        ),
        ("trtllm-serve /m --tp_size 8", "trtllm", "/m", "http://127.0.0.1:8000", 8),
        (
            "trtllm-llmapi-launch trtllm-serve serve --backend pytorch /m",
            "trtllm",
            "/m",
            "http://127.0.0.1:8000",
            1,
        ),
        ("vllm serve /m --host ::1", "vllm", "/m", "http://[::1]:8000", 1),
    ],
)
def test_servers_are_recognised(
    command: str, engine: str, model: str, url: str, tp_size: int, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    read = read_command(command.replace(" /m", f" {folder}"))
    assert read.engine is not None
    assert read.engine.name == engine
    assert read.model.replace(str(folder), "/m") == model
    assert (read.url, read.tp_size, read.recognised) == (url, tp_size, True)


@pytest.mark.parametrize(
    "command", ["python run_model.py", "bash -c 'vllm serve /m'", "vllm bench"]
)
def test_other_programs_are_not(command: str) -> None:
    assert read_command(command).engine is None


def test_engine_args_are_the_engines_own() -> None:
    read = read_command(
        "CUDA_VISIBLE_DEVICES=0 vllm serve /m --port 81 --api-key hush --max-num-seqs 64 "
        "--compilation-config '{\"mode\": 0}' --enforce-eager --host=::"
    )
    assert read.env == {"CUDA_VISIBLE_DEVICES": "0"}
    assert read.argv[:2] == ("vllm", "serve")
    wanted = ("--max-num-seqs", "64", "--compilation-config", '{"mode": 0}', "--enforce-eager")
    assert read.engine_args == wanted
    assert read.api_key == "hush"
    assert "hush" not in " ".join(read.shown())


def test_wrapper_script_with_named_engine() -> None:
    read = read_command("./serve.sh", "sglang", "http://127.0.0.1:9")
    assert read.engine is not None
    assert (read.engine.name, read.url, read.recognised) == ("sglang", "http://127.0.0.1:9", False)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "empty"),
        ("A=1", "empty"),
        ("vllm serve '/m", "cannot be read"),
        ("cd /x && vllm serve /m", "'&&'"),
        ("vllm serve /m --port eighty", "no number"),
    ],
)
def test_unusable_commands_are_refused(command: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read_command(command)


def test_unknown_engine_name() -> None:
    with pytest.raises(BadInput, match=r"ollama: not a known .*vllm, trtllm, sglang"):
        read_command("./serve.sh", "ollama")


def test_flags_match_in_every_spelling() -> None:
    assert has_flag(["--profiler_config.profiler=cuda"], ("--profiler-config",))
    assert has_flag(["--config", "x"], ("--extra_llm_api_options", "--config"))
    assert not has_flag(["--max-num-seqs", "-1"], ("-1",))


@pytest.mark.parametrize(
    ("flags", "compiles"),
    [
        ((), True),
        (("--enforce-eager",), False),
        (("--compilation-config", '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'), False),
        (("--compilation-config", '{"cudagraph_mode":"NONE"}'), True),
        (("-O", "0"), False),
        (("--compilation-config.mode=3",), True),
    ],
)
def test_whether_vllm_compiles(flags: tuple[str, ...], compiles: bool) -> None:
    assert vllm_compiles(flags) is compiles


def test_model_folder_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_folder("org/m") == snapshot
    assert model_folder(str(snapshot)) == snapshot
    assert model_folder("org/other") is None


def test_request_bodies() -> None:
    by_name = {engine.name: engine for engine in ENGINES}
    sglang = by_name["sglang"].body("m", [[1, 2], [3]], 4)
    assert sglang["input_ids"] == [[1, 2], [3]]
    assert sglang["sampling_params"]["max_new_tokens"] == 4
    assert sglang["sampling_params"]["ignore_eos"] is True
    for name in ("vllm", "trtllm"):
        body = by_name[name].body("m", [[1, 2], [3]], 4)
        assert (body["prompt"], body["max_tokens"], body["min_tokens"]) == ([[1, 2], [3]], 4, 4)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"usage": {"completion_tokens": 8}}, 8),
        ([{"meta_info": {"completion_tokens": 3}}, {"meta_info": {"completion_tokens": 4}}], 7),
        ([{"meta_info": {"completion_tokens": 3}}, {}], None),
        ({}, None),
        ("text", None),
    ],
)
def test_tokens_are_counted(answer: object, tokens: int | None) -> None:
    assert tokens_out(answer) == tokens


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        # vLLM's: choices may come in any order; each says which prompt's it is.
        (
            {"choices": [{"index": 1, "token_ids": [3, 4]}, {"index": 0, "token_ids": [1, 2]}]},
            ((1, 2), (3, 4)),
        ),
        ([{"output_ids": [1, 2]}, {"output_ids": [3]}], ((1, 2), (3,))),  # SGLang's
        ({"output_ids": [5]}, ((5,),)),  # SGLang's to one prompt
        ({"choices": [{"index": 0, "text": ""}]}, ()),  # a server that was not asked
        ({"choices": [{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": None}]}, ()),
        ({"usage": {"completion_tokens": 8}}, ()),
        ([], ()),
        ("no", ()),
        ([{"output_ids": ["1"]}], ()),
    ],
)
def test_answered_tokens_are_read_where_all_are_told(
    answer: Any, tokens: tuple[tuple[int, ...], ...]
) -> None:
    assert token_ids(answer) == tokens


def test_only_vllm_is_asked_for_its_tokens() -> None:
    # TensorRT-LLM's request refuses fields that it does not know; SGLang answers with them anyway.
    bodies = {engine.name: engine.body("m", [[1]], 2) for engine in ENGINES}
    assert {name for name, body in bodies.items() if "return_token_ids" in body} == {"vllm"}

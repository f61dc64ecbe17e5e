"""Reading the flags of trtllm-serve, and the folder that its loader is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import BadInput
from opkit.layers.backends.trtllm.config import (
    Request,
    needs,
    one_layer_folder,
    read_server,
    requests_of,
)
from opkit.layers.mla import MLA
from opkit.layers.moe import MOE
from opkit.layers.op import AnyCase, Case, GemmCase, LaunchMode, MoeCase, Phase
from opkit.layers.plan import Plan, PlannedCase

CONTEXT = Case(Phase.CONTEXT, 4, 1024, 128)
GENERATION = Case(Phase.GENERATION, 16, 1, 1029)


def plan(*flags: str, cases: tuple[AnyCase, ...] = (CONTEXT, GENERATION), **more: Any) -> Plan:
    planned = tuple(PlannedCase(case, LaunchMode.EAGER) for case in cases)
    return Plan("mla", "trtllm", more.pop("model", "model"), planned, "mock.json", flags, **more)


def test_without_flags_the_servers_defaults_hold() -> None:
    server = read_server(plan())
    assert server.options == {"max_batch_size": 2048, "max_num_tokens": 8192}
    assert server.ignored == ()


def test_flags_are_read_in_all_their_forms() -> None:
    server = read_server(
        plan(
            "--max_batch_size", "8", "--max-seq-len=4096", "--enable_chunked_prefill", "--port", "1"
        )
    )
    assert server.options == {
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "max_seq_len": 4096,
        "enable_chunked_prefill": True,
    }
    assert server.ignored == ("--port", "1")


@pytest.mark.parametrize("flag", ["--config", "--extra_llm_api_options"])
def test_the_file_of_options_overrides_the_flags(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("max_batch_size: 4\nkv_cache_config: {dtype: fp8}\ntensor_parallel_size: 8\n")
    server = read_server(plan("--max_batch_size", "8", flag, str(path), tp_size=8))
    assert server.options["max_batch_size"] == 4
    assert server.options["kv_cache_config"] == {"dtype": "fp8"}
    assert "tensor_parallel_size" not in server.options


def test_an_empty_file_of_options_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("# nothing\n")
    assert read_server(plan("--config", str(path))).options == read_server(plan()).options


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (("--pp_size", "2"), None, "pipeline_parallel_size 2 cannot be mocked"),
        (("--ep_size", "8"), None, "moe_expert_parallel_size 8 cannot be mocked"),
        (
            ("--tp_size", "4"),
            None,
            "plan says tp_size 1, the server's flags tensor_parallel_size 4",
        ),
        (("--tp_size",), None, "--tp_size has no value"),
        (("--max_num_tokens", "many"), None, "needs a number, not 'many'"),
        (("--backend", "tensorrt"), None, "only the pytorch backend"),
        (("--config", "nowhere.yaml"), None, "nowhere.yaml: no readable file of options"),
        ((), "speculative_config: {decoding_type: MTP}", "speculative decoding"),
        ((), "enable_attention_dp: true", "attention data parallelism"),
        ((), "[1, 2]", "not a YAML mapping"),
        ((), "a: [", "no readable file of options"),
    ],
)
def test_what_one_rank_cannot_show_is_refused(
    tmp_path: Path, flags: tuple[str, ...], content: str | None, message: str
) -> None:
    if content is not None:
        path = tmp_path / "options.yaml"
        path.write_text(content)
        flags = ("--config", str(path))
    with pytest.raises(BadInput, match=message):
        read_server(plan(*flags))


def test_limits_can_be_raised_to_the_cases() -> None:
    large = Case(Phase.CONTEXT, 4, 4096, 0)
    options = read_server(plan(cases=(large, GENERATION), limits="cases")).options
    assert options == {"max_batch_size": 2048, "max_num_tokens": 16384, "max_seq_len": 4096}


def test_cases_become_requests() -> None:
    assert requests_of(Case(Phase.CONTEXT, 2, 5, 7)) == (Request(0, 7, 5), Request(1, 7, 5))
    assert [part.tokens for part in requests_of(MoeCase(4100))] == [2048, 2048, 4]
    assert requests_of(GemmCase(1, 2, 3)) == ()
    assert needs(plan()) == {"max_batch_size": 16, "max_num_tokens": 4096, "max_seq_len": 1152}
    assert Request(0, 7, 5).length == 12


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text("{}")
    (folder / "configuration_paper.py").write_text("")
    (folder / "model-00001.safetensors").write_text("large")
    return folder


def test_the_folder_has_one_layer_of_one_rank(model: Path) -> None:
    made = one_layer_folder(plan(model=str(model), tp_size=8), MLA, {"decoder_sparse_step": 1})
    config = json.loads((made / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (16, 16)
    assert config["first_k_dense_replace"] == 3
    assert "decoder_sparse_step" not in config  # a key that this model has not
    assert sorted(path.name for path in made.iterdir()) == [
        "config.json", "configuration_paper.py", "hf_quant_config.json",
    ]  # fmt: skip
    shutil.rmtree(made)


def test_what_an_op_shares_and_overrides_is_its_own(model: Path) -> None:
    made = one_layer_folder(plan(model=str(model), tp_size=8), MOE, {"first_k_dense_replace": 0})
    config = json.loads((made / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["first_k_dense_replace"]) == (256, 0)
    shutil.rmtree(made)


def test_heads_that_cannot_be_shared_are_told(model: Path) -> None:
    with pytest.raises(BadInput, match="num_attention_heads 128 cannot be shared by 7 ranks"):
        one_layer_folder(plan(model=str(model), tp_size=7), MLA, {})

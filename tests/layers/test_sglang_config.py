"""The arguments of an SGLang server, cut down to one layer, on a host without SGLang."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import fake_sglang
import pytest

from opkit.errors import BadInput
from opkit.layers.backends.shared import drawn_weights
from opkit.layers.dsa import DSA
from opkit.layers.gemm import GEMM
from opkit.layers.op import AnyCase, Case, GemmCase, LaunchMode, MoeCase, Phase
from opkit.layers.plan import Plan, PlannedCase

MODEL = {
    "architectures": ["DeepseekV32ForCausalLM"], "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 8, "kv_lora_rank": 16, "num_hidden_layers": 4,
}  # fmt: skip


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake_sglang.install(monkeypatch)
    return importlib.import_module("opkit.layers.backends.sglang.config")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return str(tmp_path)


def plan(model: str, *cases: AnyCase, flags: str = "", **more: Any) -> Plan:
    planned = tuple(
        PlannedCase(
            case,
            LaunchMode.GRAPH
            if isinstance(case, Case) and case.phase is Phase.GENERATION
            else LaunchMode.EAGER,
        )
        for case in cases
    )
    return Plan("dsa", "sglang", model, planned, "m.json", engine_args=(*flags.split(),), **more)


CONTEXT = Case(Phase.CONTEXT, 4, 3000, 0)
DECODE = Case(Phase.GENERATION, 24, 1, 9000)


def args_of(config: Any, made: Plan, op: Any = DSA) -> Any:
    return config.layer_args(made, op, config.server_flags(made), {"extra": 1})


def test_one_layer_on_one_rank(config: Any, model: str) -> None:
    made = plan(
        model,
        CONTEXT,
        flags='--tp-size 2 --pp-size 2 --load-format auto --json-model-override-args {"a":3}',
        tp_size=2,
    )
    args = args_of(config, made)
    assert json.loads(args.json_model_override_args) == {
        "a": 3, "extra": 1, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }  # fmt: skip
    assert (args.tp_size, args.pp_size, args.load_format) == (1, 1, "dummy")
    assert args.max_total_tokens >= 4 * 3000


@pytest.mark.parametrize(
    ("flags", "tp_size", "loaded"),
    [
        ("", 1, "auto"),
        ("--load-format safetensors", 1, "safetensors"),
        ("", 2, "dummy"),
        ("--load-format dummy", 1, "dummy"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "consolidated.pt"])
def test_a_checkpoint_is_loaded_where_one_rank_has_it_whole(
    config: Any, model: str, file: str, flags: str, tp_size: int, loaded: str
) -> None:
    (Path(model) / file).touch()
    args = args_of(config, plan(model, CONTEXT, flags=flags, tp_size=tp_size))
    assert args.load_format == loaded


def test_without_weights_in_the_models_folder_they_are_drawn(config: Any, model: str) -> None:
    assert args_of(config, plan(model, CONTEXT)).load_format == "dummy"


@pytest.mark.parametrize(
    ("file", "load_format", "tp_size", "said"),
    [
        ("", "auto", 1, "the model's folder has no *.safetensors, *.bin, *.pt"),
        ("", "auto", 2, "the model's folder has no *.safetensors, *.bin, *.pt"),
        ("model.safetensors", "auto", 2, "no rank's share is cut out of the checkpoint"),
        ("model.safetensors", "auto", 1, ""),
        ("", "dummy", 1, ""),
        ("model.safetensors", "dummy", 2, ""),
    ],
)
def test_drawn_weights_are_told_with_their_reason_and_no_server_is_invented(
    model: str, file: str, load_format: str, tp_size: int, said: str
) -> None:
    if file:
        (Path(model) / file).touch()
    found = drawn_weights(plan(model, CONTEXT, tp_size=tp_size), load_format)
    assert found.startswith("the mock draws its weights: " + said if said else "")
    assert bool(found) == bool(said)
    assert "the server" not in found  # a check has none


@pytest.mark.parametrize("flag", ["--speculative-algorithm EAGLE", "--enable-dp-attention"])
def test_what_cannot_be_mocked_is_refused(config: Any, model: str, flag: str) -> None:
    with pytest.raises(BadInput, match="cannot be mocked"):
        config.server_flags(plan(model, CONTEXT, flags=flag))


def test_ranks_must_agree_with_the_plan(config: Any, model: str) -> None:
    with pytest.raises(BadInput, match=r"tp_size 2.*--tp-size 4"):
        config.server_flags(plan(model, CONTEXT, flags="--tp-size 4", tp_size=2))


def test_a_refusal_of_sglang_is_told(config: Any, model: str) -> None:
    made = plan(model, CONTEXT, flags="--refuse-me")
    flags = config.server_flags(made)
    with pytest.raises(BadInput, match=r"refuses.*not with me"):
        config.layer_args(made, DSA, flags)


def test_unknown_flags_are_refused(
    config: Any, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="refuses the server's flags"):
        config.server_flags(plan(model, CONTEXT, flags="--no-such-flag"))
    assert "--no-such-flag" in capsys.readouterr().err


def test_limits_grow_with_the_cases_and_never_shrink(config: Any, model: str) -> None:
    small = "--context-length 4096 --chunked-prefill-size 2048 --max-running-requests 8"
    args = args_of(config, plan(model, CONTEXT, DECODE, flags=small, limits="cases"))
    assert args.context_length == 9001
    assert args.chunked_prefill_size == 12032  # 12,000 tokens in whole pages of 128
    assert args.max_running_requests == 24
    assert args.cuda_graph_bs_decode == [24]
    roomy = "--context-length 65536 --chunked-prefill-size 32768 --max-running-requests 512"
    args = args_of(config, plan(model, CONTEXT, DECODE, flags=roomy, limits="cases"))
    assert (args.context_length, args.chunked_prefill_size) == (65536, 32768)
    assert args.max_running_requests == 512


def test_the_servers_own_limits_stay(config: Any, model: str) -> None:
    args = args_of(config, plan(model, CONTEXT, flags="--chunked-prefill-size 2048"))
    assert (args.chunked_prefill_size, args.cuda_graph_bs_decode) == (2048, None)


def test_without_chunks_none_are_made(config: Any, model: str) -> None:
    flags = "--chunked-prefill-size -1"
    args = args_of(config, plan(model, CONTEXT, flags=flags, limits="cases"))
    assert args.chunked_prefill_size == -1
    assert args.max_prefill_tokens == 16384


@pytest.mark.parametrize("case", [GemmCase(20000, 64, 64), MoeCase(20000)])
def test_cases_without_requests_have_limits_too(config: Any, model: str, case: AnyCase) -> None:
    args = args_of(config, plan(model, case, limits="cases"), GEMM)
    assert args.max_prefill_tokens == 20096
    assert args.cuda_graph_bs_decode is None


def test_a_missing_model_is_not_looked_for_elsewhere(config: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no readable model configuration"):
        config.server_flags(plan(str(tmp_path), CONTEXT))

"""What a review of the layers found, each fixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_subject
import pytest
from cli_runs import run_main

from opkit.align.judge import _other_system
from opkit.align.policy import Policy
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE, BadInput
from opkit.layers.checkpoint import Checkpoint, find_config, plan_checkpoint, write_checkpoint
from opkit.layers.dsa import columns
from opkit.layers.geometry import geometry_of
from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import mock_manifest, op_digests
from opkit.layers.registry import BACKENDS, OPS, mock_backends


@pytest.mark.parametrize("given", [".", "sub/.."])
def test_the_folder_one_stands_in_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    made = plan_checkpoint(*find_config("llama"), layers=1)
    plain = Checkpoint(made.config, made.dtype, made.seed, ())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(folder)
    write_checkpoint(plain, Path(given), force=True)
    assert json.loads((folder / "config.json").read_text()) == plain.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("inputs", ["zeros", "rows"])
def test_degenerate_inputs_never_pass_whatever_the_samples_and_the_policy(inputs: str) -> None:
    lenient = Policy(max_zeros=1.0, max_equal_rows=1.0, min_distinct=0.0, require_operands=False)
    found = made_subject.checked(made_subject.subject(policy=lenient, inputs=inputs))["data"]
    assert str(found.outcome) == "fail"
    assert f"inputs {inputs}" in found.detail


@pytest.mark.parametrize("inputs", ["", "tokens", "normal", "captured"])
def test_other_inputs_are_no_reason_to_fail(inputs: str) -> None:
    assert made_subject.not_passed(made_subject.subject(inputs=inputs)) == {}


def sides(command: str = "vllm serve m --block-size 16", **mock: Any) -> list[str]:
    """What is said of a mock beside an engine that was recorded from a command."""
    ours = Manifest("mock", engine_args=("--block-size", "16"))
    theirs = Manifest("e2e", command=tuple(command.split()))
    engine: Any = SimpleNamespace(facts=[], manifest=theirs)
    facts: Any = SimpleNamespace(gpus=())
    return _other_system(facts, replace(ours, **mock), engine)


def test_a_mock_of_other_flags_or_ranks_is_no_evidence() -> None:
    assert sides() == []
    assert sides("vllm serve m --block-size 32") == ["flags: mock --block-size 16, "
                                                     "E2E --block-size 32"]  # fmt: skip
    assert sides(tp_size=2) == ["ranks: mock 2, E2E 1"]
    assert sides("python run.py", engine_args=("--x",)) == []  # no engine's command: unknown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--recorded", "--inputs", "zeros"], EXIT_USAGE, "files are only compared"),
        (["--recorded", "--captured", "x"], EXIT_USAGE, "files are only compared"),
        (["--e2e-trace", "x", "--strict-trace", "y"], EXIT_USAGE, "no --mock-trace was given"),
        (["--e2e-cmd", "python run.py", "--backend", "torch"], EXIT_BAD_INPUT, "no engine"),
        (["--e2e-cmd", "vllm serve m", "--backend", "torch"], EXIT_USAGE, "serves with vllm"),
        (
            ["--e2e-cmd", "python3 -m sglang.launch_server --model-path m", "--inputs", "captured"],
            EXIT_BAD_INPUT,
            "not for that of sglang",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    ran = run_main(capsys, monkeypatch, "align", "dsa", "--dry-run", *words)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err


def test_every_mock_has_a_kernel_source_in_its_tables() -> None:
    missing = {
        (op.name, backend)
        for op in OPS.values()
        for table in op.tables.values()
        for backend in mock_backends(op)
        if not table.kernel_source.get(backend)
    }
    assert missing == {("dsa", "sglang")}  # whose rows tell it, see below


@pytest.mark.parametrize(
    ("case", "cache", "source"),
    [
        # As in the tables that aiconfigurator ships for SGLang 0.5.14 on an H100.
        (Case(Phase.CONTEXT, 2, 512, 1536), "bfloat16", "dense_mha_fa3"),
        (Case(Phase.CONTEXT, 1024, 4, 128), "bfloat16", "indexer_flashmla_sparse"),
        (Case(Phase.CONTEXT, 1, 2049, 0), "bfloat16", "indexer_flashmla_sparse"),
        (Case(Phase.CONTEXT, 1, 4096, 0), "float8_e4m3fn", "indexer_flashmla_kv"),
        (Case(Phase.GENERATION, 1, 1, 64), "bfloat16", "indexer_fa3"),
        (Case(Phase.GENERATION, 1, 1, 64), "float8_e4m3fn", "indexer_flashmla_kv"),
    ],
)
def test_sglang_rows_of_dsa_tell_what_attends(case: Case, cache: str, source: str) -> None:
    both = ["flashmla_kv"] * 2 if "float8" in cache else ["flashmla_sparse", "fa3"]
    model = {
        "architecture": "DeepseekV32ForCausalLM", "num_heads": 128, "index_topk": 2048,
        "prefill_backend": both[0], "decode_backend": both[1],
    }  # fmt: skip
    dtypes = {"weights": "bfloat16", "activations": "bfloat16", "kv_cache": cache}
    mock = Manifest("mock", op="dsa", backend="sglang", model=model, dtypes=dtypes)
    assert columns(case, mock)["kernel_source"] == f"sglang_dsa_{source}"
    assert "kernel_source" not in columns(case, replace(mock, backend="vllm"))


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ops_own_file_is_part_of_its_layer_source(op: str, backend: str) -> None:
    found = op_digests(op, backend)
    assert f"opkit/layers/{op}/{backend}.py" in found
    assert {"opkit/layers/geometry.py", "opkit/layers/model_config.py"} < found.keys()
    assert (f"opkit/layers/{op}/routing.py" in found) == (op == "moe")
    strangers = {f"opkit/layers/{op}/{name}.py" for name in BACKENDS if name != backend}
    assert not strangers & found.keys()


def test_a_manifest_holds_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    case = PlannedCase(Case(Phase.CONTEXT, 1, 8, 0), LaunchMode.EAGER)
    plan = Plan("mla", "vllm", str(tmp_path), (case,), "m.json")
    made = mock_manifest(
        plan, versions={}, model={}, dtypes={}, sources={"vllm/x.py": "1"}, recipe={}, notes=()
    )
    assert made.layer_source.keys() == {"vllm/x.py", *op_digests("mla", "vllm")}


@pytest.mark.parametrize("name", ["banana", "float8_e4m3fn", "Tensor"])
def test_an_element_type_that_no_activation_has_is_bad_input(name: str) -> None:
    config, _ = find_config("llama")
    with pytest.raises(BadInput, match="torch_dtype must be one of bfloat16, float16, float32"):
        geometry_of({**config, "torch_dtype": name}, "c.json")

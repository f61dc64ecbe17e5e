"""The plans: the commands of each mode, as the dry run shows them and the run executes them."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import opkit
from opkit.align.profile.e2e import (
    DEFAULT_WAVES,
    Collect,
    E2EPlan,
    E2ERequest,
    Mode,
    parse_wave,
    plan_e2e,
    wave_text,
)
from opkit.align.profile.engines import engine_named
from opkit.align.profile.plan import End, Post, Purpose, Ready, Run, Send, Start
from opkit.align.profile.target import with_opkit
from opkit.errors import BadInput
from opkit.layers.manifest import Wave

VLLM = "vllm serve /m --compilation-config '{\"mode\":0}'"


pytestmark = pytest.mark.usefixtures("no_nsys")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that the engines' switches look at."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "TLLM_LLMAPI_ENABLE_NVTX", "OPAL_PREFIX"):
        monkeypatch.delenv(name, raising=False)


def dry(command: str, **changes: Any) -> E2EPlan:
    return plan_e2e(E2ERequest(command, Path("/out"), **changes), dry_run=True)


def argvs(plan: E2EPlan) -> list[str]:
    return [shlex.join(command.argv) for command in plan.plan.commands]


def test_server_mode_opens_a_window_around_the_waves() -> None:
    plan = dry(VLLM)
    (session,) = plan.plan.sessions
    launch, start, stop = argvs(plan)
    assert plan.mode is Mode.SERVER
    assert launch.startswith(
        f"nsys launch --session-new={session} -t cuda,nvtx --cuda-graph-trace=node "
        "--trace-fork-before-exec=true --wait=primary vllm serve /m "
    )
    assert start == (
        f"nsys start --session={session} -o /out/e2e --force-overwrite=true "
        "--sample=none --cpuctxsw=none"
    )
    assert stop == f"nsys stop --session={session}"
    assert [type(step) for step in plan.plan.steps] == [
        Start, Ready, Send, Post, Run, Send, Send, Run, End,
    ]  # fmt: skip
    sends = [step for step in plan.plan.steps if isinstance(step, Send)]
    assert [send.purpose for send in sends] == [Purpose.WARM_UP, Purpose.PRIME, Purpose.RECORD]
    assert [send.rounds for send in sends] == [2, 1, 1]


def test_window_of_the_whole_process_needs_no_start() -> None:
    profile, stop = argvs(dry(VLLM, window=Collect.PROCESS))
    assert profile.startswith("nsys profile --sample=none --cpuctxsw=none -o /out/e2e ")
    assert stop.startswith("nsys stop ")
    assert "prime" not in dry(VLLM, window=Collect.PROCESS).text()


def test_program_mode_is_the_default_for_other_commands() -> None:
    plan = dry("python run.py 'a b'")
    assert plan.mode is Mode.PROGRAM
    (profile,) = argvs(plan)
    assert profile.startswith("nsys profile ")
    assert profile.endswith("-o /out/e2e --force-overwrite=true python run.py 'a b'")


def test_system_wide_mode_carries_the_options_of_the_recipe() -> None:
    (profile,) = argvs(dry(VLLM, mode=Mode.SYSTEM_WIDE, delay_s=90.0, duration_s=30.0))
    assert "-t cuda,nvtx,osrt --sample=system-wide --cpuctxsw=system-wide" in profile
    assert "--cuda-graph-trace=node" in profile
    assert "--delay=90 --duration=30" in profile


def test_per_rank_mode_runs_one_nsys_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPAL_PREFIX", "/opt/hpcx/ompi")
    plan = dry("trtllm-serve /m --tp_size 2", mode=Mode.PER_RANK)
    mpirun = argvs(plan)[0]
    assert mpirun.startswith("mpirun -n 2 -x TLLM_LLMAPI_ENABLE_NVTX -x OPAL_PREFIX nsys profile ")
    assert "-o '/out/rank%q{OMPI_COMM_WORLD_RANK}'" in mpirun
    assert " trtllm-llmapi-launch trtllm-serve /m --tp_size 2 " in mpirun
    assert [report.name for report in plan.plan.reports] == ["rank0.nsys-rep", "rank1.nsys-rep"]
    assert len(plan.plan.commands) == 1 + 2 + 2  # mpirun, start and stop for each rank


@pytest.mark.parametrize(
    ("command", "changes", "sentence"),
    [
        ("python run.py", {"mode": Mode.SERVER}, "none is recognised"),
        (VLLM, {"mode": Mode.PROGRAM}, "serves until it is ended"),
        ("mpirun -n 2 trtllm-serve /m", {"mode": Mode.PER_RANK}, "without it"),
        (VLLM, {"mode": Mode.PER_RANK, "ranks": 0}, "0 ranks"),
    ],
)
def test_modes_that_do_not_fit(command: str, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        dry(command, **changes)


def test_vllm_is_made_to_emit_ranges() -> None:
    plan = dry(VLLM)
    start = plan.plan.commands[0]
    text = shlex.join(start.argv)
    assert text.endswith(
        '--enable-layerwise-nvtx-tracing --profiler-config \'{"profiler":"cuda"}\' '
        "--no-enable-prefix-caching"
    )
    assert start.env == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert any("V2 model runner" in note for note in plan.plan.notes)
    assert not any("compiles" in note for note in plan.plan.notes)
    # The mock's engine is built from the user's flags, not from opkit's.
    assert plan.server.engine_args == ("--compilation-config", '{"mode":0}')


def test_what_the_user_decided_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    command = (
        "vllm serve /m --enable-layerwise-nvtx-tracing --profiler-config.profiler=cuda "
        "--enable_prefix_caching --enforce-eager"
    )
    start = dry(command).plan.commands[0]
    assert shlex.join(start.argv).endswith(command)
    assert start.env == {}


def test_sglang_marker_only_without_prefill_graphs() -> None:
    base = "python -m sglang.launch_server --model-path /m"
    with_graphs = dry(base)
    assert "--enable-layerwise-nvtx-marker" not in with_graphs.plan.commands[0].argv
    assert any("--disable-piecewise-cuda-graph" in note for note in with_graphs.plan.notes)
    without = dry(f"{base} --disable-piecewise-cuda-graph")
    assert "--enable-layerwise-nvtx-marker" in without.plan.commands[0].argv


def test_trtllm_gets_a_yaml_unless_it_has_one() -> None:
    plan = dry("trtllm-serve /m")
    ((path, text),) = plan.plan.files
    assert plan.plan.commands[0].argv[-2:] == ("--extra_llm_api_options", str(path))
    assert text == (
        "enable_layerwise_nvtx_marker: true\nkv_cache_config:\n  enable_block_reuse: false\n"
    )
    own = dry("trtllm-serve /m --config mine.yaml")
    assert own.plan.files == ()
    assert any("enable_layerwise_nvtx_marker: true" in note for note in own.plan.notes)
    # The YAML's kv_cache_config would replace what the flag says.
    flagged = dry("trtllm-serve /m --free_gpu_memory_fraction 0.5")
    assert flagged.plan.files[0][1] == "enable_layerwise_nvtx_marker: true\n"


def test_dry_run_is_a_script_with_every_step() -> None:
    plan = dry(VLLM, waves=(Wave(4, 1024, 12),), env={"A": "b c"})
    text = plan.text()
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert commands[0].startswith("A='b c' VLLM_USE_V2_MODEL_RUNNER=0 nsys launch ")
    assert [line.removesuffix(" &") for line in commands] == [
        command.line() for command in plan.plan.commands
    ]
    assert "# warm up 2 times: POST http://127.0.0.1:8000/v1/completions: 4x1024+12\n" in text
    assert "# wait until GET http://127.0.0.1:8000/health answers 200, at most 900 s\n" in text
    assert "# switch step labels on: POST http://127.0.0.1:8000/start_profile\n" in text
    assert "# prime the window: POST http://127.0.0.1:8000/v1/completions: 1x16+2\n" in text
    assert "# send the requests: POST http://127.0.0.1:8000/v1/completions: 4x1024+12\n" in text
    assert "# result: /out/e2e.nsys-rep\n" in text


def test_output_path_is_not_expanded_by_nsys() -> None:
    plan = plan_e2e(E2ERequest("python x.py", Path("/out/50%p")), dry_run=True)
    assert "/out/50%%p/e2e" in plan.plan.commands[0].argv
    assert plan.plan.reports == (Path("/out/50%p/e2e.nsys-rep"),)


@pytest.mark.parametrize("text", ["4x1024+12", " 4×1024+12 "])
def test_wave_is_read(text: str) -> None:
    assert parse_wave(text) == Wave(4, 1024, 12)
    assert wave_text(Wave(4, 1024, 12)) == "4x1024+12"


@pytest.mark.parametrize("text", ["", "4x1024", "0x1024+12", "4x1024+0", "ax1+1", "4x-1+1"])
def test_no_wave(text: str) -> None:
    with pytest.raises(BadInput, match="not a wave"):
        parse_wave(text)


def test_default_waves_lie_on_both_sides_of_the_index() -> None:
    assert [wave_text(wave) for wave in DEFAULT_WAVES] == [
        "1x512+96",
        "1x1024+96",
        "1x4096+96",
        "4x1024+96",
        "16x512+96",
    ]
    assert dry(VLLM).request.waves == DEFAULT_WAVES


SGLANG = "python -m sglang.launch_server --model-path /m"
OWN = str(Path(opkit.__file__).parent / "inside")


def test_sglang_is_made_to_name_its_steps_and_compute_whole_prompts() -> None:
    plan = dry(SGLANG)
    start = plan.plan.commands[0]
    argv = start.argv[start.argv.index("python") :]
    hooks = json.loads(argv[argv.index("--forward-hooks") + 1])
    assert "--disable-radix-cache" in argv
    # SGLang takes a list of hooks, each with a factory as MODULE:NAME.
    (hook,) = hooks
    module, name = hook["hook_factory"].split(":")
    assert f'"{name}": ' in (Path(OWN) / f"{module}.py").read_text()
    # Nothing of what may lie beside opkit comes before the server's own packages.
    assert [path.name for path in Path(OWN).glob("*.py")] == [f"{module}.py"]
    assert any(note.startswith("--forward-hooks added") for note in plan.plan.notes)
    assert plan.server.engine_args == ()  # the mock's engine has none of it


@pytest.mark.parametrize(
    ("flags", "absent"),
    [
        ("--forward-hooks '[]'", "opkit.layers.backends.sglang"),
        ("--forward_hooks '[]'", "opkit.layers.backends.sglang"),
    ],
)
def test_hooks_of_the_users_own_stay(flags: str, absent: str) -> None:
    argv = dry(f"{SGLANG} {flags}").plan.commands[0].argv
    assert not any(absent in word for word in argv)
    assert argv.count("--disable-radix-cache") == 1


def test_sglangs_server_finds_opkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert dry(SGLANG).plan.commands[0].env["PYTHONPATH"] == OWN
    assert "PYTHONPATH" not in dry(VLLM).plan.commands[0].env


@pytest.mark.parametrize(
    ("inherited", "given", "found"),
    [
        (None, {}, {"PYTHONPATH": OWN}),
        ("", {}, {"PYTHONPATH": OWN}),
        ("/a", {"B": "1"}, {"B": "1", "PYTHONPATH": f"{OWN}{os.pathsep}/a"}),
        ("/a", {"PYTHONPATH": "/b"}, {"PYTHONPATH": f"{OWN}{os.pathsep}/b"}),
        (f"/a{os.pathsep}{OWN}", {}, {}),
        (OWN, {"PYTHONPATH": "/b"}, {"PYTHONPATH": f"{OWN}{os.pathsep}/b"}),
        ("/a", {"PYTHONPATH": OWN}, {"PYTHONPATH": OWN}),
        (f"{OWN}-not", {}, {"PYTHONPATH": f"{OWN}{os.pathsep}{OWN}-not"}),
    ],
)
def test_a_path_to_opkit_is_put_before_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
    inherited: str | None,
    given: dict[str, str],
    found: dict[str, str],
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if inherited is not None:
        monkeypatch.setenv("PYTHONPATH", inherited)
    before = dict(given)
    assert with_opkit(given) == found
    assert given == before


def test_sglang_is_asked_by_token_ids_and_for_no_least_number() -> None:
    # A least number of tokens is refused by a server without a tokenizer.
    assert engine_named("sglang").body("m", [[1, 2], [3, 4]], 5) == {
        "input_ids": [[1, 2], [3, 4]],
        "sampling_params": {"max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True},
        "stream": False,
    }


def test_a_question_with_a_body_is_shown_with_it() -> None:
    plan = dry(VLLM).plan
    asked = (Post("http://h/rpc", "store", '{"method": "m"}'), Post("http://h/start", "begin"))
    lines = replace(plan, steps=asked).text().splitlines()
    assert '# store: POST http://h/rpc {"method": "m"}' in lines
    assert "# begin: POST http://h/start" in lines


@pytest.mark.parametrize(
    ("op", "config", "rounds"),
    [
        ("gqa", {"num_hidden_layers": 4}, 1),  # 3 regions by sequence, which misses the first
        ("gqa", {"num_hidden_layers": 2}, 3),
        ("gqa", {"text_config": {"num_hidden_layers": 3}}, 2),
        ("moe", {"num_hidden_layers": 5, "first_k_dense_replace": 3}, 3),
        ("mla", {"num_hidden_layers": 5, "first_k_dense_replace": 3}, 1),
        ("gqa", {}, 1),
    ],
)
def test_a_model_of_few_layers_is_asked_more_often(
    tmp_path: Path, op: str, config: dict[str, Any], rounds: int
) -> None:
    # A prompt is one step with a region a layer, and a verdict needs three.
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = dry(f"vllm serve {tmp_path}", op=op, waves=(Wave(1, 8, 4), Wave(4, 8, 4)))
    assert plan.request.waves == (Wave(1, 8, 4), Wave(4, 8, 4)) * rounds
    (sent,) = [
        step
        for step in plan.plan.steps
        if isinstance(step, Send) and step.purpose is Purpose.RECORD
    ]
    assert sent.waves == plan.request.waves

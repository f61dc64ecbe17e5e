"""What is planned, and which rows are the same row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opkit.collect.comm.plan import (
    CommCase,
    CommOptions,
    case_key,
    estimate_seconds,
    gpu_counts,
    launches,
    make_worlds,
    series_of,
)
from opkit.collect.comm.run import plan_comm
from opkit.collect.measurement import Timing
from opkit.errors import BadInput, ToolMissing, WrongUsage
from opkit.layers.op import LaunchMode

ASKED = CommOptions(out=Path("out"))
CASE = CommCase("nccl", "all_reduce", "half", 2, 512, LaunchMode.GRAPH)


@pytest.mark.parametrize(
    ("present", "counts"), [(1, (1,)), (2, (2,)), (6, (2, 4)), (8, (2, 4, 8)), (16, (2, 4, 8, 16))]
)
def test_worlds_have_two_four_eight_gpus(present: int, counts: tuple[int, ...]) -> None:
    assert gpu_counts(ASKED, present) == counts


def test_all_of_the_fields_table_is_planned() -> None:
    worlds = make_worlds(ASKED, 8)
    assert [(world.implementation, world.ranks) for world in worlds] == [
        ("nccl", 2), ("nccl", 4), ("nccl", 8)
    ]  # fmt: skip
    # 504 rows in h100_sxm/comm/nccl/2.29.2: 4 ops, 2 types, 21 sizes, 3 numbers of GPUs.
    assert sum(len(world.cases) for world in worlds) == 504
    assert len({case for world in worlds for case in world.cases}) == 504


def test_an_engines_all_reduce_is_planned_alone() -> None:
    (world,) = make_worlds(replace(ASKED, all_reduce_backend="vllm"), 2)
    assert world.implementation == "vllm"
    # 138 rows in h100_sxm/comm/vllm/0.24.0 for three numbers of GPUs: graph and eager, 23 sizes.
    assert len(world.cases) == 46
    assert {case.launch for case in world.cases} == {LaunchMode.GRAPH, LaunchMode.EAGER}
    assert {(case.op, case.dtype) for case in world.cases} == {("all_reduce", "bfloat16")}


def test_an_engines_all_reduce_goes_with_collectives_that_are_named() -> None:
    both = replace(ASKED, all_reduce_backend="trtllm", ops=("all_to_all",), dtypes=("int8",))
    nccl, engine = make_worlds(both, 2)
    assert {(case.op, case.dtype) for case in nccl.cases} == {("alltoall", "int8")}
    assert {case.launch for case in engine.cases} == {LaunchMode.GRAPH}


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"ops": ("broadcast",)}, WrongUsage, "'broadcast'"),
        ({"dtypes": ("fp4",)}, WrongUsage, "'fp4'"),
        ({"all_reduce_backend": "mscclpp"}, WrongUsage, "vllm, trtllm"),
        ({"all_reduce_backend": "vllm", "device": "cpu"}, WrongUsage, "needs GPUs"),
        ({"all_reduce_backend": "vllm", "gpus": (1,)}, BadInput, "at least two"),
        ({"gpus": (2, 16)}, BadInput, "asks for 16 GPUs and 8 are here"),
        ({"gpus": (0,)}, WrongUsage, "at least 1"),
        ({"min_bytes": 64, "gpus": (8,)}, WrongUsage, "less than one share"),
        ({"min_bytes": 2048, "max_bytes": 1024}, WrongUsage, "no message size"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    wrong: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make_worlds(replace(ASKED, **wrong), 8)  # type: ignore[arg-type]


def test_no_gpu_is_told() -> None:
    with pytest.raises(ToolMissing, match="no GPU"):
        make_worlds(ASKED, 0)


def test_a_plan_for_another_host_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opkit.collect.comm.run.list_gpus", list)
    plan = plan_comm(replace(ASKED, gpus=(2, 4, 8)))
    assert (plan.cases, len(plan.worlds)) == (504, 3)
    assert plan.seconds > 0


def test_a_longer_plan_is_estimated_longer() -> None:
    few = make_worlds(replace(ASKED, ops=("all_reduce",)), 2)
    many = make_worlds(ASKED, 2)
    timing = ASKED.timing
    assert estimate_seconds(few, timing) < estimate_seconds(many, timing)
    assert estimate_seconds(many, timing) < estimate_seconds(
        many, replace(timing, min_iterations=2000, max_iterations=2000)
    )


def test_a_batch_has_more_launches_of_small_messages() -> None:
    assert launches(CASE) == 20
    assert launches(replace(CASE, size=8 * 1024**2)) == 4
    assert launches(replace(CASE, size=1024**3)) == 2


def test_a_key_holds_all_that_decides_a_value() -> None:
    subject = {"versions": {"nccl": "2.29.2"}, "variables": {"NCCL_NVLS_ENABLE": "0"}}
    timing = Timing()
    key = case_key(series_of("nccl", subject, timing), CASE)
    same = case_key(series_of("nccl", dict(reversed(subject.items())), Timing()), replace(CASE))
    assert key == same
    series = series_of("nccl", subject, timing)
    others = [
        case_key(series_of("nccl", {**subject, "variables": {}}, timing), CASE),
        case_key(series_of("nccl", subject, replace(timing, spread=0.1)), CASE),
        case_key(series_of("vllm", subject, timing), CASE),
        case_key(series, replace(CASE, op="alltoall")),
        case_key(series, replace(CASE, dtype="int8")),
        case_key(series, replace(CASE, ranks=4)),
        case_key(series, replace(CASE, size=1024)),
        case_key(series, replace(CASE, launch=LaunchMode.EAGER)),
    ]
    assert len({key, *others}) == 1 + len(others)

"""The grids of the ops, and cases that know no phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opkit.collect.groups import Subject, make_groups
from opkit.collect.measurement import Timing
from opkit.collect.sweep import Sweep, phase_of, phases_of, read_sweep, select, size_of
from opkit.errors import BadInput, WrongUsage
from opkit.layers.geometry import read_geometry
from opkit.layers.op import Case, GemmCase, LaunchMode, MoeCase, Op, Phase
from opkit.layers.registry import OPS

MODELS = Path(__file__).parents[2] / "opkit" / "layers" / "models"
MODEL_OF = {
    "dsa": "deepseek-v32", "mla": "deepseek-v3", "gqa": "qwen3", "moe": "mixtral",
}  # fmt: skip


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_grid_for_each_of_its_tables(op: Op) -> None:
    sweep = read_sweep(op)
    assert {phase_of(case) for case in sweep.cases} == set(phases_of(op)) == set(op.tables)
    assert len(set(sweep.cases)) == len(sweep.cases)
    assert sweep.seconds.keys() == set(phases_of(op))
    assert sweep.estimate_s() > 0
    assert {op.table(case).name for case in sweep.cases} == {
        table.name for table in op.tables.values()
    }


def test_the_grids_are_the_fields() -> None:
    """Counted in aiconfigurator's shipped h100_sxm tables of vLLM 0.24.0, of one head count."""
    mla = [phase_of(case) for case in read_sweep(OPS["mla"]).cases]
    assert (mla.count("context"), mla.count("generation")) == (122, 181)
    gqa = read_sweep(OPS["gqa"]).cases
    assert sum(phase_of(case) == "context" for case in gqa) == 119
    # 8 query heads of one key and value head: the field leaves out the longest of each batch from
    # 256 requests on where it does not fit.
    decoding = {(c.batch, c.past) for c in gqa if isinstance(c, Case) and c.past}
    field = {(b, 2**k - 1) for k in range(1, 18) for b in (2**i for i in range(12))
             if b * 2**k <= (2**20 if b >= 256 else 2**21)}  # fmt: skip
    assert field <= decoding
    assert len(decoding) < 1.1 * len(field)
    moe = read_sweep(OPS["moe"])
    assert len(moe.cases) == 27 * 3
    assert moe.tp == (1, 2, 4, 8, 16, 32)
    assert moe.seconds == {"": 0.1}


@pytest.mark.parametrize(("op", "name"), MODEL_OF.items())
def test_bundled_models_can_be_shared_as_the_grids_ask(op: str, name: str) -> None:
    for tp in read_sweep(OPS[op]).tp:
        assert read_geometry(MODELS / f"{name}.json").local(tp, OPS[op].shares)


def moe(tmp_path: Path, text: str) -> Sweep:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return read_sweep(OPS["moe"], file)


def test_a_users_grid_of_experts(tmp_path: Path) -> None:
    sweep = moe(tmp_path, '[moe]\ntokens = [1, 8]\nrouting = ["balanced", "power_law_1.5"]\n')
    assert sweep.cases == tuple(
        MoeCase(tokens, routing) for routing in ("balanced", "power_law_1.5") for tokens in (1, 8)
    )
    assert moe(tmp_path, "[moe]\ntokens = [3]\n").cases == (MoeCase(3, "balanced"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[moe]\ntokens = [1]\nrouting = ["even"]\n',
            r"\[moe\]: routing is balanced or power_law_A .*, not 'even'",
        ),
        ('[moe]\nrouting = ["balanced"]\n', "tokens is missing"),
        ("[moe]\ntokens = [0]\n", "tokens must be a list of whole numbers"),
        ("[context]\nbatch = [1]\ntokens = [1]\n", "moe has no context; known: tp, moe"),
    ],
)
def test_a_wrong_grid_of_experts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        moe(tmp_path, text)


def test_experts_are_filtered_and_tried() -> None:
    sweep = read_sweep(OPS["moe"])
    found = select(sweep, filters=["routing=power_law_1.2,tokens<=4"])
    assert found.cases == tuple(MoeCase(tokens, "power_law_1.2") for tokens in (1, 2, 4))
    with pytest.raises(WrongUsage, match="a case has no batch; it has tokens, routing"):
        select(sweep, filters=["batch=1"])
    with pytest.raises(WrongUsage, match=r"tokens is not compared with '1\.5'"):
        select(sweep, filters=["tokens<1.5"])
    smoke = select(sweep, smoke=True)
    assert len(smoke.cases) == 3
    assert max(map(size_of, smoke.cases)) <= 8192
    assert len({size_of(case) for case in smoke.cases}) == 3


def subject(op: Op, **modes: LaunchMode) -> Subject:
    phases = phases_of(op)
    told: dict[str, Any] = {"gpu": "a", "framework": "1"}
    chosen = modes or dict.fromkeys(phases, LaunchMode.GRAPH)
    return Subject(op, "vllm", "model", (), chosen, 0, dict.fromkeys(phases, told))


def test_steps_of_experts_share_a_build() -> None:
    sweep = Sweep("a test", (1, 2), tuple(MoeCase(n) for n in (64, 1, 16384)), {})
    groups = make_groups(subject(OPS["moe"]), sweep, Timing(), ordered=False)
    assert [group.name for group in groups] == ["moe vllm tp 1", "moe vllm tp 2"]
    for group, tp_size in zip(groups, (1, 2), strict=True):
        assert group.plan.tp_size == tp_size
        assert [task.planned.case.tokens for task in group.tasks] == [1, 64, 16384]
        assert {task.planned.mode for task in group.tasks} == {LaunchMode.GRAPH}
    keys = [task.key for group in groups for task in group.tasks]
    assert len(set(keys)) == 6
    other = Sweep("a test", (1,), (MoeCase(64, "power_law_1.2"),), {})
    (group,) = make_groups(subject(OPS["moe"]), other, Timing(), ordered=False)
    assert group.tasks[0].key not in keys


def test_sizes() -> None:
    assert size_of(MoeCase(96, "power_law_1.2")) == 96
    assert size_of(GemmCase(7, 64, 32)) == 7
    assert size_of(Case(Phase.GENERATION, 4, 1, 15)) == 64
    assert phase_of(MoeCase(1)) == phase_of(GemmCase(1, 1, 1)) == ""

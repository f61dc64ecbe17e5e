"""A true pair passes; no spoiled copy of it does.

Runs on the recorded pair of the package, and on a made one as long as that is not there.
``OPKIT_MUTATIONS=N`` tries N examples of each mutation.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import mutate
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from made_pair import write_pair
from mutate import COUNTS, Edit, Execution, Pair, Side, edited, read_pair

import opkit
from opkit.align.judge import judge
from opkit.align.result import AlignResult, Outcome
from opkit.nsys_parsers.names import parse_name

RECORDED = Path(opkit.__file__).parent / "recorded"
FILES = tuple(RECORDED / f"dsa-vllm-h100-{side}.sqlite.gz" for side in ("mock", "e2e"))
EXAMPLES = int(os.environ.get("OPKIT_MUTATIONS", "4"))
PLACES: dict[str, Edit] = {
    "drop": mutate.drop,
    "duplicate": mutate.duplicate,
    "rename": mutate.rename,
    "stretch": mutate.stretch,
}
INDEX = st.integers(min_value=0, max_value=2**20)
EITHER = st.sampled_from(["mock", "e2e"])

# A fill of 0.7 µs in the mock takes 1.2 µs in the engine, behind other work: three times as long
# is then within what the true pair differs by.
SHORTEST_STRETCHED_NS = 1_000

few = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failure is told as found: shrinking would judge a hundred more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    recorded = all(path.is_file() for path in FILES)
    files = FILES if recorded else write_pair(tmp_path_factory.mktemp("made"))
    return read_pair(*files, tmp_path_factory.mktemp("read"))


def verdict(what: str, pair: Pair, side: str, path: Path) -> AlignResult:
    """The verdict over the pair with one file replaced, counted."""
    files = {side: path}
    result = judge(pair.question(**files))
    COUNTS[what, str(result.verdict)] += 1
    return result


def place(side: Side, case: int, at: int) -> list[Execution]:
    """The executions at one place of the sequence, in all regions of one case."""
    regions = side.regions[sorted(side.regions)[case % len(side.regions)]]
    length = min(len(region) for region in regions)
    return [region[at % length] for region in regions]


def explain(result: AlignResult) -> str:
    lines = [f"{c.check} {c.outcome}: {c.detail}" for p in result.phases for c in p.checks]
    return "\n".join(lines)


def test_the_true_pair_passes(pair: Pair) -> None:
    result = verdict("unmutated", pair, "mock", pair.mock.path)
    assert result.verdict is Outcome.PASS, explain(result)
    assert [str(phase.verdict) for phase in result.phases] == ["pass", "pass"]


@pytest.mark.parametrize("side", ["mock", "e2e"])
def test_a_copy_that_went_through_an_edit_without_change_passes(
    pair: Pair, side: str, tmp_path: Path
) -> None:
    with edited(getattr(pair, side), tmp_path / "same.sqlite") as db:
        db.execute("VACUUM")
    result = verdict("unmutated", pair, side, tmp_path / "same.sqlite")
    assert result.verdict is Outcome.PASS, explain(result)


@pytest.mark.parametrize("what", PLACES)
@few
@given(side=EITHER, case=INDEX, at=INDEX)
def test_one_place_of_the_sequence_in_every_region(
    pair: Pair, what: str, side: str, case: int, at: int, tmp_path: Path
) -> None:
    chosen = place(getattr(pair, side), case, at)
    assume(what != "stretch" or chosen[0].end - chosen[0].start >= SHORTEST_STRETCHED_NS)
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        PLACES[what](db, chosen)
    result = verdict(f"{what}, every region", pair, side, tmp_path / "spoiled.sqlite")
    assert result.verdict is not Outcome.PASS, (side, chosen[0], explain(result))


@pytest.mark.parametrize("what", ["drop", "duplicate", "rename"])
@few
@given(side=EITHER, case=INDEX, at=INDEX, region=INDEX)
def test_one_execution(
    pair: Pair, what: str, side: str, case: int, at: int, region: int, tmp_path: Path
) -> None:
    chosen = place(getattr(pair, side), case, at)
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        PLACES[what](db, [chosen[region % len(chosen)]])
    result = verdict(f"{what}, one execution", pair, side, tmp_path / "spoiled.sqlite")
    assert result.verdict is not Outcome.PASS, (side, chosen[0], explain(result))


@few
@given(side=EITHER, case=INDEX, at=INDEX, region=INDEX)
def test_one_slow_execution_is_an_outlier_not_another_kernel(
    pair: Pair, side: str, case: int, at: int, region: int, tmp_path: Path
) -> None:
    chosen = place(getattr(pair, side), case, at)
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        mutate.stretch(db, [chosen[region % len(chosen)]])
    result = verdict("stretch, one execution", pair, side, tmp_path / "spoiled.sqlite")
    # Medians stand: it may pass, and nothing but time can have been found.
    failed = {c.check for p in result.phases for c in p.checks if c.outcome is not Outcome.PASS}
    assert failed <= {"latency", "data"}


@few
@given(side=EITHER, case=INDEX, at=INDEX, other=INDEX)
def test_two_kernels_in_each_others_place(
    pair: Pair, side: str, case: int, at: int, other: int, tmp_path: Path
) -> None:
    one, two = (place(getattr(pair, side), case, index) for index in (at, other))
    assume(one[0].table == two[0].table == mutate.KERNEL)
    assume(parse_name(one[0].name).demangled != parse_name(two[0].name).demangled)
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        for a, b in zip(one, two, strict=True):
            mutate.swap(db, a, b)
    result = verdict("swap", pair, side, tmp_path / "spoiled.sqlite")
    assert result.verdict is not Outcome.PASS, (side, one[0].name, two[0].name, explain(result))


@pytest.mark.parametrize("what", ["calls", "graph launches", "kernel records"])
@few
@given(side=EITHER, seed=INDEX)
def test_one_in_ten_launches_is_lost(
    pair: Pair, what: str, side: str, seed: int, tmp_path: Path
) -> None:
    noise = random.Random(seed)
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        if what == "kernel records":
            assert mutate.lose_kernels(db, noise) > 5
        else:
            assert mutate.lose_calls(db, getattr(pair, side), noise, what != "calls") >= 1
    result = verdict(f"lose 10 % of {what}", pair, side, tmp_path / "spoiled.sqlite")
    assert result.verdict is not Outcome.PASS, (side, explain(result))


@few
@given(side=EITHER, seed=INDEX)
def test_two_processes_are_mixed(pair: Pair, side: str, seed: int, tmp_path: Path) -> None:
    with edited(getattr(pair, side), tmp_path / "spoiled.sqlite") as db:
        assert mutate.merge_process(db, random.Random(seed)) > 10
    result = verdict("mix two processes", pair, side, tmp_path / "spoiled.sqlite")
    assert result.verdict is not Outcome.PASS, (side, explain(result))

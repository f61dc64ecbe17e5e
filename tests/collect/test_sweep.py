"""Sweeps: the field's grids, a user's files, and what a selection leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from opkit.collect.sweep import phase_of, read_sweep, select, size_of
from opkit.errors import BadInput, WrongUsage
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, Phase


def test_the_grid_of_dsa_is_the_fields() -> None:
    """Counted in aiconfigurator's shipped h100_sxm tables: 244 and, where all fit, 184 a head
    count (181 where a bf16 cache of 33.5 million tokens did not)."""
    sweep = read_sweep(DSA)
    phases = [phase_of(case) for case in sweep.cases]
    assert (phases.count("context"), phases.count("generation")) == (244, 184)
    assert sweep.tp == (1, 2, 4, 8, 16, 32, 64, 128)
    assert sweep.count() == 8 * 428
    assert len(set(sweep.cases)) == 428
    assert all(c.batch * c.tokens <= 131072 for c in sweep.cases if isinstance(c, Case))


TOML = "[context]\nbatch = [1, 4]\ntokens = [16, 64]\nmax_tokens = 128\n"
YAML = "context:\n  batch: [1, 4]\n  tokens: [16, 64]\n  max_tokens: 128\n"


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_a_users_file_replaces_the_grid(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    sweep = read_sweep(DSA, file)
    assert sweep.cases == tuple(
        Case(Phase.CONTEXT, batch, tokens, 0) for batch, tokens in ((1, 16), (4, 16), (1, 64))
    )
    assert sweep.tp == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[context]\nbatch = [1]\ntokens = [4]\nmax_token = 3\n", "unknown max_token"),
        ("[contex]\nbatch = [1]\n", "dsa has no contex"),
        ("[context]\nbatch = [1]\n", "tokens is missing"),
        ("[context]\nbatch = [1.5]\ntokens = [4]\n", "batch must be a list of whole numbers"),
        ("[context]\nbatch = [true]\ntokens = [4]\n", "batch must be a list of whole numbers"),
        ("[context]\nbatch = 1\ntokens = [4]\n", "batch must be a list"),
        ("tp = [1]\n", "no case of dsa"),
        ("context = 3\n", "not a table"),
        ("[context\n", "not a readable sweep"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_sweep(DSA, file)


def test_filters_must_all_hold() -> None:
    found = select(read_sweep(DSA), filters=["batch<=2,past=0", "tokens>=16384"])
    assert [(c.batch, c.tokens) for c in found.cases if isinstance(c, Case)] == [
        (1, 16384), (2, 16384), (1, 32768), (2, 32768),
    ]  # fmt: skip
    assert all(phase_of(c) == "context" for c in found.cases)
    assert len(select(read_sweep(DSA), filters=["phase=generation"]).cases) == 184


@pytest.mark.parametrize(
    ("text", "message"),
    [("batch", "not a condition"), ("m=3", "a case has no m"), ("batch=one", "not compared")],
)
def test_a_wrong_filter_is_wrong_usage(text: str, message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        select(read_sweep(DSA), filters=[text])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(BadInput, match="no case is left"):
        select(read_sweep(DSA), filters=["batch>1024"])


def test_smoke_is_small_and_has_both_phases() -> None:
    found = select(read_sweep(DSA), smoke=True)
    assert [phase_of(case) for case in found.cases] == ["context"] * 3 + ["generation"] * 3
    assert max(size_of(case) for case in found.cases) <= 8192
    assert found.tp == (1,)


def test_a_shuffle_keeps_every_case_and_a_limit_takes_the_first() -> None:
    sweep = read_sweep(DSA)
    mixed = select(sweep, shuffle=7)
    assert mixed.cases != sweep.cases
    assert sorted(mixed.cases, key=repr) == sorted(sweep.cases, key=repr)
    assert select(sweep, shuffle=7, limit=5).cases == mixed.cases[:5]

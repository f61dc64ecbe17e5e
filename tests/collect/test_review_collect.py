"""What a review of collection tried to break: admission, keys, resume, and what a run ends with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_rows import H100, about, dsa_row, failed_row, measured

from opkit.align.ledger import Ledger
from opkit.align.policy import Policy
from opkit.align.result import AlignResult
from opkit.collect import options as collect_options
from opkit.collect import repeat
from opkit.collect import run as collect_run
from opkit.collect.admission import Admission, ask_ledger, check_mock
from opkit.collect.fidelity import compare_with_engine, engine_cases
from opkit.collect.measurement import Timing
from opkit.collect.options import CollectOptions, Job, Where, prepare
from opkit.collect.record import Record
from opkit.collect.run import Collected, collect
from opkit.collect.sweep import read_sweep
from opkit.collect.tables.write import write_tables
from opkit.collect.work import Fault, Group, Row, Task, build_digest
from opkit.collect.workers.gpus import Gpu
from opkit.collect.workers.parts import Part, read_parts
from opkit.collect.workers.tally import Tally
from opkit.errors import BadInput, Refused, WrongUsage
from opkit.layers.dsa import DSA
from opkit.layers.gemm import GEMM
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode

BOTH = ("context", "generation")
SWEEP = "[gemm]\nm = [1, 16]\nn = [128]\nk = [256]\n"


def given(out: Path, op: str = "gemm", **changed: Any) -> CollectOptions:
    """The options of ``opkit collect OP --waive 'a try'``."""
    sweep = out / "sweep.toml"
    if op == "gemm" and not sweep.exists():
        sweep.write_text(SWEEP)
    known: dict[str, Any] = {
        "op": op, "backend": "", "model": None, "engine_args": "", "phases": (), "tp": (),
        "sweep": sweep if op == "gemm" else None, "case_filter": (), "limit": None,
        "smoke": False, "shuffle": None, "waive": "a try", "policy": None, "timing": Timing(),
        "latency": "auto", "eager": False, "gpus": "all", "python": "python", "engine": "local",
        "ray_address": "", "ray_workers": None, "case_timeout": 9.0, "build_timeout": 9.0,
        "retry_failed": False, "seed": 0, "out": out,
    }  # fmt: skip
    return CollectOptions(**{**known, **changed})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put GPUs and a framework's version in place of the host's."""

    def put(*names: str, version: str = "0.24.0") -> None:
        gpus = [Gpu(number, f"GPU-{number}", name) for number, name in enumerate(names)]
        monkeypatch.setattr(collect_options, "list_gpus", lambda: gpus)
        monkeypatch.setattr(collect_options, "framework_version", lambda *_: version)

    put()
    return put


def model(folder: Path, heads: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    return folder


class Bench:
    """In the workers' place: rows at once, of a build that says what it is told to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: tuple[int, ...] = ()  # cases, by m, that fail
        self.manifest = Manifest(side="mock", versions={"torch": "0.24.0"})
        monkeypatch.setattr(collect_run, "run_groups", self.run)

    def run(
        self, groups: Sequence[Group], _lanes: object, folder: Path, _options: object,
        _event: object, built: Callable[[Manifest, Group], None],
    ) -> Any:  # fmt: skip
        known = read_parts(folder).rows
        left = [(g, t) for g in groups for t in g.tasks if t.key not in known]
        tally, part = Tally(len(left), 1), Part(folder)
        for group, task in left:
            built(self.manifest, group)
            row = self.row(group, task)
            part.append(row)
            tally.row(row)
        part.close()
        return tally.outcome((), "")

    def row(self, group: Group, task: Task) -> Row:
        case = task.planned.case
        row = Row(
            task.key, group.name, "gemm", GEMM.columns(case, self.manifest) if GEMM.columns else {},
            {**dataclasses.asdict(case), "mode": task.planned.mode},
            measured(0.1 + case.m / 1e4, launch=LaunchMode.EAGER),
            build=build_digest(self.manifest),
        )  # fmt: skip
        if case.m in self.fails:
            return dataclasses.replace(
                row, table="", columns={}, measurement=None, fault=Fault.CRASH, error="signal 11"
            )
        return row


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, host: Callable[..., None]) -> Bench:
    del host
    return Bench(monkeypatch)


def collected(out: Path, **changed: Any) -> Collected:
    return collect(prepare(given(out, **changed)), lambda _: None)


# What a run ends with.


def test_a_quarantined_case_is_told_by_every_run(tmp_path: Path, bench: Bench) -> None:
    """GIVEN a case that fails WHEN the command is run again THEN the run is not green."""
    bench.fails = (16,)
    first, second = collected(tmp_path), collected(tmp_path)
    assert (len(first.outcome.failed), len(second.outcome.failed)) == (1, 0)
    assert not first.ok
    assert not second.ok
    assert [row.error for row in second.quarantined] == ["signal 11"]
    assert [table.status for table in second.written.tables] == ["partial"]


def test_a_narrower_run_is_as_good_as_a_whole_one(tmp_path: Path, bench: Bench) -> None:
    assert bench is not None
    assert collected(tmp_path).ok
    narrower = collected(tmp_path, limit=1)
    assert narrower.written.problems == ()
    assert narrower.ok
    assert [table.rows for table in narrower.written.tables] == [2]


def test_rows_left_out_of_the_tables_are_told(tmp_path: Path, bench: Bench) -> None:
    assert bench is not None
    assert collected(tmp_path).elsewhere == 0
    other = collected(tmp_path, limit=1, timing=Timing(pacing="sustained"))
    assert ([table.rows for table in other.written.tables], other.elsewhere) == ([1], 2)


def test_a_case_that_died_before_it_had_columns_keeps_no_table_back(tmp_path: Path) -> None:
    lost = dataclasses.replace(
        failed_row(2, 512, 0, Fault.CRASH, "a node was lost"), table="", columns={}
    )
    written = write_tables(DSA, [dsa_row(1, 512, 0, 1.0), lost], about(), tmp_path)
    assert [(table.rows, table.status) for table in written.tables] == [(1, "partial")]


def test_tables_of_another_version_are_told_before_anything_is_measured(
    tmp_path: Path, bench: Bench, host: Callable[..., None]
) -> None:
    collected(tmp_path)
    host(version="0.25.0")
    bench.manifest = dataclasses.replace(bench.manifest, versions={"torch": "0.25.0"})
    with pytest.raises(BadInput, match=r"holds tables of torch 0.24.0, not of torch 0.25.0"):
        collected(tmp_path)
    assert len(read_parts(tmp_path / "collect" / "gemm-torch").rows) == 2


# What a row stands for.


@pytest.mark.usefixtures("host")
def test_another_model_is_another_row_without_a_verdict_too(
    tmp_path: Path, host: Callable[..., None]
) -> None:
    """A waiver with another model must not be answered with the first model's rows."""
    host(H100)
    keys = [
        {task.key for group in prepare(options).groups for task in group.tasks}
        for options in (
            given(tmp_path, "dsa", model=model(tmp_path / "a", 128), tp=(1,)),
            given(tmp_path, "dsa", model=model(tmp_path / "b", 64), tp=(1,)),
        )
    ]
    assert keys[0].isdisjoint(keys[1])


def test_waived_rows_are_never_taken_for_admitted_ones(ledger: Ledger) -> None:
    """The waiver may have let another layer source through, which the verdict's digest hides."""
    admitted = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    waived = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100, waiver="a try")
    names = ("context", "0.24.0", H100)
    assert admitted.subject(*names) != waived.subject(*names)


def test_an_admitted_models_key_is_the_verdicts(ledger: Ledger, aligned: AlignResult) -> None:
    digest = aligned.provenance["model"]["config_sha256"]
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    names = ("context", "0.24.0", H100)
    assert admission.subject(*names, digest) == admission.subject(*names)


def test_what_a_waiver_overrode_at_the_build_is_in_the_record(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(admission: Admission, _mock: Manifest, _gpu: str) -> Admission:
        return dataclasses.replace(admission, differences=("layer source: changed",))

    monkeypatch.setattr(collect_run, "check_mock", differs)
    found = collected(tmp_path)
    assert bench is not None
    assert found.record.differences == ("layer source: changed",)
    proof = json.loads(found.written.tables[0].provenance.read_text())
    assert proof["waived"] == ["layer source: changed"]


def test_rows_of_two_sources_and_versions_are_told(tmp_path: Path, bench: Bench) -> None:
    bench.manifest = Manifest("mock", versions={"torch": "0.24.0", "driver": "1"},
                              layer_source={"opkit/x.py": "0"})  # fmt: skip
    collected(tmp_path, limit=1)
    bench.manifest = Manifest("mock", versions={"torch": "0.24.0", "driver": "2"},
                              layer_source={"opkit/x.py": "1"})  # fmt: skip
    found = collected(tmp_path)
    assert any("several versions of opkit/x.py" in item for item in found.record.differences)
    proof = json.loads(found.written.tables[0].provenance.read_text())
    assert proof["versions"]["driver"] == "1, 2"


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "0.24.0", "gpu": H100}, "for GPU CPU, a worker has NVIDIA H100"),
        ({"torch": "0.23.0"}, "version of torch 0.24.0, a worker has 0.23.0"),
    ],
)
def test_a_worker_of_another_kind_measures_nothing(
    tmp_path: Path, bench: Bench, versions: dict[str, str], message: str
) -> None:
    bench.manifest = Manifest("mock", versions=versions)
    with pytest.raises(BadInput, match=message):
        collected(tmp_path)
    assert not (tmp_path / "collect" / "gemm-torch" / "run.json").exists()
    assert read_parts(tmp_path / "collect" / "gemm-torch").rows == {}


def test_a_clusters_head_without_a_gpu_collects_what_was_aligned(
    tmp_path: Path, aligned: AlignResult, host: Callable[..., None]
) -> None:
    """Not eager rows in the name of a CPU."""
    host()
    Ledger(tmp_path / "ledger.db").record(aligned)
    job = prepare(given(tmp_path, "dsa", model=model(tmp_path / "m", 128), engine="ray", waive=""))
    assert job.subject.modes["generation"] is LaunchMode.GRAPH
    assert job.subject.admitted["generation"]["gpu"] == H100


@pytest.mark.usefixtures("host")
def test_a_plan_knows_what_is_there(tmp_path: Path, bench: Bench) -> None:
    assert bench is not None
    done = collected(tmp_path)
    plan: Job = prepare(given(tmp_path), only_plan=True)
    keys = {task.key for group in plan.groups for task in group.tasks}
    assert keys == set(read_parts(done.folder).rows)


# What the ledger lets through.


def test_eager_rows_need_an_eager_verdict(ledger: Ledger) -> None:
    with pytest.raises(Refused, match="generation in mode graph, asked for is eager"):
        ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100, eager=True)
    assert ask_ledger(ledger, DSA, ("context",), "vllm", gpu=H100, eager=True).entries


def mock_of(aligned: AlignResult, **changed: Any) -> Manifest:
    known = aligned.provenance
    same = Manifest(
        side="mock", versions=known["versions"], model=known["model"], dtypes=known["dtypes"],
        engine_args=tuple(known["engine_args"]), layer_source=known["layer_source"],
    )  # fmt: skip
    return dataclasses.replace(same, **changed)


def admission_of(tmp_path: Path, aligned: AlignResult, **changed: Any) -> Admission:
    ledger = Ledger(tmp_path / "changed.db")
    ledger.record(dataclasses.replace(aligned, provenance={**aligned.provenance, **changed}))
    return ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)


def test_flags_are_no_less_different_when_none_were_aligned(
    tmp_path: Path, aligned: AlignResult
) -> None:
    admission = admission_of(tmp_path, aligned, engine_args=[])
    with pytest.raises(Refused, match=r"engine flags: .* holds for none, this is --block-size 1"):
        check_mock(admission, mock_of(aligned, engine_args=("--block-size", "1")), H100)


def test_a_verdict_of_unknown_version_holds_for_none(tmp_path: Path, aligned: AlignResult) -> None:
    admission = admission_of(tmp_path, aligned, versions={})
    with pytest.raises(Refused, match=r"vllm version: .* holds for unknown, this is 0.24.0"):
        check_mock(admission, mock_of(aligned), H100)


def test_an_element_type_that_was_not_aligned_is_refused(
    ledger: Ledger, aligned: AlignResult
) -> None:
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    more = {**aligned.provenance["dtypes"], "gate": "float8"}
    with pytest.raises(Refused, match=r"dtype of gate: .* unknown, this is float8"):
        check_mock(admission, mock_of(aligned, dtypes=more), H100)


def test_a_verdict_without_a_threshold_was_not_judged_by_it(
    tmp_path: Path, aligned: AlignResult
) -> None:
    policy = dict(aligned.provenance["policy"])
    del policy["latency"]
    with pytest.raises(Refused, match=rf"latency = None, asked for is {Policy().latency}"):
        admission_of(tmp_path, aligned, policy=policy)


# Ordinary mistakes.


@pytest.mark.usefixtures("host")
def test_a_blank_reason_waives_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no verdict on gemm"):
        prepare(given(tmp_path, waive="  "))


@pytest.mark.usefixtures("host")
def test_gemm_has_no_ranks(tmp_path: Path) -> None:
    """Each rank's row would be the same row of the table."""
    with pytest.raises(WrongUsage, match="gemm is not shared by tensor-parallel ranks"):
        prepare(given(tmp_path, tp=(1, 2)))


def test_a_rank_named_twice_is_one(tmp_path: Path, host: Callable[..., None]) -> None:
    host(H100)
    job = prepare(given(tmp_path, "dsa", model=model(tmp_path / "m", 128), tp=(8, 8)))
    assert len({group.name for group in job.groups}) == len(job.groups)
    assert job.sweep.tp == (8,)


@pytest.mark.parametrize("name", ["batch", "tokens", "tp"])
def test_a_sweep_with_a_zero_is_refused_at_once(tmp_path: Path, name: str) -> None:
    grid = {"batch": 1, "tokens": 1, "tp": 1, name: 0}
    path = tmp_path / "s.toml"
    path.write_text("tp = [{tp}]\n[context]\nbatch = [{batch}]\ntokens = [{tokens}]\n"
                    .format(**grid))  # fmt: skip
    with pytest.raises(BadInput, match=f"{name} must be a list of whole numbers from 1 on"):
        read_sweep(DSA, path)


# Verifying.


def record_of(*phases: str, verdicts: str, gpu: str = H100) -> Record:
    return Record(
        "dsa", "vllm", "m", (), dict.fromkeys(phases, LaunchMode.GRAPH), 0,
        {phase: {"framework": "0.24.0", "gpu": gpu} for phase in phases}, Timing(), "auto",
        verdicts=verdicts,
    )  # fmt: skip


def where(*names: str) -> Where:
    return Where(tuple(Gpu(i, f"GPU-{i}", name) for i, name in enumerate(names)), "python")


def test_one_phase_alone_is_held_against_the_engine(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure(_folder: Path, groups: Sequence[Group], *_: object) -> dict[str, Row]:
        asked.extend(str(t.planned.case.phase) for group in groups for t in group.tasks)
        return {}

    monkeypatch.setattr(repeat, "_measure", measure)
    record = record_of("generation", verdicts=ledger.entries()[0].id)
    options = repeat.VerifyOptions(1, None, None)
    found = repeat.verify_against_engine(
        tmp_path, record, ledger, where(H100), options, lambda _: None
    )
    assert set(asked) == {"generation"}
    assert not found.passed
    assert len(found.failed) == len(asked)


def test_a_phase_whose_verdict_is_gone_does_not_pass_unseen(
    tmp_path: Path, ledger: Ledger, aligned: AlignResult
) -> None:
    """GIVEN a verdict for each phase WHEN one has gone THEN the other alone is not a pass."""
    alone = tuple(phase for phase in aligned.phases if str(phase.phase) == "context")
    other = Ledger(tmp_path / "one.db")
    other.record(dataclasses.replace(aligned, phases=alone))
    ids = " ".join([ledger.entries()[0].id, other.entries()[0].id])
    with pytest.raises(BadInput, match=r"does not hold the verdict .* generation"):
        repeat.verify_against_engine(
            tmp_path, record_of(*BOTH, verdicts=ids), other, where(H100),
            repeat.VerifyOptions(1, None, None), lambda _: None,
        )  # fmt: skip


def test_eager_kernels_are_not_held_against_a_graphs(aligned: AlignResult) -> None:
    cases = [case for case in engine_cases(aligned) if case.e2e.mode is LaunchMode.GRAPH][:1]
    case = cases[0].mock.case
    eager = measured(0.1, 0.1, launch=LaunchMode.EAGER)
    row = dsa_row(case.batch, case.tokens, case.past, 0.1, measurement=eager)
    found = compare_with_engine("v", DSA, cases, {case: row})
    assert found.failed == (
        f"generation {case.label()}: measured in mode eager, the engine ran it in mode graph",
    )
    assert not found.passed


def test_another_gpu_verifies_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"collected on NVIDIA H100 .*, this is NVIDIA H200"):
        repeat.verify_sample(
            tmp_path, record_of(*BOTH, verdicts=""), where("NVIDIA H200"),
            repeat.VerifyOptions(1, None, None), lambda _: None,
        )  # fmt: skip

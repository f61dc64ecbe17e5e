"""Two seconds of truth: a tiny program under the real nsys, and what of it the export holds.

The program opens one NVTX range with the package ``nvtx`` and, where CUDA's driver is there,
launches one empty kernel through it (no framework is imported): so both a range and a kernel are
looked for as alignment reads them.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from opkit.doctor.machine import MARK, Machine, Ran, end_marked
from opkit.errors import OpkitError
from opkit.nsys_parsers.tool import export_sqlite

LIMIT_S = 60.0
RANGE = "opkit doctor: self-test"
KERNEL = "opkit_doctor_kernel"
CHILD = Path(__file__).parent / "selftest_child.py"


@dataclass(frozen=True)
class SelfTest:
    """What a recording of the tiny program holds.

    Attributes:
        ran: whether there was a recording to read.
        problem: why there was none.
        nvtx: version of the package ``nvtx`` that wrote the range; empty: there is none, so no
            range was written.
        range_recorded: whether the range is in the recording.
        launched: whether the program launched its kernel; if not, ``no_kernel`` says why.
        no_kernel: in CUDA's words, or ``no CUDA driver``.
        kernel_recorded: whether the kernel is in the recording.
        said: what nsys itself remarks on the recording.
        seconds: how long it took.
    """

    ran: bool
    problem: str = ""
    nvtx: str = ""
    range_recorded: bool = False
    launched: bool = False
    no_kernel: str = ""
    kernel_recorded: bool = False
    said: tuple[str, ...] = ()
    seconds: float = 0.0


def run_selftest(machine: Machine, nsys: str, python: str, gpu: str = "") -> SelfTest:
    """Record the tiny program and read the recording.

    Args:
        nsys: the program.
        python: the interpreter whose package ``nvtx`` is tried.
        gpu: UUID of the GPU that launches the kernel; empty: the first one.
    """
    mark = uuid4().hex
    with tempfile.TemporaryDirectory(prefix="opkit-doctor-") as folder:
        report, told = Path(folder) / "test.nsys-rep", Path(folder) / "told.json"
        argv = [nsys, "profile", f"--session-new=opkit-doctor-{mark[:8]}", "-t", "cuda,nvtx"]
        argv += ["--sample=none", "--cpuctxsw=none", "-o", str(report.with_suffix(""))]
        argv += [python, "-P", str(CHILD), str(told), RANGE, KERNEL]
        env = {MARK: mark, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
        try:
            ran = machine.run(argv, LIMIT_S, env)
        finally:
            end_marked(mark)  # nsys keeps an agent outside the process group it starts
        return _read(ran, report, told)


def _read(ran: Ran, report: Path, told: Path) -> SelfTest:
    if not told.is_file():
        return SelfTest(False, f"the test program did not run under nsys ({ran.why()})")
    child = json.loads(told.read_text("utf-8"))
    if not report.is_file():
        return SelfTest(False, f"nsys left no report ({ran.why()})", seconds=ran.seconds)
    try:
        export = export_sqlite(report)
    except OpkitError as error:
        return SelfTest(False, str(error), seconds=ran.seconds)
    ranges, kernels, said = read_export(export)
    return SelfTest(
        ran=True,
        nvtx=child["nvtx"],
        range_recorded=RANGE in ranges,
        launched=child["launched"],
        no_kernel=child["no_kernel"],
        kernel_recorded=KERNEL in kernels,
        said=said,
        seconds=ran.seconds,
    )


def read_export(path: Path) -> tuple[set[str], set[str], tuple[str, ...]]:
    """Texts of ranges, names of kernels and nsys's own remarks in a small export, whose tables
    may each be missing."""
    with closing(sqlite3.connect(path)) as db:
        there = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        strings: Mapping[int, str] = {}
        if "StringIds" in there:
            strings = dict(db.execute("SELECT id, value FROM StringIds"))
        ranges: set[str] = set()
        if "NVTX_EVENTS" in there:
            rows = db.execute("SELECT text, textId FROM NVTX_EVENTS")
            ranges = {text or strings.get(number, "") for text, number in rows}
        kernels: set[str] = set()
        if "CUPTI_ACTIVITY_KIND_KERNEL" in there:
            rows = db.execute("SELECT shortName FROM CUPTI_ACTIVITY_KIND_KERNEL")
            kernels = {strings.get(number, "") for (number,) in rows}
        said: tuple[str, ...] = ()
        if "DIAGNOSTIC_EVENT" in there:
            said = tuple(str(text) for (text,) in db.execute("SELECT text FROM DIAGNOSTIC_EVENT"))
    return ranges, kernels, said

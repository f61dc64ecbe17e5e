"""What ``parse.py`` times: the commands, what they print, how one is measured, and where."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from big_export import KERNEL

from opkit.nsys_parsers.tool import Nsys

ROOT = Path(__file__).parents[1]
CACHE_SUFFIX = ".opkit"
MIB = 2**20
SUMMARY = "nsys stats cuda_gpu_kern_sum"
ATTRIBUTION = "nsys stats nvtx_kern_sum"
PLAIN = "sqlite3 GROUP BY"
# Prints what `opkit trace kernels --json` prints, without the median and the spread.
PLAIN_SCRIPT = f"""
import json, sqlite3, sys
rows = sqlite3.connect(sys.argv[1]).execute('''
    SELECT s.value, k.calls, k.total, k.least, k.most FROM (
        SELECT demangledName AS name, count(*) AS calls, sum("end" - start) AS total,
            min("end" - start) AS least, max("end" - start) AS most
        FROM {KERNEL} GROUP BY demangledName) AS k JOIN StringIds AS s ON s.id = k.name''')
keys = ("name", "calls", "total_ns", "min_ns", "max_ns")
json.dump({{"kernels": [dict(zip(keys, row)) for row in rows]}}, sys.stdout)
"""

# Per kernel name: calls, total, shortest and longest in ns.
Sums = dict[str, tuple[int, int, int, int]]


@dataclass(frozen=True)
class Tool:
    """One command to time.

    Attributes:
        name: as the table says.
        command: its words, paths absolute.
        printed: how many rows (or documents) it printed: 0 is a failure whatever its exit code.
        sums: reads its kernel sums from what it printed; None where it prints other things.
        cold: opkit's cache is removed first.
        slow: run in the first ``--slow-repeat`` rounds only.
        against: name of the ``nsys stats`` row that it is held against.
    """

    name: str
    command: list[str]
    printed: Callable[[Path], int]
    sums: Callable[[Path], Sums] | None = None
    cold: bool = False
    slow: bool = False
    against: str = ""


def opkit_tools(export: Path, cached: bool = True, memory: str | None = None) -> list[Tool]:
    """opkit's summary and attribution, cold and cached; each cached one follows its cold one."""
    limit = ["--memory", memory] if memory else []

    def tool(what: str, command: str, cold: bool, against: str) -> Tool:
        words = [sys.executable, "-m", "opkit", "trace", command, str(export), "--json", *limit]
        name = f"opkit {what}, {'cold' if cold else 'cached'}"
        sums = json_sums if command == "kernels" else None
        return Tool(name, words, opkit_documents, sums, cold=cold, against=against)

    states = (True, False) if cached else (True,)
    return [
        *(tool("kernel summary", "kernels", cold, SUMMARY) for cold in states),
        *(tool("full attribution", "modules", cold, ATTRIBUTION) for cold in states),
    ]


def nsys_tools(export: Path, nsys: Nsys) -> list[Tool]:
    """The three reports; the two over NVTX take minutes."""

    def tool(report: str, sums: Callable[[Path], Sums] | None) -> Tool:
        words = ["stats", "--quiet", "--report", report, "--format", "csv", str(export)]
        name = f"nsys stats {report}"
        return Tool(name, [str(nsys.path), *words], csv_rows, sums, slow=sums is None)

    return [
        tool("cuda_gpu_kern_sum", csv_sums),
        tool("nvtx_kern_sum", None),
        tool("nvtx_gpu_proj_sum", None),
    ]


def plain_tool(export: Path) -> Tool:
    """Python's sqlite3 in a process of its own: what SQLite itself costs."""
    words = [sys.executable, "-c", PLAIN_SCRIPT, str(export)]
    return Tool(PLAIN, words, lambda path: len(json_sums(path)), json_sums, against=SUMMARY)


# --- what they print ----------------------------------------------------------------------------


def opkit_documents(printed: Path) -> int:
    """1 if this begins as a document of `opkit trace`; long ones are not read to their end."""
    with printed.open(encoding="utf-8", errors="replace") as file:
        return int('"opkit.trace.' in file.read(400))


def csv_rows(printed: Path) -> int:
    """Rows below a heading of ``nsys stats``, which ends with 0 without any, too."""
    with printed.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        heading = next(reader, [])
        return sum(len(row) == len(heading) > 1 for row in reader)


def csv_sums(printed: Path) -> Sums:
    """Of the report cuda_gpu_kern_sum. Raises KeyError, ValueError: it is something else."""
    numbers = ("Instances", "Total Time (ns)", "Min (ns)", "Max (ns)")
    with printed.open(encoding="utf-8", newline="") as file:
        return _gather(
            (row["Name"], *(int(row[n]) for n in numbers)) for row in csv.DictReader(file)
        )


def json_sums(printed: Path) -> Sums:
    """Of `opkit trace kernels --json`. Raises KeyError, TypeError, ValueError: something else."""
    numbers = ("calls", "total_ns", "min_ns", "max_ns")
    kernels = json.loads(printed.read_text(encoding="utf-8"))["kernels"]
    return _gather((kernel["name"], *(int(kernel[n]) for n in numbers)) for kernel in kernels)


def _gather(kernels: Iterable[tuple[str | int, ...]]) -> Sums:
    """Add up rows of one name, should there be several."""
    sums: Sums = {}
    for name, *numbers in kernels:
        calls, total, least, most = map(int, numbers)
        had = sums.get(str(name), (0, 0, least, most))
        sums[str(name)] = (had[0] + calls, had[1] + total, min(had[2], least), max(had[3], most))
    return sums


# --- running one --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How one command went.

    Attributes:
        seconds: wall time from start to end.
        peak_mib: largest resident set of any one process of its tree.
        failure: empty, ``over 600 s``, or the exit code and what it said on stderr.
        printed: the file that holds its stdout, until the next run.
    """

    seconds: float
    peak_mib: float
    failure: str
    printed: Path


def measure(command: list[str], scratch: Path, limit_s: float) -> Run:
    """Run a command in a process group of its own; end the whole group after ``limit_s`` seconds.

    Output goes to files in ``scratch``, never through memory of this process; so do its own
    temporary files.
    """
    printed, said = scratch / "stdout", scratch / "stderr"
    late = threading.Event()
    with printed.open("wb") as out, said.open("wb") as err:
        began = time.perf_counter()
        child = subprocess.Popen(  # from ROOT, `-m opkit` is this checkout's
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT,
            start_new_session=True, env={**os.environ, "TMPDIR": str(scratch)},
        )  # fmt: skip

        def end() -> None:
            late.set()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, end)
        try:
            timer.start()
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # Ctrl-C: leave nothing running
            end()
            child.wait()
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    failure = ""
    if child.returncode != 0:
        words = " ".join(said.read_text(errors="replace").split()) or "nothing on stderr"
        failure = (
            f"over {limit_s:g} s" if late.is_set() else f"exit {child.returncode}: {words[-500:]}"
        )
    return Run(seconds, usage.ru_maxrss / 1024, failure, printed)


def cache_of(export: Path) -> Path:
    """Where opkit keeps what it has read of this export."""
    return export.with_name(export.name + CACHE_SUFFIX)


def cache_mib(export: Path) -> float:
    """Size of that; 0 where there is none."""
    return sum(p.stat().st_size for p in cache_of(export).rglob("*") if p.is_file()) / MIB


def drop_cache(export: Path) -> None:
    """Remove opkit's cache of this export: exactly ``FILE.opkit/`` beside it."""
    cache = cache_of(export)
    if cache.is_dir() and not cache.is_symlink():
        shutil.rmtree(cache)


def machine(nsys: Nsys | None) -> dict[str, str]:
    """Facts without which times say little."""
    model = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), model
        )
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": f"{len(os.sched_getaffinity(0))} cores, {model}",
        "RAM": f"{ram:.0f} GiB",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        "duckdb": importlib.metadata.version("duckdb"),
        "SQLite": sqlite3.sqlite_version,
        "nsys": nsys.version if nsys else "none",
    }

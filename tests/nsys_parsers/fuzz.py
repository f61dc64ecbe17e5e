"""Fuzzing of everything that reads a trace: odd tables, damaged files, odd paths, several ranks.

    python tests/nsys_parsers/fuzz.py --inputs 2500 --seed 1 --jobs 2
    python tests/nsys_parsers/fuzz.py --seed 1 --only 1234 --keep FOLDER   # one input again

An input is a file, or several, and a few questions of ``opkit trace`` (and of alignment's reader)
to them. It passes when each ends in time with a result or with one sentence and its exit code,
never with a traceback or a signal, and leaves nothing behind. Questions are asked in worker
processes; one that dies or hangs costs its input and is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from fuzz_files import Made, make, unpack  # noqa: E402

LIMIT_S = 30.0
MEMORY = 8 << 30  # address space of a worker: beyond it an input fails instead of the machine
MAY_END = {0, 3, 4, 5}  # and 1 for diff: see opkit.errors
REAL = (HERE.parent / "traces", HERE.parents[2] / "shared" / "traces")
HELPERS = {"rows", "main", "write_texts", "iterate", "answer", "write"}
RAISED = re.compile(r"[\w.]+(Error|Exception|Iteration)\b")
ALL_SOURCES, SMALL_SOURCES = ("*.sqlite.gz",), ("h200-rank*.sqlite.gz",)


@dataclass
class Told:
    """What one question came to: ``said`` is the class of the sentence, or how it failed."""

    number: int
    kind: str
    words: str
    outcome: str  # accepted, refused, failed
    said: str
    seconds: float


# One question, in this process.


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def ask(words: list[str]) -> Answer:
    """``opkit trace WORDS``, or alignment's reader for ``open_trace FILE``."""
    from opkit import cli

    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code: Any = 0
    real, argv = cli.cli, sys.argv
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in heard}
    sys.argv = ["opkit", "trace", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if words[0] == "open_trace":
            vars(cli)["cli"] = _Reader(words[1])  # main's own handling of errors around it
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            vars(cli)["cli"], sys.argv = real, argv
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.buffer.read().decode("utf-8", "replace"))
    return Answer(code if isinstance(code, int) else 0 if code is None else -1, *texts)


@dataclass(frozen=True)
class _Reader:
    path: str

    def main(self, **_options: object) -> int:
        from opkit.nsys_parsers.trace import open_trace

        with open_trace(Path(self.path)) as trace:
            trace.rows("SELECT * FROM kernel")
            trace.rows("SELECT * FROM nvtx")
        return 0


def judge(words: list[str], answer: Answer) -> tuple[str, str]:
    """Outcome and class of an answer."""
    lines = answer.err.splitlines()
    if "Traceback (most recent call last)" in answer.err or answer.code == 70:
        return "failed", _traceback(answer.err)
    may = MAY_END | ({1} if words[0] == "diff" else set())
    if answer.code not in may:
        return "failed", f"exit {answer.code}: {_shape(answer.err)}"
    if answer.code in (0, 1):
        if lines:
            return "failed", f"exit {answer.code}, but on stderr: {_shape(lines[0])}"
        if "--json" in words:
            try:
                json.loads(answer.out, parse_constant=_no_number)
            except ValueError as error:
                return "failed", f"not JSON: {_shape(str(error))}"
        return "accepted", f"exit {answer.code}"
    if not lines or not lines[0].startswith("opkit: ") or not lines[0][7:].strip():
        return "failed", f"exit {answer.code} without a sentence: {_shape(answer.err)}"
    if any(not line.startswith("  ") for line in lines[1:]):
        return "failed", f"more than a sentence: {_shape(answer.err)}"
    if answer.out and "--json" not in words and "--csv" not in words:
        return "failed", f"a refusal, but a result too: {_shape(answer.out[:80])}"
    return "refused", f"exit {answer.code}: {_shape(lines[0])}"


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _traceback(err: str) -> str:
    """Exception and the innermost line of opkit that is no mere helper."""
    places = re.findall(r'File "[^"]*?(opkit/[\w/]+\.py)", line (\d+), in (\w+)', err)
    telling = [place for place in places if place[2] not in HELPERS] or places or [("?",)]
    raised = [line for line in err.splitlines() if RAISED.match(line)] or ["?"]
    return f"{':'.join(telling[-1])} {_shape(raised[-1][:110])}"


def _shape(text: str) -> str:
    """A sentence less what differs from input to input."""
    text = re.sub(r"(opkit: (?:rank \d+: )?).*?(: )", r"\1FILE\2", text, count=1)
    text = re.sub(r"[^\s'\"]*/[^\s'\"]*", "FILE", text)
    text = re.sub(r"0x[0-9a-f]+", "#", text)
    text = re.sub(r"'.*'|\"[^\"]*\"", "…", re.sub(r"[\d,.]*\d", "#", text))
    return " ".join(text.split())[:150]


# A worker: inputs from ``first`` on, each told on stdout.


def work(
    seed: int, numbers: list[int], room: Path, sources: list[Path], quick: bool, keep: bool = False
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    stacks = (room / "stack.txt").open("w+")
    for number in numbers:
        folder, scratch = room / f"{number}", room / "tmp"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        made = make(seed, number, folder, sources)
        for words in [made.asks[number % len(made.asks)]] if quick else made.asks:
            print(json.dumps({"begin": number, "kind": made.kind, "words": words}), file=out)
            stacks.truncate(0)
            stacks.seek(0)
            faulthandler.dump_traceback_later(LIMIT_S - 1, file=stacks)
            before, began = made.listing(), time.monotonic()
            answer = ask(words)
            seconds = time.monotonic() - began
            faulthandler.cancel_dump_traceback_later()
            outcome, said = judge(words, answer)
            if left := _left(scratch, before, made):
                outcome, said = "failed", f"left behind: {left}"
            if keep:
                print(" ".join(words), answer, sep="\n", file=sys.stderr)
            told = Told(number, made.kind, " ".join(words), outcome, said, seconds)
            print(json.dumps(vars(told)), file=out)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _left(scratch: Path, before: set[str], made: Made) -> str:
    """Names of what a question left in TMPDIR or beside the files."""
    left = [_shape(each.name) for each in scratch.iterdir()]
    for each in sorted(made.listing() - before):
        inside_cache = any(part.endswith(".opkit") for part in each.split(os.sep))
        if "making-" in each or not (inside_cache or each.startswith("asked.")):
            left.append(re.sub(r"making-\w+(-old)?.*", r"making-…\1", each))
    return ", ".join(sorted(set(left)))


# The runner: workers, their clocks, what they tell.


@dataclass
class Lane:
    """One worker process and what it is at."""

    todo: list[int]
    room: Path
    process: subprocess.Popen[bytes] | None = None
    pending: bytes = b""
    now: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0


class Runner:
    """Runs inputs in workers; ``told`` has a row a question."""

    def __init__(self, seed: int, sources: list[Path], room: Path, quick: bool) -> None:
        self.seed, self.sources, self.room, self.quick = seed, sources, room, quick
        self.told: list[Told] = []
        self.peak_kib = 0

    def run(self, numbers: list[int], jobs: int, each: Callable[[Told], None]) -> None:
        """Ask about all inputs; ``each`` is called with every answer."""
        size = -(-len(numbers) // jobs)
        lanes = []
        for job in range(jobs):
            room = self.room / f"lane{job}"
            room.mkdir(parents=True)
            lanes.append(Lane(numbers[job * size : (job + 1) * size], room))
        with selectors.DefaultSelector() as ready:
            try:
                for lane in lanes:
                    self._start(lane, ready)
                while ready.get_map():
                    for key, _ in ready.select(timeout=1.0):
                        for told in self._read(key.data, ready):
                            self.told.append(told)
                            each(told)
                    for lane in lanes:
                        if lane.process and lane.now and time.monotonic() > lane.began + LIMIT_S:
                            lane.process.kill()  # what it was at is told when its pipe ends
            finally:
                for lane in lanes:
                    if lane.process:
                        lane.process.kill()
                        lane.process.wait()

    def _start(self, lane: Lane, ready: selectors.BaseSelector) -> None:
        if not lane.todo:
            return
        words = [
            json.dumps(
                [self.seed, lane.todo, str(lane.room), list(map(str, self.sources)), self.quick]
            )
        ]
        lane.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(lane.room / "err").open("ab"),
        )  # fmt: skip
        assert lane.process.stdin is not None
        assert lane.process.stdout is not None
        lane.process.stdin.write(words[0].encode())
        lane.process.stdin.close()
        lane.pending, lane.now, lane.began = b"", {"begin": lane.todo[0]}, time.monotonic() + 30
        ready.register(lane.process.stdout, selectors.EVENT_READ, lane)

    def _read(self, lane: Lane, ready: selectors.BaseSelector) -> Iterator[Told]:
        assert lane.process is not None
        assert lane.process.stdout is not None
        data = os.read(lane.process.stdout.fileno(), 1 << 16)
        *lines, lane.pending = (lane.pending + data).split(b"\n")
        for line in map(json.loads, lines):
            lane.began = time.monotonic()
            if "begin" in line:
                lane.now = line
                while lane.todo[0] != line["begin"]:
                    lane.todo.pop(0)
            else:
                yield Told(**line)
        if data:
            return
        ready.unregister(lane.process.stdout)
        _, status, usage = os.wait4(lane.process.pid, 0)
        self.peak_kib = max(self.peak_kib, usage.ru_maxrss)
        lane.process.returncode, lane.process = status, None
        if status:
            yield self._died(lane, status)
            lane.todo = [n for n in lane.todo if n > lane.now["begin"]]
            self._start(lane, ready)

    def _died(self, lane: Lane, status: int) -> Told:
        seconds = time.monotonic() - lane.began
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status >> 8}"
        if how == f"signal {int(signal.SIGKILL)}" and seconds >= LIMIT_S:
            frames = re.findall(
                r'(opkit/[\w/]+\.py)", line (\d+) in (\w+)', _text(lane.room / "stack.txt")
            )
            inside = [frame for frame in frames if frame[0] != "opkit/cli.py"]
            how = f"hang in {':'.join(inside[0]) if inside else '?'}"
        else:
            how += f": {_shape(_text(lane.room / 'err')[-300:])}"
        words = " ".join(lane.now.get("words", ["making it"]))
        return Told(lane.now["begin"], lane.now.get("kind", "?"), words, "failed", how, seconds)


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""


def fuzz(
    inputs: Sequence[int],
    seed: int,
    jobs: int,
    small: bool = False,
    quick: bool = False,
    each: Callable[[Told], None] = lambda _told: None,
) -> Runner:
    """Run inputs.

    Args:
        small: damage small recordings only, those of this repository.
        quick: ask one question of an input.
        each: is called with every answer.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        sources = unpack(REAL, SMALL_SOURCES if small else ALL_SOURCES, Path(name) / "sources")
        runner = Runner(seed, sources, Path(name), quick)
        runner.run(list(inputs), jobs, each)
        return runner


# The report.


def report(runner: Runner) -> str:
    """Numbers by kind and outcome, the classes of refusals, the failures."""
    told, lines = runner.told, []
    inputs = {t.number for t in told}
    failed = {t.number for t in told if t.outcome == "failed"}
    lines.append(
        f"{len(inputs):,} inputs, {len(told):,} questions, {len(failed):,} inputs failed; slowest "
        f"{max((t.seconds for t in told), default=0):.1f} s, peak {runner.peak_kib >> 10:,} MiB"
    )
    lines.append(
        f"{'kind':28}{'inputs':>8}{'accepted':>10}{'refused':>9}{'failed':>8}  (questions)"
    )
    for kind in sorted({t.kind for t in told}):
        of = [t for t in told if t.kind == kind]
        count = Counter(t.outcome for t in of)
        lines.append(
            f"{kind:28}{len({t.number for t in of}):8}{count['accepted']:10}{count['refused']:9}"
            f"{count['failed']:8}"
        )
    for outcome in ("refused", "failed"):
        lines.append(f"\n{outcome}:")
        classes = Counter(t.said for t in told if t.outcome == outcome)
        for said, count in classes.most_common():
            which = sorted({t.number for t in told if t.said == said and t.outcome == outcome})
            lines.append(f"{count:6}  {said}  [{', '.join(map(str, which[:4]))}]")
    return "\n".join(lines)


def _ended(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words.add_argument("--inputs", type=int, default=2500)
    words.add_argument("--first", type=int, default=0, help="number of the first input")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--jobs", type=int, default=2)
    words.add_argument("--only", type=int, help="run this input, in this process, and show it")
    words.add_argument("--keep", type=Path, help="with --only: leave its files there")
    words.add_argument("--small", action="store_true", help="damage small recordings only")
    words.add_argument("--worker", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        seed, numbers, room, sources, quick = json.load(sys.stdin)
        work(seed, numbers, Path(room), list(map(Path, sources)), quick)
        return 0
    if given.only is not None:
        room = Path(given.keep or tempfile.mkdtemp(prefix="fuzz-"))
        room.mkdir(exist_ok=True)
        sources = unpack(REAL, SMALL_SOURCES if given.small else ALL_SOURCES, room / "s")
        work(given.seed, [given.only], room, sources, quick=False, keep=True)
        return 0

    def each(told: Told) -> None:
        if told.outcome == "failed":
            print(f"FAILED {told.number} {told.kind}: {told.words[:200]}: {told.said}", flush=True)

    signal.signal(signal.SIGTERM, _ended)  # ends its workers and removes its files
    numbers = range(given.first, given.first + given.inputs)
    runner = fuzz(numbers, given.seed, given.jobs, given.small, each=each)
    print(report(runner))
    return 1 if any(t.outcome == "failed" for t in runner.told) else 0


if __name__ == "__main__":
    sys.exit(main())

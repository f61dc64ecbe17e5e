"""What a process died of, from its exit code and its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from opkit.post_mortem import how_it_ended, last_words, points_elsewhere, root_cause

# The end of a real engine.log (vLLM 0.24.0 on an H100, 2026-11-21): the caller's shell had exported
# a variable CC that named no program, so Triton could not build. Most frames are left out, and
# folders are shortened; every other line is as vLLM wrote it.
REAL = Path(__file__).with_name("vllm_no_compiler.txt")
NO_COMPILER = (
    "FileNotFoundError: [Errno 2] No such file or directory: "
    '\'{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[1,4,16]}\' '
    "(in triton/runtime/build.py:48)"
)


def log(folder: Path, text: str) -> Path:
    path = folder / "engine.log"
    path.write_text(text)
    return path


def test_the_cause_of_a_real_failure() -> None:
    assert root_cause(REAL) == NO_COMPILER


def test_what_vllm_says_when_the_cause_is_in_the_log() -> None:
    """0.24.0: v1/engine/utils.py, v1/engine/exceptions.py, v1/executor/multiproc_executor.py."""
    for said in (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc",
        "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root",
        "Exception: WorkerProc initialization failed due to an exception in a background process. "
        "See stack trace for root cause.",
        "RuntimeError: Worker failed with error 'x', please check the stack trace above for the",
        "RuntimeError: Executor failed.",
    ):
        assert points_elsewhere(said)
    assert not points_elsewhere("ValueError: Free memory on device is too small")


WORKERS = """\
(EngineCore pid=7) INFO 11-21 23:37:03 [core.py:10] starting
(Worker_TP1 pid=9) ERROR 11-21 23:37:08 [multiproc_executor.py:898] WorkerProc failed to start.
(Worker_TP0 pid=8) ERROR 11-21 23:37:08 [multiproc_executor.py:898] WorkerProc failed to start.
(Worker_TP0 pid=8) ERROR 11-21 23:37:08 [multiproc_executor.py:898] Traceback (most recent call last):
(Worker_TP1 pid=9) ERROR 11-21 23:37:08 [multiproc_executor.py:898] Traceback (most recent call last):
(Worker_TP0 pid=8) ERROR 11-21 23:37:08 [multiproc_executor.py:898]   File "/x/w.py", line 3, in f
(Worker_TP1 pid=9) ERROR 11-21 23:37:08 [multiproc_executor.py:898]   File "/x/v.py", line 4, in g
(Worker_TP0 pid=8) ERROR 11-21 23:37:08 [multiproc_executor.py:898] torch.OutOfMemoryError: no room
(Worker_TP1 pid=9) ERROR 11-21 23:37:08 [multiproc_executor.py:898] DistError: peer is gone
(EngineCore pid=7) ERROR 11-21 23:37:09 [core.py:1231] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-21 23:37:09 [core.py:1231] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 23:37:09 [core.py:1231]   File "/x/core.py", line 5, in h
(EngineCore pid=7) ERROR 11-21 23:37:09 [core.py:1231] Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
"""  # noqa: E501


def test_workers_that_write_at_the_same_time(tmp_path: Path) -> None:
    """The first that failed; what the others say follows from it."""
    assert root_cause(log(tmp_path, WORKERS)) == "torch.OutOfMemoryError: no room (in x/w.py:3)"


def chained(link: str) -> str:
    return (
        "ERROR 11-21 23:37:09 [core.py:1] EngineCore failed to start.\n"
        'Traceback (most recent call last):\n  File "/a.py", line 1, in a\nKeyError: 1\n\n'
        f'{link}\n\nTraceback (most recent call last):\n  File "/b.py", line 2, in b\n'
        "ValueError: too long\n"
    )


@pytest.mark.parametrize(
    ("link", "cause"),
    [
        ("The above exception was the direct cause of the following exception:", "KeyError: 1"),
        ("During handling of the above exception, another exception occurred:",
         "ValueError: too long"),
    ],
)  # fmt: skip
def test_chains(tmp_path: Path, link: str, cause: str) -> None:
    assert root_cause(log(tmp_path, chained(link))).startswith(cause)


def test_a_line_that_only_mentions_an_error_is_no_cause(tmp_path: Path) -> None:
    text = 'Traceback (most recent call last):\n  File "/a.py", line 1, in a\n    raise Error('
    assert root_cause(log(tmp_path, text)) == ""
    assert root_cause(tmp_path / "none") == ""


def test_pydantic_s_first_line_says_nothing(tmp_path: Path) -> None:
    text = (
        'Traceback (most recent call last):\n  File "/a.py", line 1, in a\n'
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Invalid repository ID or local directory specified: '/no/model'.\n"
    )
    assert "local directory specified: '/no/model'" in root_cause(log(tmp_path, text))


def test_another_engine_s_part_of_the_log_is_left_out(tmp_path: Path) -> None:
    path = log(tmp_path, REAL.read_text())
    start = path.stat().st_size
    with path.open("a") as more:
        more.write("(EngineCore pid=9) INFO 11-21 23:37:09 [core.py:1] starting\nKilled\n")
    assert root_cause(path, start) == ""
    assert last_words(path, start) == "starting | Killed"


def test_colours_and_progress_bars_are_no_hindrance(tmp_path: Path) -> None:
    text = (
        "\x1b[36m(EngineCore pid=7)\x1b[0m Loading: 10%\rLoading: 100%\r\n"
        "\x1b[36m(EngineCore pid=7)\x1b[0m Traceback (most recent call last):\n"
        '\x1b[36m(EngineCore pid=7)\x1b[0m   File "/a.py", line 1, in a\n'
        "\x1b[36m(EngineCore pid=7)\x1b[0m MemoryError\n"
    )
    assert root_cause(log(tmp_path, text)) == "MemoryError (in a.py:1)"


def test_last_words_are_where_it_was_hit(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("loading\n\nstep 1\rstep 2\n")
    assert last_words(log) == "loading | step 1 | step 2"
    dump = "Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n"
    log.write_text("loading\n" * 9 + dump + "".join(f"  File {n}\n" for n in range(20)))
    assert last_words(log).startswith("Fatal Python error: Aborted | Current thread")
    assert last_words(log).endswith("File 2")
    assert "cannot be read" in last_words(tmp_path / "none")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-11, "was ended by SIGSEGV"),
        (-60, "was ended by signal 60"),
        (3, "ended with code 3"),
        (None, "does not end"),
    ],
)
def test_an_end_has_a_name(code: int | None, said: str) -> None:
    assert how_it_ended(code) == said


def test_what_frames_of_c_plus_plus_follow_is_not_lost(tmp_path: Path) -> None:
    frames = "".join(f"frame #{n}: c10::something\n" for n in range(9))
    said = "  what():  CUDA error: an illegal memory access was encountered\n"
    found = last_words(log(tmp_path, f"RuntimeError: earlier\nterminate called\n{said}{frames}"))
    assert found.split(" | ") == [
        "what():  CUDA error: an illegal memory access was encountered",
        *(f"frame #{n}: c10::something" for n in range(4, 9)),
    ]


def test_an_error_among_the_last_lines_stands_where_it_was(tmp_path: Path) -> None:
    text = "ValueError: an old one\n" + "step\n" * 9 + "RuntimeError: died\nbye\n"
    assert last_words(log(tmp_path, text)) == "step | step | step | RuntimeError: died | bye"
    assert last_words(log(tmp_path, "")) == ""

"""Ctrl-C while a compiled library works, which answers a signal in its own words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import Ran, environment, run_main

from opkit import cli
from opkit.errors import EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, BadInput

RECORDED = Path(cli.__file__).parent / "recorded"
MOCK, E2E = (str(RECORDED / f"dsa-vllm-h100-{side}.sqlite.gz") for side in ("mock", "e2e"))
SAYS = "interrupted; everything that was started has been ended"
# Before opkit's own main nobody can hear; from then on everything must be heard.
READY = "import sys; from opkit import cli; print('ready', file=sys.stderr, flush=True); cli.main()"
WORDS = {
    "align": ("align", "dsa", "--recorded"),
    "diff": ("trace", "diff", MOCK, E2E, "--no-cache"),
}
TOLD = {
    "align": "a bundled recording enters no ledger; a run with --e2e-cmd does\n",
    "trace": "",
}


def interrupted(words: tuple[str, ...], after_s: float, cwd: Path) -> Ran | None:
    """``opkit WORDS`` with Ctrl-C so long after its start; None when it had ended before."""

    def listening() -> None:  # whatever the tests themselves were started as
        signal.signal(signal.SIGINT, signal.default_int_handler)

    child = subprocess.Popen(
        [sys.executable, "-c", READY, *words], cwd=cwd, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listening,
    )  # fmt: skip
    with child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        time.sleep(after_s)
        late = child.poll() is not None
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    # What had been told before the signal came is no failure; Python on its way out dies of it.
    told = (
        child.returncode in (0, 1, -signal.SIGINT) and out.endswith("\n") and err == TOLD[words[0]]
    )
    return None if late or told else Ran(child.returncode, out, err)


@pytest.mark.parametrize("name", list(WORDS))
def test_ctrl_c_at_any_time_is_one_sentence(name: str, tmp_path: Path) -> None:
    ran = [interrupted(WORDS[name], tenth / 10, tmp_path) for tenth in range(1, 15, 2)]
    ended = [each for each in ran if each is not None]
    assert len(ended) >= 3
    assert [(each.code, each.complaint()) for each in ended] == [
        (EXIT_INTERRUPTED, SAYS) for _ in ended
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "error", [RuntimeError("Query interrupted"), ImportError("failed"), BadInput("cannot be read")]
)
def test_what_a_library_makes_of_a_signal_is_an_interruption(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    error: Exception,
) -> None:
    def swallowed(**_options: object) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            pass  # as a C extension clears it
        raise error

    monkeypatch.setattr(cli.cli, "main", swallowed)
    before = signal.signal(number, signal.default_int_handler)  # not ignored, as under nohup
    try:
        ran = run_main(capsys, monkeypatch, "anything")
    finally:
        signal.signal(number, before)
    assert (ran.code, ran.complaint()) == (EXIT_INTERRUPTED, SAYS)


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("x"), EXIT_BUG), (OSError(28, "full"), EXIT_BAD_INPUT)]
)
def test_without_a_signal_an_error_stays_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    def fails(**_options: object) -> int:
        raise error

    monkeypatch.setattr(cli.cli, "main", fails)
    assert run_main(capsys, monkeypatch, "anything").code == code

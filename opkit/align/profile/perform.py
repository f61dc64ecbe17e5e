"""Execute a plan's steps; whatever happens, nothing it started is left running."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from opkit.align.profile.plan import (
    End,
    Finish,
    Post,
    ProfilePlan,
    Purpose,
    Ready,
    Run,
    Send,
    Start,
    Window,
    wave_text,
)
from opkit.align.profile.process import Grace, Launch, Progress, launched
from opkit.align.profile.server import Client, listening
from opkit.errors import BadInput, RunFailed
from opkit.layers.manifest import Answer

_POLL_S = 0.2
_TELL_EVERY_S = 5.0
_REPEAT_EVERY_S = 60.0  # what has not changed is said again
_SHOWN = 100  # characters of the server's last line
# Added to the seed of prompts that are not recorded: no prefix cache may know those that are.
_OTHER_SEED = 1_000_003
_SENDING = {Purpose.WARM_UP: "warm-up", Purpose.PRIME: "prime the window:", Purpose.RECORD: "wave"}


@dataclass
class Outcome:
    """What a run learnt: notes for the sidecar, the engine's version and its answers to the
    recorded waves when it told."""

    notes: list[str] = field(default_factory=list)
    engine_version: str = ""
    answers: list[Answer] = field(default_factory=list)


def perform(
    plan: ProfilePlan,
    progress: Progress,
    client: Client | None = None,
    seed: int = 0,
    grace: Grace | None = None,
) -> Outcome:
    """Do what the plan says and check that its reports are new.

    Args:
        client: for plans that send requests.
        seed: of the recorded prompts.

    Raises:
        ToolMissing: a program of the plan is not there.
        BadInput: the output folder cannot be written.
        RunFailed: a step failed, or a report is missing, old or empty.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything has been ended by then.
    """
    first = plan.steps[0]
    assert isinstance(first, Start), "a plan begins with its Start"
    _prepare(plan)
    for step in plan.steps:
        if isinstance(step, Ready) and listening(step.url):
            raise RunFailed(
                f"something listens at {step.url} already and would be taken for the server",
                "end it, or give the server another --port",
            )
    began = time.time()
    performer = _Performer(client, seed, progress)
    progress(first.command.purpose)
    with launched(first.command, plan.log, plan.nsys, plan.sessions, progress, grace) as launch:
        for step in plan.steps[1:]:
            performer.do(step, launch)
    performer.outcome.notes += launch.forced
    _check_fresh(plan, began, launch)
    return performer.outcome


def _prepare(plan: ProfilePlan) -> None:
    """Make the folders (nsys would write elsewhere without a word) and remove old reports."""
    try:
        for path in (plan.log, *plan.reports):
            path.parent.mkdir(parents=True, exist_ok=True)
        for report in plan.reports:
            report.unlink(missing_ok=True)
        for path, text in plan.files:
            path.write_text(text)
    except OSError as error:
        raise BadInput(f"the output folder cannot be used ({error})") from error


def _check_fresh(plan: ProfilePlan, began: float, launch: Launch) -> None:
    """Hold nsys to its reports: there, newer than ``began`` (s since the epoch), not empty."""
    wrong = []
    for report in plan.reports:
        if not report.is_file():
            wrong.append(f"{report} is missing")
        elif report.stat().st_size == 0:
            wrong.append(f"{report} is empty")
        elif report.stat().st_mtime < began - 1:  # file systems round
            wrong.append(f"{report} is older than this run")
    if wrong:
        raise launch.failure(f"nsys left no usable report: {'; '.join(wrong)}", plan.missing)


def _starting(launch: Launch, status: int) -> str:
    """What a server that is not ready does: its answer, or without one the last line of its log."""
    if status:
        return f" (it answers {status})"
    said = launch.tail(1).strip()
    return f": {said[:_SHOWN]}{'…' if len(said) > _SHOWN else ''}" if said else " (it is silent)"


class _Performer:
    """The steps after the start, and what they share."""

    def __init__(self, client: Client | None, seed: int, progress: Progress) -> None:
        self.outcome = Outcome()
        self._client = client
        self._seed = seed
        self._progress = progress
        self._began = time.monotonic()
        self._closes: float | None = None

    def do(self, step: object, launch: Launch) -> None:
        match step:
            case Ready(url, limit_s):
                self._ready(url, limit_s, launch)
            case Post(url, purpose, body, limit_s):
                self._progress(purpose)
                _alive(launch, purpose)
                try:
                    self._the_client().post(url, body, limit_s)
                except RunFailed as error:
                    raise launch.failure(f"{purpose}: {error}") from error
            case Send():
                self._send(step, launch)
            case Run(command, limit_s):
                self._progress(command.purpose)
                _alive(launch, command.purpose)
                launch.run(command, limit_s)
            case Window(delay_s, duration_s):
                self._window(delay_s, duration_s, launch)
            case Finish(limit_s, codes):
                self._progress("waiting for its end")
                code = launch.wait(limit_s)
                if codes is not None and code not in codes:
                    raise launch.failure(f"{launch.command.purpose}: ended with code {code}")
            case End():
                self._progress("ending the server")
            case _:
                raise AssertionError(f"unknown step {step!r}")

    def _the_client(self) -> Client:
        assert self._client is not None, "a plan that sends requests needs a client"
        return self._client

    def _ready(self, url: str, limit_s: float, launch: Launch) -> None:
        began = told = time.monotonic()
        said = ""
        while True:
            _alive(launch, "before it was ready")
            status, reason = self._the_client().health()
            waited = time.monotonic() - began
            if status == 200:
                break
            if waited > limit_s:
                raise launch.failure(
                    f"the server was not ready after {limit_s:.0f} s: GET {url}: {status or reason}"
                )
            now, state = time.monotonic(), _starting(launch, status)
            if not said or now - told >= (_TELL_EVERY_S if state != said else _REPEAT_EVERY_S):
                told, said = now, state
                self._progress(f"waiting for {url}{state}")
            time.sleep(_POLL_S)
        self._progress(f"the server was ready after {waited:.1f} s")
        try:
            self.outcome.engine_version = self._the_client().version()
        except RunFailed as error:
            self.outcome.notes.append(f"the engine's version is unknown: {error}")

    def _send(self, step: Send, launch: Launch) -> None:
        client = self._the_client()
        began = time.monotonic()
        try:
            model = client.served_model()
            for turn in range(step.rounds):
                other = 0 if step.purpose is Purpose.RECORD else _OTHER_SEED * (turn + 1)
                for wave in step.waves:
                    self._progress(f"{_SENDING[step.purpose]} {wave_text(wave)}")
                    answer = client.send(wave, model, self._seed + other, step.limit_s)
                    if answer is not None and step.purpose is Purpose.RECORD:
                        self.outcome.answers.append(answer)
        except RunFailed as error:
            code = launch.ended()
            died = f"; the server has ended with code {code}" if code is not None else ""
            raise launch.failure(f"{error}{died}") from error
        took = time.monotonic() - began
        if step.purpose is Purpose.WARM_UP:
            note = f"warm-up: {len(step.waves)} waves sent {step.rounds} times, {took:.1f} s"
            self._progress(note)
            self.outcome.notes.append(note)
        if self._closes is not None and time.monotonic() > self._closes:
            raise launch.failure(
                "nsys's window closed before the last wave was answered: give it a longer duration"
            )

    def _window(self, delay_s: float, duration_s: float, launch: Launch) -> None:
        opens = self._began + delay_s
        late = time.monotonic() - opens
        if late > 0:
            raise launch.failure(
                f"the server was ready and warm {late:.0f} s after nsys's window had opened",
                "give a longer delay",
            )
        self._closes = opens + duration_s
        while time.monotonic() < opens + 1:  # nsys counts from its own start, a little later
            _alive(launch, "before nsys's window opened")
            time.sleep(_POLL_S)


def _alive(launch: Launch, when: str) -> None:
    code = launch.ended()
    if code is not None:
        raise launch.failure(f"the server ended with code {code} ({when})")

"""The lanes of a Ray cluster: an actor a GPU, which runs the same lane as a single host does.

Rows come back to the driver, which appends them to a part of its own, so nodes need no folder in
common. Ray is told to restart nothing: what is tried again is the pool's decision. An actor or a
node that dies costs the case in hand; if no actor can take its place, other lanes get its tasks.

opkit and the framework must be installed on the nodes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from opkit.collect.work import Fault, Group, Row, Task
from opkit.collect.workers.lane import (
    BuildFailed,
    BuildReport,
    Cancelled,
    LaneOptions,
    LocalLane,
    Stop,
    Tried,
    Unwanted,
)
from opkit.collect.workers.pool import OnBuilt, OnEvent, RunOptions, run_groups
from opkit.collect.workers.tally import Outcome
from opkit.errors import BadInput, RunFailed, ToolMissing

_POLL_S = 0.2
_STORE_BYTES = 100 * 2**20  # object store of a local cluster: rows are small
_END_S = 10.0  # for an actor to end its worker


@dataclass(frozen=True)
class RayOptions:
    """Which cluster, and what of it.

    Attributes:
        address: of a running cluster; empty for ``RAY_ADDRESS``, and without that for a cluster
            of this host's own, which is ended afterwards.
        workers: at most; None for as many as there are GPUs (or CPUs).
        cpus: use CPUs, though there may be GPUs; so many a worker.
        actor_s: seconds until an actor must have found its place.
        lane: how workers are run; its ``python`` empty means each node's own.
    """

    address: str = ""
    workers: int | None = None
    cpus: int | None = None
    actor_s: float = 60.0
    lane: LaneOptions = field(default_factory=LaneOptions)


def run_on_ray(
    groups: Sequence[Group],
    ray: RayOptions,
    folder: Path,
    options: RunOptions | None = None,
    on_event: OnEvent | None = None,
    on_built: OnBuilt | None = None,
) -> Outcome:
    """:func:`opkit.collect.workers.pool.run_groups` over a Ray cluster.

    Raises:
        As :func:`ray_lanes` and :func:`opkit.collect.workers.pool.run_groups` do.
    """
    with ray_lanes(ray) as lanes:
        return run_groups(groups, lanes, folder, options, on_event, on_built)


@contextmanager
def ray_lanes(options: RayOptions) -> Iterator[list[RayLane]]:
    """The lanes of a cluster; all that was started for them is ended with the block.

    Raises:
        ToolMissing: Ray is not installed.
        RunFailed: there is no cluster at the address, or a local one does not start.
        BadInput: the cluster has nothing to run on.
    """
    ray = _import_ray()
    mine = _connect(ray, options.address)
    made: list[RayLane] = []
    try:
        made += [
            RayLane(ray, f"ray{number}", needs, options.actor_s, options.lane)
            for number, needs in enumerate(_places(ray, options))
        ]
        yield made
    finally:
        for item in made:
            item.drop()
        if mine:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without a GPU keep what CUDA_VISIBLE_DEVICES they find; Ray warns unless told so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _own_signals():
        try:
            return importlib.import_module("ray")
        except ImportError as error:
            raise ToolMissing(
                f"Ray cannot be imported ({error})", hint='install it: pip install "opkit[ray]"'
            ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers: Ray, when imported, takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _connect(ray: Any, address: str) -> bool:
    """Connect unless it is done already; return whether it was done here."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS", "")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    local = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        with _own_signals():
            ray.init(address=address or "local", **quiet, **({} if address else local))
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        where = f"no Ray cluster at {address}" if address else "a local Ray does not start"
        raise RunFailed(
            f"{where} ({error})", hint="`ray status` shows a cluster that runs; --ray-address"
        ) from error
    return True


def _places(ray: Any, options: RayOptions) -> list[dict[str, float]]:
    """What each lane's actor needs of the cluster."""
    has = ray.cluster_resources()
    gpus = 0 if options.cpus else int(has.get("GPU", 0))
    each = options.cpus or 1
    count = gpus or int(has.get("CPU", 0)) // each
    if options.workers is not None:
        count = min(count, options.workers)
    if not count:
        raise BadInput(f"the Ray cluster has no room for a worker (CPUs: {has.get('CPU', 0):g})")
    needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_gpus": 0, "num_cpus": each}
    return [dict(needs) for _ in range(count)]


class Seat:
    """The actor: one lane on its node. Answers with plain data, raises nothing of its own."""

    def __init__(self, name: str, options: LaneOptions) -> None:
        self._logs = Path(tempfile.mkdtemp(prefix="opkit-ray-"))
        # Ray has chosen the GPU for this process, and with it for its worker.
        self._lane = LocalLane(name, None, options, self._logs, None)

    def pid(self) -> int:
        """The actor's process, once it is there."""
        return os.getpid()

    def build(self, group: Group) -> BuildReport | tuple[str, bool, bool]:
        """See :meth:`.lane.Lane.build`; (reason, final, start) when it failed."""
        try:
            return self._lane.build(group, _never)
        except BuildFailed as failure:
            return failure.reason, failure.final, failure.start
        except Stop as stop:
            return str(stop), True, True

    def measure(self, task: Task, attempt: int) -> Tried | str:
        """See :meth:`opkit.collect.workers.lane.Lane.measure`; a reason when the node is unfit."""
        try:
            return self._lane.measure(task, attempt, False, _never)
        except Stop as stop:
            return str(stop)

    def drop(self) -> None:
        """End the worker, and leave nothing on the node."""
        self._lane.drop()
        shutil.rmtree(self._logs, ignore_errors=True)


def _never() -> bool:
    return False


class RayLane:
    """A lane whose worker is anywhere in the cluster; see :class:`.lane.Lane`."""

    keeps = False

    def __init__(
        self, ray: Any, name: str, needs: dict[str, float], actor_s: float, options: LaneOptions
    ) -> None:
        self.name = name
        self._ray = ray
        self._actor_s = actor_s
        self._options = options
        # max_restarts and retries are Ray's defaults, but all depends on them.
        self._class = ray.remote(max_restarts=0, max_task_retries=0, **needs)(Seat)
        self._actor: Any = None
        self._idle = False  # whether the actor listens
        self._group = ""
        self._unfit = ""  # why its node is of no use any more

    def serves(self, group: Group) -> bool:
        """See :class:`opkit.collect.workers.lane.Lane`."""
        return self._actor is not None and self._group == group.name

    def build(self, group: Group, cancelled: Cancelled) -> BuildReport:
        """See :class:`opkit.collect.workers.lane.Lane`."""
        if self._unfit:
            raise BuildFailed(self._unfit, final=True, start=True)
        began = time.monotonic()
        if self._actor is None:
            self._place(cancelled)
        waited = time.monotonic() - began
        self._group = ""
        try:
            answer = self._call("build", (group,), cancelled)
        except _Lost as lost:
            raise BuildFailed(str(lost)) from lost
        if not isinstance(answer, BuildReport):
            raise BuildFailed(*answer)
        self._group = group.name
        return BuildReport(answer.manifest, answer.digest, answer.start_s + waited, answer.build_s)

    def measure(self, task: Task, attempt: int, keep: bool, cancelled: Cancelled) -> Tried:
        """See :class:`opkit.collect.workers.lane.Lane`; ``keep`` is the driver's affair."""
        del keep
        began = time.monotonic()
        group = self._group
        try:
            answer = self._call("measure", (task, attempt), cancelled)
        except _Lost as lost:
            return self._tried(group, task, attempt, str(lost), True, time.monotonic() - began)
        if isinstance(answer, str):
            self.drop()
            self._unfit = answer
            return self._tried(group, task, attempt, answer, False, time.monotonic() - began)
        if answer.died:
            self._group = ""
        return cast(Tried, answer)

    def drop(self) -> None:
        """See :class:`opkit.collect.workers.lane.Lane`."""
        if self._actor is None:
            return
        actor, self._actor, self._group = self._actor, None, ""
        with contextlib.suppress(self._ray.exceptions.RayError):  # it, or the cluster, has gone
            # While it measures, it does not listen; its worker then ends with it.
            if self._idle:
                self._ray.wait([actor.drop.remote()], timeout=_END_S)
            self._ray.kill(actor)

    def _place(self, cancelled: Cancelled) -> None:
        """Have an actor somewhere."""
        self._actor = self._class.remote(self.name, self._options)
        try:
            self._call("pid", (), cancelled, self._actor_s)
        except _Lost as lost:
            raise BuildFailed(str(lost), final=True, start=True) from lost

    def _call(
        self, method: str, arguments: tuple[Any, ...], cancelled: Cancelled, limit: float = 0.0
    ) -> Any:
        """Call the actor and wait for its answer.

        Raises:
            _Lost: it, or its node, is gone, or has no answer after ``limit`` seconds.
            Unwanted: ``cancelled`` says so; the actor has been ended.
        """
        until = time.monotonic() + limit
        errors = self._ray.exceptions
        self._idle = False
        try:
            answer = getattr(self._actor, method).remote(*arguments)
            while not self._ray.wait([answer], timeout=_POLL_S)[0]:
                if cancelled():
                    self.drop()
                    raise Unwanted
                if limit and time.monotonic() > until:
                    self.drop()
                    raise _Lost(f"no node had room for {self.name} within {limit:g} s")
            given = self._ray.get(answer)
        except errors.RayTaskError:
            raise  # a bug, in the actor
        except errors.RayError as error:
            self.drop()
            reason = str(error).strip().splitlines()[0]
            raise _Lost(f"{self.name} was lost: {type(error).__name__}: {reason}") from error
        self._idle = True
        return given

    def _tried(
        self, group: str, task: Task, attempt: int, reason: str, began: bool, seconds: float
    ) -> Tried:
        """An attempt of which nothing came back."""
        case = {**asdict(task.planned.case), "mode": task.planned.mode}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = Row(
            task.key, group, "", {}, case, fault=Fault.CRASH, error=reason, created=now,
            seconds=seconds, attempts=attempt,
        )  # fmt: skip
        return Tried(row, died=True, began=began, gone=True, seconds={"lost": seconds})


class _Lost(Exception):
    """The actor is gone."""

"""The processes of one world: how they are started, and how they all end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from opkit.collect.comm.channel import RANK_VARIABLE, Channel
from opkit.collect.comm.plan import World
from opkit.errors import RunFailed, ToolMissing
from opkit.layers.interpreter import module_command

END_S = 10.0  # that a process may take to be gone once it is killed


@dataclass(frozen=True)
class Launcher:
    """How ranks are started.

    Attributes:
        argv: the rank's command; the socket's path is appended.
        logs: folder for each rank's standard output and error.
        device: ``cuda`` or ``cpu``.
        mpirun: start them under mpirun, which gives them an MPI world.
        env: variables to set.
        case_limit_s, start_limit_s: see ``CommOptions``.
    """

    argv: tuple[str, ...]
    logs: Path
    device: str = "cuda"
    mpirun: bool = False
    env: dict[str, str] = field(default_factory=dict)
    case_limit_s: float = 60.0
    start_limit_s: float = 300.0


def rank_environment(device: str) -> dict[str, str]:
    """Variables for the ranks, beside all that opkit itself has.

    Nothing is ever cleared: switches such as ``NCCL_NVLS_ENABLE`` must reach the ranks.
    """
    if device == "cuda":
        return {}
    # gloo else looks up the host's name, which may not resolve.
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket of this world's own; its folder is readable by this user only."""
    # Not below the output folder: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="opkit-") as folder, ExitStack() as stack:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(listener.close)
        path = f"{folder}/comm"
        listener.bind(path)
        listener.listen()
        yield listener, path


class Ranks:
    """The processes of a world. Leaving the block ends them and all that they started."""

    def __init__(self, world: World, launcher: Launcher, path: str) -> None:
        self._world, self._launcher, self._path = world, launcher, path
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank; mpirun is rank 0's
        self.channels: dict[int, Channel] = {}
        self.pids: dict[int, int] = {}

    def __enter__(self) -> Ranks:
        try:
            if self._launcher.mpirun:
                count = str(self._world.ranks)
                prefix = ("mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", count)
                self._start(0, prefix)
            else:
                for rank in range(self._world.ranks):
                    self._start(rank, ())
        except BaseException:
            self.end()
            raise
        return self

    def _start(self, rank: int, prefix: tuple[str, ...]) -> None:
        argv = (*prefix, *self._launcher.argv, self._path)
        env = {**os.environ, **self._launcher.env}
        env.pop(RANK_VARIABLE, None)
        if not prefix:
            env[RANK_VARIABLE] = str(rank)
        with self.log(rank).open("ab") as log:
            try:
                self.processes[rank] = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                    start_new_session=True,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise ToolMissing(
                    f"{argv[0]} is not there, so no rank can be started",
                    "name the interpreter with --python" if not prefix else "install Open MPI",
                ) from error
            except OSError as error:
                raise RunFailed(f"{argv[0]} could not be started ({error})") from error

    def log(self, rank: int) -> Path:
        """Where a rank's output goes; under mpirun all go to rank 0's."""
        shown = 0 if self._launcher.mpirun else rank
        name = f"{self._world.implementation}-{self._world.ranks}-rank{shown}.log"
        return self._launcher.logs / name

    def exit_code(self, rank: int) -> int | None:
        """How a rank's process ended (-n: by signal n), None while it runs. Does not reap it."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        found = os.waitid(os.P_PID, self.processes[rank].pid, look)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill what still runs: a rank within a collective cannot be asked to stop."""
        for rank, pid in self.pids.items():
            # Still connected, so the pid is still its own.
            if rank in self.channels:
                _kill(os.kill, pid)
        for process in self.processes.values():
            # The group, also when its leader has ended: what a rank started is in there. Nothing
            # has reaped the leader yet, so the number is still its own.
            _kill(os.killpg, process.pid)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired as error:
                raise RunFailed(
                    f"process {process.pid} outlives SIGKILL: it hangs in the GPU's driver"
                ) from error
        for channel in self.channels.values():
            channel.close()


def _kill(how: Callable[[int, int], None], number: int) -> None:
    try:
        how(number, signal.SIGKILL)
    except ProcessLookupError:  # ended already: as wanted
        return


def default_launcher(python: str, logs: Path, device: str, mpirun: bool) -> Launcher:
    """Ranks of ``python`` (by default this one) with all that they need set."""
    return Launcher(
        argv=tuple(module_command(python, "opkit.collect.comm.rank")),
        logs=logs,
        device=device,
        mpirun=mpirun,
        env=rank_environment(device),
    )

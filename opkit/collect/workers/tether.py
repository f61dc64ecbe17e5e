"""A process that does not outlive the one that started it, whatever kills that one.

Two ways, since each has a hole. The kernel's parent-death signal ends this process even when it
hangs in a driver call, but not what it started. A guard, forked first thing, sees the other end of
the socket close and kills the whole process group, but could itself be killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal

from opkit.errors import RunFailed

_PR_SET_PDEATHSIG = 1  # prctl(2)


def tether(parent: int, link: int) -> int:
    """Tie this process, and its process group, to ``parent``. Call it before there are threads.

    Args:
        parent: process id of whoever started this one.
        link: a socket whose other end only ``parent`` holds.

    Returns:
        The guard's process id.

    Raises:
        RunFailed: the parent has gone already, or the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise RunFailed(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it went before the line above
        raise RunFailed("whoever started this worker has gone")
    if os.getpgrp() != os.getpid():  # started by hand: the guard must not end a shell's group
        os.setpgrp()
    guard = os.fork()
    if guard == 0:
        _guard(link)
    return guard


def _guard(link: int) -> None:
    """Wait for the other end of ``link`` to close, then kill this process group. Never returns."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a polite end is the worker's own affair
        poll = select.poll()
        poll.register(link, 0)  # a hang-up is always reported
        poll.poll()
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(1)

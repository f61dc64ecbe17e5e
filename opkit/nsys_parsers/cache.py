"""Parsed tables kept beside their export, in ``FILE.opkit/``, so that nothing is parsed twice.

An entry is a folder named after the file's digest, the options and the parser's version. It is made
aside and renamed into place, so readers see all of it or nothing, and of several makers the first
one wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from opkit.nsys_parsers.export import TraceFacts
from opkit.nsys_parsers.reading import CannotWrite

# Raise it whenever what an entry holds changes.
PARSER_VERSION = 2
SUFFIX = ".opkit"
FACTS = "facts.json"
_LOCK, _MAKING = "lock", "making-"
_SAMPLES, _SAMPLE = 64, 1 << 16  # bytes looked at in a large file: 4 MiB


def digest(path: Path) -> str:
    """What tells this file from another: its size, its time of change, and its bytes.

    Of a file beyond 8 MiB 64 samples of 64 KiB are read, the first and the last bytes among them:
    hashing a gigabyte would take longer than any answer.
    """
    state = path.stat()
    found = hashlib.blake2b(f"{state.st_size} {state.st_mtime_ns} ".encode(), digest_size=10)
    with path.open("rb") as file:
        if state.st_size <= 2 * _SAMPLES * _SAMPLE:
            found.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek((state.st_size - _SAMPLE) * number // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
    return found.hexdigest()


class Cache:
    """The entries of one export.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.with_name(path.name + SUFFIX)
        self._digest = digest(path)

    def find(self, kind: str, options: object) -> Path | None:
        """The complete entry, or None."""
        entry = self._entry(kind, options)
        return entry if _complete(entry) else None

    def make(self, kind: str, options: object, fill: Callable[[Path], TraceFacts]) -> Path | None:
        """Fill a new folder and publish it; None when nothing can be written beside the export.

        What ``fill`` raises is passed on; then nothing is left.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.folder))
        except OSError:
            return None
        entry = self._entry(kind, options)
        try:
            if not self._fill(made, entry, fill):
                return None
        finally:
            shutil.rmtree(made, ignore_errors=True)
            with contextlib.suppress(OSError):  # goes if nothing was published
                self.folder.rmdir()
        self._sweep()
        return entry if _complete(entry) else None

    @staticmethod
    def _fill(made: Path, entry: Path, fill: Callable[[Path], TraceFacts]) -> bool:
        """Whether the entry was made; what ``fill`` raises of its own is passed on."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_held(made / _LOCK))
            except OSError:  # a file system without locks, as some clusters mount theirs
                return False
            try:
                facts = fill(made)
            except CannotWrite:
                return False
            try:
                _seal(made, facts)
                (made / _LOCK).unlink()
                _publish(made, entry)
            except OSError:
                return False
        return True

    def clear(self) -> None:
        """Remove all entries of the file: one proved damaged although it looked complete."""
        for entry in self.folder.glob(f"{self._digest}-*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _entry(self, kind: str, options: object) -> Path:
        asked = hashlib.blake2b(repr(options).encode(), digest_size=4).hexdigest()
        return self.folder / f"{self._digest}-v{PARSER_VERSION}-{kind}-{asked}"

    def _sweep(self) -> None:
        """Remove entries of an older file or parser, and what a killed maker left."""
        current = f"{self._digest}-v{PARSER_VERSION}-"
        for entry in self.folder.iterdir():
            making = entry.name.startswith(_MAKING)
            if not entry.name.startswith(current) and not (making and _in_use(entry)):
                shutil.rmtree(entry, ignore_errors=True)


def read_facts(entry: Path, path: Path) -> TraceFacts:
    """The facts of a complete entry, of the export that lies at ``path`` now."""
    facts = json.loads((entry / FACTS).read_text("utf-8"))["facts"]
    for name in ("gpus", "warnings", "losses"):
        facts[name] = tuple(facts[name])
    return TraceFacts(**(facts | {"path": path, "tables": frozenset(facts["tables"])}))


def _seal(made: Path, facts: TraceFacts) -> None:
    """Write the facts and every file's size; an entry without them is none."""
    said = asdict(facts) | {"path": facts.path.name, "tables": sorted(facts.tables)}
    sizes = {f.name: f.stat().st_size for f in made.iterdir() if f.name != _LOCK}
    (made / FACTS).write_text(json.dumps({"facts": said, "sizes": sizes}), "utf-8")


def _complete(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / FACTS).read_text("utf-8"))["sizes"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, or not all of it: it is made again


def _publish(made: Path, entry: Path) -> None:
    """Rename into place. If an entry is there, another maker was first, or it is damaged."""
    for _ in range(2):
        try:
            made.rename(entry)
            return
        except OSError:
            if _complete(entry):
                return
            aside = made.with_name(made.name + "-old")
            with contextlib.suppress(OSError):
                entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # what lay there was a file
                aside.unlink()


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _in_use(made: Path) -> bool:
    """Whether a maker holds the folder; one a minute old may not have locked it yet."""
    try:
        with (made / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return made.exists() and time.time() - made.stat().st_mtime < 60
    except OSError:
        return True

"""The ``nsys`` program itself: where it is, which version, and its export to SQLite.

The exit code of nsys is not believed on its own: ``export`` is also held to a new, non-empty file
that starts like an SQLite database.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import BadInput, RunFailed, ToolMissing

ENVIRONMENT = "OPKIT_NSYS"  # the path of nsys, when it is neither on PATH nor in a usual place
EXPORT_LIMIT_S = 1800.0
MANIFEST_TABLE = "OPKIT_MANIFEST"
SIDECAR_SUFFIX = ".opkit.json"  # as opkit.layers.manifest has it, which this package never imports
_SQLITE_MAGIC = b"SQLite format 3\x00"  # https://www.sqlite.org/fileformat.html
# Where NVIDIA's installers put it: the CUDA toolkit, the stand-alone package, the container images.
_USUAL_PLACES = (
    "/usr/local/cuda/bin/nsys",
    "/usr/local/bin/nsys",
    "/opt/nvidia/nsight-systems/*/bin/nsys",
    "/opt/nvidia/nsight-systems/*/target-linux-x64/nsys",
    "/opt/nvidia/nsight-systems-cli/*/bin/nsys",
    "/opt/nvidia/nsight-systems-cli/*/target-linux-x64/nsys",
)
_INSTALL_HINT = (
    "install NVIDIA Nsight Systems (apt package nsight-systems-cli) and put nsys on PATH, "
    f"or set {ENVIRONMENT} to its path"
)


@dataclass(frozen=True)
class Nsys:
    """An nsys that answered ``--version``.

    Attributes:
        path: the program.
        version: as it says, e.g. ``2024.2.3.38-242334140272v0``.
    """

    path: Path
    version: str


def find_nsys() -> Nsys:
    """The nsys to use: ``$OPKIT_NSYS``, else the one on PATH, else the newest in a usual place.

    Raises:
        ToolMissing: there is none, or the one found does not run.
    """
    path = _locate()
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissing(f"{path} does not run ({error})", _INSTALL_HINT) from error
    found = re.search(r"version\s+(\S+)", answer.stdout)
    if answer.returncode != 0 or found is None:
        said = (answer.stdout + answer.stderr).strip() or "nothing"
        raise ToolMissing(f"{path} --version failed; it said: {said[:200]}", _INSTALL_HINT)
    return Nsys(path, found[1])


def _locate() -> Path:
    wanted = os.environ.get(ENVIRONMENT)
    if wanted:
        named = shutil.which(wanted)
        if named is None:
            raise ToolMissing(f"{ENVIRONMENT}={wanted} is not an executable file", _INSTALL_HINT)
        return Path(named).absolute()
    on_path = shutil.which("nsys")
    if on_path is not None:
        return Path(on_path).absolute()
    for pattern in _USUAL_PLACES:
        places = sorted(Path("/").glob(pattern.lstrip("/")), key=_by_number, reverse=True)
        for place in places:
            if os.access(place, os.X_OK):
                return place
    raise ToolMissing("nsys was not found on PATH or in its usual places", _INSTALL_HINT)


def _by_number(path: Path) -> list[int]:
    """Sort key by which 2024.10 comes after 2024.9."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def export_sqlite(report: Path, out: Path | None = None) -> Path:
    """Export a report to SQLite, with its manifest inside when a sidecar lies beside it.

    Args:
        report: a ``.nsys-rep`` (or old ``.qdrep``) file.
        out: where to; by default beside the report, with the suffix ``.sqlite``.

    Raises:
        ToolMissing: no nsys.
        BadInput: the report is missing, empty, damaged, or newer than the nsys found.
        RunFailed: nsys failed in another way, or left no usable file although it ended with 0.
    """
    if not report.is_file():
        raise BadInput(f"{report}: no such report")
    if report.stat().st_size == 0:
        raise BadInput(f"{report}: the report is empty", "its recording did not end properly")
    target = out if out is not None else report.with_suffix(".sqlite")
    if target.absolute() == report.absolute():
        raise BadInput(f"{report}: the export would overwrite the report")
    nsys = find_nsys()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Exported aside and moved into place: a failed export leaves no half file to believe.
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        _run_export(nsys, report, partial)
        _check_sqlite(report, partial)
        _carry_manifest(report, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _run_export(nsys: Nsys, report: Path, target: Path) -> None:
    command = [str(nsys.path), "export", "--type", "sqlite", "--force-overwrite", "true"]
    command += ["--quiet", "true", "--output", str(target), str(report)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=EXPORT_LIMIT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{report}: nsys export took over {EXPORT_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise RunFailed(f"{report}: nsys export could not be started ({error})") from error
    if done.returncode != 0:
        _explain(nsys, report, done.stdout + done.stderr, done.returncode)


def _explain(nsys: Nsys, report: Path, said: str, returncode: int) -> None:
    """Turn what a failing ``nsys export`` said (wording of nsys 2024.2) into one sentence."""
    newer = re.search(r"created in Nsight Systems version \(([^)]+)\), newer than", said)
    if newer is not None:
        raise BadInput(
            f"{report}: recorded by nsys {newer[1]}, newer than the nsys found ({nsys.version})",
            f"update nsys, or export on the machine that recorded it and give the .sqlite; "
            f"{ENVIRONMENT} chooses another nsys",
        )
    damaged = ("ProtobufParseException", "Version tag is not found", "Cannot read from stream")
    if any(sign in said for sign in damaged):
        raise BadInput(
            f"{report}: damaged or not an nsys report (nsys {nsys.version} cannot read it)",
            "record it again; a profiled process killed with SIGKILL leaves such a report",
        )
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    last = lines[-1] if lines else "no message"
    raise RunFailed(f"{report}: nsys export ended with code {returncode}: {last}")


def _check_sqlite(report: Path, target: Path) -> None:
    if not target.is_file() or target.stat().st_size == 0:
        raise RunFailed(f"{report}: nsys export ended with code 0 but wrote nothing")
    with target.open("rb") as file:
        if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
            raise RunFailed(f"{report}: what nsys export wrote is not an SQLite database")


def _carry_manifest(report: Path, target: Path) -> None:
    """Put the sidecar's text, unread, into the export, so that one file is enough to align."""
    sidecar = report.with_name(report.stem + SIDECAR_SUFFIX)
    if not sidecar.is_file():
        return
    try:
        text = sidecar.read_text(encoding="utf-8")
        with closing(sqlite3.connect(target)) as database, database:
            database.execute(f"CREATE TABLE {MANIFEST_TABLE} (key TEXT, value TEXT)")
            database.execute(f"INSERT INTO {MANIFEST_TABLE} VALUES ('manifest', ?)", (text,))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{sidecar}: the manifest cannot be read ({error})") from error
    except sqlite3.Error as error:
        raise RunFailed(f"{target}: the manifest cannot be written into it ({error})") from error

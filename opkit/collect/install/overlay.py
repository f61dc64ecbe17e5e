"""An overlay of aiconfigurator's ``systems`` folder: links to all that is installed, own tables in
their place.

aiconfigurator reads one root for a whole system (several do not merge), so the overlay holds every
file that it has not replaced as a link. The folders on the way to an own table are real.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opkit.collect.tables.files import META, staged
from opkit.errors import BadInput

MARK = ".opkit-overlay.json"
MARK_SCHEMA = "opkit.overlay/1"
QUERY_VERSIONS = "query_versions.yaml"
REUSE = "reuse.yaml"
# aiconfigurator lists no version that begins with _, but takes rows from it where it is declared.
SHIPPED = "_shipped-"
APPROVED_BY = "opkit install"
# Not beside the tables: each file there counts as a table that the metadata must name.
PROVENANCE = "opkit"


@dataclass(frozen=True)
class Place:
    """Where tables belong: ``<data of system>/<family>/<backend>/<version>``."""

    system: str
    family: str
    backend: str
    version: str


@dataclass(frozen=True)
class Laid:
    """What was laid out.

    Attributes:
        folder: the version's folder in the overlay.
        fills: tables whose missing rows come from the installed table of the same version.
        queryable: whether the estimator takes this version by itself; else it must be asked for.
        shipped: whether aiconfigurator knows this version of the backend at all.
    """

    folder: Path
    fills: tuple[str, ...]
    queryable: bool
    shipped: bool


def lay_out(
    root: Path,
    origin: Path,
    place: Place,
    tables: Mapping[str, Path],
    entries: Mapping[str, Mapping[str, Any]],
    *,
    fill: bool,
) -> Laid:
    """Put tables into an overlay, which is made when missing. Other tables in it stay.

    Args:
        root: the overlay's folder.
        origin: the installed ``systems`` folder.
        place: where the tables belong.
        tables: parquet files by name without suffix, as ``dsa_context_module_perf``.
        entries: what ``collection_meta.yaml`` is to say of each.
        fill: let missing rows come from the installed table of the same version, declared in
            ``reuse.yaml``; they come from earlier versions and other backends in any case.

    Raises:
        BadInput: no such system, or ``root`` is no overlay of this origin, or cannot be written.
    """
    data = _data_folder(origin, place.system)
    try:
        queryable = _open(root, origin, place)
        parts = (*data.parts, place.family, place.backend, place.version)
        for depth in range(len(parts)):
            below = Path(*parts[: depth + 1])
            _make_real(root / below, origin / below)
        folder = root.joinpath(*parts)
        installed = origin.joinpath(*parts)
        fills = _declare(folder, installed, tables, place.version, fill=fill)
        _put(folder, tables, entries, place)
    except OSError as error:
        raise BadInput(f"{root}: cannot be laid out ({error.strerror or error})") from error
    shipped = any(origin.joinpath(*data.parts).glob(f"*/{place.backend}/{place.version}"))
    return Laid(folder, fills, queryable, shipped)


def _data_folder(origin: Path, system: str) -> Path:
    """A system's data folder, relative to the root."""
    path = origin / f"{system}.yaml"
    try:
        return Path(yaml.safe_load(path.read_text("utf-8"))["data_dir"])
    except OSError as error:
        known = sorted(item.stem for item in origin.glob("*.yaml") if _is_system(item))
        raise BadInput(f"no system {system!r}; known: {', '.join(known)}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a system of aiconfigurator ({error})") from error


def _is_system(path: Path) -> bool:
    return "\ndata_dir:" in "\n" + path.read_text("utf-8")


def _open(root: Path, origin: Path, place: Place) -> bool:
    """Make sure that ``root`` is an overlay of ``origin``; return whether the version is a slot.

    aiconfigurator refuses versions that ``query_versions.yaml`` does not list, so that file is left
    out for one; it then takes the highest version that it finds, unless told which.
    """
    mark = root / MARK
    if mark.exists():
        known = json.loads(mark.read_text("utf-8"))
        if known["origin"] != str(origin):
            raise BadInput(
                f"{root}: overlays {known['origin']}, not {origin}", "choose another folder"
            )
    elif root.exists() and any(root.iterdir()):
        raise BadInput(f"{root}: not empty and no overlay of opkit's", "choose another folder")
    elif root.resolve().is_relative_to(origin.resolve()):
        raise BadInput(f"{root}: within the installed systems folder", "choose another folder")
    else:
        root.mkdir(parents=True, exist_ok=True)
        told = {"schema": MARK_SCHEMA, "origin": str(origin)}
        with staged(root) as stage:
            stage.write(MARK, json.dumps(told) + "\n")
        _link_children(root, origin)
    query = root / QUERY_VERSIONS
    if query.is_symlink() and not _is_slot(query, place):
        query.unlink()
    return query.exists()


def _is_slot(query: Path, place: Place) -> bool:
    """Whether ``query_versions.yaml`` lists the version, by name."""
    data = yaml.safe_load(query.read_text("utf-8")) or {}
    own = ((data.get("overrides") or {}).get(place.system) or {}).get(place.backend)
    slots = own or (data.get("defaults") or {}).get(place.backend) or {}
    return place.version in (slots.get("current"), slots.get("previous"))


def _make_real(path: Path, origin: Path) -> None:
    """Make ``path`` a real folder with a link to each child of ``origin`` that it does not hold."""
    if path.is_symlink():
        path.unlink()
    path.mkdir(exist_ok=True)
    if origin.is_dir():
        _link_children(path, origin)


def _link_children(path: Path, origin: Path) -> None:
    for child in sorted(origin.iterdir()):
        if not os.path.lexists(path / child.name):
            (path / child.name).symlink_to(child)


def _declare(
    folder: Path, installed: Path, tables: Mapping[str, Path], version: str, *, fill: bool
) -> tuple[str, ...]:
    """Say in ``reuse.yaml`` that missing rows come from the installed tables of this version."""
    path = folder / REUSE
    known = yaml.safe_load(path.read_text("utf-8"))["reuse"] if path.exists() else []
    entries = [e for e in known if not (e["table"] in tables and e["approved_by"] == APPROVED_BY)]
    filled = tuple(
        sorted(name for name in tables if fill and (installed / f"{name}.parquet").is_file())
    )
    ours = [
        {
            "table": name,
            "from_version": SHIPPED + version,
            "reason": "rows that opkit did not collect, as installed",
            "approved_by": APPROVED_BY,
        }
        for name in filled
    ]
    link = folder.with_name(SHIPPED + version)
    if ours and not link.is_symlink():
        link.symlink_to(installed)
    if ours or entries:
        with staged(folder) as stage:
            stage.write(REUSE, yaml.safe_dump({"schema_version": 1, "reuse": [*ours, *entries]}))
    elif path.is_symlink() or path.exists():
        path.unlink()
    if link.is_symlink() and not any(e["approved_by"] == APPROVED_BY for e in [*ours, *entries]):
        link.unlink()
    return filled


def _put(
    folder: Path,
    tables: Mapping[str, Path],
    entries: Mapping[str, Mapping[str, Any]],
    place: Place,
) -> None:
    """Copy the tables and add them to the folder's metadata."""
    with staged(folder) as stage:
        for name, source in tables.items():
            shutil.copyfile(source, stage.path(f"{name}.parquet"))
        stage.write(META, _meta(folder, entries, place))
    with staged(folder / PROVENANCE) as stage:
        for name, source in tables.items():
            told = source.with_name(f"{name}.provenance.json")
            if told.exists():
                shutil.copyfile(told, stage.path(told.name))


def _meta(folder: Path, entries: Mapping[str, Mapping[str, Any]], place: Place) -> str:
    """``collection_meta.yaml`` with ``entries`` in it, in the schema that the folder has."""
    path = folder / META
    data = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    data.setdefault("schema_version", 1)
    data.setdefault("provenance", "collected")
    data.setdefault("runtime", {"framework": place.backend, "version": place.version})
    made = {name: dict(entry) for name, entry in entries.items()}
    if data["schema_version"] == 2:  # has the runs that a table was made in, each with our entry
        made = {
            name: {"rows": e["rows"], "status": e["status"], "collections": [e]}
            for name, e in made.items()
        }
    data["tables"] = {**(data.get("tables") or {}), **made}
    return yaml.safe_dump(data, sort_keys=False)

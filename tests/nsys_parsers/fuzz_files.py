"""The inputs of ``fuzz.py``: files made odd, each from a seed and a number alone."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import socket
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_tables import made_tables
from made_export import SCHEMA, make_export

GRAPH_ONLY = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"


@dataclass
class Made:
    """An input: files in ``folder`` and the questions about them (words after ``opkit trace``)."""

    kind: str
    folder: Path
    asks: list[list[str]] = field(default_factory=list)

    def listing(self) -> set[str]:
        """Everything below the folder, by name."""
        return {
            os.path.relpath(os.path.join(root, name), self.folder)
            for root, folders, files in os.walk(self.folder)
            for name in (*folders, *files)
        }


@dataclass
class _Room:
    """What a kind of input is made from."""

    rng: random.Random
    folder: Path
    sources: list[Path]
    turn: int  # how many inputs of this kind came before
    seed: int

    def source(self) -> Path:
        """A sound export: one made, or a real one."""
        if not self.sources or self.rng.random() < 0.3:
            return make_export(self.folder / "made.source")
        return self.rng.choice(self.sources)

    def copy(self, name: str = "in.sqlite") -> Path:
        target = self.folder / name
        source = self.source()
        if source.suffix == ".source":
            source.rename(target)
        else:
            shutil.copyfile(source, target)
        return target


def unpack(folders: tuple[Path, ...], patterns: tuple[str, ...], into: Path) -> list[Path]:
    """Recordings below ``folders``, unpacked, in order of their names."""
    into.mkdir(parents=True, exist_ok=True)
    found = []
    for pattern in patterns:
        for packed in sorted(p for folder in folders for p in folder.glob(pattern)):
            target = into / packed.name.removesuffix(".gz")
            if not target.exists():
                target.write_bytes(gzip.decompress(packed.read_bytes()))
            found.append(target)
    return found


def make(seed: int, number: int, folder: Path, sources: list[Path]) -> Made:
    """Input ``number`` of a run."""
    folder.mkdir(parents=True)
    kind, maker = ROTA[number % len(ROTA)]
    earlier = sum(each == kind for each, _ in ROTA[: number % len(ROTA)])
    turn = number // len(ROTA) * KINDS[kind][0] + earlier
    rng = random.Random(f"{seed} {number}")
    subjects = maker(_Room(rng, folder, sources, turn, seed))
    if subjects[0].startswith("--"):  # an option to try, and a sound file
        return Made(kind, folder, [[c, *subjects, "--json"] for c in ("kernels", "steps")])
    return Made(kind, folder, _questions(rng, folder, subjects))


# The questions.

FILTERS = [
    ["--step", "0"], ["--step", "execute"], ["--step", "٣"], ["--step", "9" * 30], ["--step", "("],
    ["--module", r"layers.[01]"], ["--module", "'; DROP TABLE kernel; --"], ["--module", "["],
    ["--rank", "0"], ["--rank", "1"], ["--rank", "9" * 30], ["--module", "."],
]  # fmt: skip
READING = [
    ["--same-thread"], ["--no-cache"], ["--partial"], ["--step-pattern", "self_attn|a"],
    ["--step-pattern", "(?<x"], ["--step-pattern", ""], ["--memory", "200MB"], ["--memory", "x"],
]  # fmt: skip
ASPECTS = {
    "summary": [[]],
    "kernels": [[], [], ["--by", "family"], ["--by", "short", "--copies"], ["--copies"]],
    "steps": [[], ["--per-rank"]],
    "modules": [[], ["--fold"], ["--depth", "2"]],
    "sequence": [[], ["--all"]],
    "diff": [[], ["--all"], ["--module-a", "mlp"]],
}


def _questions(rng: random.Random, folder: Path, files: list[str]) -> list[list[str]]:
    asks = []
    for command in rng.sample(sorted(ASPECTS), 2):
        words = rng.choice(ASPECTS[command]).copy()
        if rng.random() < 0.7:
            words.append("--json")
        elif command not in ("summary", "diff") and rng.random() < 0.5:
            words.append("--csv")
        if command != "summary" and rng.random() < 0.35:
            words += rng.choice(FILTERS)
        if rng.random() < 0.35:
            words += rng.choice(READING)
        if command != "diff" and rng.random() < 0.15:
            words += ["--perfetto", str(folder / "asked.json")]
        if command not in ("diff", "summary") and rng.random() < 0.15:
            words += ["--parquet", str(folder / "asked.parquet")]
        given = files
        if command == "diff":
            other = make_export(folder / "other.sqlite") if rng.random() < 0.5 else None
            given = [files[0], str(other or files[-1])]
            rng.shuffle(given)
        asks.append([command, *given, *words])
    if rng.random() < 0.4:
        asks.append(["open_trace", files[0]])
    return asks


# (a) tables


def _tables(room: _Room) -> list[str]:
    made = made_tables(room.seed, room.turn, room.folder / "in.sqlite")
    return [str(made)]


# (b) damage


def _truncated(room: _Room) -> list[str]:
    """Cut in the header, at a page's border or within a page; half of the headers say so."""
    path = room.copy()
    data = bytearray(path.read_bytes())
    page = _page_size(data)
    pages = len(data) // page
    keep = room.rng.choice(
        [
            room.rng.randrange(0, 101),
            room.rng.randrange(0, pages) * page,
            room.rng.randrange(len(data)),
            len(data) - room.rng.randrange(1, 9),
            page * room.rng.randrange(1, min(pages, 12) + 1),
        ]
    )
    data = data[:keep]
    if len(data) >= 100 and room.rng.random() < 0.7:
        data[28:32] = struct.pack(">I", room.rng.choice([len(data) // page, 0, 1]))
    path.write_bytes(data)
    return [str(path)]


def _page_size(data: bytes | bytearray) -> int:
    size = int.from_bytes(data[16:18], "big")
    return 65536 if size == 1 else size or 4096


def _flipped(where: Callable[[random.Random, int, int], int]) -> Callable[[_Room], list[str]]:
    """Bytes and bits changed at ``where(rng, page size, pages)``."""

    def flip(room: _Room) -> list[str]:
        path = room.copy()
        data = bytearray(path.read_bytes())
        page = _page_size(data)
        for _ in range(room.rng.choice([1, 1, 1, 2, 4, 16, 64])):
            at = min(where(room.rng, page, len(data) // page), len(data) - 1)
            data[at] = room.rng.choice(
                [data[at] ^ 1 << room.rng.randrange(8), 0, 255, room.rng.randrange(256)]
            )
        path.write_bytes(data)
        return [str(path)]

    return flip


def _in_header(rng: random.Random, _page: int, _pages: int) -> int:
    return rng.randrange(16, 100)


def _in_schema(rng: random.Random, page: int, _pages: int) -> int:
    return rng.randrange(100, page * 2)


def _in_page_header(rng: random.Random, page: int, pages: int) -> int:
    """Type, cells, children, and the first cells' places."""
    return rng.randrange(1, pages) * page + rng.randrange(0, 24)


def _anywhere(rng: random.Random, page: int, pages: int) -> int:
    return rng.randrange(100, page * pages)


def _pages(room: _Room) -> list[str]:
    """Whole pages zeroed, swapped, repeated, made of noise; a tail too many."""
    path = room.copy()
    data = bytearray(path.read_bytes())
    page = _page_size(data)
    pages = len(data) // page
    for _ in range(room.rng.choice([1, 2, 8])):
        a, b = (room.rng.randrange(1, pages) * page for _ in range(2))
        first, second = data[a : a + page], data[b : b + page]
        what = room.rng.randrange(5)
        data[a : a + page] = [
            bytes(page), second, second, room.rng.randbytes(page), first
        ][what]  # fmt: skip
        if what == 1:
            data[b : b + page] = first
        elif what == 4:
            data += room.rng.randbytes(room.rng.randrange(1, 3 * page))
    path.write_bytes(data)
    return [str(path)]


def _packed(room: _Room) -> list[str]:
    """Gzip files, whole and damaged, of sound and damaged exports."""
    rng, target = room.rng, room.folder / room.rng.choice(["in.sqlite.gz", "copy.sqlite"])
    data = bytearray(gzip.compress(room.copy().read_bytes(), 1))
    match rng.randrange(8):  # 7: sound
        case 0:
            del data[rng.randrange(2, len(data)) :]
        case 1 | 2 | 3:
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.randrange(2, len(data))] ^= 1 << rng.randrange(8)
        case 4:
            data = bytearray(gzip.compress(bytes(data)))
        case 5:
            data += rng.randbytes(rng.randrange(1, 99))
        case 6:
            data = bytearray(gzip.compress(rng.randbytes(rng.randrange(0, 999))))
    (room.folder / "in.sqlite").unlink()
    target.write_bytes(data)
    return [str(target)]


def _other_files(room: _Room) -> list[str]:
    """What is no export: noise, other databases, no files at all."""
    rng = room.rng
    path = room.folder / rng.choice(["in.sqlite", "in.sqlite.gz", "in.nsys-rep"])
    match rng.randrange(16):
        case 0:
            path.write_bytes(rng.randbytes(rng.randrange(5000)))
        case 1:
            path.write_bytes(b"SQLite format 3\x00" + rng.randbytes(rng.randrange(9000)))
        case 2:
            path.write_bytes(b"\x1f\x8b" + rng.randbytes(rng.randrange(300)))
        case 3:
            _database(path, "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x')")
        case 4:
            _database(path, "PRAGMA user_version = 3")
        case 5:
            _database(path, SCHEMA)
        case 6:
            graph = "(start INT, end INT, graphId INT)"
            _database(path, f"{SCHEMA}; CREATE TABLE {GRAPH_ONLY} {graph}")
        case 7:
            path.mkdir()
        case 8:
            os.mkfifo(path)
        case 9:
            path.symlink_to(path.name)
        case 10:
            path.symlink_to("nowhere")
        case 11:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(os.path.relpath(path))
        case 12:
            return [rng.choice(["/dev/null", "/dev/zero", "/proc/self/mem", "/dev/full", "/"])]
        case 13:
            return [str(room.copy() / "below")]
        case 14:
            return [str(room.folder / ("n" * rng.choice([255, 300, 5000])))]
        case 15:
            path.touch()
    return [str(path)]


def _database(path: Path, script: str) -> None:
    db = sqlite3.connect(path)
    db.executescript(script)
    db.commit()
    db.close()


def _states(room: _Room) -> list[str]:
    """Sound exports in odd states: WAL with and without its log, other page sizes and encodings,
    held by another, a cache that is no folder or lies."""
    rng, path = room.rng, room.copy()
    match rng.randrange(8):
        case 0 | 1 | 2 as which:
            db = sqlite3.connect(path)
            db.execute("PRAGMA journal_mode = wal")
            db.execute("CREATE TABLE more (a)")
            db.commit()
            if which:
                log = path.with_name("in.sqlite-wal").read_bytes()
            db.close()
            if which:
                cut = rng.randrange(len(log)) if which == 2 else len(log)
                path.with_name("in.sqlite-wal").write_bytes(log[:cut])
        case 3:
            _database(path, f"PRAGMA page_size = {rng.choice([512, 65536])}; VACUUM")
        case 4:
            text = rng.choice(["UTF-16le", "UTF-16be"])
            dump = "\n".join(sqlite3.connect(make_export(room.folder / "m.source")).iterdump())
            (room.folder / "m.source").unlink()
            path.unlink()
            _database(path, f"PRAGMA encoding = '{text}'; {dump}")
        case 5:
            path.with_name("in.sqlite.opkit").write_bytes(b"no folder")
        case 6:
            path.with_name("in.sqlite.opkit").symlink_to("in.sqlite.opkit")
        case 7:
            path.with_name("in.sqlite-journal").write_bytes(rng.randbytes(rng.randrange(9000)))
    return [str(path)]


def _kept(room: _Room) -> list[str]:
    """A cache whose entries were damaged after they were made."""
    from fuzz import ask

    path = make_export(room.folder / "in.sqlite")
    ask(["steps", str(path), "--json"])
    ask(["kernels", str(path), "--json"])
    kept = sorted(p for p in path.with_name("in.sqlite.opkit").rglob("*") if p.is_file())
    for each in room.rng.sample(kept, room.rng.randint(1, 3)):
        data = bytearray(each.read_bytes())
        match room.rng.randrange(4):
            case 0:
                each.unlink()
            case 1:
                each.write_bytes(data[: room.rng.randrange(len(data))])
            case _:
                for _ in range(room.rng.choice([1, 8])):
                    data[room.rng.randrange(len(data))] ^= 1 << room.rng.randrange(8)
                each.write_bytes(data)
    return [str(path)]


NAMES = [
    "a b.sqlite", "it's.sqlite", 'q".sqlite', "run[1].sqlite", "*.sqlite", "what?.sqlite", "$HOME",
    "#1.sqlite", "100%41.sqlite", "a;b.sqlite", "{x}.sqlite", "größe-日本.sqlite", "\udcff.sqlite",
    "a\nb.sqlite", "a\x1b[31m.sqlite", "in.qdrep", "n" * 243 + ".sqlite", "n" * 248, ".sqlite",
    "a\\b.sqlite",
]  # fmt: skip


def _names(room: _Room) -> list[str]:
    """A sound export, and a damaged one, under an odd name or in an odd folder."""
    name = NAMES[room.turn % len(NAMES)]
    path = room.folder / name
    if room.turn // len(NAMES) % 2 and len(name) < 99:
        path.mkdir()
        path = path / "in.sqlite"
    make_export(room.folder / "m.source").rename(path)
    if room.rng.random() < 0.25:
        path.write_bytes(path.read_bytes()[:-9])
    return [str(path)]


# (c) several files


def _ranks(room: _Room) -> list[str]:
    """Ranks: equal ones, one twice, one damaged or missing, of runs long past each other."""
    rng, count = room.rng, room.rng.choice([2, 2, 3, 4])
    odd = rng.randrange(9)
    paths = [room.folder / f"rank{n + (odd == 0) * (n > 0)}.sqlite" for n in range(count)]
    for number, path in enumerate(paths):
        make_export(path)
        moved = rng.choice([0, 1, 10**6, 10**18, 2**62]) * number if odd in (1, 2) else number
        db = sqlite3.connect(path)
        db.execute("UPDATE TARGET_INFO_SESSION_START_TIME SET utcEpochNs = ?", (moved % 2**63,))
        if odd == 3 or (odd == 4 and number):
            db.execute("DROP TABLE TARGET_INFO_SESSION_START_TIME")
        if odd == 5 and number == 1:
            db.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL")
        db.commit()
        db.close()
    if odd == 6:
        paths[-1].write_bytes(rng.choice([b"", b"x" * 99, paths[0].read_bytes()[:-5000]]))
    if odd == 7:
        paths.append(rng.choice(paths))
    if odd == 8:
        paths[-1] = made_tables(room.seed, room.turn, room.folder / f"rank{count}.sqlite")
    return list(map(str, paths))


def _options(room: _Room) -> list[str]:
    """Files and values given by option."""
    rng, path = room.rng, make_export(room.folder / "in.sqlite")
    families = room.folder / "families.toml"
    written = [
        b"\xff\xfe", b"family = 3", b"family = [3]", b"[[family]]\nfamily = 'x'", b"= =", b"",
        b"[[family]]\nfamily='x'\npattern='('", b"[[family]]\nfamily='x'\npattern=3",
        b"[[family]]\nfamily=['x']\npattern='.'\ndtype='a'\ntile=''", b"[family]\nx = 1",
        b"[[family]]\nfamily='x'\npattern='.'\ndtype='.'",
        b"[[family]]\nfamily='x'\npattern='.'\nwrapper=true",
    ]  # fmt: skip
    families.write_bytes(written[room.turn % len(written)])
    given = [
        ["--families", str(families)], ["--families", str(families)], ["--families", "/"],
        ["--memory", rng.choice(["1MB", "20MB", "0GB", "-1GB", "1e3GB", "99999999TB", ""])],
        ["--step-pattern", rng.choice(["(", "\udcff", "a" * 99_999, "(a*)*b", "x{1001}", "\x01"])],
        ["--step", rng.choice(["\udcff", "²", "0" * 400, "-1", "1.0"])],
        ["--module", rng.choice(["\udcff", "(?P<a>.)", "\\", "a" * 99_999])],
        ["--perfetto", "/nowhere/x.json"], ["--perfetto", "/"], ["--perfetto", "."],
    ]  # fmt: skip
    return [*given[room.turn % len(given)], str(path)]


KINDS: dict[str, tuple[int, Callable[[_Room], list[str]]]] = {
    "tables": (25, _tables),
    "truncated": (4, _truncated),
    "flipped header": (2, _flipped(_in_header)),
    "flipped schema": (3, _flipped(_in_schema)),
    "flipped page headers": (5, _flipped(_in_page_header)),
    "flipped anywhere": (4, _flipped(_anywhere)),
    "pages": (2, _pages),
    "gzip": (3, _packed),
    "no export": (3, _other_files),
    "states": (2, _states),
    "cache": (2, _kept),
    "names": (2, _names),
    "ranks": (4, _ranks),
    "options": (2, _options),
}
ROTA = [(kind, maker) for kind, (weight, maker) in KINDS.items() for _ in range(weight)]
random.Random(0).shuffle(ROTA)

"""What a run leaves on disk: a summary, and one file a test with sensors and times."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from opkit.bench.measure import Measured
from opkit.bench.result import Bench
from opkit.sensors.levels import Sensors

DETAIL_SCHEMA = "opkit.bench.detail/1"
SUMMARY = "summary.json"


def new_folder(parent: Path, started: str) -> Path:
    """A folder of its own for a run, named by its beginning: nothing is ever overwritten."""
    stamp = re.sub(r"[^0-9TZ]", "", started)
    for number in range(1000):
        folder = parent / (f"bench-{stamp}" + (f"-{number}" if number else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}: a thousand runs began at {stamp}")


def write_summary(folder: Path, bench: Bench) -> None:
    """All that was found so far; the file is whole at any time."""
    _write(folder / SUMMARY, json.dumps(bench.as_json(), indent=1, ensure_ascii=False))


def detail_name(model: str, measured: Measured) -> str:
    """The name of a test's file."""
    label = re.sub(r"[^\w.+-]+", "-", f"{Path(model).name or 'model'}_{measured.test.label}")
    return f"{label.strip('-')}.json"


def write_detail(
    folder: Path, name: str, measured: Measured, sensors: Sensors, sample_ms: int
) -> Path:
    """Write ``power``, ``temp``, ``freq`` and ``time`` of one test; its path."""
    path, number = folder / name, 1
    while path.exists():  # two models of one name
        number += 1
        path = folder / f"{Path(name).stem}-{number}.json"
    _write(path, json.dumps(detail(measured, sensors, sample_ms), ensure_ascii=False))
    return path


def detail(measured: Measured, sensors: Sensors, sample_ms: int) -> dict[str, Any]:
    """The detail of one test. Times are ns since 1970; W, °C and MHz beside them."""
    shift = measured.shift_ns
    levels = measured.track.levels
    stamps = [at + shift for at, _ in levels]

    def series(kind: str, unit: str) -> dict[str, Any]:
        names = sorted({name for _, each in levels for name in getattr(each, kind)})
        values = {name: [getattr(each, kind).get(name) for _, each in levels] for name in names}
        return {
            "unit": unit, "sampling_duration_ms": sample_ms, "timestamps": stamps, "value": values
        }  # fmt: skip

    meter = sensors.meter()
    timed = [(turn, number) for number, turn in enumerate(measured.turns)]
    # Runs that only made the power measurement longer are marked by a repetition of -1.
    timed += [(turn, -1) for turn in measured.more]
    return {
        "schema": DETAIL_SCHEMA,
        "test": measured.test.label,
        "sensors": sensors.kind,
        "power": series("power", "W"),
        "temp": series("temp", "°C"),
        "freq": series("freq", "MHz"),
        "meter": {
            "method": meter.method if meter else "",
            "unit": ("J" if meter.counts else "W") if meter else "",
            "timestamps": [round(at * 1e9) + shift for at, _ in measured.track.readings],
            "value": [value for _, value in measured.track.readings],
        },
        "time": [
            {
                "n_p_eval": measured.test.n_prompt,
                "n_eval": measured.test.n_gen,
                "rep_id": number,
                "start_time_ns": turn.began_ns + shift,
                "end_time_ns": turn.ended_ns + shift,
                "first_token_ns": [_shifted(reply.first_ns, shift) for reply in turn.replies],
                "last_token_ns": [_shifted(reply.last_ns, shift) for reply in turn.replies],
                "tokens": [reply.tokens for reply in turn.replies],
            }
            for turn, number in timed
        ],
    }


def _shifted(at: int | None, shift: int) -> int | None:
    return None if at is None else at + shift


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text + "\n", "utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

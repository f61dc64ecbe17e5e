"""Rules over caches: there, written, read."""

from __future__ import annotations

import math
from collections.abc import Callable

from opkit.layers.check.cases import Role
from opkit.layers.check.facts import LEAST_CHANGE, CacheFact, Observation, Seen
from opkit.layers.check.lines import absent, line, unseen
from opkit.layers.check.result import Line, Numbers


def _cache_line(
    seen: Seen, name: str, judged: Callable[[Observation, CacheFact], str | None], good: str
) -> Line:
    """A rule over every cache of every case; ``judged`` returns a problem, "" or None (no say)."""
    if not seen.keeps_cache:
        return absent(name, f"{seen.op} keeps no cache")
    if early := unseen(seen, name, tuple(Role)):
        return early
    problems, passed = [], 0
    numbers: Numbers = {}
    for o in seen.observations:
        if not o.ran:
            continue
        for cache in o.caches:
            text = judged(o, cache)
            if text is None:
                continue
            problems += [f"{o.label()}: {cache.name} {text}"] if text else []
            passed += 1
            numbers[f"{o.label()} {cache.name}"] = {
                "new": cache.new, "written": cache.written, "past": cache.past,
                **({"change": cache.read.relative} if cache.read else {}),
            }  # fmt: skip
    if not passed:
        return line(name, ["no case has a cache to look at"], "")
    names = ", ".join(dict.fromkeys(c.name for o in seen.observations for c in o.caches))
    return line(name, problems, f"{names}: {good.format(count=passed)}", numbers)


def present(seen: Seen, name: str) -> Line:
    """Every case has its caches, with the blocks that the probe names."""
    missing = [o.label() for o in seen.observations if o.ran and not o.caches]
    if seen.keeps_cache and missing:
        return line(name, [f"{label}: the probe names no cache" for label in missing], "")

    def judged(_: Observation, cache: CacheFact) -> str:
        if not math.prod(cache.shape):
            return "is empty"
        if cache.outside:
            return f"has no block for {cache.outside:,} of the numbers that the probe names"
        return "" if cache.new else "has no block for the new tokens"

    return _cache_line(seen, name, judged, "there in {count} cases")


def written(seen: Seen, name: str) -> Line:
    """The new tokens' blocks, blanked before a forward, are filled by it."""

    def judged(_: Observation, cache: CacheFact) -> str | None:
        if not cache.new:
            return None
        lost = cache.new - cache.written
        return f"{lost:,} of {cache.new:,} blocks stay blank" if lost else ""

    return _cache_line(seen, name, judged, "every blanked block is filled again, {count} cases")


def read(seen: Seen, name: str) -> Line:
    """Changing the cached tokens' blocks changes the output."""
    long = any(asked.role is Role.LONG for asked in seen.asked)

    def judged(o: Observation, cache: CacheFact) -> str | None:
        # Where an indexer picks every token, only a longer past shows that it is read.
        picked = long and o.asked.role is not Role.LONG and "index" in cache.name
        if cache.read is None or picked:
            return None
        change = cache.read.relative
        if change > LEAST_CHANGE or math.isnan(change):
            return ""
        return f"may hold anything: the output changes by {change:.1e}"

    if seen.keeps_cache and not any(c.read for o in seen.observations for c in o.caches):
        return unseen(seen, name, tuple(Role)) or line(
            name, ["no case has blocks of cached tokens alone"], ""
        )
    return _cache_line(seen, name, judged, "changing the past changes the output, {count} cases")

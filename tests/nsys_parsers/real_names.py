"""Kernel names as real programs have them, with what is expected of each.

``origin`` says where a name was seen: an export of ../shared/traces, a recording of tests/traces, a
library of the serving stack (names out of its wheel), a public profile, or a source file.
"""

from __future__ import annotations

import csv
from pathlib import Path

with (Path(__file__).parent / "real_names.tsv").open(encoding="utf-8") as file:
    REAL = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

# Demangled by short name, and by short name without what stands in brackets; the first one seen.
NAMES: dict[str, str] = {}
for row in REAL:
    NAMES.setdefault(row["short"], row["demangled"])
for row in REAL:
    NAMES.setdefault(row["short"].partition("(")[0], row["demangled"])

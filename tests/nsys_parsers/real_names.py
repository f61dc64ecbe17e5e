"""Kernel names out of real exports: vLLM 0.24 with DSA on an H100, and those of
../shared/traces."""

from __future__ import annotations

import csv
from pathlib import Path

with (Path(__file__).parent / "real_names.tsv").open(encoding="utf-8") as file:
    REAL = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

# Demangled by short name.
NAMES = {row["short"]: row["demangled"] for row in REAL}

"""Draw the report of the bundled recording as docs/report.svg, for the README.

python examples/report_svg.py [--width 110]
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from opkit.align.result_json import align_from_json
from opkit.reports.terminal import print_align

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=110)
    width = parser.parse_args().width
    command = ["align", "dsa", "--recorded", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "opkit", *command], capture_output=True, text=True, check=False
    )
    if not done.stdout:
        sys.exit(done.stderr)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    print_align(align_from_json(json.loads(done.stdout)), console)
    # Rich would have every reader's browser fetch a font: the reader's own will do.
    plain = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = console.export_svg(title="opkit align dsa --recorded", code_format=plain)
    (ROOT / "docs" / "report.svg").write_text(svg)


if __name__ == "__main__":
    main()

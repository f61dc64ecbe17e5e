"""Time and memory of ``opkit align`` on trace files, start of the interpreter included.

    python benchmarks/judge_files.py [MOCK E2E] [--repeat N]

Without files: the bundled recording. Prints the median of N runs, their range, and the largest
resident set of any of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="MOCK E2E")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    traces = ["--recorded"]
    if given.files:
        mock, *engine = given.files
        traces = [
            "--mock-trace",
            mock,
            *(word for path in engine for word in ("--e2e-trace", path)),
        ]
    seconds = []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "opkit", "align", "dsa", *traces, "--json", "--out", out]
        for _ in range(given.repeat):
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - began)
            if done.returncode not in (0, 1, 3):
                sys.exit(done.stderr)
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{statistics.median(seconds):.2f} s (median of {len(seconds)}; {min(seconds):.2f} to "
        f"{max(seconds):.2f} s), {peak_mib:.0f} MiB at most"
    )


if __name__ == "__main__":
    main()

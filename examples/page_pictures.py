"""Draw the pictures of HTML reports that README.md and docs/ show: docs/page-*.png.

python examples/page_pictures.py [--keep FOLDER] [NAME …]

Inputs are the bundled recording, a wrong mock of tests/traces and the rows that were collected on
an H100 (tests/traces/collected). Needs Chromium (on PATH, or named by OPKIT_CHROMIUM) and the
environment that `make setup` makes: the browser and the folder of the collection are the tests'.
"""

from __future__ import annotations

import argparse
import base64
import io
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
for folder in ("tests/collect", "tests/reports"):
    sys.path.insert(0, str(ROOT / folder))

from browser import Page, started  # noqa: E402
from made_collections import h100  # noqa: E402

WIDTH = 1000  # CSS pixels of the window
SCALE = 1.7  # README shows 830 of them; this stays crisp on a screen of two dots a pixel
MARGIN = 16  # CSS pixels above and below what is shown
COLOURS = 128  # of the palette: text and few hues
LIMIT = 300_000  # bytes of a picture

# The run was cut after 330 s (docs/development.md): of tp 8 some context and all decode is missing.
PLANNED = {"dsa_context_module": 388, "dsa_generation_module": 368}


@dataclass(frozen=True)
class Picture:
    """What of which page: from the top of one element to the bottom of another."""

    name: str
    page: str
    first: str
    last: str


PICTURES = (
    Picture("page-verdict", "pass", "h1", "section[aria-labelledby=verdict] table"),
    Picture("page-timeline", "pass", "#context", "details[open][id^=context-] .timeline"),
    Picture("page-fail", "fail", "h1", "section[aria-labelledby=verdict] table"),
    Picture("page-fail-timeline", "fail", "#context-1 summary", "#context-1 .timeline"),
    Picture("page-collect", "rows", "h1", "#summary table"),
    Picture("page-curves", "rows", "#t0 h2", "#t0g0 ~ figure"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, help="leave the pages in this folder")
    parser.add_argument("names", nargs="*", metavar="NAME", help="draw these only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opkit-pictures-") as scratch, started() as browser:
        folder = given.keep or Path(scratch)
        write_pages(folder)
        for picture in PICTURES:
            if given.names and picture.name not in given.names:
                continue
            for dark in (False, True):
                page = browser.open(folder / f"{picture.page}.html", dark=dark, width=WIDTH)
                shot = shoot(page, picture)
                page.close()
                save(shot, ROOT / "docs" / f"{picture.name}{'-dark' if dark else ''}.png")


def write_pages(folder: Path) -> None:
    """The three pages, and what they are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    traces = ROOT / "tests" / "traces"
    out = ("--out", str(folder / "out"))
    mock, e2e = traces / "wrong/norm_fp32.sqlite.gz", traces / "wrong-e2e.sqlite.gz"
    wrong = ("--mock-trace", str(mock), "--e2e-trace", str(e2e))
    for name, given in (("pass", ("--recorded",)), ("fail", wrong)):
        # From a file of its own: the ledger's entry would show this machine's folder.
        result = folder / f"dsa-{name}.json"
        result.write_text(opkit("align", "dsa", *given, "--json", *out))
        opkit("report", str(result), "--html", str(folder / f"{name}.html"), "--force")
    if not (folder / "dsa-vllm").exists():
        h100(folder / "dsa-vllm", planned=PLANNED)
    page = str(folder / "rows.html")
    opkit("report", str(folder / "dsa-vllm"), "--html", page, "--force", *out)


def opkit(*arguments: str) -> str:
    """What a command prints; a verdict of fail is one of the answers wanted here."""
    command = [sys.executable, "-m", "opkit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.stderr)
    return done.stdout


def shoot(page: Page, picture: Picture) -> Image.Image:
    """The page's part, as Chromium draws it."""
    top, bottom = (
        page.run(f"document.querySelector({selector!r}).getBoundingClientRect().{edge} + scrollY")
        for selector, edge in ((picture.first, "top"), (picture.last, "bottom"))
    )
    top = max(0, top - MARGIN)
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom + MARGIN - top, "scale": SCALE}
    answer = page.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    return Image.open(io.BytesIO(base64.b64decode(answer["data"])))


def save(shot: Image.Image, path: Path) -> None:
    """Write the picture with a palette of its own; too large a file is an error."""
    flat = shot.convert("RGB").quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )  # a hue of few dots keeps its place
    flat.save(path, optimize=True)
    size = path.stat().st_size
    if size > LIMIT:
        sys.exit(f"{path.name} has {size:,} bytes, over {LIMIT:,}")
    print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()

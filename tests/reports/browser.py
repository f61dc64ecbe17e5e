"""A real headless Chromium for tests of HTML reports, spoken to over its DevTools pipe.

No package is needed beyond Chromium itself: the protocol is JSON between NUL bytes on file
descriptors 3 and 4 (chromium's ``--remote-debugging-pipe``;
https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Set where the browser tests must run, as .ci/run does: there a missing Chromium is a failure.
REQUIRED = "OPKIT_REQUIRE_BROWSER"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
ANSWER_S = 120.0  # a busy machine starts a renderer in tens of seconds
VIRTUAL_KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
    "ArrowRight": 39, "ArrowDown": 40, " ": 32,
}  # fmt: skip


def find_chromium() -> str | None:
    """The browser that ``OPKIT_CHROMIUM`` names, or one on PATH."""
    named = os.environ.get("OPKIT_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium process. ``open`` gives a fresh page each time."""

    def __init__(self, program: str, profile: Path) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        # Out of the way of 3 and 4 before they are taken.
        high = [os.dup(to_child), os.dup(from_child)]

        def take_3_and_4() -> None:
            first, second = (os.dup2(fd, 100 + n) for n, fd in enumerate(high))
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._log = profile / "stderr.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                preexec_fn=take_3_and_4,
                close_fds=False,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        for fd in (to_child, from_child, *high):
            os.close(fd)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def open(self, file: Path, *, dark: bool = False, width: int = 1280, height: int = 900,
             script: bool = True) -> Page:  # fmt: skip
        """Load a file and wait until its scripts ran."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        page.emulate(dark=dark)
        if not script:
            page.ask("Emulation.setScriptExecutionDisabled", value=True)
        page.ask("Page.navigate", url=file.resolve().as_uri())
        self.wait(session, "Page.loadEventFired")
        return page

    def ask(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + ANSWER_S
        while True:
            answer = self._next(limit)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self.events.append(answer)

    def wait(self, session: str, method: str) -> None:
        """Until the event has come."""
        limit = time.monotonic() + ANSWER_S
        while not any(
            e.get("method") == method and e.get("sessionId") == session for e in self.events
        ):
            self.events.append(self._next(limit))

    def _next(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, limit - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, f"Chromium ended or did not answer: {self._log.read_text('utf-8')[-2000:]}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


class Page:
    """One loaded page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.ask(method, self._session, **params)

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """The system's colour scheme, and ``print`` for how it would look on paper."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[feature])

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression; an exception in it is an assertion error."""
        answer = self.ask(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys by name (``Tab``, ``ArrowRight``) where the focus is."""
        for key in keys:
            code = VIRTUAL_KEYS[key]
            text = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
            about = {"key": key, "code": "Space" if key == " " else key}
            for kind in ("keyDown", "keyUp"):
                self.ask("Input.dispatchKeyEvent", type=kind, windowsVirtualKeyCode=code,
                         **about, **(text if kind == "keyDown" else {}))  # fmt: skip

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        box = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }"
            f")(document.querySelector({json.dumps(selector)}))"
        )
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def errors(self) -> list[str]:
        """Everything that the console showed as an error or a warning, exceptions included."""
        self.run("new Promise(done => setTimeout(done, 50))")  # what is under way arrives
        found = []
        for event in self._own():
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                if params["type"] in ("error", "warning", "assert"):
                    found.append(" ".join(str(a.get("value", a)) for a in params["args"]))
            elif event["method"] == "Log.entryAdded":
                loud = params["entry"]["level"] in ("error", "warning")
                found += [params["entry"]["text"]] if loud else []
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        return [
            e["params"]["request"]["url"]
            for e in self._own()
            if e["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, file: Path, *, full: bool = True) -> None:
        """A picture of the whole page (PNG)."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self, file: Path) -> None:
        """The page as it prints."""
        data = self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", targetId=self._target)

    def _own(self) -> list[dict[str, Any]]:
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A browser with an empty profile, ended and its profile removed afterwards."""
    program = find_chromium()
    if program is None:
        why = f"no Chromium on PATH ({', '.join(NAMES)}) and OPKIT_CHROMIUM names none"
        assert REQUIRED not in os.environ, f"{why}, but {REQUIRED} is set"
        pytest.skip(f"{why}: what the page does in a browser was not tested")
    profile = Path(tempfile.mkdtemp(prefix="opkit-chromium-"))
    chromium = Browser(program, profile)
    try:
        yield chromium
    finally:
        chromium.close()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a run (``conftest.py`` makes it known)."""
    with started() as found:
        yield found

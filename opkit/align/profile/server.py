"""HTTP to a serving engine with the standard library: health, names, waves of requests."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opkit.align.profile.engines import Engine, token_ids, tokens_out
from opkit.align.profile.plan import wave_text
from opkit.errors import RunFailed
from opkit.layers.manifest import Answer, Wave
from opkit.layers.prompts import prompt_tokens

_SHORT_S = 10.0  # for questions that a living server answers at once
_BODY_SHOWN = 600  # characters of a refusal that are shown
# The server is on this machine: a proxy from the environment must not stand in between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Client:
    """Asks one server.

    Attributes:
        engine: what it is; ``url`` where.
        vocab: token ids lie below this.
        model: its name in requests; empty: asked from ``/v1/models``.
    """

    engine: Engine
    url: str
    vocab: int
    model: str = ""
    api_key: str = ""

    def health(self) -> tuple[int, str]:
        """The health status (0: no answer) and its reason in words."""
        try:
            with self._open(self.url + self.engine.health, None, _SHORT_S) as answer:
                return answer.status, str(answer.reason)
        except urllib.error.HTTPError as error:
            return error.code, str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            return 0, str(getattr(error, "reason", None) or error)

    def served_model(self) -> str:
        """The model's name in requests.

        Raises:
            RunFailed: the server does not tell.
        """
        if self.model:
            return self.model
        answer = self._json(f"{self.url}/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (TypeError, LookupError) as error:
            raise RunFailed(f"GET {self.url}/v1/models names no model: {answer!r}"[:400]) from error

    def version(self) -> str:
        """The engine's version.

        Raises:
            RunFailed: the server does not tell.
        """
        url = self.url + self.engine.version
        answer = self._json(url)
        if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
            raise RunFailed(f"GET {url} names no version")
        return str(answer["version"])

    def post(self, url: str, body: str = "", limit_s: float = _SHORT_S) -> None:
        """POST ``body`` (JSON; empty: an empty object), whatever is answered.

        Raises:
            RunFailed: no answer, or a refusal.
        """
        try:
            with self._open(url, json.loads(body) if body else {}, limit_s):
                return
        except urllib.error.HTTPError as error:
            raise RunFailed(f"POST {url} answered {error.code}: {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RunFailed(f"POST {url}: connection failed ({reason})") from error

    def send(self, wave: Wave, model: str, seed: int, limit_s: float) -> Answer | None:
        """Send one wave as one POST, so that its requests are scheduled together, and wait for it.

        Returns:
            The tokens that came back, where the engine tells all of them.

        Raises:
            RunFailed: no answer, a refusal, or not the number of output tokens asked for.
        """
        prompts = [
            prompt_tokens(seed, index, wave.prompt, self.vocab) for index in range(wave.requests)
        ]
        body = self.engine.body(model, prompts, wave.output)
        url = self.url + self.engine.completions
        answer = self._json(url, body, limit_s, f"wave {wave_text(wave)}: POST {url}")
        asked, given = wave.requests * wave.output, tokens_out(answer)
        if given is not None and given != asked:
            raise RunFailed(
                f"wave {wave_text(wave)}: {given} output tokens came back instead of {asked}"
            )
        tokens = token_ids(answer)
        whole = [len(ids) for ids in tokens] == [wave.output] * wave.requests
        return Answer(wave.prompt, tokens) if whole else None

    def _json(self, url: str, body: Any = None, limit_s: float = _SHORT_S, what: str = "") -> Any:
        what = what or f"GET {url}"
        try:
            with self._open(url, body, limit_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(_BODY_SHOWN).decode(errors="replace").strip()
            raise RunFailed(f"{what} answered {error.code}: {said or error.reason}") from error
        except TimeoutError as error:
            raise RunFailed(f"{what}: no answer within {limit_s:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RunFailed(f"{what}: connection failed ({reason})") from error
        except ValueError as error:
            raise RunFailed(f"{what}: the answer is not JSON ({error})") from error

    def _open(self, url: str, body: Any, limit_s: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        return _OPENER.open(urllib.request.Request(url, data, headers), timeout=limit_s)


def listening(url: str) -> bool:
    """Whether something accepts connections at the URL's address."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=2.0):
            return True
    except OSError:
        return False

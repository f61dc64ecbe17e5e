"""A server with OpenAI's completions API, as vLLM, TensorRT-LLM and SGLang have it.

``POST /v1/completions`` with token ids and ``stream``. Tokens are counted by ``usage``, never by
chunks: a server may put several into one. ``stream_options.continuous_usage_stats`` (vLLM 0.24.0,
``entrypoints/openai/completion/serving.py``; TensorRT-LLM, ``serve/postprocess_handlers.py``)
says with each chunk how many there are so far. That also holds for a vLLM without a tokenizer, of
which every chunk's text is empty.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.bench.prompts import vocabulary
from opkit.errors import BadInput, RunFailed

_SHORT_S = 10.0  # for questions that a living server answers at once
_BODY_SHOWN = 400  # characters of a refusal that are shown
TIMED_BY = "this process (chunks of the stream as they arrive)"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Address:
    """Where a server listens; ``path`` is what comes before ``/v1``."""

    secure: bool
    host: str
    port: int
    path: str

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection, opened: that is no part of what is timed."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout_s)
        connection.connect()
        return connection


def parse_url(url: str) -> Address:
    """The address in a URL; a trailing ``/v1`` is taken as said twice.

    Raises:
        BadInput: not an http or https URL.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise BadInput(f"--url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"--url {url}: not an http URL", "e.g. --url http://127.0.0.1:8000")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(secure, parts.hostname, port or (443 if secure else 80), path)


class OpenAiUrl:
    """A running server. Nothing is started and nothing ended.

    Args:
        url: as ``http://host:port``.
        model: its name in requests; empty: the first that the server lists.
        vocab: size of the vocabulary; 0: from the server's model folder, where it is on this
            machine.
        limit_s: seconds for one request.
        api_key: sent as a bearer token.
        clock: ns of the monotonic clock.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        vocab: int = 0,
        limit_s: float = 300.0,
        api_key: str = "",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._address = parse_url(url)
        self._url = url
        self._model = model
        self._vocab = vocab
        self._limit_s = limit_s
        self._api_key = api_key
        self._clock = clock
        self._reached = True

    def start(self) -> Served:
        """Ask the server what it serves.

        Raises:
            RunFailed: no answer, or no such model.
        """
        listed = self._get("/v1/models")
        try:
            models = {str(each["id"]): each for each in listed["data"]}
            name = self._model or next(iter(models))
        except (TypeError, LookupError, StopIteration) as error:
            raise RunFailed(
                f"GET {self._url}/v1/models names no model: {listed!r}"[:400]
            ) from error
        if name not in models:
            raise RunFailed(f"{self._url} does not serve {name}; it lists {', '.join(models)}")
        self._model = name
        about = models[name]
        root = Path(str(about.get("root") or name))
        return Served(
            model=name,
            version=self._version(),
            vocab=self._vocab or vocabulary(root),
            max_length=int(about.get("max_model_len") or 0),
            timed_by=TIMED_BY,
            facts={"url": self._url, "owned_by": about.get("owned_by")},
        )

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Turn:
        """One repetition: one request and connection a prompt, sent together.

        Connections are opened before the clock starts. Ends with the last token, not with what the
        server says after it.
        """
        bodies = [self._body(prompt, output) for prompt in prompts]
        with ExitStack() as stack:
            open_ones = [stack.enter_context(closing(self._connect())) for _ in bodies]
            began = self._clock()
            answers = self._exchange(open_ones, bodies, began + round(self._limit_s * 1e9))
        for prompt, answer in zip(prompts, answers, strict=True):
            self._check(answer, len(prompt), output)
        ended = max(answer.stream.last_ns for answer in answers)
        return Turn(began, ended, tuple(answer.as_reply() for answer in answers))

    def alive(self) -> bool:
        """Whether the server could be reached the last time."""
        return self._reached

    def close(self) -> None:
        """Nothing was started."""

    def _check(self, answer: _Answer, sent: int, asked: int) -> None:
        if answer.tokens != asked:
            raise RunFailed(
                f"{self._url}: {answer.tokens} output tokens came back instead of {asked}",
                "the server must know ignore_eos, and its longest context must hold both",
            )
        if answer.prompt_tokens is not None and answer.prompt_tokens < sent:
            raise RunFailed(
                f"{self._url}: the server took {answer.prompt_tokens} prompt tokens of {sent}"
            )

    def _body(self, prompt: Sequence[int], output: int) -> bytes:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        return json.dumps(body).encode()

    def _connect(self) -> http.client.HTTPConnection:
        try:
            connection = self._address.connect(self._limit_s)
        except OSError as error:
            self._reached = False
            raise RunFailed(
                f"{self._url}: cannot connect ({error})", "is the server up?"
            ) from error
        self._reached = True
        return connection

    def _exchange(
        self,
        open_ones: Sequence[http.client.HTTPConnection],
        bodies: Sequence[bytes],
        until_ns: int,
    ) -> list[_Answer]:
        if len(bodies) == 1:  # no thread between the socket and the clock
            return [self._request(open_ones[0], bodies[0], until_ns)]
        pool = ThreadPoolExecutor(len(bodies), thread_name_prefix="opkit request")
        try:
            return list(pool.map(self._request, open_ones, bodies, [until_ns] * len(bodies)))
        except BaseException:  # also Ctrl-C: nobody waits for the other answers
            for connection in open_ones:
                _hang_up(connection)
            raise
        finally:
            pool.shutdown()

    def _request(
        self, connection: http.client.HTTPConnection, body: bytes, until_ns: int
    ) -> _Answer:
        try:
            connection.request("POST", self._address.path + COMPLETIONS, body, self._headers())
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise _refused(f"POST {self._url}{COMPLETIONS}", answer)
            return _read(answer, self._clock, self._url, until_ns)
        except TimeoutError as error:
            raise RunFailed(
                f"{self._url}: no answer within {self._limit_s:.0f} s", "--limit sets these seconds"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise RunFailed(f"{self._url}: the connection failed ({error})") from error

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        return headers | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})

    def _version(self) -> str:
        """vLLM and TensorRT-LLM tell at ``/version``; others have no such path."""
        try:
            told = self._get("/version")
        except RunFailed:
            return ""
        return str(told.get("version", "")) if isinstance(told, dict) else ""

    def _get(self, path: str) -> Any:
        try:
            connection = self._address.connect(_SHORT_S)
            try:
                connection.request("GET", self._address.path + path, headers=self._headers())
                answer = connection.getresponse()
                if answer.status != http.client.OK:
                    raise _refused(f"GET {self._url}{path}", answer)
                text = answer.read()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            self._reached = False
            raise RunFailed(
                f"GET {self._url}{path}: no answer ({error})", "is the server up, and at this URL?"
            ) from error
        try:
            return json.loads(text)
        except ValueError as error:
            raise RunFailed(f"GET {self._url}{path}: the answer is not JSON") from error


@dataclass
class _Stream:
    """Chunks as they come: when, and how many tokens there were then."""

    first_ns: int = 0
    last_ns: int = 0
    first_tokens: int = 1
    so_far: int | None = None  # tokens, where each chunk tells
    gaps: list[tuple[int, int]] | None = None

    def take(self, now: int, so_far: int | None) -> None:
        """One chunk of tokens. Chunks without any (a finish reason alone) are no event."""
        if so_far is not None and so_far == (self.so_far or 0):
            return
        if not self.first_ns:
            self.first_ns, self.first_tokens = now, so_far or 1
            self.gaps = [] if so_far is not None else None
        elif self.gaps is not None and so_far is not None and self.so_far is not None:
            self.gaps.append((now - self.last_ns, so_far - self.so_far))
        self.last_ns, self.so_far = now, so_far


@dataclass(frozen=True)
class _Answer:
    """One stream read to its end, with what ``usage`` says in the last chunk."""

    stream: _Stream
    tokens: int
    prompt_tokens: int | None
    cached: int | None

    def as_reply(self) -> Reply:
        stream = self.stream
        return Reply(
            first_ns=stream.first_ns,
            last_ns=stream.last_ns,
            tokens=self.tokens,
            first_tokens=stream.first_tokens,
            gaps=tuple(stream.gaps or ()),
            cached=self.cached,
        )


def _refused(request: str, answer: http.client.HTTPResponse) -> RunFailed:
    """What to say of an answer that is not 200."""
    said = answer.read(_BODY_SHOWN).decode(errors="replace").strip()
    what = f"{request} answered {answer.status}" + (f": {said}" if said else "")
    if to := answer.getheader("Location"):
        return RunFailed(f"{what} and leads to {to}", "give the server's own address as --url")
    if answer.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return RunFailed(what, "the environment's OPENAI_API_KEY is sent as the key")
    return RunFailed(what)


def _read(
    answer: http.client.HTTPResponse, clock: Callable[[], int], url: str, until_ns: int
) -> _Answer:
    """Read a stream of server-sent events; ``until_ns`` is when it takes too long.

    Raises:
        RunFailed: it ends early, carries an error, or never says how many tokens there were.
        TimeoutError: it goes on for too long.
    """
    stream, usage, done = _Stream(), None, False
    while line := answer.readline():
        now = clock()
        if now > until_ns:  # a socket's own limit is for each piece
            raise TimeoutError
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            done = True
            break
        chunk = _chunk(data, url)
        usage = chunk.get("usage") or usage
        if chunk.get("choices"):
            told = (chunk.get("usage") or {}).get("completion_tokens")
            if told is not None or _has_tokens(chunk["choices"][0]):
                stream.take(now, told)
    if not done or not stream.first_ns:
        raise RunFailed(f"{url}: the stream ended early", "the server's log says why")
    if not usage or not isinstance(usage.get("completion_tokens"), int):
        raise RunFailed(f"{url}: the stream has no usage, so its tokens cannot be counted")
    details = usage.get("prompt_tokens_details") or {}
    return _Answer(
        stream, usage["completion_tokens"], usage.get("prompt_tokens"), details.get("cached_tokens")
    )


def _chunk(data: bytes, url: str) -> dict[str, Any]:
    """One event, as OpenAI's API has it.

    Raises:
        RunFailed: it is not, or carries an error.
    """
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise RunFailed(f"{url}: a chunk of the stream is not JSON") from error
    if not isinstance(chunk, dict):
        raise RunFailed(f"{url}: a chunk of the stream is no JSON object")
    if chunk.get("error"):
        raise RunFailed(f"{url}: {str(chunk['error'])[:_BODY_SHOWN]}")
    choices, usage = chunk.get("choices") or [], chunk.get("usage") or {}
    right = isinstance(choices, list) and all(isinstance(each, dict) for each in choices)
    told = usage.get("completion_tokens", 0) if isinstance(usage, dict) else None
    if not right or not isinstance(told, int):
        raise RunFailed(f"{url}: a chunk of the stream is not as OpenAI's API has it")
    return chunk


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Whether a chunk of a server that counts only at the end holds tokens."""
    return bool(choice.get("text") or choice.get("token_ids")) or not choice.get("finish_reason")


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Wake a thread that reads from the connection."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)

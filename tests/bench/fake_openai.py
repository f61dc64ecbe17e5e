"""A server with OpenAI's completions API, streaming as vLLM 0.24.0 does without a tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any


@dataclass
class Behaviour:
    """How the server answers, and what it was asked.

    Attributes:
        per_chunk: tokens that a chunk holds.
        continuous: whether each chunk says how many tokens there are so far.
        usage: whether the last chunk says so.
        short: so many tokens fewer than asked.
        status: of every completion; ``error``: sent in the stream instead of a chunk.
        cut: end the stream after so many chunks, without a word.
        cached: prompt tokens from the cache, as told; None: not told.
        together: requests that must be there before any is answered.
        location: where a redirect leads.
        odd: the data of every event, whatever was asked.
        endless: events without tokens, again and again, until the client hangs up.
    """

    per_chunk: int = 1
    continuous: bool = True
    usage: bool = True
    short: int = 0
    status: int = 200
    error: str = ""
    cut: int | None = None
    cached: int | None = None
    together: int = 1
    text: str = ""
    location: str = ""
    odd: str = ""
    endless: bool = False
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"id": "m", "root": "/nowhere", "max_model_len": 8192, "owned_by": "vllm"}
        ]
    )
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    version: str | None = "0.24.0"


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The server's URL; it is gone afterwards."""
    gate = threading.Barrier(behaviour.together)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._json(200, {"data": behaviour.models})
            elif self.path == "/version" and behaviour.version:
                self._json(200, {"version": behaviour.version})
            else:
                self._json(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.bodies.append(body)
            behaviour.headers.append(dict(self.headers))
            if self.path != "/v1/completions" or behaviour.status != 200:
                self._json(behaviour.status, {"error": {"message": "the prompt is too long"}})
                return
            gate.wait(10)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # the client hung up
                for event in islice(events(body, behaviour), behaviour.cut):
                    self._chunk(f"data: {event}\n\n".encode())
                self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def _json(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if behaviour.location:
                self.send_header("Location", behaviour.location)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client hung up
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def events(body: dict[str, Any], behaviour: Behaviour) -> Iterator[str]:
    """The data of the events for one request."""
    asked = body["max_tokens"] - behaviour.short
    prompt, so_far = len(body["prompt"]), 0
    while behaviour.odd or behaviour.endless:
        yield behaviour.odd or json.dumps({"choices": []})
    while so_far < asked:
        so_far = min(asked, so_far + behaviour.per_chunk)
        reason = "length" if so_far == asked else None
        chunk: dict[str, Any] = {"choices": [{"text": behaviour.text, "finish_reason": reason}]}
        if behaviour.continuous:
            chunk["usage"] = usage(prompt, so_far)
        if behaviour.error:
            chunk = {"error": {"message": behaviour.error}}
        yield json.dumps(chunk)
    if behaviour.usage:
        told = usage(prompt, asked)
        if behaviour.cached is not None:
            told["prompt_tokens_details"] = {"cached_tokens": behaviour.cached}
        yield json.dumps({"choices": [], "usage": told})
    yield "[DONE]"


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }  # fmt: skip

"""JSON lines over a local socket: how the parent and its ranks talk.

A socket rather than pipes, because ranks under mpirun do not inherit the parent's descriptors.
"""

from __future__ import annotations

import json
import socket
from typing import Any

RANK_VARIABLE = "OPKIT_COMM_RANK"
GARBLED = "garbled"
_RECEIVE_BYTES = 65536


class Channel:
    """One end of a connected socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._pending = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. OSError when the other end has gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data; return the messages that are complete, or None at the other's end.

        A line that is no message becomes one of kind ``garbled``, with its beginning.
        """
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except ConnectionResetError:
            return None
        if not data:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [_message(line) for line in lines if line]

    def wait_for_one(self) -> dict[str, Any]:
        """The next message, where only one is expected. EOFError when the other end has gone."""
        while (messages := self.receive()) is not None:
            if messages:
                return messages[0]
        raise EOFError("the other end of the channel has gone")

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if isinstance(message, dict) and isinstance(message.get("kind"), str):
        return message
    return {"kind": GARBLED, "text": line[:80].decode(errors="replace")}


def connect(path: str) -> Channel:
    """Connect to the parent's listening socket."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(path)
    return Channel(connected)

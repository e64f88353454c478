"""A loopback server that writes bytes as they are given, for what real servers and proxies send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answer = Callable[[dict[str, Any], socket.socket, list[dict[str, Any]]], None]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
MODELS = {"data": [{"id": "m", "max_model_len": 4096}]}


@contextlib.contextmanager
def serve(
    answer: Answer | bytes, models: Any = MODELS, listener: socket.socket | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, bodies that came) of a server that answers posts with `answer`, a function of body, connection and bodies so far."""
    asked: list[dict[str, Any]] = []
    listener = listener or bound()
    listener.listen(256)
    port = listener.getsockname()[1]

    def converse(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            while first := lines.readline():
                method, path, _ = first.decode("latin1").split()
                headers = {}
                while line := lines.readline().strip():
                    name, _, value = line.decode("latin1").partition(":")
                    headers[name.lower()] = value.strip()
                body = lines.read(int(headers.get("content-length", 0)))
                if method == "GET" and callable(models):
                    for part in models({}):
                        connection.sendall(part)
                elif method == "GET":
                    connection.sendall(models if isinstance(models, bytes) else reply(json.dumps(models).encode()))
                else:
                    asked.append({**json.loads(body), "path": path, "headers": headers})
                    if isinstance(answer, bytes):
                        connection.sendall(answer)
                    else:
                        answer(json.loads(body), connection, asked)
                connection.shutdown(socket.SHUT_RDWR)
                return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=converse, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{port}/v1", asked
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def bound() -> socket.socket:
    """A socket with an address, on which nothing listens yet."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    return listener


def reply(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """A whole reply."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


def stream(*events: Any, done: bool = True) -> bytes:
    """A stream of events that ends with the connection. Bytes are sent as they are, whatever else as JSON."""
    parts = [event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return HEAD + b"Connection: close\r\n\r\n" + b"".join(parts) + (b"data: [DONE]\n\n" if done else b"")


def says(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    return {"choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": finish}]}


def usage(count: int, **more: Any) -> dict[str, Any]:
    """The chunk that says what a completion has cost."""
    return {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": count, **more}}

"""What our HTTP servers share: requests of strangers are read within limits, tokens are compared in constant time."""

from __future__ import annotations

import hmac
import json
import socket
from typing import TYPE_CHECKING, Any

from ramet.errors import ConfigError, HTTPRefusal, first_line

if TYPE_CHECKING:
    from pydantic import ValidationError
    from starlette.applications import Starlette
    from starlette.requests import Request

SHORTEST_TOKEN = 16
"""Characters of a bearer token."""


def check_token(token: str) -> None:
    """Raises `ConfigError` for a token that is too short to be one."""
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"the bearer token needs {SHORTEST_TOKEN} characters at least")


def authorise(request: Request, token: str, given: str = "") -> None:
    """Raises `HTTPRefusal` (401) unless the request brings the token: in its header, or else as `given`."""
    credential = request.headers.get("authorization", f"Bearer {given}").encode("utf-8", "replace")
    if not hmac.compare_digest(credential, f"Bearer {token}".encode()):
        raise HTTPRefusal(401, "wrong or missing bearer token")


async def json_body(request: Request, limit: int) -> Any:
    """The body of a request as JSON. Raises `HTTPRefusal` if it is compressed, longer than `limit` bytes, or no JSON."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPRefusal(415, "compressed bodies are not read")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise HTTPRefusal(413, f"a request has at most {limit} bytes")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise HTTPRefusal(413, f"a request has at most {limit} bytes")
    return parse_json(bytes(body), "the body")


def parse_json(data: bytes, name: str) -> Any:
    """JSON that can be written again as UTF-8. Raises `HTTPRefusal`, which calls the data by `name`."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HTTPRefusal(422, f"{name} has half of a pair of surrogates ({error.object[error.start]!r}), which is no character") from None
    except (ValueError, RecursionError) as error:
        raise HTTPRefusal(400, f"{name} is no JSON: {first_line(error)}") from None
    return value


def first_problem(error: ValidationError, whole: str = "") -> str:
    """Where in a request the first problem is, and what it is, on one line; `whole` names the request itself."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or whole}: {problem['msg']}"


def run_app(app: Starlette, host: str, port: int) -> None:
    """Serve until interrupted; SIGTERM lets running requests end. Raises `ConfigError` where the address cannot be had."""
    import uvicorn

    try:
        bound = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=30, access_log=False)).run([bound])

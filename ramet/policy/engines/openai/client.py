"""The connection to a server: its address, the proxies and certificates of the environment, and the secrets in them."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from functools import cache
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from ramet.errors import PolicyError, first_line

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = ("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "te", "transfer-encoding", "upgrade")
_VERSION = re.compile(r"/v\d+(beta|alpha)?\d*(/|$)|/openai(/|$)")


class Address:
    """A server's address, up to and including the version, such as http://127.0.0.1:8000/v1, with a query if the server needs one.

    key    name of the environment variable of the API key, for messages
    shown  the address without its query, for messages

    Raises `PolicyError` for an invalid address.
    """

    def __init__(self, url: str, key: str):
        try:
            self._url = httpx.URL(url.strip())
            # httpx accepts ports and host names that no socket does.
            valid = self._url.scheme in ("http", "https") and self._url.host and (self._url.port is None or 0 < self._url.port < 65536)
        except (httpx.InvalidURL, ValueError, TypeError):
            valid = False
        if not valid or "%" in self._url.host or any(not 0 < len(part) < 64 for part in self._url.host.rstrip(".").split(".")):
            shown = url if "@" not in url and "?" not in url else "the given value"
            raise PolicyError(f"{shown!r} is not the address of a server, such as http://127.0.0.1:8000/v1")
        if self._url.userinfo:
            raise PolicyError(f"the address of the server names a user; put the key into the environment variable {key} instead")
        path = re.sub(r"((/chat)?/completions|/responses)$", "", self._url.path.rstrip("/"))
        self._url = self._url.copy_with(path=path or "/", fragment=None)
        self.shown = str(self._url.copy_with(query=None)).rstrip("/")

    def at(self, path: str) -> httpx.URL:
        """The address of a path below this one, with the same query."""
        return self._url.copy_with(path=f"{self._url.path.rstrip('/')}/{path}")

    @property
    def versioned(self) -> bool:
        """Whether the address names an API version."""
        return bool(_VERSION.search(self._url.path))

    @property
    def proxy(self) -> str:
        """The name of the environment variable of the proxy through which the server is reached; empty without a proxy."""
        proxies = getproxies()
        scheme = self._url.scheme if self._url.scheme in proxies else "all"
        if scheme not in proxies or proxy_bypass(self._url.host):
            return ""
        return _spelling(f"{scheme.upper()}_PROXY")

    def secrets(self, key: str) -> list[str]:
        """Strings never to be shown: the key, long values of the query, passwords of proxies; each also percent-encoded."""
        secrets = [key, *(value for _, value in self._url.params.multi_items() if len(value) >= 8)]
        for proxy in getproxies().values():
            try:
                secrets.append(unquote(urlsplit(proxy if "://" in proxy else f"//{proxy}").password or ""))
            except ValueError:
                continue
        return [form for secret in secrets for form in {secret, quote(secret, safe="")}]


class _Body(httpx.AsyncByteStream):
    """The body of a request, in one piece. httpx's own is a generator, which stays open if sending is cancelled."""

    def __init__(self, content: bytes):
        self._content, self._sent = content, False

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._sent = False
        return self

    async def __anext__(self) -> bytes:
        if self._sent:
            raise StopAsyncIteration
        self._sent = True
        return self._content


async def _in_one_piece(request: httpx.Request) -> None:
    request.stream = _Body(request.content)


def resolved(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of the user's, with the values of those that name an environment variable (`$NAME`). Raises `PolicyError`."""
    own = {}
    for name, value in headers.items():
        if not _HEADER.fullmatch(name) or name.lower() in _OURS:
            raise PolicyError(f"{name!r} is not a header that can be set")
        if value.startswith("$"):
            if value[1:] not in os.environ:
                raise PolicyError(f"the header {name} is to hold the environment variable {value[1:]}, which is not set")
            value = os.environ[value[1:]].strip()
        if not (value.isascii() and value.isprintable()):
            raise PolicyError(f"the value of the header {name} cannot be sent: it must be printable ASCII on one line")
        own[name] = value
    return own


def connected(headers: httpx.Headers, concurrency: int) -> httpx.AsyncClient:
    """An HTTP client with the proxies and certificates of the environment.

    Raises `PolicyError`, with the name of the environment variable at fault, if there can be none.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)

    def make(**options: object) -> httpx.AsyncClient:
        context = _ssl_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        hooks = {"request": [_in_one_piece]}
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=context, event_hooks=hooks, **options)  # type: ignore[arg-type]

    try:
        return make()
    except (ImportError, ValueError, httpx.InvalidURL, OSError) as error:
        raise PolicyError(_faulty_variable(error, make)) from None


@cache
def _ssl_context(file: str | None, directory: str | None) -> ssl.SSLContext:
    """The trusted certificates, cached by the values of these environment variables: reading them takes longer than a request."""
    return httpx.create_ssl_context()


def _faulty_variable(error: Exception, make: Callable[..., httpx.AsyncClient]) -> str:
    """A line that names the environment variable because of which no client can be made. Its value is not shown: it may be secret."""
    if isinstance(error, OSError):
        variables = " or ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)) or "SSL_CERT_FILE"
        return f"the environment variable {variables} names certificates that cannot be read: {error.strerror or first_line(error)}"
    for name in _PROXIES[:-1]:
        value = os.environ.get(_spelling(name))
        try:
            if value:
                make(proxy=value if "://" in value else f"http://{value}", trust_env=False)
        except ImportError:
            return f"the environment variable {_spelling(name)} names a SOCKS proxy, which needs: pip install 'httpx[socks]'; or unset it"
        except (ValueError, httpx.InvalidURL, OSError):
            return f"the environment variable {_spelling(name)} is not the address of a proxy; correct it, or unset it"
    return f"the environment variable {_spelling(_PROXIES[-1])} cannot be read; give host names and plain addresses, without brackets"


def _spelling(name: str) -> str:
    """The name of an environment variable as it is set here: in lower case, or else in upper case."""
    return name.lower() if os.environ.get(name.lower()) else name

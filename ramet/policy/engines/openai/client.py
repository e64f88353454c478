"""The way to a server: its address, the environment's proxies and certificates, and what must be seen of none of them."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import AsyncIterator, Callable
from functools import cache
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from ramet.errors import PolicyError, first_line

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_VERSION = re.compile(r"/v\d+(beta|alpha)?\d*(/|$)|/openai(/|$)")


class Address:
    """A server's address, up to and including the version, such as http://127.0.0.1:8000/v1; with a query, if it needs one.

    Raises `PolicyError` for what is none.
    """

    def __init__(self, url: str, key: str):
        try:
            self._url = httpx.URL(url.strip())
            # Ports and names that no socket takes.
            valid = self._url.scheme in ("http", "https") and self._url.host and (self._url.port is None or 0 < self._url.port < 65536)
        except (httpx.InvalidURL, ValueError, TypeError):
            valid = False
        if not valid or "%" in self._url.host or any(not 0 < len(part) < 64 for part in self._url.host.rstrip(".").split(".")):
            shown = url if "@" not in url and "?" not in url else "what is given"
            raise PolicyError(f"{shown!r} is not the address of a server, such as http://127.0.0.1:8000/v1")
        if self._url.userinfo:
            raise PolicyError(f"the address of the server names a user; put the key into the environment variable {key} instead")
        path = re.sub(r"(/chat)?/completions$", "", self._url.path.rstrip("/"))
        self._url = self._url.copy_with(path=path or "/", fragment=None)
        self.shown = str(self._url.copy_with(query=None)).rstrip("/")

    def at(self, path: str) -> httpx.URL:
        """The address of a path below; the query stays."""
        return self._url.copy_with(path=f"{self._url.path.rstrip('/')}/{path}")

    @property
    def versioned(self) -> bool:
        """Does it name a version?"""
        return bool(_VERSION.search(self._url.path))

    @property
    def proxy(self) -> str:
        """The environment variable of the proxy through which it is reached; empty without one."""
        proxies = getproxies()
        scheme = self._url.scheme if self._url.scheme in proxies else "all"
        if scheme not in proxies or proxy_bypass(self._url.host):
            return ""
        return _named(f"{scheme.upper()}_PROXY")

    def secrets(self, key: str) -> list[str]:
        """What is not to be shown: the key, what the query says, and the passwords of proxies; also as they stand in addresses."""
        found = [key, *(value for _, value in self._url.params.multi_items() if len(value) >= 8)]
        for proxy in getproxies().values():
            try:
                found.append(unquote(urlsplit(proxy if "://" in proxy else f"//{proxy}").password or ""))
            except ValueError:
                continue
        return [form for secret in found for form in {secret, quote(secret, safe="")}]


class _Body(httpx.AsyncByteStream):
    """The body of a request, in one piece. httpx's own is a generator, which is left open where sending it is cancelled."""

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


def connected(headers: dict[str, str], concurrency: int) -> httpx.AsyncClient:
    """A client in this environment. Raises `PolicyError` that names the variable at fault."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)

    def made(**options: object) -> httpx.AsyncClient:
        trusted = _trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        hooks = {"request": [_in_one_piece]}
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=trusted, event_hooks=hooks, **options)  # type: ignore[arg-type]

    try:
        return made()
    except (ImportError, ValueError, httpx.InvalidURL, OSError) as error:
        raise PolicyError(_blamed(error, made)) from None


@cache
def _trusted(file: str | None, directory: str | None) -> ssl.SSLContext:
    """What certificates are checked against, as these variables have it; reading it takes longer than a request."""
    return httpx.create_ssl_context()


def _blamed(error: Exception, made: Callable[..., httpx.AsyncClient]) -> str:
    """Which variable of the environment keeps a client from being made. Values are not shown: they may hold passwords."""
    if isinstance(error, OSError):
        variables = " or ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)) or "SSL_CERT_FILE"
        return f"the environment variable {variables} names certificates that cannot be read: {error.strerror or first_line(error)}"
    for name in _PROXIES[:-1]:
        value = os.environ.get(_named(name))
        try:
            if value:
                made(proxy=value if "://" in value else f"http://{value}", trust_env=False)
        except ImportError:
            return f"the environment variable {_named(name)} names a SOCKS proxy, which needs: pip install 'httpx[socks]'; or unset it"
        except (ValueError, httpx.InvalidURL, OSError):
            return f"the environment variable {_named(name)} is not the address of a proxy; mend it, or unset it"
    return f"the environment variable {_named(_PROXIES[-1])} cannot be read; give host names and plain addresses, without brackets"


def _named(name: str) -> str:
    """An environment variable as it is written here."""
    return name.lower() if os.environ.get(name.lower()) else name

"""Where a service is and how to reach it: its address, key, timeouts, certificates and the proxy in between."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from jepakit._checks import is_number
from jepakit._files import reason_of
from jepakit._loopback import is_loopback
from jepakit._messages import lines_of
from jepakit.errors import ClientError, ConfigError

if TYPE_CHECKING:
    import ssl

    import httpx

_C = TypeVar("_C")
_LONGEST_S = 1e6
_KEY = re.compile(r"[!-~]+")
_OURS = ("/v1", "/v1/embeddings", "/v1/models")
"""Routes that are also refused behind a gateway's own path."""
_ROUTES = (*_OURS, "/v2", "/docs", "/readyz", "/healthz", "/metrics")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Connection:
    """The arguments of both clients, checked, and how they configure httpx."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, deadline_s: float) -> None:
        import httpx  # by the first client only: httpx imports its own command line, which takes 0.2 s

        _check_url(url)
        for name, seconds in (("timeout_s", timeout_s), ("deadline_s", deadline_s)):
            if not is_number(seconds) or not 0 < seconds <= _LONGEST_S:
                raise ConfigError(f"{name} = {seconds!r}: give seconds, more than 0 and at most {_LONGEST_S:g}")
        timeout_s, deadline_s = float(timeout_s), float(deadline_s)
        key = api_key or os.environ.get("JEPAKIT_API_KEY")
        _check_key(key)
        self.url, self.deadline_s = url.rstrip("/"), deadline_s
        address = httpx.URL(url)
        loopback = is_loopback(address.host)
        self.proxy = None if loopback else _proxy_of(address)
        """The environment variable that names the proxy in between, if any."""
        self.patience_s = min(timeout_s, deadline_s)
        """How long to wait for the answer to one attempt."""
        self.told_of_waiting = False
        """Whether the user has been told that nothing listens at the address."""
        self.http: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": timeout_s,
            "follow_redirects": False,
            # No proxies on loopback. `trust_env` = False also ignores SSL_CERT_FILE, so `verify` reads it explicitly, except
            # for plain HTTP: reading all certificates takes 50 ms.
            "trust_env": not loopback,
            "verify": _trusted() if address.scheme == "https" or self.proxy else False,
            # No limit: the clients send MOST_AT_ONCE at a time, and httpcore loses the place of a connection whose request
            # is cancelled before it begins (encode/httpcore#1093).
            "limits": httpx.Limits(),
        }

    def connect(self, kind: Callable[..., _C]) -> _C:
        """An httpx client of this `kind` with these settings; ConfigError for an unusable proxy in the environment."""
        import httpx

        try:
            return kind(**self.http)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            told = ", ".join(name for name in os.environ if name.lower() in _PROXIES)
            raise ConfigError(
                f"the environment's proxy ({told}) cannot be used ({lines_of(error)[0]}): correct it, unset it, or name "
                "the service's host in NO_PROXY"
            ) from None


def _check_url(url: object) -> None:
    """Raise ConfigError for anything but a service's address."""
    import httpx

    if isinstance(url, str) and "@" in url:  # never repeat it in a message: it may hold a password
        raise ConfigError(
            "the url holds an @: give the service's address without a user and a password (the key is api_key=…, or "
            "JEPAKIT_API_KEY; an @ in a path is written %40)"
        )
    if isinstance(url, str) and "?" in url:
        raise ConfigError("the url has a query (what follows its ?): give the service's address without it")
    if not isinstance(url, str) or not _is_address(url):
        raise ConfigError(f"url = {url!r}: give the service's address, e.g. http://127.0.0.1:8000")
    path = httpx.URL(url).path.rstrip("/")
    for route in _ROUTES:
        if path == route or (route in _OURS and path.endswith(route)):
            raise ConfigError(f"url = {url!r}: give the service's address without {route}, which belongs to its routes")


def _check_key(key: object) -> None:
    """Raise ConfigError for an API key that no service can have made."""
    if not key:
        return
    if not isinstance(key, str):
        raise ConfigError(f"the API key is of type {type(key).__name__}: give text")
    if not _KEY.fullmatch(key):
        raise ConfigError(
            "the API key (api_key, or JEPAKIT_API_KEY) holds a space, a line break or a letter that is not ASCII: "
            "give it as it was made, without the end of the line it was read from"
        )


def _trusted() -> ssl.SSLContext:
    """The trusted certificates; ConfigError when the environment names some that cannot be read."""
    import httpx

    try:
        return httpx.create_ssl_context()
    except OSError as error:  # includes ssl.SSLError
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise ConfigError(
            f"{name} = {os.environ.get(name)!r}: no certificates can be read there ({reason_of(error)}): name a file of "
            "certificates in PEM, or unset it"
        ) from None


def _proxy_of(url: httpx.URL) -> str | None:
    """The variable that names a proxy for an address, without its value, which may hold a password."""
    from urllib.request import getproxies, proxy_bypass

    known = getproxies()
    if proxy_bypass(url.host):
        return None
    return next((f"{kind}_proxy".upper() for kind in (url.scheme, "all") if kind in known), None)


def _is_address(url: str) -> bool:
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 1 << 16


def check_open(http: httpx.Client | httpx.AsyncClient) -> None:
    if http.is_closed:
        raise ClientError("this client is closed: make another")


def no_copy(client: object) -> TypeError:
    kind = type(client).__name__
    return TypeError(
        f"this {kind} cannot be copied or sent to another process, as its connections cannot: make one there"
    )

"""Requests to a service: its address, key and timeouts, when to retry, and what a refusal means."""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from jepakit._checks import is_number
from jepakit._files import reason_of
from jepakit._loopback import is_loopback
from jepakit._messages import lines_of
from jepakit.errors import (
    AuthenticationError,
    ConfigError,
    ConnectionFailedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ResponseError,
)

if TYPE_CHECKING:
    import ssl

    import httpx

_C = TypeVar("_C")
# httpx is imported by the first client only: it imports its own command line, which takes 0.2 s.
AT_ONCE = 4
"""Concurrent requests of one call."""
MOST_AT_ONCE = 2 * AT_ONCE
"""Concurrent requests of all calls of one client together."""
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LEAST_WAIT_S = 0.25, 8.0, 0.01
_LONGEST_S = 1e6
_TOLD_AFTER_S = 2.0
_LOG = logging.getLogger("jepakit")
_KEY = re.compile(r"[!-~]+")
_OURS = ("/v1", "/v1/embeddings", "/v1/models")
"""Routes that are also refused behind a gateway's own path."""
_ROUTES = (*_OURS, "/v2", "/docs", "/readyz", "/healthz", "/metrics")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Settings:
    """The arguments of both clients, checked, and how they configure httpx."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float, deadline_s: float) -> None:
        import httpx

        if isinstance(url, str) and "@" in url:  # never repeat it in a message: it may hold a password
            raise ConfigError(
                "the url holds an @: give the service's address without a user and a password (the key is api_key=…, or "
                "JEPAKIT_API_KEY; an @ in a path is written %40)"
            )
        if isinstance(url, str) and "?" in url:
            raise ConfigError("the url holds a query, what follows its ?: give the service's address without it")
        if not isinstance(url, str) or not _is_address(url):
            raise ConfigError(f"url = {url!r}: give the service's address, e.g. http://127.0.0.1:8000")
        path = httpx.URL(url).path.rstrip("/")
        if route := next(
            (route for route in _ROUTES if path == route or (route in _OURS and path.endswith(route))), None
        ):
            raise ConfigError(f"url = {url!r}: give the service's address without {route}, which belongs to its routes")
        for name, seconds in (("timeout_s", timeout_s), ("deadline_s", deadline_s)):
            if not is_number(seconds) or not 0 < seconds <= _LONGEST_S:
                raise ConfigError(f"{name} = {seconds!r}: give seconds, more than 0 and at most {_LONGEST_S:g}")
        timeout_s, deadline_s = float(timeout_s), float(deadline_s)
        key = api_key or os.environ.get("JEPAKIT_API_KEY")
        if key and not isinstance(key, str):
            raise ConfigError(f"the API key is of type {type(key).__name__}: give text")
        if key and not _KEY.fullmatch(key):
            raise ConfigError(
                "the API key (api_key, or JEPAKIT_API_KEY) holds a space, a line break or a letter that is not ASCII: "
                "give it as it was made, without the end of the line it was read from"
            )
        self.url, self.deadline_s = url.rstrip("/"), deadline_s
        loopback = is_loopback(httpx.URL(url).host)
        self.proxy = None if loopback else _proxy_of(httpx.URL(url))
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
            # On loopback, no proxies. That would also ignore SSL_CERT_FILE, so `verify` reads it explicitly.
            "trust_env": not loopback,
            "verify": _trusted(),
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


class Attempts:
    """When to retry: embedding is pure, so every request is safe to repeat."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._url, self._deadline_s = settings, settings.url, settings.deadline_s
        self._through = f" through the proxy that {settings.proxy} names" if settings.proxy else ""
        self._timeout_s: float = settings.http["timeout"]
        self._refusal: ResponseError | None = None
        self._deadline = time.monotonic() + settings.deadline_s
        self._pause = _FIRST_PAUSE_S

    def begin(self, request: httpx.Request) -> httpx.Request:
        """The request, with its timeouts limited to the time left until the deadline."""
        import httpx

        left = max(_LEAST_WAIT_S, self._deadline - time.monotonic())
        request.extensions["timeout"] = httpx.Timeout(min(self._timeout_s, left)).as_dict()
        return request

    def pause_after(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next attempt, None for a good answer; raises the error if retrying is no use."""
        if response.status_code == 200:
            return None
        self._refusal = _meaning(response, f" (deadline_s = {self._deadline_s:g})" if _may_pass(response) else "")
        if not _may_pass(response) or (pause := self._next(response.headers.get("retry-after"))) is None:
            raise self._refusal
        return pause

    def pause_after_failure(self, error: httpx.RequestError) -> float:
        """Seconds to wait before the next attempt; raises the error if there is no time left or retrying is no use."""
        import httpx

        _raise_if_lasting(error, self._url)
        pause = self._next(None)
        if pause is None:
            if self._refusal is not None and isinstance(error, httpx.TimeoutException):
                raise self._refusal  # the last attempt was cut short by the deadline and says nothing new
            cause = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ConnectionFailedError(
                f"{self._url} gave no answer within {self._deadline_s:g} s{self._through} ({cause}): is the service "
                "running, and is this its address, http or https?"
            ) from error
        if isinstance(error, httpx.ConnectError):
            self._tell_of_waiting(error)
        return pause

    def _tell_of_waiting(self, error: httpx.ConnectError) -> None:
        """Warn once per client, after a while: a restarting service is back sooner, one never started is not."""
        left_s = self._deadline - time.monotonic()
        if self._deadline_s - left_s < _TOLD_AFTER_S or self._settings.told_of_waiting:
            return
        self._settings.told_of_waiting = True
        _LOG.warning(
            "%s gives no answer yet (%s): trying for %.0f s more. Is `jepakit serve` running there?",
            self._url,
            error,
            left_s,
        )

    def _next(self, retry_after: str | None) -> float | None:
        try:
            pause = max(_FIRST_PAUSE_S, min(float(retry_after or ""), 60.0))
        except ValueError:
            pause = random.uniform(0.5, 1.0) * self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        return pause if time.monotonic() + pause < self._deadline else None


def _may_pass(response: httpx.Response) -> bool:
    """Whether the same request may succeed in a moment. Ray's proxy knows no routes while it restarts."""
    return response.status_code in _RETRYABLE or (response.status_code == 404 and b"/-/routes" in response.content)


def _raise_if_lasting(error: httpx.RequestError, url: str) -> None:
    """Raise the error for a failure that every further attempt would meet again."""
    import ssl

    import httpx

    if isinstance(error, httpx.LocalProtocolError):
        raise ConnectionFailedError(f"the request to {url} cannot be sent: {error}") from error
    if not isinstance(error, httpx.TransportError):
        raise ProtocolError(
            f"{url} sent an answer that cannot be read ({error}): is this a jepakit service?"
        ) from error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise ConnectionFailedError(
            f"the certificate of {url} is not trusted ({cause.verify_message}): set SSL_CERT_FILE to the file of the "
            "certificate, or of the authority that signed it"
        ) from error
    # Its subclasses mean broken connections, which are normal while a service restarts.
    if type(cause) is ssl.SSLError:
        raise ConnectionFailedError(
            f"{url} does not speak https ({cause.reason}): should the address begin with http://?"
        ) from error


def _meaning(response: httpx.Response, note: str) -> ResponseError:
    """The service's own message if it sent one, plus `note`; a bare 5xx comes from something in front of it."""
    url = response.request.url.copy_with(query=None)
    message, told = (
        f"{url} answered {response.status_code} without a reason: is this a jepakit service?",
        dict[str, Any](),
    )
    if response.next_request is not None:  # not followed: it would receive the key
        to = response.next_request.url
        message = (
            f"the service answered {response.status_code}, a redirect to {to.scheme}://{to.netloc.decode('ascii')}{to.path}: "
            "give the part of that address before /v1 as url"
        )
    with suppress(ValueError, KeyError, TypeError):
        error = response.json()["error"]
        message, told = str(error["message"]), error
    if response.status_code == 401:
        message += " (give it as api_key=…, or in JEPAKIT_API_KEY)"
    code, param, request_id = (
        told[name] if isinstance(told.get(name), str) else None for name in ("code", "param", "request_id")
    )
    kind = {
        401: AuthenticationError,
        403: AuthenticationError,
        404: NotFoundError,
        429: OverloadedError,
        503: OverloadedError,
    }
    return kind.get(response.status_code, ResponseError)(
        message + note, status=response.status_code, code=code, param=param, request_id=request_id
    )

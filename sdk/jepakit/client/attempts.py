"""Requests to a service: when to retry, and what a refusal means."""

from __future__ import annotations

import logging
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeGuard

from jepakit.client.connection import Connection
from jepakit.errors import (
    AuthenticationError,
    ClientError,
    ConnectionFailedError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ResponseError,
)

if TYPE_CHECKING:
    import httpx

AT_ONCE = 4
"""Concurrent requests of one call."""
MOST_AT_ONCE = 2 * AT_ONCE
"""Concurrent requests of all calls of one client together."""
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LEAST_WAIT_S = 0.25, 8.0, 0.01
_TOLD_AFTER_S = 2.0
_LOG = logging.getLogger("jepakit")


class Attempts:
    """The attempts of one request: when to retry, and when to give up. Embedding is pure, so every request is safe to repeat."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._url, self._deadline_s = connection, connection.url, connection.deadline_s
        self._through = f" through the proxy that {connection.proxy} names" if connection.proxy else ""
        self._timeout_s: float = connection.http["timeout"]
        self._refusal: ResponseError | None = None
        self._deadline = time.monotonic() + connection.deadline_s
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
        """Warn once per client if nothing listens for a while: a restarting service is back sooner, so none may be running."""
        left_s = self._deadline - time.monotonic()
        if self._deadline_s - left_s < _TOLD_AFTER_S or self._connection.told_of_waiting:
            return
        self._connection.told_of_waiting = True
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
    message = f"{url} answered {response.status_code} without a reason: is this a jepakit service?"
    told: dict[str, Any] = {}
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


def is_too_large(error: ClientError) -> TypeGuard[ResponseError]:
    """Whether a request was too large for the service, whose limits may have shrunk since they were asked for."""
    return isinstance(error, ResponseError) and error.status == 413

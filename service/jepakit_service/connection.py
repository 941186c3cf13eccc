"""The HTTP/1.1 connection of `--no-ray`: uvicorn's on httptools, which costs less per request than h11, with stricter limits."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_UNDELIVERED = 64 * 1024
"""Most bytes of a request's head, or of a chunked body's trailer: h11's limit. httptools has none, and would buffer any number."""
_MOST_FIELDS = 256
"""Most header fields of a request: each takes memory of thirty times the bytes of the shortest one."""
_MOST_WAITING = 64
"""Most pipelined requests of one connection that wait for earlier answers; uvicorn itself has no limit."""


class _RefusalError(Exception):
    """A request that is refused; the message is sent to the client, and nothing more is read from the connection."""


class Connection(HttpToolsProtocol):
    """One client connection. Ignores `Upgrade`, and limits the size of heads and the number of pipelined requests.

    Java's client and `curl --http2` offer HTTP/2 by `Upgrade`, which a server may ignore (RFC 9110, 7.8). httptools ends the
    message after a head with this field, and would take the body for the next request: so the head is parsed again without it.
    """

    _refused = False
    _delivered = False
    _undelivered_bytes = 0
    _head_without_offer: bytes | None = None

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._delivered = False
        try:
            self._read(data)
            self._undelivered_bytes = 0 if self._delivered else self._undelivered_bytes + len(data)
            if self._undelivered_bytes > _MOST_UNDELIVERED:
                raise _RefusalError(f"The head of a request has more than {_MOST_UNDELIVERED} bytes.")
        except (httptools.HttpParserError, _RefusalError) as error:
            self._refuse(error)

    def _read(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                assert self._head_without_offer is not None
                data = self._head_without_offer + data[offer.args[0] :]
                self._head_without_offer = None
                self.parser = httptools.HttpRequestParser(self)  # the old one may treat the connection as closed

    def _refuse(self, error: Exception) -> None:
        """Close the connection: after the pending answers, if all their requests are complete; at once, if an answer has begun
        before its request was complete; else with a 400 that says why."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self.cycle.keep_alive = False
                return
            if self.cycle.response_started:
                self.transport.close()
                return
        why = error.__context__ or error  # httptools wraps what its callbacks raise
        self.send_400_response(str(why) if isinstance(why, _RefusalError) else "Invalid HTTP request received.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MOST_FIELDS:
            raise _RefusalError(f"The head of a request has more than {_MOST_FIELDS} fields.")
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        version, hosts = self.parser.get_http_version(), sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            raise _RefusalError("This is neither HTTP/1.1 nor HTTP/1.0.")
        if hosts > 1 or (hosts < 1 and version == "1.1"):
            raise _RefusalError("A request must have exactly one Host.")  # RFC 9112, 3.2
        if self.parser.get_method() == b"CONNECT":
            raise _RefusalError("CONNECT is for proxies, and this is none.")
        if len(self.pipeline) >= _MOST_WAITING:
            raise _RefusalError(f"{_MOST_WAITING} requests of this connection are waiting for earlier answers.")
        if self.parser.should_upgrade():
            request = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version.encode())
            kept = (b"%s: %s" % header for header in self.headers if header[0] != b"upgrade")
            self._head_without_offer = b"\r\n".join([request, *kept, b"", b""])
            return
        self._delivered = True
        super().on_headers_complete()
        self.headers = []  # uvicorn would add the trailer fields of a chunked body to the request's own

    def on_body(self, body: bytes) -> None:
        self._delivered = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._head_without_offer is None:
            super().on_message_complete()

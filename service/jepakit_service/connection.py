"""What `--no-ray` reads HTTP/1.1 with: uvicorn's connection on httptools, which costs less a request than h11."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_UNDELIVERED = 64 * 1024
"""Bytes of a head, or of what ends a chunked body, as h11 takes: httptools alone would keep any number."""
_MOST_WAITING = 64
"""Requests of one connection that wait for the answers before theirs: uvicorn alone would read on."""


class Connection(HttpToolsProtocol):
    """Ignores offers of another protocol, and takes no endless heads and no endless row of requests.

    Offers: Java's client and `curl --http2` offer HTTP/2 by `Upgrade`, which a server may ignore (RFC 9110, 7.8). httptools
    ends the message at such a head, so that its body would pass for the next request: the head is read again without it.
    """

    _delivered = False
    _undelivered_bytes = 0
    _head_without_offer: bytes | None = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._delivered = False
        try:
            self._read(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
            return
        self._undelivered_bytes = 0 if self._delivered else self._undelivered_bytes + len(data)
        if self._undelivered_bytes > _MOST_UNDELIVERED:
            self._refuse(f"The head of a request has more than {_MOST_UNDELIVERED} bytes.")
        elif len(self.pipeline) > _MOST_WAITING:
            self.send_400_response(f"More than {_MOST_WAITING} requests wait for the answers before theirs.")

    def _read(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                assert self._head_without_offer is not None
                data = self._head_without_offer + data[offer.args[0] :]
                self._head_without_offer = None
                self.parser = httptools.HttpRequestParser(self)  # the old one may take the connection for closed

    def _refuse(self, why: str) -> None:
        """Answer 400 and close, after the answer to the request before, if that came whole."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            self.send_400_response(why)
        else:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")  # httptools makes a parser's error of it
        if self.parser.should_upgrade():
            request = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            kept = (b"%s: %s" % header for header in self.headers if header[0] != b"upgrade")
            self._head_without_offer = b"\r\n".join([request, *kept, b"", b""])
            return
        self._delivered = True
        super().on_headers_complete()
        self.headers = []  # uvicorn would add the fields that trail a body in chunks to the request's

    def on_body(self, body: bytes) -> None:
        self._delivered = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._head_without_offer is None:
            super().on_message_complete()

"""The clients of benchmarks/service.py, in a separate process: a closed loop over persistent connections.

Reads orders from stdin, one JSON object per line, and answers each with another. httptools on uvloop, both of which
come with uvicorn, costs a fraction of aiohttp: on two cores the clients' CPU time is taken from the server's.

    {"port": 8000, "request": "FILE", "clients": 32, "seconds": 2.0}

FILE holds one request, head and body, as it goes over the wire.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

_PATIENCE_S = 120.0


class _Connection(asyncio.Protocol):
    """One client: sends the next request once the previous answer is complete, until `deadline`."""

    def __init__(self, request: bytes, deadline: float) -> None:
        self._request, self._deadline = request, deadline
        self._parser: Any = None
        self._sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.statuses: Counter[int] = Counter()
        self.latencies_s: list[float] = []
        self.last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():  # the server closed it with a request under way
            self.statuses[0] += 1
            self.done.set_result(None)

    def on_message_complete(self) -> None:
        """httptools calls this when an answer is complete."""
        self.last = time.perf_counter()
        self.statuses[self._parser.get_status_code()] += 1
        self.latencies_s.append(self.last - self._sent)
        if self.last < self._deadline and self._parser.should_keep_alive():
            # Not from inside the parser: the next answer needs a new one.
            asyncio.get_running_loop().call_soon(self._send)
        else:
            self.done.set_result(None)
            self._transport.close()

    def _send(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def load(port: int, request: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Send requests for `seconds`, then wait for those under way: all of them count, and all the time they took."""
    loop = asyncio.get_running_loop()
    start, cpu = time.perf_counter(), time.process_time()
    made = [
        loop.create_connection(lambda: _Connection(request, start + seconds), "127.0.0.1", port) for _ in range(clients)
    ]
    connections = [connection for _, connection in await asyncio.gather(*made)]
    _, unanswered = await asyncio.wait([one.done for one in connections], timeout=seconds + _PATIENCE_S)
    statuses = sum((one.statuses for one in connections), Counter({0: len(unanswered)}))
    return {
        "statuses": {str(status): count for status, count in statuses.items() if count},
        "latencies_ms": [1000 * taken for one in connections for taken in one.latencies_s],
        "seconds": max(one.last for one in connections) - start,
        "cpu_s": time.process_time() - cpu,
    }


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            order = json.loads(line)
            request = Path(order["request"]).read_bytes()
            found = runner.run(load(order["port"], request, order["clients"], order["seconds"]))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

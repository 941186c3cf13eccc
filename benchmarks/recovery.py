"""How long a service on Ray leaves its clients without an answer when one of its processes is killed, behind either proxy.

    python benchmarks/recovery.py [--quick] [--kills N]

`jepakit serve` with two replicas runs behind HAProxy, then behind Ray's own Python proxy. Clients that do not retry send
one small image after another; after an answer other than 200, or none, they connect anew. Each kind of process is
killed N times (one of them, if there are several). Prints a Markdown table and one JSON object as the last line:

    longest pause   the longest time without any answer of 200 from the kill until 2 s after the process was replaced
    refused, lost   requests in that time that got another answer, or none
    replaced        until a new process of this kind runs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

import jepakit
from _service_servers import RAW, Request, Server, ServerError, jepakit_requests, jepakit_server, one_image, tell

VICTIMS = {
    "haproxy": ("haproxy", "ray::HAProxyManager", "ray::ServeController", "ray::ServeReplica"),
    "python": ("ray::ProxyActor", "ray::ServeController", "ray::ServeReplica"),
}
"""What is killed behind each proxy, by the program's name or the title of the process."""
CLIENTS = 4
_PATIENCE_S, _AFTER_S, _CALM_S = 120.0, 2.0, 3.0
_PAUSE_S = 0.02


class Answer(NamedTuple):
    """When a request ended, and its status; 0 without an answer."""

    at: float
    status: int


class Outage(NamedTuple):
    """What the clients saw of one kill."""

    longest_pause_s: float
    refused: int
    lost: int
    replaced_s: float


@asynccontextmanager
async def clients(port: int, request: Request) -> AsyncIterator[list[Answer]]:
    """Clients that send the request over and over during the block; yields their answers, which grow."""
    answers: list[Answer] = []

    async def run() -> None:
        while True:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE_S) as http:
                status = 200
                while status == 200:
                    status = 0
                    with suppress(httpx.TransportError):
                        answer = await http.post(request.path, content=request.body, headers=request.headers)
                        status = answer.status_code
                    answers.append(Answer(time.monotonic(), status))
            await asyncio.sleep(_PAUSE_S)

    tasks = [asyncio.create_task(run()) for _ in range(CLIENTS)]
    try:
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def outage(server: Server, victim: str, answers: list[Answer]) -> Outage:
    """Kill one of the server's processes and wait until it is replaced. Raises ServerError if it is not."""
    await asyncio.sleep(_CALM_S)
    before = await asyncio.to_thread(server.processes, victim)
    known = {process.pid for process in before}
    start = time.monotonic()
    before[0].kill()
    while {process.pid for process in await asyncio.to_thread(server.processes, victim)} <= known:
        if time.monotonic() > start + _PATIENCE_S:
            raise ServerError(f"{victim} was not replaced")
        await asyncio.sleep(0.05)
    replaced = time.monotonic()
    while not any(answer.status == 200 and answer.at > replaced + _AFTER_S for answer in answers):
        if time.monotonic() > replaced + _PATIENCE_S:
            raise ServerError(f"no answer after {victim} was killed")
        await asyncio.sleep(0.05)
    seen = [answer for answer in answers if answer.at >= start]
    good = [start, *(answer.at for answer in seen if answer.status == 200)]
    return Outage(
        max(later - earlier for earlier, later in pairwise(good)),
        sum(answer.status not in (0, 200) for answer in seen),
        sum(answer.status == 0 for answer in seen),
        replaced - start,
    )


async def outages(server: Server, proxy: str, request: Request, kills: int) -> dict[str, list[Outage]]:
    """Every kind of process killed so many times, in turns."""
    found: dict[str, list[Outage]] = {victim: [] for victim in VICTIMS[proxy]}
    async with clients(server.port, request) as answers:
        for number in range(kills):
            for victim, outages_of in found.items():
                tell(f"{proxy}: kill {number + 1} of {kills}, {victim}")
                outages_of.append(await outage(server, victim, answers))
    return found


def show(found: dict[str, dict[str, list[Outage]]]) -> None:
    print("| proxy | killed | longest pause, s: median (most) | refused | lost | replaced after, s |")
    print("|---|---|---|---|---|---|")
    for proxy, victims in found.items():
        for victim, seen in victims.items():
            pauses, refused, lost, replaced = np.array(seen).T
            print(
                f"| {proxy} | {victim} | {np.median(pauses):.2f} ({pauses.max():.2f}) | {refused.mean():.1f} | {lost.mean():.1f} "
                f"| {np.median(replaced):.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill of each process")
    parser.add_argument("--kills", type=int, help="kills of each process (5; 1 with --quick)")
    options = parser.parse_args()
    kills = options.kills or (1 if options.quick else 5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the servers are stopped too
    image, found = one_image(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = jepakit.export("vit_tiny_patch16_224:random", folder / "bundle", image_size=64)
        (expected,) = jepakit.load(bundle.path).embed([image], progress=False).vectors
        for proxy in VICTIMS:
            arguments = ("--replicas", "2", "--proxy", proxy)
            with jepakit_server(proxy, arguments, bundle.path, image, expected, folder) as server:
                found[proxy] = asyncio.run(outages(server, proxy, jepakit_requests(image)[RAW], kills))
    show(found)
    figures: dict[str, Any] = {
        proxy: {victim: [seen._asdict() for seen in all_of] for victim, all_of in victims.items()}
        for proxy, victims in found.items()
    }
    print(json.dumps({"kills": kills, "clients": CLIENTS, "proxies": figures}))


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(f"error: {error}")

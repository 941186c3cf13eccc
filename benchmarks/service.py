"""How much of the raw engine a service leaves, and how it stands beside other servers, in one run on one machine.

    python benchmarks/service.py [--quick] [--rounds N] [--only MODEL] [--peers DIR] [--provider cuda] [--replicas N] [--proxies]

The same image, graph and clients for all: the raw loop (decode, preprocess, ONNX Runtime, no HTTP), `jepakit serve`
with and without Ray (with --replicas on Ray with so many, with --proxies behind Ray's Python proxy, too), and with --peers FastAPI + ONNX Runtime, LitServe and
BentoML, each in an environment in DIR that is made where it is missing; all of them on the CPU, or all on one GPU. Every server gives the raw loop's vector before it is timed.

Blocks of a few seconds go round in random order, the raw loop beside every one of them; a block's images/s are compared
with those of the raw loop next to it. Servers stay up, stopped outside their own blocks. Prints Markdown tables, the goals and whether they
are met, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

import jepakit
from _blocks import Ratio, at_least, at_most, ratio
from _service_servers import (
    BENTOML,
    FASTAPI,
    IMAGE,
    IMAGES,
    LITSERVE,
    MANY,
    PEERS,
    RAW,
    Server,
    ServerError,
    Worker,
    empty_server,
    jepakit_requests,
    jepakit_server,
    make_environment,
    one_image,
    peer_server,
    tell,
)
from jepakit._machine import usable_cpus
from jepakit.inference.ort import import_ort

onnxruntime = import_ort()

RAY, NO_RAY = "jepakit on Ray", "jepakit --no-ray"
VARIANTS: dict[str, tuple[str, ...]] = {RAY: (), NO_RAY: ("--no-ray",)}
"""Options of `jepakit serve`, by their name in the tables."""
CLIENTS = (1, 8, 32)
MOST = CLIENTS[-1]
LONGER = 3
"""How many times longer blocks of 32 images per request or 32 clients are: cores idle at the end of a block."""


class ModelCase(NamedTuple):
    """One model, the requests made of the servers with it, the length of a block, and its goals."""

    backbone: str
    size: int
    seconds: float
    single_goal: dict[str, float]
    """Minimum share of the raw loop's speed, with single images from 32 clients."""
    ahead_of: dict[str, tuple[str, ...]]
    """Peers that a variant must outperform, with 8 and 32 clients."""


MODELS = {
    "ViT-Ti/16 at 64 px": ModelCase(
        "vit_tiny_patch16_224", 64, 1.5,
        {RAY: 0.60, NO_RAY: 0.80}, {RAY: (FASTAPI, BENTOML), NO_RAY: (FASTAPI, LITSERVE, BENTOML)},
    ),
    "ViT-S/16 at 224 px": ModelCase(
        "vit_small_patch16_224", 224, 3.0,
        {RAY: 0.95, NO_RAY: 0.95}, {RAY: (FASTAPI, LITSERVE, BENTOML), NO_RAY: (FASTAPI, LITSERVE, BENTOML)},
    ),
}  # fmt: skip
MANY_GOAL = 0.90
LATENCY_GOAL_MS = {RAY: 3.0, NO_RAY: 2.0}


class Cell(NamedTuple):
    """One line of the table."""

    server: str
    kind: str
    clients: int

    @property
    def length(self) -> int:
        """Length of its block, in multiples of a block whose requests are answered quickly."""
        return LONGER if self.kind == MANY or self.clients == MOST else 1


@dataclass
class Measured:
    """A cell's blocks, one per round."""

    images_per_s: list[float] = field(default_factory=list)
    raw_per_s: list[float] = field(default_factory=list)
    """Images/s of the raw loop's block next to each."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU time of all the server's processes per request."""
    client_cpu_ms: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    """Median of the raw call, measured before each block of one client with raw bytes."""
    latencies_ms: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    """Answers other than 200, by status; 0 means no answer."""

    def share(self) -> Ratio:
        """The share of the raw loop's images/s."""
        return ratio(self.images_per_s, self.raw_per_s)


class Bench:
    """One model's servers, all running, and the blocks measured on them."""

    def __init__(self, case: ModelCase, servers: list[Server], raw: Worker, load: Worker, *, quick: bool) -> None:
        self._servers, self._raw, self._load = {server.name: server for server in servers}, raw, load
        self._seconds = 1.0 if quick else case.seconds
        self.raw_cpu_ms: list[float] = []
        """CPU time of the raw loop per image."""
        self.cells: dict[Cell, Measured] = {}
        for server in servers:
            wanted = [(kind, clients) for kind in server.wires for clients in CLIENTS]
            if quick:
                wanted = [(RAW, 1), (RAW, MOST), *([] if server.name in PEERS else [(MANY, MOST)])]
            self.cells |= {Cell(server.name, kind, clients): Measured() for kind, clients in wanted}

    def idle(self, seconds: float) -> dict[str, float]:
        """Cores that each server uses while idle."""
        before = {name: server.cpu_s() for name, server in self._servers.items()}
        time.sleep(seconds)
        return {name: (server.cpu_s() - before[name]) / seconds for name, server in self._servers.items()}

    def warm_up(self) -> None:
        """Load every server once, uncounted; then pause them all: each runs only during its own blocks."""
        for server in self._servers.values():
            self._ask(server, RAW, MOST, self._seconds)
            server.pause()

    def round(self, random: np.random.Generator) -> None:
        """Measure every cell once, in random order, each next to a block of the raw loop."""
        order = list(self.cells)
        order = [order[place] for place in random.permutation(len(order))]
        before = self._raw_rate()
        for place, cell in enumerate(order):
            self._block(cell)
            # Two cells between two blocks of the raw loop: one before the first, the other after the second.
            if place % 2 or place == len(order) - 1:
                after = self._raw_rate()
                self.cells[cell].raw_per_s.append(after)
                before = after
            else:
                self.cells[cell].raw_per_s.append(before)

    def _raw_rate(self) -> float:
        found = self._raw.ask(do="loop", seconds=self._seconds)
        self.raw_cpu_ms.append(1000 * found["cpu_s"] / found["images"])
        return float(found["images"] / found["seconds"])

    def _block(self, cell: Cell) -> None:
        measured, server = self.cells[cell], self._servers[cell.server]
        if cell.clients == 1 and cell.kind == RAW:
            measured.call_ms.append(
                float(np.median(self._raw.ask(do="call", seconds=self._seconds / 3)["latencies_ms"]))
            )
        with server.awake():
            cpu = server.cpu_s()
            found = self._ask(server, cell.kind, cell.clients, self._seconds * cell.length)
            cpu = server.cpu_s() - cpu
        good, asked = found["statuses"].pop("200", 0), len(found["latencies_ms"])
        if not good:
            raise ServerError(
                f"{cell.server} answered no request of {cell.kind} from {cell.clients} clients: {found['statuses']}"
            )
        measured.failed.update(found["statuses"])
        measured.images_per_s.append(good * IMAGES[cell.kind] / found["seconds"])
        measured.cpu_ms.append(1000 * cpu / asked)
        measured.client_cpu_ms.append(1000 * found["cpu_s"] / asked)
        measured.latencies_ms += found["latencies_ms"]
        measured.p50_ms.append(float(np.median(found["latencies_ms"])))

    def _ask(self, server: Server, kind: str, clients: int, seconds: float) -> Any:
        return self._load.ask(port=server.port, request=str(server.wires[kind]), clients=clients, seconds=seconds)


class Goal(NamedTuple):
    """What was promised, what was measured, and whether the goal is met."""

    what: str
    figure: str
    verdict: str


def judged(what: str, found: Ratio, goal: float) -> Goal:
    """Whether the ratio is at least `goal`, judged by its interval."""
    return Goal(f"{what}: at least {goal:.2f}", str(found), at_least(goal, found.low, found.high))


def goals(case: ModelCase, cells: dict[Cell, Measured], variants: list[str], peers: list[str]) -> list[Goal]:
    """Every goal that the measured cells can decide."""
    found = []
    for variant in variants:
        if many := cells.get(Cell(variant, MANY, MOST)):
            found.append(
                judged(f"{variant}, {MANY} a request, {MOST} clients, of the raw loop", many.share(), MANY_GOAL)
            )
        single = cells[Cell(variant, RAW, MOST)].share()
        found.append(
            judged(f"{variant}, {RAW}, {MOST} clients, of the raw loop", single, case.single_goal[goals_of(variant)])
        )
        found.append(latency_goal(variant, cells[Cell(variant, RAW, 1)]))
        for peer in peers:
            for clients in CLIENTS[1:]:
                ours, theirs = cells.get(Cell(variant, RAW, clients)), cells.get(Cell(peer, RAW, clients))
                if ours is None or theirs is None:
                    continue
                times = ratio(shares(ours), shares(theirs))
                what = f"{variant}, {RAW}, {clients} clients, over {peer}"
                promised = peer in case.ahead_of[goals_of(variant)]
                found.append(judged(what, times, 1.0) if promised else Goal(what, str(times), "published, no goal"))
    return found


def goals_of(variant: str) -> str:
    """The variant whose goals apply to this one."""
    return NO_RAY if variant == NO_RAY else RAY


def shares(measured: Measured) -> list[float]:
    """Shares of the raw loop next to each block, used to compare servers: a slow minute counts against neither."""
    return [images / raw for images, raw in zip(measured.images_per_s, measured.raw_per_s, strict=True)]


def latency_goal(variant: str, one: Measured) -> Goal:
    """How much longer one client waits than the raw call takes, by the medians of each round."""
    extra = [ours - call for ours, call in zip(one.p50_ms, one.call_ms, strict=True)]
    draws = np.random.default_rng(0).choice(extra, (4000, len(extra)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    goal = LATENCY_GOAL_MS[goals_of(variant)]
    figure = f"{np.median(extra):.1f} [{low:.1f}, {high:.1f}] ms"
    what = f"{variant}, one client, p50 above the raw call: at most {goal:g} ms"
    return Goal(what, figure, at_most(goal, low, high))


def figures(measured: Measured) -> dict[str, Any]:
    """A cell's numbers for the table and the last line."""
    return {
        "images_per_s": float(np.median(measured.images_per_s)),
        "share_of_raw": measured.share()._asdict(),
        "p50_ms": float(np.percentile(measured.latencies_ms, 50)),
        "p99_ms": float(np.percentile(measured.latencies_ms, 99)),
        "cpu_ms_per_request": float(np.median(measured.cpu_ms)),
        "client_cpu_ms_per_request": float(np.median(measured.client_cpu_ms)),
        "requests": len(measured.latencies_ms),
        "failed": dict(measured.failed),
        "blocks": {
            "images_per_s": measured.images_per_s,
            "raw_per_s": measured.raw_per_s,
            "p50_ms": measured.p50_ms,
            "call_p50_ms": measured.call_ms,
        },
    }


def show(name: str, found: dict[str, Any]) -> None:
    """Print one model's tables."""
    raw = found["raw"]
    print(
        f"\n### {name}\n\nRaw loop: {raw['images_per_s']:.0f} images/s and {raw['cpu_ms_per_image']:.2f} CPU ms an image ({raw['workers_told']}); one image alone {raw['call_p50_ms']:.1f} ms. "
        f"CPU that idle servers take, of a core: {', '.join(f'{server} {cores:.1%}' for server, cores in found['idle_cores'].items())}.\n"
    )
    print("| server | request | clients | images/s | of the raw loop | p50 ms | p99 ms | CPU ms a request | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in found["cells"]:
        share = Ratio(**row["share_of_raw"])
        failed = ", ".join(f"{count} × {status}" for status, count in row["failed"].items()) or "0"
        print(
            f"| {row['server']} | {row['request']} | {row['clients']} | {row['images_per_s']:.0f} | {share} | {row['p50_ms']:.1f} "
            f"| {row['p99_ms']:.1f} | {row['cpu_ms_per_request']:.1f} | {failed} |"
        )
    print("\n| goal | measured | |\n|---|---|---|")
    for goal in found["goals"]:
        print(f"| {goal['what']} | {goal['figure']} | {goal['verdict']} |")


def model_figures(
    case: ModelCase,
    image: bytes,
    peers: dict[str, str],
    environments: Path | None,
    load: Worker,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Start all servers with one model, measure, stop them."""
    variants = VARIANTS | options.more_on_ray
    bundle = jepakit.export(f"{case.backbone}:random", folder / "bundle", image_size=case.size)
    (folder / "image.jpg").write_bytes(image)
    with ExitStack() as stack:
        raw = stack.enter_context(Worker("_service_raw.py", bundle.path, folder / "image.jpg", options.provider))
        tell("starting the servers")
        chosen = raw.ask(do="choose", seconds=0.1 if options.quick else 0.3)
        expected = np.array(raw.ask(do="vector"), np.float32)
        servers = [
            stack.enter_context(
                jepakit_server(name, (*arguments, "--provider", options.provider), bundle.path, image, expected, folder)
            )
            for name, arguments in variants.items()
        ]
        for name in peers:
            assert environments is not None
            graph = bundle.path / "model.onnx"
            servers.append(
                stack.enter_context(peer_server(name, environments, graph, options.provider, image, expected, folder))
            )
        bench = Bench(case, servers, raw, load, quick=options.quick)
        idle = bench.idle(3.0)
        bench.warm_up()
        random = np.random.default_rng(0)
        for number in range(options.rounds):
            tell(f"round {number + 1} of {options.rounds}")
            bench.round(random)
        tell("stopping the servers")
    cells = bench.cells
    workers, threads, batch = chosen["way"]
    rates = [rate for measured in cells.values() for rate in measured.raw_per_s]
    calls = [call for measured in cells.values() for call in measured.call_ms]
    return {
        "raw": {
            "images_per_s": float(np.median(rates)),
            "cpu_ms_per_image": float(np.median(bench.raw_cpu_ms)),
            "call_p50_ms": float(np.median(calls)),
            **chosen,
            "workers_told": f"{workers} workers × {threads} threads, batches of {batch}",
        },
        "idle_cores": idle,
        "cells": [
            {"server": cell.server, "request": cell.kind, "clients": cell.clients, **figures(measured)}
            for cell, measured in cells.items()
        ],
        "goals": [goal._asdict() for goal in goals(case, cells, list(variants), list(peers))],
    }


def clients_cost(load: Worker, image: bytes, folder: Path) -> dict[str, float]:
    """CPU milliseconds that the clients themselves take per request, measured with a server that does nothing."""
    wire = folder / "empty.http"
    wire.write_bytes(jepakit_requests(image)[RAW].wire())
    with empty_server(768) as port:
        found = load.ask(port=port, request=str(wire), clients=MOST, seconds=1.0)
    requests = len(found["latencies_ms"])
    return {"cpu_ms_per_request": 1000 * found["cpu_s"] / requests, "requests_per_s": requests / found["seconds"]}


def busy_cores() -> float:
    """Cores in use while this program only waits: 0 on a quiet machine."""
    return float(psutil.cpu_percent(2.0)) / 100 * (psutil.cpu_count() or 1)


def ready_peers(environments: Path | None) -> dict[str, str]:
    """Versions of the peers that can be measured; prints which are left out, and why."""
    if environments is None:
        print(f"left out without --peers DIR: {', '.join(PEERS)}")
        return {}
    versions = {}
    for name in PEERS:
        try:
            versions[name] = make_environment(environments, name)
        except ServerError as reason:
            print(f"left out: {reason}")
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the small model alone, few cells, two rounds of 1 s blocks"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each cell (5; 2 with --quick)")
    parser.add_argument("--only", action="append", choices=list(MODELS), help="one model alone; repeatable")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="environments of the peers, made where missing")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu", help="what all of them compute on [cpu]")
    parser.add_argument("--replicas", type=int, metavar="N", help="`jepakit serve` on Ray with N replicas beside one")
    parser.add_argument("--proxies", action="store_true", help="`jepakit serve` behind Ray's Python proxy, too")
    options = parser.parse_args()
    options.more_on_ray = {
        f"{RAY}, {words}": arguments
        for wanted, words, arguments in (
            (options.replicas, f"{options.replicas} replicas", ("--replicas", str(options.replicas))),
            (options.proxies, "Python proxy", ("--proxy", "python")),
        )
        if wanted
    }
    options.rounds = options.rounds or (2 if options.quick else 5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the servers are stopped too
    image, peers = one_image(), ready_peers(options.peers)
    results: dict[str, Any] = {
        "image": f"{IMAGE}, {len(image)} bytes",
        "peers": peers,
        "cores": usable_cpus(),
        "rounds": options.rounds,
        "provider": options.provider,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "others_before": busy_cores(),
    }
    with tempfile.TemporaryDirectory() as name, Worker("_service_load.py") as load:
        results["clients"] = cost = clients_cost(load, image, Path(name))
        print(
            f"{results['image']}; {usable_cpus()} cores; the clients take "
            f"{cost['cpu_ms_per_request']:.3f} CPU ms a request by themselves ({cost['requests_per_s']:.0f}/s from a server that does nothing)"
        )
        results["models"] = {}
        for model in options.only or list(MODELS)[: 1 if options.quick else None]:
            folder = Path(name, str(MODELS[model].size))
            folder.mkdir()
            found = model_figures(MODELS[model], image, peers, options.peers, load, folder, options)
            results["models"][model] = found
            show(model, found)
    results["others_after"] = busy_cores()
    print(
        f"\nOther work took {results['others_before']:.2f} cores before the run and {results['others_after']:.2f} after it."
    )
    print(json.dumps(results))


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(f"error: {error}")

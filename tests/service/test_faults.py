"""What happens under load when a process is killed or the service is stopped, overloaded, kept busy or updated.

Every test starts `jepakit serve` from the command line and queries it with the client that users have.
JEPAKIT_SOAK_S sets the seconds of the soak (30).
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import jepakit
from jepakit.bundles.manifest import Pooling
from tests.test_pipeline import jepakit_cli, serving

from .conftest import picture
from .load import RECOVERY_S, Load, alike, processes, wait_until

pytestmark = pytest.mark.slow

SOAK_S = float(os.environ.get("JEPAKIT_SOAK_S", "30"))
FLAT_MB = 10.0
"""By how much memory may grow in the last two thirds of a soak, by its line of least squares."""
IMAGES = [picture(seed) for seed in range(40)]
"""More than one request of the client's."""
RAY, NO_RAY = ("--replicas", "2"), ("--no-ray",)
PYTHON_PROXY = (*RAY, "--proxy", "python")
MODES = pytest.mark.parametrize("options", [RAY, NO_RAY], ids=["ray", "no-ray"])


def service_process() -> psutil.Process:
    """`jepakit serve` itself."""
    (found,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
    return found


@pytest.fixture(scope="module")
def right(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """What the bundle computes in this process; rows far enough apart that a change of order is noticed."""
    found = jepakit.load(bundle).embed(IMAGES, progress=False)
    assert not any(alike(found.vectors[[place]], found.vectors[[place + 1]]) for place in range(len(IMAGES) - 1))
    return {found.model_id: found.vectors}


@pytest.mark.parametrize(
    ("proxy", "victim"),
    [
        ("python", "ray::ServeReplica"),
        ("python", "ray::ProxyActor"),
        ("python", "ray::ServeController"),
        ("haproxy", "ray::ServeReplica"),
        ("haproxy", "ray::HAProxyManager"),
        ("haproxy", "ray::ServeController"),
        ("haproxy", "haproxy"),
    ],
)
def test_a_killed_process_is_replaced_and_no_image_is_lost(
    proxy: str, victim: str, bundle: Path, right: dict[str, NDArray[np.float32]]
) -> None:
    with serving(bundle, *RAY, "--proxy", proxy) as url, Load(url, IMAGES, right) as load:
        load.wait_for(2)
        before = processes(victim)
        before[0].kill()
        load.wait_for(5)
        known = {process.pid for process in before}
        wait_until(lambda: any(one.pid not in known for one in processes(victim)), f"{victim} was not replaced")
        load.wait_for(2)
    assert load.failures == []


class Answer(NamedTuple):
    """One request and what came of it; `status` 0: no answer."""

    asked: float
    answered: float
    status: int
    retry_after: str | None
    body: bytes


async def post(http: httpx.AsyncClient, images: list[bytes]) -> Answer:
    """Send one request, without retries."""
    asked = time.monotonic()
    try:
        response = await http.post(
            "/v1/embeddings",
            files=[("files", (str(place), image)) for place, image in enumerate(images)],
            headers={"Accept": "application/octet-stream"},
        )
    except httpx.TransportError:
        return Answer(asked, time.monotonic(), 0, None, b"")
    return Answer(asked, time.monotonic(), response.status_code, response.headers.get("retry-after"), response.content)


def patient(url: str) -> httpx.AsyncClient:
    """A client with no limit of its own on connections, which would hold requests back."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=RECOVERY_S, limits=limits)


async def closed_loop(ask: Callable[[], Awaitable[Answer]], clients: int, seconds: float) -> list[Answer]:
    """`clients` send one request after another for a time; those under way at the end are awaited."""
    end = time.monotonic() + seconds

    async def one() -> list[Answer]:
        answers = []
        while time.monotonic() < end:
            answers.append(await ask())
        return answers

    return [answer for answers in await asyncio.gather(*(one() for _ in range(clients))) for answer in answers]


async def open_loop(ask: Callable[[], Awaitable[Answer]], per_s: float, seconds: float) -> list[Answer]:
    """Send a request every 1 / per_s seconds, whatever happens to the earlier ones."""
    start, asked = time.monotonic(), []
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, start + number / per_s - time.monotonic()))
        asked.append(asyncio.ensure_future(ask()))
    return list(await asyncio.gather(*asked))


def good_per_s(answers: list[Answer]) -> float:
    """Answers with status 200 per second, from the first request to the last such answer."""
    good = [answer for answer in answers if answer.status == 200]
    return len(good) / (max(answer.answered for answer in good) - min(answer.asked for answer in answers))


@pytest.mark.parametrize(
    ("options", "number", "to_all"),
    [
        (RAY, signal.SIGTERM, False),
        (RAY, signal.SIGTERM, True),
        (RAY, signal.SIGHUP, False),
        (PYTHON_PROXY, signal.SIGTERM, False),
        (NO_RAY, signal.SIGTERM, False),
        (NO_RAY, signal.SIGHUP, False),
    ],
    ids=["ray", "ray, its group", "ray, SIGHUP", "ray, python proxy", "no-ray", "no-ray, SIGHUP"],
)
def test_a_signal_under_load_answers_what_is_in_flight_and_ends_with_0(
    options: tuple[str, ...], number: int, to_all: bool, bundle: Path, right: dict[str, NDArray[np.float32]]
) -> None:
    margin_s = 0.5  # a request may be on its way for so long, on a busy machine, before the service has it
    images = 5 * IMAGES
    expected = np.tile(next(iter(right.values())), (5, 1))
    with serving(bundle, *options, "--set", "max_waiting=4096") as url:
        process = service_process()

        async def run() -> tuple[list[Answer], float]:
            under_way: list[float] = []
            async with patient(url) as http:

                async def ask() -> Answer:
                    under_way.append(since := time.monotonic())
                    answer = await post(http, images)
                    under_way.remove(since)
                    return answer

                asking = asyncio.ensure_future(closed_loop(ask, 8, 6.0))
                await asyncio.sleep(3.0)
                while not asking.done() and min(under_way, default=math.inf) > time.monotonic() - margin_s:
                    await asyncio.sleep(0.01)
                stopped = time.monotonic()
                (os.killpg if to_all else os.kill)(process.pid, number)
                return await asking, stopped

        answers, stopped = asyncio.run(run())
        # Ended, and left for `serving` to read its exit code: a second SIGTERM would meet Python without its handlers.
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, "the service does not end")
    accepted = [answer for answer in answers if answer.asked < stopped - margin_s]
    assert any(answer.answered > stopped for answer in accepted), "nothing was in flight: the requests are too short"
    assert {answer.status for answer in accepted} == {200}
    assert all(alike(np.frombuffer(one.body, "<f4").reshape(expected.shape), expected) for one in accepted)
    assert {answer.status for answer in answers} <= {200, 503, 0}
    assert all(answer.retry_after for answer in answers if answer.status == 503)


@pytest.fixture(scope="module")
def heavy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so heavy that refusing costs little: on two cores, refusals compete with the work."""
    out = tmp_path_factory.mktemp("heavy") / "small"
    jepakit.export("vit_small_patch16_224:random", out, image_size=224)
    return out


@pytest.mark.parametrize("options", [(), NO_RAY], ids=["ray", "no-ray"])
def test_ten_times_too_much_is_refused_with_429_and_the_rest_served_as_fast_as_before(
    options: tuple[str, ...], heavy_bundle: Path
) -> None:
    images = [picture(seed, kind="JPEG") for seed in range(64)]

    async def run(url: str) -> tuple[list[float], list[list[Answer]]]:
        """Peaks, and the floods between them: the machine's own speed changes from minute to minute."""
        async with patient(url) as http:

            async def ask() -> Answer:
                return await post(http, images)

            await ask()
            peaks, floods = [good_per_s(await closed_loop(ask, 3, 12))], []
            for _ in range(3):
                floods.append(await open_loop(ask, 10 * peaks[-1], 15))
                peaks.append(good_per_s(await closed_loop(ask, 3, 12)))
            return peaks, floods

    with serving(heavy_bundle, *options, "--set", "max_waiting=256") as url:
        peaks, floods = asyncio.run(run(url))
    for flood in floods:
        assert {answer.status for answer in flood} == {200, 429}
        assert all(float(answer.retry_after or "nan") > 0 for answer in flood if answer.status == 429)
    shares = [
        2 * good_per_s(flood) / (before + after)
        for flood, before, after in zip(floods, peaks[:-1], peaks[1:], strict=True)
    ]
    print(f"of the peak beside ten times too much: {', '.join(f'{share:.2f}' for share in shares)}")
    assert np.median(shares) >= 0.9, (shares, peaks)


@pytest.fixture(scope="module")
def busy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps the service busy, not its client: with the smallest one, asking costs more than computing."""
    out = tmp_path_factory.mktemp("busy") / "tiny"
    jepakit.export("vit_tiny_patch16_224:random", out, image_size=64)
    return out


@MODES
def test_a_soak_at_80_percent_gives_no_error_and_takes_no_more_memory(
    options: tuple[str, ...], busy_bundle: Path
) -> None:
    images = IMAGES[:8]
    expected = jepakit.load(busy_bundle).embed(images, progress=False).vectors

    async def run(url: str, resident: list[tuple[float, float]]) -> list[Answer]:
        async with jepakit.AsyncClient(url, deadline_s=RECOVERY_S) as client:

            async def ask() -> Answer:
                asked = time.monotonic()
                found = await client.embed(images, progress=False)
                status = 200 if alike(found.vectors, expected) else 0
                return Answer(asked, time.monotonic(), status, None, b"")

            await closed_loop(ask, 8, 3)
            peak = good_per_s(await closed_loop(ask, 8, 5))
            watching = asyncio.ensure_future(watch(resident))
            answers = await open_loop(ask, 0.8 * peak, SOAK_S)
            watching.cancel()
            return answers

    resident: list[tuple[float, float]] = []
    with serving(busy_bundle, *options) as url:
        answers = asyncio.run(run(url, resident))
    assert {answer.status for answer in answers} == {200}
    seconds, mb = np.array(resident[len(resident) // 3 :]).T  # the first third fills pools and caches
    per_hour = 3600 * float(np.polyfit(seconds, mb, 1)[0])
    print(f"resident: {np.median(mb):.0f} MB, {per_hour:+.0f} MB an hour over {seconds[-1] - seconds[0]:.0f} s")
    # An allocator moves some megabytes to and fro, which in a short soak is much in an hour.
    assert per_hour * (seconds[-1] - seconds[0]) / 3600 <= FLAT_MB, f"{per_hour:+.0f} MB an hour"


async def watch(resident: list[tuple[float, float]]) -> None:
    """The time, and the resident memory of all processes of the service in MB, twice a second."""
    service = service_process()
    while True:
        resident.append((time.monotonic(), sum(memory_mb([service, *service.children(recursive=True)]))))
        await asyncio.sleep(0.5)


def memory_mb(family: list[psutil.Process]) -> Iterator[float]:
    for process in family:
        try:
            yield process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue


@pytest.mark.parametrize("options", [RAY, PYTHON_PROXY, NO_RAY], ids=["ray", "ray, python proxy", "no-ray"])
def test_a_new_model_is_deployed_under_load_without_a_failed_request(options: tuple[str, ...], tmp_path: Path) -> None:
    images = IMAGES[:32]  # one request a call: no call can meet both models

    def exported(out: Path, pooling: Pooling) -> tuple[str, NDArray[np.float32]]:
        jepakit.export("test_vit:random", out, image_size=32, pooling=pooling, name="tiny")
        found = jepakit.load(out).embed(images, progress=False)
        return found.model_id, found.vectors

    watched, bundle = tmp_path / "watched", tmp_path / "new"
    old, old_vectors = exported(watched / "tiny", "cls")
    new, new_vectors = exported(bundle, "mean")
    assert old != new
    with serving(watched, *options) as url, Load(url, images, {old: old_vectors, new: new_vectors}) as load:
        load.wait_for(2)
        assert load.newest() == {old}
        deployed = jepakit_cli("deploy", bundle, watched, "--url", url)
        assert deployed.returncode == 0, deployed.stderr
        wait_until(lambda: load.newest() == {new}, "the new model does not answer")
        load.wait_for(3)
        assert load.newest() == {new}
    assert load.failures == []

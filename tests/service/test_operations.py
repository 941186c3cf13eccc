"""What operators see: readiness that cannot lie, metrics of the whole deployment, logs and traces that hold no content."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import errno
import gc
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import jepakit
from jepakit import _machine
from jepakit.images import Pixels
from jepakit_service import listeners, memory
from jepakit_service import replica as replica_module
from jepakit_service.faults import ApiError
from jepakit_service.http import answers, oip_routes, operations
from jepakit_service.http.api import build_app
from jepakit_service.http.keys import new_key
from jepakit_service.listeners import free_port, open_listeners
from jepakit_service.models import heartbeat
from jepakit_service.models import model as models
from jepakit_service.models.sharing import Shared
from jepakit_service.replica import Replica, Report, Round
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry import logs, tracing
from jepakit_service.telemetry.metrics import merge

from .conftest import Spans, picture, running
from .load import wait_until

PNG = {"Content-Type": "image/png"}


def settings(bundle: Path, **more: Any) -> ServeSettings:
    return ServeSettings(bundles=(str(bundle),), port=1, **more)


class Deployment:
    """Two replicas in one process; `silent` ones do not answer, and if `frozen` no reports arrive at all."""

    def __init__(self, bundle: Path) -> None:
        self.silent: set[str] = set()
        self.frozen = False
        self.replicas = [Replica(settings(bundle, replicas=2), self.ask_all) for _ in range(2)]

    async def ask_all(self, with_metrics: bool) -> list[Report | None]:
        if self.frozen:
            return [None]
        return [await replica.report(with_metrics) for replica in self.replicas if replica.id not in self.silent]

    async def get(self, path: str) -> httpx.Response:
        """Send a GET to the first replica."""
        app = FastAPI()
        app.include_router(operations.router(self.replicas[0]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await http.get(path)


@pytest.fixture(scope="module")
def deployment(bundle: Path) -> Deployment:
    return Deployment(bundle)


def test_readiness_and_metrics_speak_for_the_deployment(deployment: Deployment) -> None:
    async def go() -> None:
        first, second = deployment.replicas
        assert (await deployment.get("/readyz")).json()["status"] == "ready"
        await second.engine.answer(second.registry.find("tiny"), [picture(0), b"no image"])
        text = (await deployment.get("/metrics")).text
        assert f'jepakit_images_total{{model="tiny",replica="{second.id}",result="ok"}} 1.0' in text
        assert f'jepakit_images_total{{model="tiny",replica="{second.id}",result="error"}} 1.0' in text
        assert f'jepakit_ready{{replica="{first.id}"}} 1.0' in text
        assert len(re.findall(r"^# TYPE jepakit_images_total counter", text, re.MULTILINE)) == 1

        deployment.silent.add(second.id)
        degraded = (await deployment.get("/readyz")).json()
        assert (degraded["status"], degraded["replicas_ready"]) == ("degraded", 1)
        deployment.silent.clear()
        deployment.frozen = True
        assert (await deployment.get("/readyz")).json() == degraded
        assert f'jepakit_ready{{replica="{first.id}"}} 1.0' in (await deployment.get("/metrics")).text
        assert await first._states() == [None], "a replica that says nothing agrees to nothing"
        deployment.frozen = False

    asyncio.run(go())


def hang(model: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on, no batch of the model ends before the event is set or 10 s have passed."""
    released, run = threading.Event(), model._batcher._run
    for way in ("_run", "_whole"):
        monkeypatch.setattr(model._batcher, way, lambda images: (released.wait(10), run(images))[1])
    return released


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers wait for the heartbeat, however busy the machine is."""
    monkeypatch.setattr(heartbeat, "_PATIENCE_S", 30.0)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept no batch as proof, however slow the model: every heartbeat sends an image of its own."""
    monkeypatch.setattr(heartbeat, "_FRESH_S", 0.0)
    monkeypatch.setattr(heartbeat, "_BATCHES", 0)


def test_a_model_that_hangs_is_not_ready(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    replica = Replica(settings(bundle))
    (model,) = replica.registry

    async def go() -> None:
        assert (await replica.report()).faults == ()
        released = hang(model, monkeypatch)
        monkeypatch.setattr(heartbeat, "_TIMEOUT_S", 0.3)
        (fault,) = (await replica.report()).faults
        assert "has run no batch" in fault
        with pytest.raises(ApiError) as caught:
            operations._readiness([await replica.report()], wanted=1)
        assert caught.value.status == 503
        app = FastAPI()
        app.include_router(oip_routes.router(replica))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            for path in ("health/ready", "models/tiny/ready", f"models/tiny/versions/{model.model_id}/ready"):
                with pytest.raises(ApiError) as caught:
                    await http.get(f"/v2/{path}")
                assert (caught.value.status, caught.value.code) == (503, "not_ready")
        released.set()
        monkeypatch.setattr(heartbeat, "_TIMEOUT_S", 10.0)
        assert (await replica.report()).faults == ()

    asyncio.run(go())


def test_a_model_whose_images_take_long_to_decode_is_busy_and_one_that_hangs_is_not(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once(monkeypatch)
    for name, seconds in (("_FRESH_S", 2.0), ("_TIMEOUT_S", 2.1)):
        monkeypatch.setattr(heartbeat, name, seconds)
    (model,) = Replica(settings(bundle)).registry
    released = hang(model, monkeypatch)

    async def go() -> None:
        model.heartbeat._ran = model.heartbeat._right = time.monotonic() - 60
        beat = asyncio.create_task(model.heartbeat())
        while not beat.done():
            model.heartbeat.decoded(0.3)
            await asyncio.sleep(0.02)
        assert beat.result() is None
        assert "has run no batch" in (await model.heartbeat() or "")
        released.set()
        await asyncio.sleep(0.2)

    asyncio.run(go())


def test_what_is_shared_is_no_part_of_the_request_that_began_it() -> None:
    """Ray ends what belongs to a request when its client leaves, and the others still wait for it."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    async def work() -> str:
        return request.get()

    async def go() -> str:
        request.set("the first asker's")
        return await Shared(work)()

    assert asyncio.run(go()) == "none"


def test_no_request_is_in_flight_beside_the_one_for_the_metrics(service: str) -> None:
    """An upgrade waits for this."""
    answer = httpx.get(f"{service}/metrics")
    assert re.search(r'^jepakit_in_flight_requests\{replica="\w+"\} 0\.0$', answer.text, re.MULTILINE)


def test_the_metrics_count_each_stage_of_a_request_and_name_what_runs(service: str, bundle: Path) -> None:
    def samples() -> list[Sample]:
        text = httpx.get(f"{service}/metrics").text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def counts() -> dict[tuple[str, str], float]:
        return {
            (one.name, one.labels.get("stage") or one.labels.get("route", "")): one.value
            for one in samples()
            if one.name.endswith("_count")
        }

    counted = [
        *(("jepakit_stage_seconds_count", stage) for stage in ("decode", "queue", "inference")),
        ("jepakit_batch_size_count", ""),
        ("jepakit_request_seconds_count", "/v1/embeddings"),
    ]
    before = counts()
    assert httpx.post(f"{service}/v1/embeddings", content=picture(0), headers=PNG).status_code == 200
    after = counts()
    assert [name for name in counted if after[name] <= before.get(name, 0.0)] == []
    (named,) = (one.labels for one in samples() if one.name == "jepakit_model_info")
    manifest = jepakit.open_bundle(bundle).manifest
    assert named.pop("replica")
    assert named == {
        "model": "tiny",
        "model_id": manifest.model_id,
        "digest": manifest.digest,
        "precision": "fp32",
        "provider": "cpu",
    }


def test_one_process_is_all_there_is_without_ray(bundle: Path) -> None:
    with running(settings(bundle, ray=False)) as url:
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"


def test_a_large_answer_is_sent_as_it_is_taken_and_not_waited_with_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(message: Any) -> None:
        await asyncio.sleep(0 if message["type"] == "http.response.start" else 60)

    body = bytes(range(256)) * 1000
    asyncio.run(answers.send_whole(send, 200, body, "application/octet-stream", {}))
    start, *parts = sent
    assert dict(start["headers"])[b"content-length"] == b"256000"
    assert b"".join(part["body"] for part in parts) == body
    assert [part["more_body"] for part in parts] == [True, True, True, False]
    monkeypatch.setattr(answers, "_TAKEN_S", 0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(answers.send_whole(never, 200, body, "application/octet-stream", {}))


def test_metrics_are_collected_for_those_who_ask_for_them_alone(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many models it takes long, and everybody may ask whether the service is ready."""

    def collected() -> NoReturn:
        raise AssertionError

    async def go() -> None:
        with monkeypatch.context() as patch:
            for replica in deployment.replicas:
                patch.setattr(replica.metrics, "families", collected)
            for path in ("/readyz", "/v1/models"):
                assert (await deployment.get(path)).status_code == 200
        assert (await deployment.get("/metrics")).text.count("\njepakit_model_info{") == 2

    asyncio.run(go())


def test_however_many_ask_one_heartbeat_is_taken_at_a_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    replica = Replica(settings(bundle))
    (model,) = replica.registry
    run, ran = model._batcher._run, []

    def counted(images: Pixels) -> NDArray[np.float32]:
        ran.append(len(images))
        return run(images)

    monkeypatch.setattr(model._batcher, "_run", counted)
    monkeypatch.setattr(model._batcher, "_whole", counted)

    async def go() -> None:
        asked = asyncio.gather(*(replica.reports() for _ in range(50)))
        assert set(await asyncio.gather(*(model.heartbeat() for _ in range(50)))) == {None}
        assert all(report.faults == () for (report,), _ in await asked)
        assert ran == [1]
        await replica.reports()
        assert ran == [1, 1], "the next one is asked anew"

    asyncio.run(go())


def test_a_model_that_works_off_a_backlog_is_not_dead(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(settings(bundle))
    (model,) = replica.registry
    monkeypatch.setattr(model.heartbeat, "_ran", 0.0)

    async def behind_others(images: object, timeout_s: float) -> None:
        model.heartbeat.ran(1, [0.0], 0.1)
        raise TimeoutError

    monkeypatch.setattr(model, "embed", behind_others)
    assert asyncio.run(model.heartbeat()) is None


def test_a_slow_model_is_given_the_time_of_some_of_its_batches(bundle: Path) -> None:
    asked: list[float] = []

    async def behind_others(timeout_s: float) -> Any:
        asked.append(timeout_s)
        raise TimeoutError

    def beat(batch_s: float) -> heartbeat.Heartbeat:
        made = heartbeat.Heartbeat("slow", behind_others, np.zeros(2, np.float32), 1e-3, batch_s, observer)
        made._ran = made._right = made._decoded = time.monotonic() - 50
        return made

    (model,) = Replica(settings(bundle)).registry
    observer = model.metrics
    assert asyncio.run(beat(20.0)()) is None, "the batches before it take a minute"
    assert "has run no batch for 50 s" in (asyncio.run(beat(0.1)()) or "")
    made = beat(20.0)
    made._ran = made._decoded = made._ran - 20
    assert "has run no batch for 70 s" in (asyncio.run(made()) or "")
    assert asked == [10.0, 120.0], "the first one was proof enough"


def test_a_model_that_computes_something_else_is_not_ready(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    replica = Replica(settings(bundle))
    (model,) = replica.registry
    run = model._batcher._run
    monkeypatch.setattr(model._batcher, "_run", lambda images: run(images) + np.float32(1))
    monkeypatch.setattr(model._batcher, "_whole", model._batcher._run)
    (fault,) = asyncio.run(replica.report()).faults
    assert "no longer gives its golden vectors" in fault


def test_wrong_numbers_stay_told_while_batches_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(settings(bundle))
    (model,) = replica.registry
    run = model._batcher._run
    monkeypatch.setattr(model._batcher, "_run", lambda images: run(images) * np.float32("nan"))
    monkeypatch.setattr(model._batcher, "_whole", model._batcher._run)

    async def go() -> None:
        await replica.check()
        model.heartbeat._right -= heartbeat._RIGHT_S  # since a minute only others' images have been computed
        for _ in range(3):
            await replica.engine.answer(model, [picture(0)])
            with pytest.raises(jepakit.errors.ServeError, match="golden vectors"):
                await replica.check()

    asyncio.run(go())


def test_a_model_that_fails_is_no_sign_of_life(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(settings(bundle))
    (model,) = replica.registry

    def broken(images: Pixels) -> NDArray[np.float32]:
        raise OSError("device lost")

    monkeypatch.setattr(model._batcher, "_run", broken)
    monkeypatch.setattr(model._batcher, "_whole", broken)
    model.heartbeat._ran -= heartbeat._FRESH_S

    async def go() -> None:
        for _ in range(3):  # as often as it takes for Ray to replace the replica
            with pytest.raises(OSError, match="device lost"):
                await replica.engine.answer(model, [picture(0)])
            with pytest.raises(jepakit.errors.ServeError, match=r"tiny fails \(OSError\)"):
                await replica.check()

    asyncio.run(go())
    text = merge({"r": replica.metrics.families()}).decode()
    assert 'jepakit_batch_size_count{model="tiny",replica="r"} 0.0' in text


def test_a_probe_does_not_wait_for_a_heartbeat(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    monkeypatch.setattr(heartbeat, "_TIMEOUT_S", 2.0)
    monkeypatch.setattr(heartbeat, "_PATIENCE_S", 0.05)
    replica = Replica(settings(bundle))
    (model,) = replica.registry
    released = hang(model, monkeypatch)

    async def go() -> None:
        start = time.monotonic()
        assert (await replica.report()).faults == (), "nothing is known yet"
        assert time.monotonic() - start < 2.0
        await model.heartbeat._beat()
        (fault,) = (await replica.report()).faults
        assert "has run no batch" in fault
        released.set()
        await model.heartbeat._beat()
        await model.heartbeat._beat()
        assert (await replica.report()).faults == ()

    asyncio.run(go())


def test_a_closed_model_gives_its_memory_back_whoever_still_knows_it(bundle: Path) -> None:
    """Ray takes what a replica begins with out of garbage collection."""
    (model,) = Replica(settings(bundle)).registry
    session = weakref.ref(model._batcher._run.__self__)  # type: ignore[attr-defined]
    gc.disable()
    try:
        model.close()
        wait_until(lambda: session() is None, "the session stays", within_s=20)
    finally:
        gc.enable()


def test_too_much_memory_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(settings(bundle, max_memory_mb=10_000))
    assert asyncio.run(replica.report()).faults == ()
    monkeypatch.setattr(memory, "used_mb", lambda: 10_001.0)
    with pytest.raises(jepakit.errors.ServeError, match="10001 MB"):
        asyncio.run(replica.check())


def test_a_replica_logs_once_why_it_does_not_answer_correctly_and_when_it_does_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be replaced for it, and then nobody can ask it any more."""
    replica, lines = Replica(settings(bundle, max_memory_mb=10_000)), list[str]()
    for used in (9_000.0, 10_001.0, 10_002.0, 9_000.0, 9_000.0):
        monkeypatch.setattr(memory, "used_mb", lambda used=used: used)
        with monkeypatch.context() as patch:
            for level in ("error", "info"):
                patch.setattr(replica_module._log, level, lambda text, *values: lines.append(text % values))
            asyncio.run(replica.report())
    assert lines == [
        f"replica {replica.id} does not answer correctly: uses 10001 MB of memory, more than max_memory_mb = 10000",
        f"replica {replica.id} answers correctly again",
    ]


def test_memory_that_is_not_limited_is_not_looked_at(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a file descriptor, and there may be none left."""

    def too_many() -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(memory, "used_mb", too_many)
    assert asyncio.run(deployment.replicas[0].faults()) == ()


def test_the_memory_that_is_left_is_no_more_than_the_machines() -> None:
    assert 0 < memory.available_mb() < 1 << 24
    assert memory.used_mb() > 10


def test_cached_files_of_a_container_are_no_used_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(_machine, "_OWN_GROUP", tmp_path / "none")
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{90 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {30 << 20}\ninactive_file {60 << 20}\nactive_file 0\n")
    assert memory.available_mb() == 70


def test_without_a_model_the_service_is_not_ready_and_says_so(bundle: Path) -> None:
    deployment = Deployment(bundle)
    for replica in deployment.replicas:
        replica.registry.forget("tiny").current.close()  # type: ignore[union-attr]

    async def go() -> None:
        with pytest.raises(ApiError, match="no model is in service") as caught:
            await deployment.get("/readyz")
        assert (caught.value.status, caught.value.code) == (503, "not_ready")
        assert (await deployment.get("/v1/models")).json()["data"] == []
        await deployment.replicas[0].check()  # another replica would not start at all

    asyncio.run(go())
    with pytest.raises(ApiError, match="no model is in service") as caught:
        deployment.replicas[0].registry.find(None)
    assert caught.value.status == 503


def test_a_replica_that_lacks_what_another_serves_is_not_ready(bundle: Path) -> None:
    deployment = Deployment(bundle)
    lacking = deployment.replicas[1]
    lacking.registry.forget("tiny").current.close()  # type: ignore[union-attr]
    told = asyncio.run(deployment.get("/readyz")).json()
    assert (told["status"], told["replicas_ready"], told["models"]) == ("degraded", 1, ["tiny"])
    assert "tiny is not in service on this replica" in told["faults"][lacking.id]


def test_a_model_is_described_as_its_manifest_its_plan_and_the_settings_say(deployment: Deployment) -> None:
    model = copy.copy(deployment.replicas[0].registry.find("tiny"))
    start = model.manifest.backbone.start.model_copy(update={"license": "cc-by-nc-4.0"})
    verdict = SimpleNamespace(verdict=SimpleNamespace(word="better"))
    backbone = model.manifest.backbone.model_copy(update={"start": start})
    model.manifest = model.manifest.model_copy(update={"backbone": backbone, "comparison": verdict})
    model.plan = model.plan._replace(max_batch=12, lanes=3, rate=10.0)
    limits: dict[str, Any] = {"max_body_mb": 7, "max_images": 11, "max_pixels": 12_345, "request_timeout_s": 4.0}
    told = operations._describe(model, ServeSettings(bundles=("x",), **limits), Round([], is_whole=True))
    assert (told["license"], told["verdict"], told["max_batch"], told["lanes"]) == ("cc-by-nc-4.0", "better", 12, 3)
    assert told["limits"] == {**limits, "max_images_in_time": 20}


def test_a_pinned_version_is_described_itself_during_a_switch(bundle: Path) -> None:
    deployment = Deployment(bundle)
    old, new = (replica.registry.find("tiny") for replica in deployment.replicas)
    new.manifest = new.manifest.model_copy(update={"model_id": "0" * 16})
    versions = deployment.replicas[0].registry.versions("tiny")
    versions.current, versions.previous = new, old

    async def go() -> None:
        for model in (old, new):
            model_id = model.manifest.model_id
            assert (await deployment.get(f"/v1/models/tiny@{model_id}")).json()["model_id"] == model_id

    asyncio.run(go())


def test_a_replica_that_does_not_answer_is_told_where_versions_are(bundle: Path) -> None:
    deployment = Deployment(bundle)
    assert asyncio.run(deployment.get("/v1/models/tiny")).json()["all_heard"] is True
    deployment.frozen = True
    described = asyncio.run(deployment.get("/v1/models/tiny")).json()
    assert (described["all_heard"], described["serving"]) == (False, [jepakit.open_bundle(bundle).digest]), (
        "this replica's own"
    )


def test_a_switch_while_the_replicas_are_asked_is_described_as_done(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Deployment(bundle)
    replica = deployment.replicas[0]
    new = deployment.replicas[1].registry.find("tiny")
    new.manifest = new.manifest.model_copy(update={"model_id": "0" * 16})
    ask_all = deployment.ask_all

    async def switching(with_metrics: bool) -> list[Report | None]:
        replica.registry.versions("tiny").current = new
        return await ask_all(with_metrics)

    monkeypatch.setattr(replica, "_ask_all", switching)
    assert asyncio.run(deployment.get("/v1/models/tiny")).json()["model_id"] == new.manifest.model_id


def test_bodies_held_at_a_time_are_bounded_before_they_are_read(bundle: Path) -> None:
    async def go(url: str) -> list[int]:
        async def slowly() -> Any:
            yield b"\x89PNG" + bytes(600 << 10)
            await asyncio.sleep(0.7)

        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            length = {"Content-Length": str(600 << 10), **PNG}
            held = asyncio.create_task(http.post("/v1/embeddings", content=slowly(), headers={**PNG}))
            await asyncio.sleep(0.3)
            refused = await http.post("/v1/embeddings", content=b"\0" * (600 << 10), headers=length)
            assert (await http.get("/readyz")).status_code == 200, "probes are answered while bodies are refused"
            return [refused.status_code, (await held).status_code]

    with running(settings(bundle, max_body_mb=1, max_bodies_mb=1)) as url:
        assert asyncio.run(go(url)) == [429, 415]


@pytest.mark.parametrize(("size", "refused"), [(100 << 10, False), (300 << 10, True)])
def test_a_body_in_chunks_takes_room_as_it_arrives(bundle: Path, size: int, refused: bool) -> None:
    """Clients that stream declare no length: small ones are answered side by side, and what they hold is given back."""

    async def go(url: str) -> tuple[list[int], int]:
        may_end = asyncio.Event()

        async def image() -> Any:
            yield b"\x89PNG"
            yield bytes(size)
            await may_end.wait()

        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            asked = [asyncio.create_task(http.post("/v1/embeddings", content=image(), headers=PNG)) for _ in range(6)]
            while refused and "overloaded" not in (await http.get("/metrics")).text:  # an answer is read after the body
                await asyncio.sleep(0.05)
            may_end.set()
            answers = [answer.status_code for answer in await asyncio.gather(*asked)]
            whole = await http.post("/v1/embeddings", content=bytes(1 << 20), headers=PNG)
            return answers, whole.status_code

    with running(settings(bundle, max_body_mb=1, max_bodies_mb=1)) as url:
        answers, whole = asyncio.run(go(url))
    assert whole == 415
    assert set(answers) == ({415, 429} if refused else {415})
    assert answers.count(415) >= 3, "so many fit side by side, as those refused give back what they held"


def test_probes_are_answered_while_one_body_holds_more_than_all_may(bundle: Path) -> None:
    async def go(url: str) -> int:
        async def slowly() -> Any:
            yield b"\x89PNG" + bytes(2 << 20)
            await asyncio.sleep(0.7)

        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            held = asyncio.create_task(http.post("/v1/embeddings", content=slowly(), headers=PNG))
            await asyncio.sleep(0.3)
            for path in ("/healthz", "/readyz", "/v1/models"):
                assert (await http.get(path)).status_code == 200
            return (await held).status_code

    with running(settings(bundle, max_body_mb=3, max_bodies_mb=1)) as url:
        assert asyncio.run(go(url)) == 415


def test_a_length_of_thousands_of_digits_is_too_large_and_no_fault(bundle: Path) -> None:
    async def go(length: bytes) -> int:
        app = build_app(settings(bundle))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            headers = [(b"Content-Length", length), (b"Content-Type", b"image/png")]
            return (await http.post("/v1/embeddings", content=b"\x89PNG", headers=headers)).status_code

    assert asyncio.run(go(b"9" * 5000)) == 413
    assert asyncio.run(go(b"0" * 5000 + b"4")) == 415


@pytest.mark.parametrize("declared", [b"1", b"\xb2"])
def test_the_length_of_a_body_in_chunks_is_not_believed(bundle: Path, declared: bytes) -> None:
    """Some servers hand both headers on."""

    async def go() -> int:
        async def slowly() -> Any:
            yield b"\x89PNG" + bytes(600 << 10)
            await asyncio.sleep(0.3)

        app = build_app(settings(bundle, max_body_mb=1, max_bodies_mb=1))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            both = [(b"Content-Length", declared), (b"Transfer-Encoding", b"chunked"), (b"Content-Type", b"image/png")]
            held = asyncio.create_task(http.post("/v1/embeddings", content=slowly(), headers=both))
            await asyncio.sleep(0.1)
            refused = await http.post("/v1/embeddings", content=b"\0" * (600 << 10), headers=PNG)
            assert (await held).status_code == 415
            return refused.status_code

    assert asyncio.run(go()) == 429


def test_log_lines_are_json_and_hold_no_content_and_of_a_key_its_name(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(f"{line}\n")
    wanted = settings(bundle, log_format="json", access_log="all", api_key_file=str(tmp_path / "keys"))
    logs.configure(wanted)
    try:
        with running(wanted) as url, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as http:
            http.post("/v1/embeddings?model=tiny", content=picture(0), headers={"X-Request-Id": "abc", **PNG})
            http.post("/v1/embeddings", files={"files": ("patient42.png", b"broken")})
            http.request("PROPFIND", "/secret-path-of-a-stranger")
            assert http.request("SECRET|STRANGER", "/v1/models").status_code == 400, (
                "no method: it comes to no route and no log"
            )
            http.get("/v1/models", headers={"Authorization": f"Bearer {key}-of-a-stranger"})
    finally:
        logs.silence()
    text = capfd.readouterr().err
    first, second, third, fourth = map(json.loads, text.splitlines())
    assert (first["request_id"], first["route"], first["status"], first["bytes"]) == (
        "abc", "/v1/embeddings", 200, len(picture(0)),
    )  # fmt: skip
    assert second["status"] == 415
    assert (second["method"], third["method"], third["route"]) == ("POST", "other", "other")
    assert [each["key"] for each in (first, second, third, fourth)] == ["alice", "alice", "alice", None]
    for word in ("patient42", "broken", "tiny", "stranger", key):
        assert word.lower() not in text.lower()


def test_a_failure_is_logged_as_an_error_with_its_request_and_no_content(
    bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: Replica) -> None:
        raise RuntimeError("patient42")

    wanted = settings(bundle, log_format="json", access_log="errors")
    logs.configure(wanted)
    try:
        with running(wanted) as url, httpx.Client(base_url=url) as http:
            monkeypatch.setattr(Replica, "reports", broken)
            assert http.get("/v1/models", headers={"X-Request-Id": "abc"}).status_code == 500
    finally:
        logs.silence()
    failed, request = map(json.loads, capfd.readouterr().err.splitlines())
    assert (failed["level"], failed["request_id"], failed["exception"]) == ("error", "abc", "RuntimeError")
    assert (request["level"], request["request_id"], request["status"]) == ("error", "abc", 500)
    assert "patient42" not in str(failed)


def test_replicas_lines_reach_the_drivers_standard_error(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    collector = logs.Collector(tmp_path / "logs.sock")
    logs.configure(settings(bundle), collector.path)
    try:
        logging.getLogger("jepakit.service").info("hello from a replica")
        deadline = time.monotonic() + 5
        while "hello" not in (told := capfd.readouterr().err):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert re.match(r"^20\S+\+00:00 info hello from a replica$", told.strip())
    finally:
        collector.close()
        logs.silence()


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[socket.socket]:
    """A driver that reads no log lines, with a replica logging to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as driver:
        driver.bind(str(tmp_path / "logs.sock"))
        logs.configure(settings(tmp_path), str(tmp_path / "logs.sock"))
        try:
            yield driver
        finally:
            driver.close()
            logs.silence()


def logs_at_once(count: int) -> bool:
    """Whether a number of lines can be logged without waiting."""

    def log() -> None:
        for number in range(count):
            logging.getLogger("jepakit.service").info("line %d", number)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_driver_that_reads_no_lines_holds_up_no_replica_and_a_burst_is_kept_for_it(
    stalled: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    assert logs_at_once(1000), "a replica waits for the driver"
    stalled.settimeout(10)
    lines = [stalled.recv(1 << 16).decode() for _ in range(1000)]
    assert [line.split()[-1] for line in lines] == [str(number) for number in range(1000)]
    assert logs_at_once(2 * logs._MOST_WAITING)
    assert capfd.readouterr().err == ""


def test_a_full_disk_does_not_end_the_log_and_leaves_nothing_to_be_written_at_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = logs.Collector(tmp_path / "logs.sock")
    logs.configure(settings(tmp_path), collector.path)
    try:
        with Path("/dev/full").open("w") as full, (tmp_path / "log").open("w") as roomy:
            monkeypatch.setattr(sys, "stdout", full)
            monkeypatch.setattr(sys, "stderr", full)
            logs.announce("ready")
            logging.getLogger("jepakit.service").info("lost")
            time.sleep(0.2)
            full.flush()
            monkeypatch.setattr(sys, "stderr", roomy)
            logging.getLogger("jepakit.service").info("kept")
            wait_until(lambda: "info kept\n" in (tmp_path / "log").read_text(), "the log has ended", within_s=5)
            monkeypatch.undo()
    finally:
        collector.close()
        logs.silence()


def test_standard_error_that_nobody_reads_holds_up_neither_who_logs_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process; with Ray its driver takes the lines from the replicas."""
    reader, writer = os.pipe()
    with open(writer, "w") as stalled:  # noqa: PTH123 (a descriptor, no path)
        monkeypatch.setattr(sys, "stderr", stalled)
        logs.configure(settings(tmp_path))
        handler: Any = logging.getLogger(logs.LOGGER).handlers[0]
        try:
            assert logs_at_once(2 * logs._MOST_WAITING), "who logs waits for who reads"
            logs.announce("nobody waits for this", stalled)
            start = time.monotonic()
            logs.silence()
            assert time.monotonic() - start < 5
        finally:
            os.close(reader)
        wait_until(handler._lines.empty, "the lines stay")


def test_the_log_is_ended_once_though_two_loggers_write_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        logs.configure(settings(tmp_path))
        handler: Any = logging.getLogger(logs.LOGGER).handlers[0]
        logging.getLogger("uvicorn").info("the last line")
        logs.silence()
        handler.close()
        assert not handler._thread.is_alive()
        assert handler._lines.empty(), "it was ended more than once"
    assert "info the last line\n" in (tmp_path / "log").read_text()


def test_traces_follow_the_usual_variables(bundle: Path, spans: Spans) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    with running(settings(bundle)) as url:
        headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01", **PNG}
        assert httpx.post(f"{url}/v1/embeddings", content=picture(0), headers=headers).status_code == 200
        httpx.request("PROPFIND", f"{url}/v1/models")
    span, strange = spans()
    assert strange.name == "other /v1/models"
    assert span.name == "POST /v1/embeddings"
    assert span.trace_id.hex() == trace_id
    attributes = {item.key: item.value.int_value or item.value.string_value for item in span.attributes}
    assert attributes["http.response.status_code"] == 200
    assert span.status.code == 0, "unset"


def test_a_failure_marks_its_span_and_the_log_names_the_trace(
    bundle: Path, spans: Spans, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: Replica) -> None:
        raise RuntimeError("patient42")

    monkeypatch.setattr(Replica, "reports", broken)
    wanted = settings(bundle, log_format="json")
    logs.configure(wanted)
    try:
        with running(wanted) as url:
            assert httpx.get(f"{url}/v1/models").status_code == 500
            assert httpx.get(f"{url}/v1/nothing").status_code == 404
    finally:
        logs.silence()
    failed, refused = spans()
    assert (failed.status.code, refused.status.code) == (2, 0), "2 is an error; a refusal is the client's"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"request"' in line]
    assert [line["trace_id"] for line in lines] == [failed.trace_id.hex(), refused.trace_id.hex()]
    assert not any("patient42" in str(span) for span in (failed, refused))


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "jepakit"),
        ({"OTEL_SERVICE_NAME": ""}, "jepakit"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine,team=x"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "team=x"}, "jepakit"),
    ],
    ids=str,
)
def test_traces_bear_the_service_s_name_unless_the_variables_give_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    tracer = tracing.Tracer()
    attributes = tracer._provider.resource.attributes
    tracer.close()
    assert attributes["service.name"] == name
    assert attributes.get("team") == ("x" if "team" in str(variables) else None)


@pytest.mark.parametrize(
    ("process", "ray", "guard"),
    [
        ("raylet", True, "Ray's token of this run"),
        (psutil.Process().name(), True, "Ray's token of this run"),
        (psutil.Process().name(), False, "unknown: close it with this host's firewall"),
        ("stranger", True, "unknown: close it with this host's firewall"),
    ],
)
def test_nothing_is_said_to_guard_what_is_not_known(process: str, ray: bool, guard: str) -> None:
    found = listeners.Listener("0.0.0.0", 9999, process)
    assert listeners._guard(found, ServeSettings(bundles=("a",), ray=ray), None) == guard


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_collector_that_never_answers_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(tracing, "_LONGEST_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        tracer = tracing.Tracer()
        with tracer.request("POST", "/v1/embeddings", {}):
            pass
        begun = time.monotonic()
        getattr(tracer, end)()
        assert time.monotonic() - begun < 30


def test_traces_without_their_extra_are_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter.otlp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp", None)  # as where Ray brought other exporters alone
    with pytest.raises(jepakit.errors.MissingExtraError, match="tracing"):
        tracing.check()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_TRACES_EXPORTER", "otlp,zipkin"),
    ],
)
def test_traces_that_could_not_be_sent_as_asked_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(jepakit.errors.ConfigError, match=re.escape(f"{variable} = {value!r}")):
        tracing.check()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.check()


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({}, True),
        ({"OTEL_TRACES_EXPORTER": "", "OTEL_EXPORTER_OTLP_PROTOCOL": ""}, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_wanted_where_the_variables_say_so(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sent: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert tracing.wanted() == sent


def serve_after(program: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    """`jepakit serve` in a process that has run `program` first."""
    return subprocess.run(
        [sys.executable, "-c", f"{program}from jepakit.cli import main; main()", "serve", bundle, "--port", str(free_port())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_ray_without_serve_is_told_in_a_line(bundle: Path) -> None:
    """As after `pip install ray`, or where one of its own parts is missing."""
    ended = serve_after("import sys; sys.modules['ray.serve'] = None; ", bundle)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: Ray Serve cannot be imported (")
    assert ended.stderr.endswith("pip install 'jepakit[serve]'\n")
    assert "Traceback" not in ended.stderr


def test_a_ray_that_does_not_start_is_asked_once_and_told_in_a_line(bundle: Path) -> None:
    """Serve's status would start one of its own to ask it."""
    program = "import ray\ndef init(*_, **__):\n print('asked')\n raise OSError('no room')\nray.init = init\n"
    ended = serve_after(program, bundle)
    assert (ended.returncode, ended.stdout.count("asked")) == (1, 1), ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: the service did not start: no room"


def test_one_process_listens_on_its_one_port_alone(bundle: Path) -> None:
    """On all interfaces, so that its listener shows; loopback ones are not listed."""
    script = (
        "import socket, psutil, jepakit_service.listeners as l\n"
        "quiet = socket.create_server(('127.0.0.1', 0))\n"
        "open_ = socket.create_server(('0.0.0.0', 0))\n"
        "found = l.open_listeners()\n"
        "assert [x.port for x in found] == [open_.getsockname()[1]], found\n"
        "print(found[0].address)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.0.0.0"
    with running(settings(bundle)):
        assert open_listeners() == []

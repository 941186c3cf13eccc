"""New versions beside old ones: loaded, checked, switched, drained; refused or rolled back. No request fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest

import jepakit
from jepakit._files import holding
from jepakit._run_files import CONFIG
from jepakit.bundles.bundle import MANIFEST, Bundle
from jepakit.cli import serving, stopping
from jepakit.client import ModelInfo
from jepakit.errors import (
    BundleError,
    ConnectionFailedError,
    DataError,
    InputError,
    NotFoundError,
    ServeError,
    WriteError,
)
from jepakit_service import memory
from jepakit_service.bundles import find_bundles
from jepakit_service.faults import ApiError
from jepakit_service.models.model import LoadedModel
from jepakit_service.replica import Replica, Report
from jepakit_service.settings import ServeSettings
from jepakit_service.telemetry.metrics import merge
from jepakit_service.updates import updates
from jepakit_service.updates.deploy import Deployed, _swapped, deploy

from .conftest import copied, picture, running

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def other(exported: Callable[..., Path]) -> Path:
    """Another version of the same name, with another vector space."""
    return exported(image_size=48)


@pytest.fixture(scope="module")
def third(exported: Callable[..., Path]) -> Path:
    """A third version."""
    return exported(image_size=64)


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A folder of bundles that holds the first version."""
    shutil.copytree(bundle, tmp_path / "bundles" / "tiny")
    return tmp_path / "bundles"


@pytest.fixture(scope="module")
def second(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another name."""
    return copied(bundle, tmp_path_factory.mktemp("another") / "second", name="second")


def settings(*folders: Path, **more: Any) -> ServeSettings:
    return ServeSettings(bundles=tuple(map(str, folders)), port=1, watch_s=0.05, **more)


def digest(path: Path) -> str:
    return jepakit.open_bundle(path).digest


class Deployment:
    """Replicas in one process that query each other, as under Ray."""

    def __init__(self, folder: Path, count: int) -> None:
        self.replicas = [Replica(settings(folder), self.ask_all) for _ in range(count)]

    async def ask_all(self, with_metrics: bool = False) -> list[Report | None]:
        return [
            None if number == self.silent else await replica.report(with_metrics)
            for number, replica in enumerate(self.replicas)
        ]

    silent: int | None = None
    """A replica that does not answer."""

    def serving(self) -> list[str]:
        return [next(iter(replica.registry)).digest for replica in self.replicas]


async def answering(replica: Replica, asked: str) -> LoadedModel:
    """The model that is found and embeds an image."""
    model = replica.registry.find(asked)
    answer = await replica.engine.answer(model, [picture(0)])
    assert isinstance(answer.results[0], np.ndarray)
    return model


async def step(replica: Replica) -> None:
    await replica._updates.step()


def replace(folder: Path, bundle: Path, name: str = "tiny") -> None:
    shutil.rmtree(folder / name)
    shutil.copytree(bundle, folder / name)


def test_replicas_switch_only_when_all_have_the_new_version_and_answer_for_both_until_then(
    bundle: Path, other: Path, folder: Path
) -> None:
    deployment = Deployment(folder, 2)
    first, second = deployment.replicas
    old, new = (jepakit.open_bundle(path).manifest for path in (bundle, other))

    async def go() -> None:
        replace(folder, other)
        await step(first)
        assert deployment.serving() == [old.digest, old.digest]
        found = await answering(first, f"tiny@{new.model_id}")
        assert found.digest == new.digest, "what is loaded can be pinned before it is switched to"

        await step(second)
        assert deployment.serving() == [old.digest, new.digest]
        for replica in deployment.replicas:
            for manifest in (old, new):
                found = await answering(replica, f"tiny@{manifest.model_id}")
                assert found.digest == manifest.digest
        await step(first)
        assert deployment.serving() == [new.digest, new.digest]
        for replica in (*deployment.replicas, *deployment.replicas):
            await step(replica)
        with pytest.raises(ApiError, match=f"tiny is {new.model_id} here, not '{old.model_id}'"):
            await answering(first, f"tiny@{old.model_id}")

    asyncio.run(go())


def test_a_version_taken_back_while_some_replicas_had_switched_is_taken_back_by_all(
    bundle: Path, other: Path, folder: Path
) -> None:
    deployment = Deployment(folder, 2)
    first, second = deployment.replicas

    async def go() -> None:
        replace(folder, other)
        await step(first)
        await step(second)
        assert deployment.serving() == [digest(bundle), digest(other)]
        replace(folder, bundle)
        for replica in (first, second, first, second):
            await step(replica)
        assert deployment.serving() == [digest(bundle), digest(bundle)]
        assert not any(replica.registry.versions("tiny").previous for replica in deployment.replicas)

    asyncio.run(go())


def test_a_replica_that_does_not_answer_agrees_to_nothing(bundle: Path, other: Path, folder: Path) -> None:
    deployment = Deployment(folder, 2)
    first, second = deployment.replicas

    async def go() -> None:
        replace(folder, other)
        await step(first)
        deployment.silent = 1
        await step(first)
        assert deployment.serving() == [digest(bundle), digest(bundle)]
        deployment.silent = None
        await step(second)
        await step(first)
        assert deployment.serving() == [digest(other), digest(other)]

    asyncio.run(go())


def test_a_version_overtaken_by_the_next_but_one_is_closed(
    bundle: Path, other: Path, third: Path, folder: Path
) -> None:
    (replica,) = Deployment(folder, 1).replicas
    oldest = replica.registry.find("tiny")

    async def go() -> None:
        for version in (other, third):
            replace(folder, version)
            await step(replica)
        assert replica.registry.find("tiny").digest == digest(third)
        await step(replica)
        with pytest.raises(RuntimeError, match="closed"):
            await oldest.embed([picture(0)], 5)

    asyncio.run(go())


def test_a_version_waits_for_the_memory_of_one_that_leaves_but_not_for_ever(
    bundle: Path, other: Path, third: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without limit it would wait where the other's replicas do not let go of it."""
    (replica,) = Deployment(folder, 1).replicas
    versions = replica.registry.versions("tiny")
    before = replica.registry.find("tiny")

    async def go() -> None:
        replace(folder, other)
        await step(replica)
        assert versions.previous is before
        replace(folder, third)
        monkeypatch.setattr(memory, "available_mb", lambda: 1.0)
        for _ in range(3):
            await step(replica)
            assert versions.update is not None
            assert (versions.update.digest, versions.update.state) == (digest(third), "loading")
        assert versions.previous is None, "it has left meanwhile"
        with monkeypatch.context() as enough:
            enough.setattr(memory, "available_mb", lambda: 1e6)
            await step(replica)
        assert replica.registry.find("tiny").digest == digest(third)
        replace(folder, bundle)
        for _ in range(2 * updates._LEAVING_LOOKS):
            await step(replica)
        assert "MB are free" in versions.failed[digest(bundle)]

    asyncio.run(go())


def test_a_version_waits_for_the_memory_of_one_that_was_given_up_for_it(
    other: Path, third: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Deployment(folder, 2)
    replica = deployment.replicas[0]
    versions = replica.registry.versions("tiny")

    async def go() -> None:
        replace(folder, other)
        await step(replica)
        given_up = versions.next
        assert given_up is not None
        replace(folder, third)
        monkeypatch.setattr(memory, "available_mb", lambda: 1e6 if given_up._batcher._closed else 1.0)
        for _ in range(2):
            await step(replica)
        assert versions.next is not None
        assert versions.next.digest == digest(third)
        assert versions.failed == {}

    asyncio.run(go())


def test_a_version_that_fails_on_one_replica_is_given_up_by_all(
    other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Deployment(folder, 2)
    first, second = deployment.replicas
    before = deployment.serving()

    async def go() -> None:
        replace(folder, other)
        await step(first)
        monkeypatch.setattr(memory, "available_mb", lambda: 1.0)
        await step(second)
        monkeypatch.undo()
        for replica in (first, second, first):
            await step(replica)
        assert deployment.serving() == before
        for report in await deployment.ask_all():
            assert report is not None
            update = report.models["tiny"].update
            assert update is not None
            assert update.state == "failed"
            assert "MB are free" in (update.reason or "")
            assert report.models["tiny"].loaded == (before[0],)

    asyncio.run(go())


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    with running(settings(folder)) as url:
        yield url


def test_deploy_switches_a_running_service_without_a_failed_request(served: str, other: Path, folder: Path) -> None:
    async def load(stop: asyncio.Event) -> list[tuple[int, str]]:
        seen = []
        async with httpx.AsyncClient(base_url=served, timeout=60) as http:
            while not stop.is_set():
                answer = await http.post("/v1/embeddings", content=picture(0), headers=PNG)
                seen.append((answer.status_code, answer.headers["x-model-id"]))
        return seen

    before = digest(folder / "tiny")

    async def go() -> list[tuple[int, str]]:
        stop = asyncio.Event()
        clients = [asyncio.create_task(load(stop)) for _ in range(4)]
        await asyncio.sleep(0.2)
        deployed = await asyncio.to_thread(deploy, other, folder, served, timeout_s=60)
        assert deployed.replaced is not None
        assert (deployed.model.digest, deployed.replaced.digest) == (digest(other), before)
        assert deployed.beside == ()
        await asyncio.sleep(0.2)
        stop.set()
        return [seen for client in clients for seen in await client]

    seen = asyncio.run(go())
    assert {status for status, _ in seen} == {200}
    assert len({model_id for _, model_id in seen}) == 2
    assert [path.name for path in folder.iterdir()] == ["tiny"], "nothing is left beside the bundle"


def test_a_bundle_that_the_service_refuses_is_taken_out_again(
    bundle: Path, other: Path, second: Path, folder: Path
) -> None:
    with running(settings(folder, expect=(digest(bundle),))) as url:
        with pytest.raises(ServeError, match=r"second is not in service.*not the expected one"):
            deploy(second, folder, url, timeout_s=60)
        with pytest.raises(ServeError, match="not the expected one"):
            deploy(other, folder, url, timeout_s=60)
        assert digest(folder / "tiny") == digest(bundle)
        with jepakit.Client(url) as client:
            assert client.model("tiny").digest == digest(bundle)
    assert [path.name for path in folder.iterdir()] == ["tiny"]


def test_a_version_that_was_refused_may_be_deployed_again_at_once(
    other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(settings(folder).model_copy(update={"watch_s": 1.0})) as url:
        with monkeypatch.context() as patch:
            patch.setattr("jepakit_service.memory.available_mb", lambda: 0.0)
            with pytest.raises(ServeError, match="give the service more memory"):
                deploy(other, folder, url, timeout_s=60)
        assert deploy(other, folder, url, timeout_s=60).model.digest == digest(other)


def test_a_damaged_bundle_never_reaches_the_folder(served: str, other: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "damaged")
    graph = tmp_path / "damaged" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    before = digest(folder / "tiny")
    with pytest.raises(BundleError, match="damaged"):
        deploy(tmp_path / "damaged", folder, served, timeout_s=60)
    assert digest(folder / "tiny") == before


def test_what_is_deployed_is_on_the_disk_before_the_old_version_goes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("jepakit_service.updates.deploy.fsync", lambda path: flushed.append(path.name))
    shutil.copytree(bundle, tmp_path / "tiny")
    opened = jepakit.open_bundle(bundle)
    with _swapped(opened, tmp_path / "tiny"):
        assert {*opened.manifest.files, MANIFEST} < set(flushed)
        assert flushed[-1] == tmp_path.name, "and where it lies"
        assert len(list(tmp_path.glob(".deploy-*.old"))) == 1
    assert not list(tmp_path.glob(".deploy-*"))


def test_deploying_without_a_service_changes_nothing(bundle: Path, other: Path, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("jepakit_service.updates.deploy._LONGEST_SILENCE_S", 1.0)
    with pytest.raises(ConnectionFailedError):
        deploy(other, folder, "http://127.0.0.1:1", timeout_s=5)
    assert digest(folder / "tiny") == digest(bundle)


def test_a_service_that_watches_another_folder_is_noticed(
    served: str, bundle: Path, other: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(bundle, elsewhere / "tiny")
    with pytest.raises(ServeError, match="does this service watch this folder"):
        deploy(other, elsewhere, served, timeout_s=1)
    assert digest(elsewhere / "tiny") == digest(bundle)


def until(http: httpx.Client, wanted: Any) -> dict[str, Any]:
    """Poll the model until `wanted(model)`; returns the last answer."""
    for _ in range(400):
        answer = http.get("/v1/models/tiny")
        if wanted(answer):
            return dict(answer.json())
        asyncio.run(asyncio.sleep(0.05))
    raise AssertionError(answer.text)


def test_a_half_copied_bundle_is_passed_over_until_its_digests_pass(served: str, other: Path, folder: Path) -> None:
    with httpx.Client(base_url=served) as http:
        whole = (other / "model.onnx").read_bytes()
        replace(folder, other)
        (folder / "tiny" / "model.onnx").write_bytes(whole[:1000])
        model = until(http, lambda answer: (answer.json().get("update") or {}).get("state") == "incomplete")
        assert model["digest"] != digest(other)
        assert http.post("/v1/embeddings", content=picture(0), headers=PNG).status_code == 200
        (folder / "tiny" / "model.onnx").write_bytes(whole)
        model = until(http, lambda answer: answer.json()["digest"] == digest(other))
        assert model["update"] is None


def test_new_names_appear_and_removed_ones_go(served: str, second: Path, folder: Path) -> None:
    with httpx.Client(base_url=served) as http:
        deployed = deploy(second, folder, served, timeout_s=60)
        assert (deployed.replaced, deployed.beside) == (None, ("tiny",))
        assert http.get("/readyz").json()["models"] == ["second", "tiny"]
        assert http.post("/v1/embeddings", content=picture(0), headers=PNG).status_code == 400
        shutil.rmtree(folder / "tiny")
        until(http, lambda answer: answer.status_code == 404)
        assert http.get("/readyz").json()["models"] == ["second"]
        shutil.rmtree(folder / "second")
        asyncio.run(asyncio.sleep(1))
        assert http.get("/readyz").json()["models"] == ["second"], "an empty folder is a lost mount"


class Stub:
    """A client that calls the test's `ask` whenever it is asked for a model."""

    def __init__(self, ask: Callable[[], ModelInfo], models: tuple[ModelInfo, ...] = ()) -> None:
        self._ask, self._models = ask, models

    def __call__(self, *_: Any, **__: Any) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def models(self) -> list[ModelInfo]:
        return list(self._models)

    def model(self, name: str) -> ModelInfo:
        return self._ask()


def told(bundle: Path, update: dict[str, Any] | None = None, *, all_heard: bool = True) -> ModelInfo:
    """What a service that serves the bundle says."""
    raw = {"serving": [digest(bundle)], "update": update, "all_heard": all_heard}
    return ModelInfo("tiny", "", digest(bundle), 1, "fp32", "cpu", raw)


def absent() -> ModelInfo:
    raise NotFoundError("no model", status=404, code="model_not_found", param=None, request_id=None)


@pytest.fixture
def to(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Deploy to a stub: `to(source, folder, ask, models…)`."""

    def run(source: Path, folder: Path, ask: Callable[[], ModelInfo] = absent, *models: ModelInfo) -> None:
        monkeypatch.setattr("jepakit_service.updates.deploy.Client", Stub(ask, models))
        monkeypatch.setattr("jepakit_service.updates.deploy._POLL_S", 0.01)
        deploy(source, folder, "http://x", timeout_s=0.05)

    return run


def is_as_before(folder: Path, bundle: Path) -> bool:
    return [path.name for path in folder.iterdir()] == ["tiny"] and digest(folder / "tiny") == digest(bundle)


def is_swapped(folder: Path) -> bool:
    return any(folder.glob(".deploy-*.old"))


def test_a_second_deploy_into_a_folder_is_refused_at_once(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    def ask() -> ModelInfo:
        with pytest.raises(ServeError, match="another deploy is running"):
            deploy(other, folder, "http://x", timeout_s=5)
        return absent()

    with pytest.raises(ServeError, match="the folder was restored"):
        to(other, folder, ask)
    assert is_as_before(folder, bundle)
    to(other, folder, lambda: told(other))
    assert is_as_before(folder, other)


def test_a_replica_that_does_not_answer_may_still_serve_the_old_version(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    with pytest.raises(ServeError, match="the folder was restored: a replica does not answer"):
        to(other, folder, lambda: told(other, all_heard=False))
    assert is_as_before(folder, bundle)
    answers = iter([told(other, all_heard=False), told(other)])
    to(other, folder, lambda: next(answers))
    assert is_as_before(folder, other)


def test_ctrl_c_while_waiting_puts_the_old_version_back(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    def ask() -> ModelInfo:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(other, folder, ask)
    assert is_as_before(folder, bundle)


def test_the_old_version_survives_that_the_new_one_is_removed_meanwhile(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    def ask() -> ModelInfo:
        if is_swapped(folder):
            shutil.rmtree(folder / "tiny", ignore_errors=True)
        return absent()

    with pytest.raises(ServeError, match="the folder was restored"):
        to(other, folder, ask)
    assert is_as_before(folder, bundle)


def test_an_old_version_that_cannot_be_put_back_is_kept_and_named(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    def ask() -> ModelInfo:
        if is_swapped(folder):
            (folder / "tiny" / "manifest.json").write_text("somebody else's")
        return absent()

    with pytest.raises(ServeError, match=r"put the old version back yourself, it is in .*\.old$") as caught:
        to(other, folder, ask)
    assert digest(Path(str(caught.value).rpartition(" ")[2])) == digest(bundle)


@pytest.mark.parametrize("when", ["copying", "swapping"])
def test_a_full_disk_changes_nothing(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = Path.rename
    if when == "copying":
        monkeypatch.setattr(shutil, "copy", full)
    else:
        monkeypatch.setattr(
            Path, "rename", lambda path, to: (rename if path.name == "tiny" or path.suffix else full)(path, to)
        )
    with pytest.raises(WriteError, match=r"nothing was changed.*No space left on device"):
        to(other, folder)
    assert is_as_before(folder, bundle)


def test_a_bundle_is_no_folder_of_bundles(to: Callable[..., None], bundle: Path, other: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="not a folder of bundles"):
        to(other, folder / "tiny", lambda: told(other))
    assert is_as_before(folder, bundle)


def test_a_folder_that_lacks_what_is_in_service_already_is_another_one(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for wrong in (folder, tmp_path / "elsewhere"):
        with pytest.raises(DataError, match="serves this very bundle already"):
            to(other, wrong, lambda: told(other), told(other))
    assert is_as_before(folder, bundle)
    refused = {"digest": digest(bundle), "state": "failed", "reason": "…"}
    to(other, folder, lambda: told(other), told(other, refused))
    assert is_as_before(folder, other)


@pytest.fixture
def signals() -> None:
    """The signals that end a command with Python's default handlers."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_deploy_as_ctrl_c_does_and_a_second_one_cuts_nothing_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    undone = []

    def deployed(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            undone.append(True)

    monkeypatch.setattr("jepakit._frontdoor.deploy", deployed)
    with pytest.raises(SystemExit) as caught:
        serving.deploy(tmp_path, tmp_path)
    assert (caught.value.code, undone) == (128 + number, [True])


@pytest.mark.usefixtures("signals")
def test_a_second_ctrl_c_does_not_cut_short_what_the_first_one_undoes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone = []

    def deployed(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            undone.append(True)

    monkeypatch.setattr("jepakit._frontdoor.deploy", deployed)
    with pytest.raises(KeyboardInterrupt):
        serving.deploy(tmp_path, tmp_path)
    assert undone == [True]


@pytest.mark.usefixtures("signals")
def test_ctrl_c_while_a_refused_version_is_taken_out_changes_nothing(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.suffix == ".old":
            os.kill(os.getpid(), signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(ServeError, match="the folder was restored"):
        to(other, folder)
    assert is_as_before(folder, bundle)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("signals")
def test_a_system_without_sighup_can_deploy(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(
        "jepakit._frontdoor.deploy", lambda *_, **__: Deployed(told(bundle), replaced=told(bundle), beside=())
    )
    serving.deploy(tmp_path, tmp_path)


def test_what_a_killed_deploy_moved_aside_is_put_back_by_the_next(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path
) -> None:
    (folder / "tiny").rename(folder / ".deploy-a.old")
    shutil.copytree(other, folder / ".deploy-a")
    with pytest.raises(ServeError, match="the folder was restored"):
        to(other, folder)
    assert is_as_before(folder, bundle)


def test_the_old_version_of_a_killed_deploy_goes_only_once_another_one_is_in_service(
    to: Callable[..., None], bundle: Path, other: Path, third: Path, second: Path, folder: Path
) -> None:
    """What the killed one left in its place may be a version that the service refused."""
    (folder / "tiny").rename(folder / ".deploy-a.old")
    shutil.copytree(other, folder / "tiny")
    shutil.copytree(second, folder / "second")
    shutil.copytree(second, folder / ".deploy-b.old")
    (folder / ".deploy-c.old").mkdir()
    with pytest.raises(ServeError, match="the folder was restored"):
        to(third, folder)
    assert digest(folder / "tiny") == digest(other)
    assert digest(folder / ".deploy-a.old") == digest(bundle)
    to(third, folder, lambda: told(third))
    assert {path.name for path in folder.iterdir()} == {"tiny", "second", ".deploy-b.old"}
    assert digest(folder / "tiny") == digest(third)


def test_a_model_that_was_removed_is_not_brought_back_by_the_deploy_of_another(
    to: Callable[..., None], second: Path, other: Path, folder: Path
) -> None:
    shutil.copytree(second, folder / ".deploy-a.old")
    to(other, folder, lambda: told(other))
    assert {path.name for path in folder.iterdir()} == {"tiny", ".deploy-a.old"}


def test_a_bundle_that_is_a_link_is_replaced_and_the_link_goes(
    to: Callable[..., None], bundle: Path, other: Path, folder: Path, tmp_path: Path
) -> None:
    """As release folders are switched: the deploy after the next finds that the linked release has been removed."""
    (folder / "tiny").rename(tmp_path / "release")
    (folder / "tiny").symlink_to(tmp_path / "release")
    with pytest.raises(ServeError, match="the folder was restored"):
        to(other, folder)
    assert (folder / "tiny").is_symlink()
    to(other, folder, lambda: told(other))
    assert digest(tmp_path / "release") == digest(bundle)
    assert [path.name for path in folder.iterdir()] == ["tiny"]
    (folder / ".deploy-a.old").symlink_to(tmp_path / "gone")
    shutil.rmtree(folder / "tiny")
    (folder / "tiny").symlink_to(tmp_path / "gone")
    to(bundle, folder, lambda: told(bundle))
    assert [path.name for path in folder.iterdir()] == ["tiny"]
    assert digest(folder / "tiny") == digest(bundle)


def test_what_a_deploy_may_not_remove_is_named(
    to: Callable[..., None],
    other: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    to(other, folder, lambda: told(other))
    [old] = folder.glob(".deploy-*.old")
    assert f"warning: {old} could not be removed" in capsys.readouterr().err


@pytest.mark.usefixtures("signals")
def test_a_signal_long_after_one_that_a_library_swallowed_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping.exit_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # at once: ignored
    monkeypatch.setattr(stopping, "_ONE_STOP_S", 0.0)  # later
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("signals")
def test_a_deploy_under_nohup_outlives_its_terminal(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploys = []

    def deployed(path: Path, *_: object, **__: object) -> Deployed:
        deploys.append(path)
        os.kill(os.getpid(), signal.SIGHUP)
        return Deployed(told(bundle), replaced=told(bundle), beside=())

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("jepakit._frontdoor.deploy", deployed)
    serving.deploy(tmp_path, tmp_path)
    assert deploys == [tmp_path]


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("dim", "beside", "remark"),
    [
        (1, ("cells",), ""),
        (3, ("cells",), "its vectors have 1 numbers now, and had 3\n"),
        (None, ("cells",), "tiny is a new model beside cells: "),
        (None, (), ""),
    ],
)
def test_a_deploy_says_where_a_bundle_is_one_more_model_or_gives_longer_vectors(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    dim: int | None, beside: tuple[str, ...], remark: str,
) -> None:  # fmt: skip
    """dim: the length of the vectors before; None if it was not in service."""
    replaced = None if dim is None else replace_fields(told(bundle), dim=dim)
    monkeypatch.setattr("jepakit._frontdoor.deploy", lambda *_, **__: Deployed(told(bundle), replaced, beside))
    serving.deploy(tmp_path, tmp_path)
    rest = capfd.readouterr().out.partition(f"digest   {digest(bundle)}\n")[2]
    assert rest.startswith(remark)
    assert bool(rest) == bool(remark)


def test_whatever_a_new_version_raises_refuses_it_once_and_the_others_go_on(
    other: Path, second: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(settings(folder))
    tries = []

    def load(bundle: Any, *rest: Any) -> LoadedModel:
        if bundle.manifest.name != "tiny":
            return LoadedModel(bundle, *rest)
        tries.append(bundle)
        raise MemoryError

    async def go() -> None:
        replace(folder, other)
        shutil.copytree(second, folder / "second")
        monkeypatch.setattr(updates, "LoadedModel", load)
        with caplog.at_level(logging.ERROR, "jepakit.service"):
            for _ in range(3):
                await step(replica)
        assert [model.manifest.name for model in replica.registry] == ["second", "tiny"]
        update = replica.registry.state()["tiny"].update
        assert update is not None
        assert update.state == "failed"
        assert "cannot be loaded (MemoryError" in (update.reason or "")

    asyncio.run(go())
    assert len(tries) == len(caplog.records) == 1


def test_a_replica_joins_the_others_while_a_bundle_is_being_copied(second: Path, folder: Path) -> None:
    deployment = Deployment(folder, 1)
    (folder / "second").mkdir()
    files = sorted(second.iterdir())
    for file in files[:-1]:
        shutil.copy(file, folder / "second")
    (folder / "second" / files[0].name).write_bytes(b"")
    assert (folder / "second" / "manifest.json").exists()
    with pytest.raises(BundleError, match="second"):
        Replica(settings(folder))
    deployment.replicas.append(Replica(settings(folder), deployment.ask_all))
    joined = deployment.replicas[1]
    assert [model.manifest.name for model in joined.registry] == ["tiny"]
    with pytest.raises(ApiError, match="second is not in service here yet") as caught:
        joined.registry.find("second")
    assert caught.value.status == 503, "others may have it, so that asking again helps"

    async def go() -> None:
        assert await joined.faults() == ()
        for _ in range(2):
            for replica in deployment.replicas:
                await step(replica)
        assert joined.registry.state()["second"].update is not None
        shutil.copytree(second, folder / "second", dirs_exist_ok=True)
        for _ in range(3):
            for replica in deployment.replicas:
                await step(replica)

    asyncio.run(go())
    for replica in deployment.replicas:
        assert [model.manifest.name for model in replica.registry] == ["second", "tiny"]


def test_an_empty_folder_takes_nothing_out_and_keeps_no_update_of_another_back(
    other: Path, second: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(second, tmp_path / "more" / "second")
    replica = Replica(settings(tmp_path / "more", folder))

    async def go() -> None:
        shutil.rmtree(tmp_path / "more" / "second")
        replace(folder, other)
        for _ in range(8):
            await step(replica)

    asyncio.run(go())
    assert {model.digest for model in replica.registry} == {digest(other), digest(second)}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Make a folder unreadable: `broken(folder, errno)`."""

    def make(folder: Path, number: int) -> None:
        def refusing(of: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Path, *args: Any, **named: Any) -> Any:
                if path.parent == folder:
                    raise OSError(number, os.strerror(number), str(path))
                return of(path, *args, **named)

            return call

        for name in ("stat", "read_text"):
            monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
        monkeypatch.setattr(Path, "is_file", lambda path: False)  # as from Python 3.14 on

    return make


def test_a_run_is_exported_before_it_is_served(tmp_path: Path) -> None:
    (tmp_path / CONFIG).touch()
    with pytest.raises(
        DataError, match=r"is a run, and what is served is exported: jepakit export .* --out bundles/NAME"
    ):
        find_bundles(settings(tmp_path))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN], ids=errno.errorcode.get)
def test_a_folder_among_the_bundles_that_cannot_be_looked_into_keeps_no_other_back_and_is_told_once(
    other: Path,
    folder: Path,
    broken: Callable[[Path, int], None],
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """Such as `lost+found` of a volume, or a mount that is lost."""
    (folder / "lost+found").mkdir()
    broken(folder / "lost+found", number)
    assert [found.path.name for found in find_bundles(settings(folder))] == ["tiny"]
    replica = Replica(settings(folder))
    replace(folder, other)
    with caplog.at_level(logging.ERROR, "jepakit.service"):
        for _ in range(2):
            asyncio.run(step(replica))
    assert [model.digest for model in replica.registry] == [digest(other)]
    (record,) = caplog.records
    assert record.message == f"{folder / 'lost+found'} cannot be read: {os.strerror(number)}: it is passed over"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_bundle_that_cannot_be_read_for_a_while_stays_in_service(
    bundle: Path, second: Path, folder: Path, broken: Callable[[Path, int], None], number: int
) -> None:
    shutil.copytree(second, folder / "second")
    replica = Replica(settings(folder))
    broken(folder / "tiny", number)
    for _ in range(updates._ABSENT_LOOKS + 1):
        asyncio.run(step(replica))
    assert replica.registry.find("tiny").digest == digest(bundle)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_what_was_named_and_cannot_be_read_is_refused_in_words_at_start(
    folder: Path, broken: Callable[[Path, int], None], number: int
) -> None:
    broken(folder / "tiny", number)
    for named in (folder / "tiny", folder):
        with pytest.raises(InputError, match=rf"tiny.* cannot be read.*{os.strerror(number)}"):
            find_bundles(settings(named))


def test_a_new_name_that_is_incomplete_is_told_once(
    second: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(settings(folder))
    shutil.copytree(second, folder / "second")
    with caplog.at_level(logging.WARNING, "jepakit.service"):
        for size in (10, 20, 20):
            (folder / "second" / "model.onnx").write_bytes(b"\0" * size)
            asyncio.run(step(replica))
    (record,) = caplog.records
    assert "model.onnx is damaged" in record.message
    with pytest.raises(
        ApiError, match=r"second is not in service: its version .* is incomplete: .*model.onnx"
    ) as caught:
        replica.registry.find("second")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "error", [BundleError("cannot be read"), OSError(errno.EMFILE, "Too many open files")], ids=repr
)
def test_files_that_could_not_be_read_for_a_moment_are_verified_again_after_a_while(
    other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (replica,) = Deployment(folder, 1).replicas
    verify, tries = Bundle.verify, []

    def fail_once(bundle: Bundle) -> None:
        tries.append(bundle)
        if len(tries) == 1:
            raise error
        verify(bundle)

    async def go() -> None:
        replace(folder, other)
        monkeypatch.setattr(Bundle, "verify", fail_once)
        for _ in range(3):
            await step(replica)
        assert len(tries) == 1, "no file has changed, and no time has passed"
        monkeypatch.setattr(updates, "_AGAIN_S", 0.0)
        await step(replica)
        assert replica.registry.find("tiny").digest == digest(other)

    asyncio.run(go())


def test_a_manifest_that_is_refused_costs_no_model_in_service_and_is_told_once(
    bundle: Path, second: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(second, folder / "second")
    replica = Replica(settings(folder))

    async def go() -> None:
        await step(replica)
        manifest = folder / "tiny" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2', 1))
        for _ in range(8):
            await step(replica)
        assert replica.registry.find("tiny").digest == digest_before

    digest_before = digest(bundle)
    with caplog.at_level(logging.ERROR, "jepakit.service"):
        asyncio.run(go())
    (record,) = caplog.records
    assert "has schema version 2" in record.message
    assert record.message.endswith("it is passed over")


def test_a_manifest_that_is_refused_before_the_first_look_costs_no_model_in_service_either(
    bundle: Path, second: Path, folder: Path
) -> None:
    shutil.copytree(second, folder / "second")
    replica = Replica(settings(folder))
    (folder / "tiny" / "manifest.json").write_text("{}")

    async def go() -> None:
        for _ in range(8):
            await step(replica)

    asyncio.run(go())
    assert replica.registry.find("tiny").digest == digest(bundle)


def test_an_incomplete_version_that_comes_back_is_told_of_again(bundle: Path, other: Path, folder: Path) -> None:
    (replica,) = Deployment(folder, 1).replicas
    aside = folder.parent / "aside"

    def swap() -> None:
        """Swap by renaming, so that no file changes."""
        (folder / "tiny").rename(folder.parent / "meanwhile")
        aside.rename(folder / "tiny")
        (folder.parent / "meanwhile").rename(aside)

    async def told() -> tuple[str, str] | None:
        await step(replica)
        update = replica.registry.state()["tiny"].update
        return None if update is None else (update.digest, update.state)

    async def go() -> None:
        shutil.copytree(other, aside)
        (aside / "model.onnx").write_bytes(b"cut")
        for _ in range(2):
            swap()
            assert await told() == (digest(other), "incomplete")
            assert await told() == (digest(other), "incomplete")
            swap()
            assert await told() is None
        assert replica.registry.find("tiny").digest == digest(bundle)

    asyncio.run(go())


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_is_kept_of_a_name_that_is_gone(second: Path, folder: Path, whole: bool) -> None:
    replica = Replica(settings(folder))

    async def counted() -> bytes:
        return merge({report.replica: report.families for report in (await replica.reports(with_metrics=True)).reports})

    async def go() -> None:
        shutil.copytree(second, folder / "second")
        if not whole:
            (folder / "second" / "model.onnx").write_bytes(b"cut")
        await step(replica)
        assert (replica.registry.versions("second").incomplete is None) == whole
        assert (b'_images_total{model="second"' in await counted()) == whole
        assert (b'jepakit_update{model="second"' in await counted()) != whole
        model = replica.registry.versions("second").next
        shutil.rmtree(folder / "second")
        for _ in range(updates._ABSENT_LOOKS):
            await step(replica)
        if model is not None:  # until the next look it answers those who have found it
            await replica.engine.answer(model, [picture(0), b"no image"])
        assert b'"second"' not in await counted()

    asyncio.run(go())
    assert replica.registry.names() == ["tiny"]


def test_a_version_that_was_refused_and_taken_out_is_tried_again_when_it_comes_back(
    second: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "empty").mkdir()
    replica = Replica(settings(folder, folder.parent / "empty"), Deployment(folder, 1).ask_all)

    async def go() -> None:
        with monkeypatch.context() as little:
            little.setattr(memory, "available_mb", lambda: 1.0)
            shutil.copytree(second, folder / "second")
            await step(replica)
        with pytest.raises(ApiError, match="MB are free") as caught:
            replica.registry.find("second")
        assert caught.value.code == "model_refused"
        shutil.rmtree(folder / "second")
        await step(replica)
        shutil.copytree(second, folder / "second")
        await step(replica)
        assert replica.registry.versions("second").loaded()

    asyncio.run(go())


def test_a_version_that_would_exceed_the_replicas_own_memory_is_refused(
    bundle: Path, other: Path, folder: Path
) -> None:
    replica = Replica(settings(folder, max_memory_mb=int(memory.used_mb()) + 50))
    replace(folder, other)
    asyncio.run(step(replica))
    update = replica.registry.versions("tiny").update
    assert update is not None
    assert update.state == "failed"
    assert "left of max_memory_mb" in (update.reason or "")
    assert told_by(replica) == {'jepakit_update{model="tiny",replica="a",state="failed"} 1.0'}
    replace(folder, bundle)
    asyncio.run(step(replica))
    assert told_by(replica) == set()


def told_by(replica: Replica) -> set[str]:
    """What the metrics say of versions that are not in service."""
    report = asyncio.run(replica.report(with_metrics=True))
    return {line for line in merge({"a": report.families}).decode().splitlines() if line.startswith("jepakit_update{")}


def test_replicas_of_one_machine_load_a_version_one_after_the_other(
    other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would take the memory that is free for its own."""
    replicas = Deployment(folder, 2).replicas
    loading: list[int] = [0]

    def load(*args: Any) -> LoadedModel:
        loading[0] += 1
        assert loading[0] == 1, "both at a time"
        loaded = LoadedModel(*args)
        time.sleep(0.2)
        loading[0] -= 1
        return loaded

    async def go() -> None:
        replace(folder, other)
        monkeypatch.setattr(updates, "LoadedModel", load)
        await asyncio.gather(*map(step, replicas))

    asyncio.run(go())
    assert all(replica.registry.versions("tiny").failed == {} for replica in replicas)


def test_looks_that_were_ended_go_on(folder: Path, other: Path) -> None:
    async def ended(_with_metrics: bool) -> list[Report | None]:
        raise asyncio.CancelledError

    replica = Replica(settings(folder), ended)

    async def go() -> None:
        replace(folder, other)
        replica.watch()
        first = replica._watching
        assert first is not None
        await asyncio.wait_for(asyncio.wait([first]), 30)
        assert first.cancelled()
        replica._ask_all = replica._ask_alone
        replica.watch()
        second = replica._watching
        replica.watch()
        assert replica._watching is second, "one is enough"
        async with asyncio.timeout(30):
            while replica.registry.find("tiny").digest != digest(other):
                await asyncio.sleep(0.01)

    asyncio.run(go())


def test_a_replica_that_does_not_hear_itself_agrees_to_nothing(folder: Path) -> None:
    first, second = Deployment(folder, 2).replicas

    async def others(_with_metrics: bool) -> list[Report | None]:
        return [await second.report()]

    first._ask_all = others
    assert asyncio.run(first._states()) == [None]


def test_the_service_can_end_while_a_new_version_waits_for_a_lock_which_the_log_tells_once(
    other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(settings(folder))
    replace(folder, other)
    monkeypatch.setattr(updates, "_TURN_POLL_S", 0.01)
    tries = []

    def hold(path: Path) -> contextlib.AbstractContextManager[None]:
        tries.append(path)
        return holding(path)

    async def go() -> None:
        loading = asyncio.create_task(step(replica))
        while len(tries) < 3:
            await asyncio.sleep(0)
        loading.cancel()

    monkeypatch.setattr(updates, "holding", hold)
    with holding(folder / "tiny"), caplog.at_level(logging.INFO, "jepakit.service"):
        ending = threading.Thread(target=lambda: asyncio.run(go()), daemon=True)
        ending.start()
        ending.join(10)
        assert not ending.is_alive()
    assert [record.message for record in caplog.records if "has locked it" in record.message] == [
        f"{folder / 'tiny'} waits to be loaded: another process, most likely a replica, has locked it"
    ]
    asyncio.run(step(replica))
    assert replica.registry.find("tiny").digest == digest(other)


def test_a_copy_of_a_bundle_beside_it_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica(settings(folder))
    shutil.copytree(folder / "tiny", folder / "tiny-backup")
    with caplog.at_level(logging.ERROR, "jepakit.service"):
        for _ in range(3):
            asyncio.run(step(replica))
    (record,) = caplog.records
    assert "tiny-backup has the name of another bundle" in record.message


def test_a_manifest_is_read_again_only_once_it_has_changed(
    bundle: Path, other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(settings(folder))
    opened: list[str] = []

    def opening(path: Path) -> Bundle:
        opened.append(path.name)
        return jepakit.open_bundle(path)

    async def looks(count: int) -> list[str]:
        opened.clear()
        for _ in range(count):
            await step(replica)
        return opened

    monkeypatch.setattr(updates, "open_bundle", opening)
    assert asyncio.run(looks(3)) == ["tiny"]
    assert asyncio.run(looks(1)) == []
    replace(folder, other)
    assert asyncio.run(looks(3)) == ["tiny"]
    assert replica.registry.find("tiny").digest == digest(other)
    manifest = folder / "tiny" / MANIFEST
    manifest.write_bytes((bundle / MANIFEST).read_bytes())  # in place
    assert asyncio.run(looks(2)) == ["tiny"]
    manifest.unlink()
    asyncio.run(looks(1))
    assert replica._updates._opened == {}


def test_a_file_that_may_be_read_again_is_looked_at_again(second: Path, folder: Path) -> None:
    shutil.copytree(second, folder / "second")
    before = updates._stamp(folder / "second")
    assert updates._stamp(folder / "second") == before
    (folder / "second" / "model.onnx").chmod(0o640)
    assert updates._stamp(folder / "second") != before

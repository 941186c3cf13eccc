"""How a model is run: in lanes if they answer more, on all cores for a few images alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, open_bundle
from jepakit.errors import InferenceError
from jepakit.images import Pixels
from jepakit.inference.runtime import Chosen
from jepakit.inference.session import Session
from jepakit_service.models import tuning
from jepakit_service.models.tuning import Plan, Tuned, most_sessions, tune
from jepakit_service.settings import ServeSettings


def tuned_by(
    seconds: dict[tuple[int, int, int], float], bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, *,
    threads: int = 2, max_batch: int | None = None, provider: Chosen = "cpu",
) -> Tuned:  # fmt: skip
    """Tune on a machine where a batch takes `seconds[threads, lanes, size]`, too long if missing."""

    def timed(session: Session, batch: Pixels, lanes: int) -> float:
        return seconds.get((session.threads, lanes, len(batch)), 1.0)

    monkeypatch.setattr(tuning, "_pass", timed)
    bundle = open_bundle(bundle_dir)
    session = Session.open(bundle, provider="cpu", threads=threads)
    session.provider = provider
    inputs = golden.unpack(bundle.read(GOLDEN)).inputs(bundle.manifest.preprocess)
    return tune(session, bundle, inputs, ServeSettings(bundles=("x",), threads=threads, max_batch=max_batch))


SLOW_ALONE = {(2, 1, 1): 0.09, (2, 1, 2): 0.18, (1, 1, 1): 0.12, (1, 2, 1): 0.14, (1, 2, 2): 0.28}


def test_both_ways_are_open_where_each_is_better_at_something(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, session, whole = tuned_by(SLOW_ALONE, bundle, monkeypatch)
    assert plan == Plan(threads=1, lanes=2, max_batch=1, rate=2 / 0.14, few=1)
    assert (session.threads, whole.threads) == (1, 2)


def test_all_cores_take_as_many_images_as_they_answer_sooner(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {(8, 1, 1): 0.02, (8, 1, 2): 0.04, (8, 1, 4): 0.08, (8, 1, 8): 0.16, (1, 1, 1): 0.1, (1, 8, 1): 0.1}
    plan, _, _ = tuned_by(fast, bundle, monkeypatch, threads=8)
    assert (plan.threads, plan.lanes, plan.few) == (1, 8, 4)


@pytest.mark.parametrize(
    ("seconds", "lanes"),
    [
        ({**SLOW_ALONE, (1, 2, 1): 0.2, (1, 2, 2): 0.4}, 1),
        ({**SLOW_ALONE, (1, 1, 1): 0.08}, 2),
    ],
    ids=["all cores answer more", "lanes are never slower"],
)
def test_one_session_is_kept_where_the_other_gains_nothing(
    seconds: dict[tuple[int, int, int], float], lanes: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, session, whole = tuned_by(seconds, bundle, monkeypatch)
    assert (plan.lanes, plan.few) == (lanes, 0)
    assert whole is session


def test_the_largest_batch_is_the_one_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, _ = tuned_by(SLOW_ALONE, bundle, monkeypatch, max_batch=2)
    assert (plan.max_batch, plan.lanes, plan.few) == (2, 2, 1)


@pytest.mark.parametrize(("two", "lanes", "size"), [(0.040, 2, 64), (0.060, 1, 32)])
def test_on_a_gpu_two_lanes_share_the_session_unless_they_lose(
    two: float, lanes: int, size: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {(2, number, each): 0.1 for number in (1, 2) for each in (1, 2, 4, 8, 16)}
    seconds |= {(2, 1, 32): 0.0125, (2, 1, 64): 0.025, (2, 2, 32): 0.0300, (2, 2, 64): two}
    plan, session, whole = tuned_by(seconds, bundle, monkeypatch, provider="cuda")
    assert (plan.lanes, plan.max_batch, plan.few) == (lanes, size, 0)
    assert session is whole


def without_room(monkeypatch: pytest.MonkeyPatch, lanes: int, size: int) -> None:
    """From now on, sessions have no memory for batches of a given size in a given number of lanes."""
    timed = tuning._pass

    def fitting(session: Session, batch: Pixels, at_a_time: int) -> float:
        if at_a_time >= lanes and len(batch) >= size:
            raise InferenceError("out of memory")
        return timed(session, batch, at_a_time)

    monkeypatch.setattr(tuning, "_pass", fitting)


def test_a_batch_for_which_there_is_no_memory_is_not_chosen(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_LEAST_S", 0.001)
    opened = open_bundle(bundle)
    session = Session.open(opened, provider="cpu", threads=2)
    inputs = golden.unpack(opened.read(GOLDEN)).inputs(opened.manifest.preprocess)
    without_room(monkeypatch, 1, 4)
    plan, *_ = tune(session, opened, inputs, ServeSettings(bundles=("x",), threads=2))
    assert plan.max_batch < 4
    with pytest.raises(InferenceError, match="out of memory"):
        tune(session, opened, inputs, ServeSettings(bundles=("x",), threads=2, max_batch=8))


def test_what_fails_in_a_second_lane_is_not_lost(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(open_bundle(bundle), provider="cpu", threads=1)
    main, run, once = threading.Barrier(2), session.run, iter([True])

    def failing(images: Pixels) -> object:
        if next(once, False):
            return run(images)
        if main.wait(10) == 0:
            raise InferenceError("out of memory")
        return run(images)

    monkeypatch.setattr(session, "run", failing)
    monkeypatch.setattr(tuning, "_LEAST_S", 0.0)
    with pytest.raises(InferenceError, match="out of memory"):
        tuning._pass(session, golden.unpack(open_bundle(bundle).read(GOLDEN)).inputs(session.manifest.preprocess), 2)


def test_the_vectors_are_the_same_however_they_are_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, whole = tuned_by(SLOW_ALONE, bundle, monkeypatch)
    images: Any = golden.unpack(open_bundle(bundle).read(GOLDEN)).inputs(session.manifest.preprocess)
    together = whole.run(images)
    for n in range(len(images)):
        assert np.array_equal(session.run(images[n : n + 1])[0], together[n])


def test_sessions_that_are_open_at_a_time() -> None:
    assert [most_sessions("cpu", threads) for threads in (1, 2, 4, 8)] == [1, 2, 2, 3]
    assert most_sessions("cuda", 8) == 1

"""Two gloo processes against one process on the concatenated batch: same loss, same gradients, same weights."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import jepakit
from jepakit._run_files import BUNDLE, SKIPPED, START
from jepakit.bundles.bundle import WEIGHTS
from jepakit.run import Run

SCRIPT = Path(__file__).parent / "two_ranks.py"
BACKBONES = {"convnet": "test_resnet", "vit": "test_vit"}


@dataclass
class TwoRanks:
    """What two processes left behind, and their script, to compute the same in this process."""

    out: Path
    script: dict[str, Any]
    inputs: tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    image_folder: Callable[..., Path],
    weights_file: Callable[[str], Path],
) -> TwoRanks:
    out = tmp_path_factory.mktemp("two-ranks")
    inputs = image_folder(), weights_file("test_resnet"), weights_file("test_vit")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(SCRIPT), str(out), *map(str, inputs)],
        env=environment, timeout=240, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert (out / "world").read_text() == "2"
    return TwoRanks(out, runpy.run_path(str(SCRIPT)), inputs)


@pytest.fixture(scope="module")
def one_rank(two_ranks: TwoRanks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """`one_rank("vit")`: the run of that name, by this process alone."""
    images, *weights = two_ranks.inputs

    @cache
    def get(name: str) -> Run:
        return jepakit.adapt(
            images, out=tmp_path_factory.mktemp("one") / "run", backbone=BACKBONES[name],
            weights=str(weights[name == "vit"]), **two_ranks.script["ADAPT"],
        )  # fmt: skip

    return get


def relative_l2(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def test_the_loss_and_its_gradient_are_those_of_the_whole_batch(two_ranks: TwoRanks) -> None:
    two, one = torch.load(two_ranks.out / "loss.pt"), two_ranks.script["loss"]()
    for name in ("total", "prediction", "sigreg"):
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-6)
    assert relative_l2(two["gradient"], one["gradient"]) < 1e-5


@pytest.mark.parametrize("what", runpy.run_path(str(SCRIPT))["STEPS"])
def test_five_steps_through_accelerate_are_those_of_the_whole_batch(two_ranks: TwoRanks, what: str) -> None:
    name, settings = two_ranks.script["STEPS"][what]
    weights = two_ranks.inputs[1 if name == "test_resnet" else 2]
    two, one = torch.load(two_ranks.out / f"{what}.pt"), two_ranks.script["steps"](name, weights, **settings)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-5)
    for moment, most in (("first", 1e-4), ("last", 1e-2)):
        assert two[moment].keys() == one[moment].keys()
        assert flat(one[moment]).norm() > 0
        assert relative_l2(flat(two[moment]), flat(one[moment])) < most, moment
    statistics = [key for key, value in one["last"].items() if "running" in key and value.abs().max() > 0]
    assert bool(statistics) == ("trained" in what)
    assert any(value.abs().max() > 0 for key, value in one["last"].items() if not key.startswith("projector"))


def told(two_ranks: TwoRanks, what: str) -> list[Any]:
    return [json.loads((two_ranks.out / f"told-{rank}.json").read_text())[what] for rank in range(2)]


def test_what_any_rank_cannot_read_is_listed_and_counts(two_ranks: TwoRanks) -> None:
    """That many are allowed in the first run, and one fewer in the second: more than either rank meets."""
    unreadable, ranks = two_ranks.script["UNREADABLE"], told(two_ranks, "skip")
    with (two_ranks.out / "skipped" / SKIPPED).open(newline="", encoding="utf-8") as file:
        listed = [row[0] for row in csv.reader(file)][1:]
    assert sorted(listed) == sorted(unreadable)
    for rank in ranks:
        assert 0 < len(rank["met"]) < len(unreadable)
        assert list(rank["refusals"]) == ["refused"]
        assert "over 16.0714 % of the images cannot be read" in rank["refusals"]["refused"]
    assert jepakit.open_run(two_ranks.out / "skipped").finished
    assert not jepakit.open_run(two_ranks.out / "refused").finished


def test_ranks_that_find_different_checkpoints_do_not_go_on(two_ranks: TwoRanks) -> None:
    for rank, words in enumerate(told(two_ranks, "resume")):
        assert words.startswith(
            f"{two_ranks.out / f'disk-of-{rank}'} is not the same folder on all nodes: by its checkpoints process 0 at step 3, "
            "process 1 at step 0 would resume."
        )


def test_ranks_that_find_different_images_do_not_begin(two_ranks: TwoRanks) -> None:
    for words in told(two_ranks, "images"):
        assert words.startswith(
            "the images are not the same on all nodes (process 0 finds 28 images, process 1 finds 27 images; "
        )
    assert not (two_ranks.out / "apart" / START).exists()


def test_a_stop_of_one_rank_stops_both_after_the_same_step(two_ranks: TwoRanks) -> None:
    """Asked over the CPU: no step waits for what the training device has to do."""
    expected = {"flags": [[True, True, False]] * 2, "code": 143, "steps": 2, "on the device": 0}
    assert told(two_ranks, "stop") == [expected] * 2


def test_a_stopped_run_of_two_ranks_ends_as_one_that_was_not(two_ranks: TwoRanks) -> None:
    whole, stopped = (load_file(two_ranks.out / name / BUNDLE / WEIGHTS) for name in ("vit", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(stopped[name], value) for name, value in whole.items())


@pytest.mark.parametrize("name", BACKBONES)
def test_adapt_gives_the_same_weights_on_two_ranks_as_on_one(
    two_ranks: TwoRanks, one_rank: Callable[[str], Run], name: str
) -> None:
    one, two = one_rank(name), jepakit.open_run(two_ranks.out / name)
    assert [row["step"] for row in two.metrics()] == [row["step"] for row in one.metrics()] == [2]
    for key in ("sigreg", "grad_norm", "lr"):
        assert two.metrics()[0][key] == pytest.approx(one.metrics()[0][key], rel=1e-3), key
    start, ours, theirs = (
        flat({key: value.float() for key, value in load_file(file).items() if "num_batches" not in key})
        for file in (one.path / START / WEIGHTS, one.path / BUNDLE / WEIGHTS, two.path / BUNDLE / WEIGHTS)
    )
    # AdamW's first steps are signs of gradients. One that is 0 but for rounding (a bias that the projector's
    # BatchNorm cancels) may take either sign.
    assert relative_l2(theirs - start, ours - start) < 0.1
    assert two.bundle.manifest.provenance.images_seen == one.bundle.manifest.provenance.images_seen == 24


@pytest.mark.parametrize("name", BACKBONES)
def test_the_logged_loss_is_that_of_the_whole_batch(
    two_ranks: TwoRanks, one_rank: Callable[[str], Run], name: str
) -> None:
    """Not of rank 0's share alone: runs are compared by it."""
    for key in ("loss", "prediction"):
        logged = jepakit.open_run(two_ranks.out / name).metrics()[0][key]
        assert logged == pytest.approx(one_rank(name).metrics()[0][key], rel=1e-3), key

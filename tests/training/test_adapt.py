"""`jepakit.adapt` end to end on tiny models: what it leaves behind, reproduces exactly, and refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.training.runs import TINY, Adapt, adapting, stopping_in_step, weights_of
from torch import Tensor
from typer.testing import CliRunner

import jepakit
import jepakit.run
import jepakit_training.learning.learner
import jepakit_training.learning.sigreg
from jepakit._run_files import (
    BUNDLE,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    NEIGHBOURS,
    PLAN,
    SKIPPED,
    SPLIT,
    START,
)
from jepakit.backbones.backbone import start_backbone
from jepakit.bundles.bundle import WEIGHTS, open_bundle, write_bundle
from jepakit.cli import app
from jepakit.config import AdaptConfig, ViewsConfig
from jepakit.errors import (
    BackboneError,
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    JepakitError,
    TrainingError,
)
from jepakit.run import Run
from jepakit.sources import list_images
from jepakit_training import loop
from jepakit_training.alone import alone
from jepakit_training.data.batches import ViewDataset
from jepakit_training.learning.learner import Learner
from jepakit_training.run import checkpoint

STEPS, WARMUP_STEPS = 22, 6
BACKBONES = ("test_resnet", "test_vit")


@pytest.fixture(scope="module")
def images(image_folder: Callable[..., Path]) -> Path:
    return image_folder()


@pytest.fixture(scope="module")
def adapt(images: Path, weights_file: Callable[[str], Path]) -> Adapt:
    return adapting(images, weights_file, steps=STEPS, warmup=WARMUP_STEPS / STEPS)


@pytest.fixture(scope="module")
def finished(adapt: Adapt, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """`finished("test_vit")`: a finished run. Look, don't touch."""
    runs: dict[str, Run] = {}

    def get(backbone: str = "test_vit") -> Run:
        if backbone not in runs:
            runs[backbone] = adapt(tmp_path_factory.mktemp("finished") / "run", backbone)
        return runs[backbone]

    return get


@pytest.mark.parametrize("grouped", [False, True])
def test_all_images_but_those_held_out_are_trained_on_and_no_others(
    adapt: Adapt, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    names = [str(file.relative_to(images)) for file in sorted(images.rglob("*.png"))]
    rows = [f"{name},{place % 9}" for place, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("\n".join(["path,group", *rows]))
    trained_on: set[str] = set()
    read = ViewDataset._read

    def watched(self: ViewDataset, index: int) -> Any:
        trained_on.add(self.images.ids[index])
        return read(self, index)

    monkeypatch.setattr(ViewDataset, "_read", watched)
    run = adapt(tmp_path / "run", group=str(tmp_path / "groups.csv") if grouped else "none")
    with (run.path / SPLIT).open(newline="") as file:
        held_out = {row["path"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert 0 < len(held_out) < len(names)
    assert trained_on == set(names) - held_out


@pytest.fixture(scope="module")
def stopped(adapt: Adapt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after step 12. Look, don't touch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, stopping_in_step(11, patch), pytest.raises(SystemExit):
        adapt(out)
    return out


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_broke_off_before_a_checkpoint_begins_anew_and_says_so(
    adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = Learner.step

    def step(self: Learner, number: int, views: Any) -> Any:
        if number == 12:
            raise RuntimeError("the power is cut")
        return real(self, number, views)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        with pytest.raises(RuntimeError, match="power"):
            adapt(tmp_path / "run")
    assert "starting over" not in capsys.readouterr().err
    assert not list((tmp_path / "run" / CHECKPOINTS).glob("step-*"))
    run = adapt(tmp_path / "run")
    assert "no checkpoint had been saved: starting over" in capsys.readouterr().err
    assert equal(weights_of(run), weights_of(finished("test_vit")))


def test_the_split_of_a_run_is_a_manifest_that_holds_the_same_images_out(
    finished: Callable[[str], Run], images: Path, tmp_path: Path
) -> None:
    run = finished("test_vit")
    shutil.copytree(images, tmp_path / "moved")
    shutil.copy(run.path / SPLIT, tmp_path / "moved" / SPLIT)
    rows = {row["path"]: row for row in csv.DictReader((run.path / SPLIT).read_text("utf-8").splitlines())}
    listed = list_images(str(tmp_path / "moved" / SPLIT))
    assert listed.held_out is not None
    assert listed.labels is not None
    assert len(listed) == 28
    for name, held_out, label in zip(listed.ids, listed.held_out, listed.labels, strict=True):
        assert (held_out, label) == (rows[name]["split"] == "test", rows[name]["label"])
        assert label == name.partition("/")[0]
    assert sum(listed.held_out) == json.loads((run.path / PLAN).read_text())["held_out"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_run_explains_itself(finished: Callable[[str], Run], backbone: str, images: Path) -> None:
    run = finished(backbone)
    assert {path.name for path in run.path.iterdir()} == {
        CONFIG, ENVIRONMENT, PLAN, SPLIT, METRICS, CHECKPOINTS, NEIGHBOURS, START, BUNDLE,
    }  # fmt: skip
    assert run.neighbours.read_bytes().startswith(b"\x89PNG")
    assert run.finished
    assert run.config["backbone"] == backbone
    assert run.config["steps"] == STEPS
    environment = json.loads((run.path / ENVIRONMENT).read_text())
    assert environment["images"] == 28
    assert {"torch", "timm", "jepakit"} <= environment["versions"].keys()
    plan = json.loads((run.path / PLAN).read_text())
    assert (plan["steps"], plan["train"] + plan["held_out"], plan["device"]) == (STEPS, 28, "cpu")
    assert plan["lr"] > 0 < plan["lamb"]
    assert [row["step"] for row in run.metrics()] == [9, 19, STEPS - 1]
    assert set(run.metrics()[0]) == {
        "step", "loss", "prediction", "sigreg", "grad_norm", "lr", "images_per_s", "data_wait", "proj_std", "proj_rank",
        "peak_memory_gb",
    }  # fmt: skip
    for part in (START, BUNDLE):
        bundle = jepakit.open_bundle(run.path / part)
        bundle.verify()
        assert str(images.parent) not in (bundle.path / "manifest.json").read_text()
    provenance = run.bundle.manifest.provenance
    assert (provenance.steps, provenance.images_seen) == (STEPS, STEPS * 8)
    assert run.bundle.manifest.backbone.start.license == "cc0-1.0"
    again = jepakit.open_run(run.path)
    with pytest.raises(DataError, match=r"nowhere/config\.toml is gone or damaged"):
        _ = jepakit.Run("nowhere").config
    assert again.verdict == run.verdict
    assert again.verdict.word in ("better", "same", "worse", "cannot tell")
    assert again.comparison.before is not None
    assert again.comparison.after is not None
    assert again.comparison.n_held_out == 6
    told = CliRunner().invoke(app, ["report", str(run.path)]).stdout
    assert told.startswith(str(run.comparison))
    assert f"next: jepakit export {run.path}" in told
    assert f"to see for yourself: {run.neighbours}" in told
    assert json.loads(CliRunner().invoke(app, ["report", str(run.path), "--json"]).stdout)["run"] == str(run.path)


@pytest.mark.parametrize("change", ["a part more", "a part less", "another name", "another group"])
def test_a_checkpoint_of_other_libraries_is_refused_in_words(
    adapt: Adapt, stopped: Path, tmp_path: Path, change: str
) -> None:
    def other(state: dict[str, Any]) -> None:
        if change == "a part more":
            state["scheduler"] = {}
        elif change == "a part less":
            del state["projector"]
        elif change == "another name":
            state["backbone"]["renamed"] = state["backbone"].pop(next(iter(state["backbone"])))
        else:
            state["optimizer"]["param_groups"].pop()

    shutil.copytree(stopped, tmp_path / "run")
    [folder] = (tmp_path / "run" / CHECKPOINTS).iterdir()
    step, state = checkpoint.load_newest(folder.parent) or pytest.fail("no checkpoint")
    other(state)
    shutil.rmtree(folder)
    checkpoint.save(folder.parent, step, state)
    with pytest.raises(
        CheckpointError, match=r"checkpoints holds the state of another model.*environment\.json again, or remove"
    ):
        adapt(tmp_path / "run")


def test_a_gpu_without_room_for_a_checkpoint_is_no_reason_to_remove_it(
    adapt: Adapt, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(Learner, "load_state_dict", full)
    with pytest.raises(TrainingError, match=r"out of the GPU's memory .*the last checkpoint is intact"):
        adapt(tmp_path / "run")


def test_a_collapse_stays_with_the_verdict(adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = adapt(tmp_path / "run", steps=2)
    assert (run.collapsed, run.plan["steps"]) == (False, 2)
    assert "collapsed" not in run.verdict.reason
    monkeypatch.setattr(jepakit.run, "COLLAPSED_STD", 100.0)
    assert adapt(tmp_path / "again", steps=2).verdict.reason.startswith("the projections collapsed")
    (run.path / METRICS).unlink()
    assert not run.collapsed
    for damage in (lambda: (run.path / PLAN).write_text("[]"), (run.path / PLAN).unlink):
        damage()
        with pytest.raises(DataError, match=r"plan\.json is gone or damaged"):
            assert Run(run.path).plan


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_start_is_the_file_and_only_the_last_layers_moved(
    finished: Callable[[str], Run], weights_file: Callable[[str], Path], backbone: str
) -> None:
    run = finished(backbone)
    start, end = weights_of(run, START), weights_of(run)
    file, _ = start_backbone(backbone, str(weights_file(backbone)), 64)
    assert equal(start, file.state_dict())
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    last = ("layer4.",) if backbone == "test_resnet" else ("blocks.4.", "blocks.5.", "norm.")
    assert moved
    assert all(key.startswith(last) for key in moved)
    assert not any("running" in key or "num_batches" in key for key in moved)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_same_seed_gives_the_same_weights_bit_for_bit(
    adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path, backbone: str
) -> None:
    torch.rand(7)  # whatever was drawn before
    again = adapt(tmp_path / "again", backbone, workers=1)
    assert equal(weights_of(again), weights_of(finished(backbone)))
    assert again.bundle.manifest.model_id == finished(backbone).bundle.manifest.model_id


def test_another_seed_gives_other_weights(adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path) -> None:
    assert not equal(weights_of(adapt(tmp_path / "run", seed=1)), weights_of(finished("test_vit")))


@pytest.mark.parametrize(("backbone", "number"), [("test_resnet", signal.SIGTERM), ("test_vit", signal.SIGINT)])
def test_an_interrupted_run_ends_as_the_uninterrupted_one_did(
    adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    backbone: str, number: signal.Signals, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    for step, wanted in ((3, 4), (8, 13)):  # once in the warm-up, once behind it
        with (
            stopping_in_step(step, monkeypatch, number),
            pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit),
        ):
            adapt(out, backbone)
        assert f"stopped after step {wanted}; run the same command again" in capsys.readouterr().err
        assert not jepakit.open_run(out).finished
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    run = adapt(out, backbone)
    assert "resuming from step 13" in capsys.readouterr().err
    assert equal(weights_of(run), weights_of(finished(backbone)))
    assert [row["step"] for row in run.metrics()] == [9, 19, STEPS - 1]
    for row, expected in zip(run.metrics(), finished(backbone).metrics(), strict=True):
        for key in ("loss", "prediction", "sigreg", "grad_norm", "lr"):
            assert row[key] == expected[key]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_last_checkpoint_is_written_is_one_too(
    adapt: Adapt,
    finished: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    def save_and_interrupt(*args: Any) -> None:
        real(*args)
        os.kill(os.getpid(), number)

    real, out = checkpoint.save, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_interrupt)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            adapt(out)
    found = checkpoint.load_newest(out / CHECKPOINTS)
    assert found is not None
    assert found[0] == STEPS
    assert not jepakit.open_run(out).finished
    assert equal(weights_of(adapt(out)), weights_of(finished("test_vit")))


def test_steps_after_the_last_checkpoint_are_done_again_and_logged_once(
    adapt: Adapt, finished: Callable[[str], Run], stopped: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    shutil.rmtree(next((out / CHECKPOINTS).glob("step-*")))  # as if killed before it was written
    run = adapt(out)
    assert [row["step"] for row in run.metrics()] == [9, 19, STEPS - 1]
    assert equal(weights_of(run), weights_of(finished("test_vit")))


def test_a_run_does_not_go_on_by_another_plan(
    adapt: Adapt, finished: Callable[[str], Run], stopped: Path, tmp_path: Path
) -> None:
    """As another version of jepakit may make one of the same settings."""
    out = shutil.copytree(stopped, tmp_path / "run")
    plan = json.loads((out / PLAN).read_text())
    (out / PLAN).write_text(other := json.dumps({**plan, "lamb": 0.5, "workers": 7, "of_another_version": 1}))
    with pytest.raises(
        ConfigError, match=rf"began with another plan \(lamb = 0\.5, now {plan['lamb']}\): finish it with"
    ):
        adapt(out)
    assert (out / PLAN).read_text() == other
    (out / PLAN).write_text(json.dumps({**plan, "workers": 7, "device": "another"}))
    split = (out / SPLIT).read_text()
    (out / SPLIT).write_text(split.replace("train", "x").replace("test", "train").replace("x", "test"))
    with pytest.raises(
        ConfigError, match=r"began with another plan \(other images are held out than split\.csv says\)"
    ):
        adapt(out)
    (out / SPLIT).write_text(split)
    assert equal(weights_of(adapt(out)), weights_of(finished("test_vit")))


def test_a_damaged_checkpoint_is_told_and_kept(
    adapt: Adapt, finished: Callable[[str], Run], stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    (newest,) = (out / CHECKPOINTS).iterdir()
    (newest / "state.pt").write_bytes(b"half")
    run = adapt(out)
    assert f"warning: {newest} is damaged or incomplete and is passed over" in capsys.readouterr().err
    assert (out / CHECKPOINTS / f"damaged-{newest.name}" / "state.pt").read_bytes() == b"half"
    assert equal(weights_of(run), weights_of(finished("test_vit")))


def test_a_half_written_line_of_metrics_does_not_stop_a_resume(adapt: Adapt, stopped: Path, tmp_path: Path) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    with (out / METRICS).open("a") as file:
        file.write('{"step": 19, "lo')  # a full disk, a power cut
    assert [row["step"] for row in adapt(out).metrics()] == [9, 19, STEPS - 1]


def test_a_kill_between_the_first_two_files_does_not_block_the_folder(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that start together see this state too: one has written environment.json, not yet config.toml."""
    out = tmp_path / "run"
    with stopping_in_step(0, monkeypatch), pytest.raises(SystemExit):
        adapt(out, steps=2)
    only_first = tmp_path / "killed"
    only_first.mkdir()
    shutil.copy(out / ENVIRONMENT, only_first / ENVIRONMENT)
    assert adapt(only_first, steps=2).finished


def test_a_run_killed_while_measuring_the_result_only_measures_again(
    adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished("test_vit").path, out)
    shutil.rmtree(out / BUNDLE)
    run = adapt(out)
    assert f"resuming from step {STEPS}" in capsys.readouterr().err
    assert equal(weights_of(run), weights_of(finished("test_vit")))
    assert run.comparison == finished("test_vit").comparison
    assert [row["step"] for row in run.metrics()] == [9, 19, STEPS - 1]


def test_warm_up_leaves_the_backbone_untouched_bit_for_bit(
    adapt: Adapt, weights_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, _ = start_backbone("test_resnet", str(weights_file("test_resnet")), 64)
    for step, same in ((WARMUP_STEPS - 1, True), (0, False)):
        with stopping_in_step(step, monkeypatch), pytest.raises(SystemExit):
            adapt(tmp_path / "run", "test_resnet")
        found = checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS)
        assert found is not None
        assert found[0] == WARMUP_STEPS + (not same)
        assert equal(found[1]["backbone"], start.state_dict()) == same


@pytest.mark.parametrize(
    "changed", [{"lr": 0.01}, {"steps": 30}, {"image_size": 96}, {"seed": 3}, {"views": {"n_local": 2}}], ids=str
)
def test_changed_settings_are_refused_with_the_difference(
    adapt: Adapt, finished: Callable[[str], Run], changed: dict[str, Any]
) -> None:
    run = finished("test_vit")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    key = "views.n_local" if "views" in changed else next(iter(changed))
    with pytest.raises(ConfigError, match=f"other settings .*{key} was .*, now .*weights=.*, out=NEW"):
        adapt(run.path, **changed)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unfreeze": 50}, "unfreeze = 50: this backbone has 6 blocks"),
        ({"backbone": "crossvit_tiny_240", "image_size": 240, "activation_checkpointing": True}, "timm has none for"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_start_is_measured_and_may_be_corrected(
    adapt: Adapt, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        adapt(tmp_path / "run", weights="random", **settings)
    assert not (tmp_path / "run" / START).exists()
    assert adapt(tmp_path / "run", unfreeze=1, steps=2).finished


def test_a_domains_views_are_written_down_and_held_to(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, views = tmp_path / "run", {"n_local": 1, "blur": 0.25}
    with stopping_in_step(2, monkeypatch), pytest.raises(SystemExit):
        adapt(out, domain="histology", views=views)
    recorded = jepakit.open_run(out).config
    trained = AdaptConfig(images="x", domain="histology", views=ViewsConfig.model_validate(views)).resolved_views()
    assert (trained.vertical_flip, trained.brightness, trained.blur) == (0.5, 0.2, 0.25)
    assert AdaptConfig.model_validate(recorded).resolved_views() == trained
    assert recorded["views"] == trained.model_dump(mode="json", exclude_none=True)
    assert jepakit.open_bundle(out / START).manifest.provenance.config["views"] == recorded["views"]

    for changed in ({**views, "brightness": 0.3}, {**views, "vertical_flip": 0.0}):  # what the classes' defaults are
        name = list(changed)[-1]
        with pytest.raises(ConfigError, match=rf"other settings \(views\.{name} was \S+, now {changed[name]}\); name"):
            adapt(out, domain="histology", views=changed)
    # Its own config.toml goes on with it.
    with stopping_in_step(0, monkeypatch), pytest.raises(SystemExit):
        adapt(out, domain="histology", views=recorded["views"])


def test_trackers_are_told_the_views_that_train(adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    with stopping_in_step(0, monkeypatch), pytest.raises(SystemExit):
        adapt(tmp_path / "run", domain="histology", trackers="tensorboard")
    (file,) = (tmp_path / "run" / "tensorboard").rglob("*tfevents*")
    assert b"views.vertical_flip = 0.5" in file.read_bytes()


def test_settings_that_change_nothing_may_differ(adapt: Adapt, finished: Callable[[str], Run]) -> None:
    assert adapt(finished("test_vit").path, workers=1, save_every_s=7).finished


@pytest.mark.parametrize("what", ["added", "removed", "replaced"])
def test_changed_data_is_refused(adapt: Adapt, images: Path, stopped: Path, tmp_path: Path, what: str) -> None:
    folder, out = shutil.copytree(images, tmp_path / "images"), shutil.copytree(stopped, tmp_path / "run")
    recorded = json.loads((out / ENVIRONMENT).read_text())["data"]
    assert list_images(folder).digest() == recorded, "it does not depend on where they lie"
    first = min(folder.rglob("*.png"))
    if what == "added":
        shutil.copy(first, first.with_name("new.png"))
    elif what == "removed":
        first.unlink()
    else:
        first.write_bytes(max(folder.rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="images are not those"):
        adapt(out, folder=folder)


def test_a_finished_run_says_so_and_returns(
    adapt: Adapt, finished: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("test_vit")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    again = adapt(run.path)
    said = capsys.readouterr().err
    assert "is finished already" in said
    assert f"weights={run.path / BUNDLE}, out=NEW" in said
    assert again.verdict == run.verdict
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_going_on_from_a_bundle(adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path) -> None:
    first = finished("test_vit")
    second = adapt(tmp_path / "second", weights=str(first.path / BUNDLE), steps=2)
    assert equal(weights_of(second, START), weights_of(first))
    assert second.bundle.manifest.backbone.start.license == "cc0-1.0"
    assert str(first.path) not in (second.path / BUNDLE / "manifest.json").read_text()


def test_the_pooling_stays_that_of_the_bundle_a_run_starts_from(adapt: Adapt, tmp_path: Path) -> None:
    """Otherwise "before" would be another model than the one in service, and the vectors of another length."""
    first = adapt(tmp_path / "first", pooling="last2", standardize="scale", steps=1)
    plain = first.export(tmp_path / "plain", standardize="none")
    second, chosen, bare = (adapt(tmp_path / name, weights=str(weights), steps=1, **settings) for name, weights, settings in (
        ("second", first.path / BUNDLE, {}), ("chosen", first.path / BUNDLE, {"pooling": "mean"}), ("bare", plain.path, {}))
    )  # fmt: skip
    specs = [run.bundle.manifest.embedding for run in (first, second, chosen, bare)]
    assert [(spec.pooling, spec.standardize) for spec in specs] == [
        ("last2", "scale"), ("last2", "scale"), ("mean", "center"), ("last2", "center")
    ]  # fmt: skip
    assert second.comparison.before is not None
    assert first.comparison.after is not None
    assert second.comparison.before == first.comparison.after


def test_a_damaged_bundle_is_no_start(adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(finished("test_vit").path / BUNDLE, bundle)
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (bundle / WEIGHTS).write_bytes(data)
    with pytest.raises(JepakitError, match="damaged"):
        adapt(tmp_path / "run", weights=str(bundle))


def test_labels_only_measure_and_never_train(adapt: Adapt, tmp_path: Path) -> None:
    with_labels = adapt(tmp_path / "with", labels="auto", steps=2)
    without = adapt(tmp_path / "without", labels="none", steps=2)
    assert without.comparison.before is None
    assert without.verdict.word == "cannot tell"
    assert with_labels.comparison.before is not None
    assert equal(weights_of(with_labels, START), weights_of(without, START))
    assert equal(weights_of(with_labels), weights_of(without))


def test_unfreeze_none_exports_the_start(adapt: Adapt, tmp_path: Path) -> None:
    run = adapt(tmp_path / "run", "test_resnet", unfreeze="none", steps=4)
    assert equal(weights_of(run), weights_of(run, START))
    assert run.comparison.before == run.comparison.after
    assert run.verdict.word in ("same", "cannot tell")
    assert run.verdict.difference == 0


def test_random_weights_train_everything_without_warm_up_and_leave_the_callers_random_numbers(
    adapt: Adapt, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(2)
    torch.manual_seed(123)
    drawn = [torch.rand(1)]
    run = adapt(tmp_path / "run", "test_resnet", weights="random", steps=3)
    assert torch.equal(torch.cat([*drawn, torch.rand(1)]), expected)
    start, end = weights_of(run, START), weights_of(run)
    assert all(not torch.equal(start[key], end[key]) for key in start if key.endswith("weight"))
    assert any(not torch.equal(start[key], end[key]) for key in start if key.endswith("running_mean"))
    assert run.metrics()[0]["lr"] > 0


def test_a_second_one_in_the_same_process_is_refused(
    adapt: Adapt, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread it would draw from the first one's random numbers."""
    refusal = "another adaptation runs in this process: wait for it, or start this one in a process of its own"

    def meanwhile(*_: object) -> None:
        with pytest.raises(ConfigError, match=refusal):
            adapt(tmp_path / "second", steps=1)
        with pytest.raises(ConfigError, match=refusal):
            jepakit.dry_run(images, backbone="test_vit", weights="random", **TINY)
        child = os.fork()
        if child == 0:  # whatever happens, the tests go on in the parent alone
            code = 1
            try:
                with alone():
                    code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_adapt", meanwhile)
        adapt(tmp_path / "first")
    assert not (tmp_path / "second").exists()
    assert adapt(tmp_path / "second", steps=1).finished


def test_too_few_images(adapt: Adapt, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(classes=0, per_class=15)
    with pytest.raises(DataError, match="15 images are too few to adapt on: at least 16 are needed"):
        adapt(tmp_path / "run", folder=folder)


def test_a_warm_up_leaves_the_backbone_a_step(adapt: Adapt, tmp_path: Path) -> None:
    run = adapt(tmp_path / "run", steps=2, warmup=0.9)
    assert not equal(weights_of(run), weights_of(run, START))


def test_a_run_goes_on_with_weights_and_labels_that_were_moved(
    adapt: Adapt, weights_file: Callable[[str], Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{path.relative_to(images).as_posix()},{path.parent.name}" for path in sorted(images.rglob("*.png"))]
    (tmp_path / "a.csv").write_text("\n".join(["path,label", *rows]))
    with stopping_in_step(1, monkeypatch), pytest.raises(SystemExit):
        adapt(tmp_path / "run", labels=str(tmp_path / "a.csv"), steps=4)
    (tmp_path / "moved").mkdir()
    weights = shutil.copy(weights_file("test_vit"), tmp_path / "moved" / "w.safetensors")
    labels = shutil.move(tmp_path / "a.csv", tmp_path / "moved" / "b.csv")
    run = adapt(tmp_path / "run", weights=str(weights), labels=str(labels), steps=4)
    assert run.finished
    adapt(tmp_path / "run", weights=str(weights), labels=str(labels), steps=4)  # the same command again
    with pytest.raises(ConfigError, match=r"weights was .*w\.safetensors"):  # a finished run's are not compared
        adapt(
            tmp_path / "run", weights=str(shutil.move(weights, tmp_path / "w.safetensors")), labels=str(labels), steps=4
        )


def test_a_run_does_not_go_on_with_other_pixel_values(
    adapt: Adapt, finished: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = finished("test_vit").path / START
    with stopping_in_step(1, monkeypatch), pytest.raises(SystemExit):
        adapt(tmp_path / "run", weights=str(start), steps=4)
    whole = open_bundle(start)
    other = whole.manifest.preprocess.model_copy(update={"mean": (0.1, 0.2, 0.3)})

    def write_files(folder: Path) -> None:
        for name in whole.manifest.files:
            (folder / name).write_bytes(whole.read(name))

    write_bundle(tmp_path / "other", whole.manifest.model_copy(update={"preprocess": other}), write_files)
    with pytest.raises(
        ConfigError, match=r"another scaling or normalisation of values: weights = .*other is another bundle"
    ):
        adapt(tmp_path / "run", weights=str(tmp_path / "other"), steps=4)
    assert adapt(tmp_path / "run", weights=str(start), steps=4).finished


def test_other_weights_under_the_same_name_are_refused_in_the_middle_of_a_run(
    adapt: Adapt, weights_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(weights_file("test_vit"), weights)
    with stopping_in_step(1, monkeypatch), pytest.raises(SystemExit):
        adapt(tmp_path / "run", weights=str(weights), steps=4)
    tensors = load_file(weights)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, weights)
    with pytest.raises(ConfigError, match="was started with other weights"):
        adapt(tmp_path / "run", weights=str(weights), steps=4)
    rounded = {name: value * (1 + 1e-7) if value.is_floating_point() else value for name, value in tensors.items()}
    assert any(not torch.equal(rounded[name], value) for name, value in tensors.items())
    save_file(rounded, weights)
    resumed = adapt(tmp_path / "run", weights=str(weights), steps=4)
    save_file(tensors, weights)
    whole = adapt(tmp_path / "whole", weights=str(weights), steps=4)
    for part in (START, BUNDLE):
        one, other = (load_file(run.path / part / WEIGHTS) for run in (resumed, whole))
        assert all(torch.equal(one[name], other[name]) for name in other), "as another CPU might have rounded"


def test_a_damaged_start_stops_the_run_that_goes_on_from_it_by_name(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping_in_step(1, monkeypatch), pytest.raises(SystemExit):
        adapt(tmp_path / "run", steps=4)
    file = tmp_path / "run" / START / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        BundleError, match=f"cannot be resumed: {file} is damaged: .* Put .*start back as it was, or name"
    ):
        adapt(tmp_path / "run", steps=4)
    file.write_bytes(whole)
    assert adapt(tmp_path / "run", steps=4).finished


def test_labels_that_cannot_be_probed_do_not_stop_a_run(
    adapt: Adapt, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One image of a second class to train on, then none."""
    folder, manifest = image_folder(), tmp_path / "manifest.csv"
    files = sorted(folder.rglob("*.png"))
    for rare in (1, 0):
        rows = [
            f"{file},{'b' if place < rare else 'a'},{'test' if place % 4 == 3 else 'train'}"
            for place, file in enumerate(files)
        ]
        manifest.write_text("\n".join(["path,label,split", *rows]))
        run = adapt(tmp_path / f"run{rare}", folder=manifest, labels="auto", steps=2)
        assert run.verdict.word == "cannot tell"
        assert (run.comparison.before is None) == (rare == 0)
    assert "are labelled 'a', and a probe tells two classes apart" in run.verdict.reason


def test_held_out_images_that_cannot_be_read_at_all_are_told_before_training(
    adapt: Adapt, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, manifest = image_folder(), tmp_path / "manifest.csv"
    (tmp_path / "bad.png").write_bytes(b"rubbish")
    rows = [f"{file},{file.parent.name},train" for file in sorted(folder.rglob("*.png"))]
    manifest.write_text("\n".join(["path,label,split", *rows, f"{tmp_path / 'bad.png'},texture0,test"]))
    with pytest.raises(DataError, match="none of the images held out that were to be measured can be read"):
        adapt(tmp_path / "run", folder=manifest, most_skipped=1.0, labels="auto", steps=2)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


def test_a_gradient_that_is_never_finite_stops_the_run_and_is_not_saved(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jepakit_training.learning.sigreg.lejepa_loss

    def poisoned(*args: Any) -> Any:
        total, prediction, regulariser = real(*args)
        return total * float("nan"), prediction, regulariser

    monkeypatch.setattr(jepakit_training.learning.learner, "lejepa_loss", poisoned)
    with pytest.raises(TrainingError, match="not finite 3 times in a row, up to step 2"):
        adapt(tmp_path / "run", save_every_s=0)
    found = checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS)
    assert found is not None
    assert found[0] == 2, "after two that were passed over, and not after the last"
    assert all(value.isfinite().all() for part in ("backbone", "projector") for value in found[1][part].values())


def test_one_bad_step_is_passed_over(adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = jepakit_training.learning.sigreg.lejepa_loss, iter(range(100))

    def poisoned_once(*args: Any) -> Any:
        total, prediction, regulariser = real(*args)
        return total * (float("nan") if next(calls) == 4 else 1), prediction, regulariser

    with monkeypatch.context() as patch:
        patch.setattr(jepakit_training.learning.learner, "lejepa_loss", poisoned_once)
        run = adapt(tmp_path / "run", steps=8)
    assert all(value.isfinite().all() for value in weights_of(run).values())


def rows_of(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.reader(opened))


@pytest.fixture(scope="module")
def many_images(image_folder: Callable[..., Path]) -> Path:
    return image_folder(per_class=100, height=40, width=40)


def spoil(folder: Path, count: int) -> list[Path]:
    """Make the first `count` images unreadable."""
    files = sorted(folder.rglob("*.png"))[:count]
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    return files


def test_one_broken_file_in_200_is_left_out_and_listed(adapt: Adapt, many_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(many_images, folder)
    (broken,) = spoil(folder, 1)
    run = adapt(tmp_path / "run", "test_resnet", folder=folder, epochs=1, steps=None, batch_size=32, warmup=0)
    rows = rows_of(run.path / SKIPPED)
    assert rows[0] == ["id", "reason"]
    assert [row[0] for row in rows[1:]] == [broken.relative_to(folder).as_posix()]
    assert run.comparison.n_train + run.comparison.n_held_out == 199
    assert str(broken) not in (run.path / BUNDLE / "manifest.json").read_text()


def test_over_one_percent_of_broken_files_stops_the_run_naming_one(
    adapt: Adapt, many_images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(many_images, folder)
    broken = spoil(folder, 4)
    with pytest.raises(DataError, match=r"over 1 % of the images cannot be read \(4 of 200 so far\)") as raised:
        adapt(tmp_path / "run", "test_resnet", folder=folder, steps=2)
    assert any(file.relative_to(folder).as_posix() in str(raised.value) for file in broken)
    listed = (tmp_path / "run" / SKIPPED).read_text()
    assert all(file.relative_to(folder).as_posix() in listed for file in broken), "all that were looked at, in one go"
    assert not jepakit.open_run(tmp_path / "run").finished

    # The message says: "repair or remove them, then run the same command again".
    for file in broken:
        file.unlink()
    assert adapt(tmp_path / "run", "test_resnet", folder=folder, steps=2).finished


def test_a_folder_where_nothing_can_be_read_is_a_data_error(adapt: Adapt, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"\.png"):
        adapt(tmp_path / "run", folder=folder)


def test_a_refused_start_does_not_pin_its_settings(
    adapt: Adapt, weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing was trained: the mended command must not be refused for being another one."""
    out = tmp_path / "run"
    with pytest.raises(BackboneError):
        adapt(out, weights=str(weights_file("test_resnet")), steps=2)
    assert adapt(out, steps=2).finished


def test_a_folder_that_is_no_run_is_left_alone(adapt: Adapt, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and is not a run"):
        adapt(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_that_the_ends_of_long_images_go_unseen_is_told_unless_they_are_squashed(
    adapt: Adapt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 40, 160, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    told = "20 of 20 images are long, such as 160 × 40, of which the model sees the middle 25%"
    plain = adapt(tmp_path / "plain", folder=folder, steps=2)
    assert told in capsys.readouterr().err
    squashed = adapt(tmp_path / "squashed", folder=folder, steps=2, resize="squash")
    assert "are long" not in capsys.readouterr().err
    pairs = zip(weights_of(plain).values(), weights_of(squashed).values(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs), "views are squashed, too"


def test_any_name_of_a_folder_will_do(adapt: Adapt, tmp_path: Path) -> None:
    assert adapt(tmp_path / "-my größe", steps=2).finished


def test_one_folder_asked_for_as_labels_is_no_crash(adapt: Adapt, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images / "texture0", folder / "only")
    shutil.copytree(images / "texture1", folder / "only" / "more")
    run = adapt(tmp_path / "run", folder=folder, labels="folder", steps=2)
    assert run.verdict.word == "cannot tell"
    assert "a probe tells two classes apart" in run.verdict.reason


def test_a_local_view_as_large_as_the_image_is_refused(adapt: Adapt, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local views of 64 px are not smaller"):
        adapt(tmp_path / "run", views={"n_local": 1, "local_size": 64})


@pytest.mark.slow
def test_layers_under_two_names_are_written_and_exported(images: Path, tmp_path: Path) -> None:
    """CoaT shares position encodings between blocks, which safetensors refuses to write as they are."""
    run = jepakit.adapt(
        images, out=tmp_path / "run", backbone="coat_lite_tiny", weights="random",
        **{**TINY, "image_size": 64, "steps": 1},
    )  # fmt: skip
    assert run.export(tmp_path / "bundle").manifest.graph is not None


@pytest.mark.parametrize("backbone", ["mobileone_s0", "ghostnet_050"])
def test_backbones_with_an_odd_stem_or_head_train(images: Path, tmp_path: Path, backbone: str) -> None:
    """MobileOne's stem crashes torch where convolutions run channels-last; GhostNet has a layer behind its pooling."""
    run = jepakit.adapt(
        images, out=tmp_path / "run", backbone=backbone, weights="random",
        **{**TINY, "image_size": 64, "steps": 1},
    )  # fmt: skip
    assert run.finished

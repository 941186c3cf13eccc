"""`jepakit.sweep` on tiny models: what it runs, what it picks, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import TINY, weights_of
from typer.testing import CliRunner

import jepakit
import jepakit_training
from jepakit import Sweep
from jepakit._run_files import BUNDLE, METRICS, START
from jepakit.bundles.comparison import Verdict
from jepakit.cli import app
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError, TrainingError
from jepakit.run import Run
from jepakit.sources import ImageList
from jepakit_export.exporter import _of_run

STEPS = 4
LAMBDAS = {"lamb=0.02": 0.02, "lamb=0.05": 0.05}

Start = Callable[..., Sweep]


@pytest.fixture(scope="module")
def images(image_folder: Callable[..., Path]) -> Path:
    return image_folder()


@pytest.fixture(scope="module")
def start(images: Path, weights_file: Callable[[str], Path]) -> Start:
    """`start(out, {"lamb": [0.02]}, **changed settings)`."""

    def call(
        out: Path, vary: Mapping[str, Sequence[Any]], folder: Path = images, backbone: str = "test_vit", **settings: Any
    ) -> Sweep:
        given = {**TINY, "steps": STEPS, "weights": str(weights_file(backbone)), "backbone": backbone, **settings}
        return jepakit.sweep(folder, out=out, vary=vary, **given)

    return call


@pytest.fixture(scope="module")
def command(images: Path, weights_file: Callable[[str], Path]) -> Callable[..., list[str]]:
    """`command(out, *options)`: the command that does what `start` does, over LAMBDAS."""

    def call(out: Path, *options: str) -> list[str]:
        return [
            "sweep", str(images), "--out", str(out), "--vary", "lamb=0.02,0.05", "--backbone", "test_vit",
            "--weights", str(weights_file("test_vit")), "--steps", str(STEPS), "--image-size", "64",
            *("--set", "batch_size=8", "--set", "projector=[32, 32, 8]", "--set", "n_slices=16"),
            *("--set", "views.n_local=1", "--set", "workers=0"), *options,
        ]  # fmt: skip

    return call


@pytest.fixture(scope="module")
def finished(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Look, don't touch."""
    return start(tmp_path_factory.mktemp("sweep") / "sweep", {"lamb": list(LAMBDAS.values())})


@pytest.fixture
def copied(finished: Sweep, tmp_path: Path) -> Path:
    """A copy of a finished sweep's folder."""
    return shutil.copytree(finished.path, tmp_path / "sweep")


def test_each_run_is_that_of_adapt_with_the_same_settings(
    finished: Sweep, images: Path, weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    assert set(finished.runs) == LAMBDAS.keys()
    one = finished.runs["lamb=0.05"]
    same = jepakit.adapt(
        images, out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")), steps=STEPS,
        lamb=0.05, **TINY,
    )  # fmt: skip
    ours, theirs = weights_of(one), weights_of(same)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert one.comparison == same.comparison


def test_the_best_comes_first_and_the_table_names_all(finished: Sweep) -> None:
    gains = [run.verdict.difference or 0.0 for run in finished.runs.values()]
    assert gains == sorted(gains, reverse=True)
    assert finished.best is next(iter(finished.runs.values()))
    heading, of_start, *of_runs = str(finished).splitlines()
    assert heading.split("  ")[-1] == "points (95 % interval)"
    assert of_start.startswith("the start ")
    assert [row.split()[0] for row in of_runs[:-1]] == list(finished.runs)
    assert of_runs[-1] == str(finished.verdict)
    assert len({len(row) for row in (heading, *of_runs[:-1])}) == 1, "columns are aligned"


def test_the_same_call_again_trains_nothing_and_a_new_value_only_itself(
    copied: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    again = start(copied, {"lamb": list(LAMBDAS.values())})
    assert capsys.readouterr().err.count("is finished already") == 2
    assert str(again) == str(jepakit.open_sweep(copied))
    more = start(copied, {"lamb": [0.05, 0.1]})
    assert capsys.readouterr().err.count("is finished already") == 1
    assert set(more.runs) == {*LAMBDAS, "lamb=0.1"}, "the best is picked from all three"


def test_every_combination_is_a_run(start: Start, tmp_path: Path) -> None:
    out = start(tmp_path / "sweep", {"views.hue": [0.0, 0.1], "unfreeze": ["none", 1]}, steps=1)
    assert set(out.runs) == {
        f"views.hue={hue},unfreeze={what}" for hue in ("0.0", "0.1") for what in ("none", "1")
    }  # fmt: skip
    config = out.runs["views.hue=0.1,unfreeze=1"].config
    assert (config["views"]["hue"], config["views"]["n_local"], config["unfreeze"]) == (0.1, 1, 1)


def test_a_run_that_fails_is_named_and_the_others_go_on(
    start: Start, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jepakit_training.adapt

    def adapt(config: AdaptConfig, listed: ImageList, out: Path) -> Run:
        if config.lamb == 0.02:
            raise TrainingError("the loss is not finite")
        return real(config, listed, out)

    monkeypatch.setattr(jepakit_training, "adapt", adapt)
    found = start(tmp_path / "sweep", {"lamb": list(LAMBDAS.values())}, steps=1)
    assert found.failed == {"lamb=0.02": "the loss is not finite"}
    assert list(found.runs) == ["lamb=0.05"]
    told = CliRunner().invoke(app, command(found.path, "--steps", "1"))
    assert told.stdout.startswith(str(found))
    assert isinstance(told.exception, TrainingError)
    assert told.exception.exit_code == 1
    assert str(told.exception).startswith("1 run failed (lamb=0.02)")
    with pytest.raises(TrainingError, match=r"all 1 runs failed; lamb=0\.02: the loss is not finite"):
        start(tmp_path / "other", {"lamb": [0.02]}, steps=1)


def test_a_run_that_was_stopped_is_told(copied: Path) -> None:
    shutil.rmtree(copied / "lamb=0.02" / "bundle")
    sweep = jepakit.open_sweep(copied)
    assert (list(sweep.runs), sweep.unfinished) == (["lamb=0.05"], ("lamb=0.02",))
    assert "\nnot finished: lamb=0.02\n" in str(sweep)
    assert json.loads(CliRunner().invoke(app, ["report", str(copied), "--json"]).stdout)["unfinished"] == ["lamb=0.02"]
    shutil.rmtree(copied / "lamb=0.05" / "bundle")
    with pytest.raises(DataError, match=r"no run in .*sweep has finished"):
        jepakit.open_sweep(copied)


def test_a_run_whose_projections_collapsed_is_named_beside_its_scores(copied: Path) -> None:
    log = copied / "lamb=0.05" / METRICS
    log.write_text("".join(json.dumps({**step, "proj_std": 0.01}) + "\n" for step in Run(log.parent).metrics()))
    told = [line for line in str(jepakit.open_sweep(copied)).splitlines() if line.endswith("collapsed")]
    assert [line.split()[0] for line in told] == ["lamb=0.05"]


def test_a_run_whose_log_was_lost_costs_no_verdict(copied: Path) -> None:
    (copied / "lamb=0.02" / METRICS).unlink()
    sweep = jepakit.open_sweep(copied)
    assert sweep.scaled_losses == {}
    assert len(sweep.runs) == 2


def test_without_labels_runs_are_ranked_by_their_loss_where_it_means_the_same(start: Start, tmp_path: Path) -> None:
    found = start(tmp_path / "sweep", {"lamb": [0.9, 0.02]}, labels="none")
    expected = {
        name: run.metrics()[-1]["loss"] / lamb**0.4
        for (name, run), lamb in zip(sorted(found.runs.items()), (0.02, 0.9), strict=True)
    }
    assert found.scaled_losses == pytest.approx(expected)
    assert list(found.runs) == sorted(expected, key=lambda name: expected[name])
    assert found.verdict.word == "cannot tell"
    assert str(found).splitlines()[0].split() == ["loss", "/", "λ^0.4"]


def test_a_run_whose_projections_collapsed_is_never_the_best_without_labels(start: Start, tmp_path: Path) -> None:
    found = start(tmp_path / "sweep", {"lamb": [0.9, 0.02]}, labels="none")
    first, second = found.runs
    log = found.runs[first].path / METRICS
    log.write_text("".join(json.dumps({**step, "proj_std": 0.01}) + "\n" for step in found.runs[first].metrics()))
    again = jepakit.open_sweep(found.path)
    assert list(again.runs) == [second, first]
    assert str(again).splitlines()[2].endswith("collapsed")


def test_a_loss_that_was_not_finite_does_not_rank_a_run(start: Start, tmp_path: Path) -> None:
    """Its step was skipped."""
    found = start(tmp_path / "sweep", {"lamb": [0.9, 0.02]}, labels="none")
    for name in found.runs:
        log = found.runs[name].path / METRICS
        *steps, last = found.runs[name].metrics()
        log.write_text("".join(json.dumps(step) + "\n" for step in [*steps, last, {**last, "loss": float("nan")}]))
    again = jepakit.open_sweep(found.path)
    assert again.scaled_losses == pytest.approx(found.scaled_losses)
    assert list(again.runs) == list(found.runs)


def test_without_labels_and_with_other_views_nothing_is_ranked(start: Start, tmp_path: Path) -> None:
    found = start(tmp_path / "sweep", {"views.n_global": [1, 2]}, labels="none", steps=1)
    assert found.scaled_losses == {}
    assert str(found).splitlines()[:2] == ["views.n_global=1", "views.n_global=2"]


def test_runs_on_other_images_or_held_out_otherwise_are_refused_before_training(
    copied: Path, start: Start, image_folder: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=r"other images or in another way.*name another folder for the sweep"):
        start(copied, {"lamb": [0.1]}, image_folder(seed=1))
    with pytest.raises(DataError, match="other images or in another way"):
        start(copied, {"lamb": [0.1]}, held_out=0.3)
    assert sorted(path.name for path in copied.iterdir()) == sorted(LAMBDAS)


def test_a_run_whose_version_did_not_know_a_setting_is_compared_with_others(copied: Path, start: Start) -> None:
    config = next(copied.iterdir()) / "config.toml"
    text = config.read_text()
    config.write_text(text.replace('resize = "auto"\n', ""))
    assert config.read_text() != text
    assert len(jepakit.open_sweep(copied).runs) == len(LAMBDAS)
    assert len(start(copied, {"lamb": [0.1]}).runs) == len(LAMBDAS) + 1


def test_runs_from_other_weights_are_not_compared(
    copied: Path, start: Start, weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = {name: value + 0.001 for name, value in load_file(weights_file("test_vit")).items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"cannot be compared, as they differ in start weights: move"):
        start(copied, {"lamb": [0.1]}, weights=str(tmp_path / "other.safetensors"), steps=1)


def test_a_sweep_under_a_launcher_is_refused(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="one by one: start it without torchrun"):
        start(tmp_path / "sweep", {"lamb": [0.02]})


def test_the_command_reports_what_to_export_and_so_does_report(copied: Path, command: Callable[..., list[str]]) -> None:
    told = CliRunner().invoke(app, command(copied))
    assert told.exit_code == 0, told.output
    best = jepakit.open_sweep(copied).best
    assert f"next: jepakit export {best.path}" in told.stdout
    assert CliRunner().invoke(app, ["report", str(copied)]).stdout == told.stdout
    home = CliRunner().invoke(app, ["report", f"~/{copied.name}"], env={"HOME": str(copied.parent)})
    assert home.stdout == told.stdout
    as_json = json.loads(CliRunner().invoke(app, ["report", str(copied), "--json"]).stdout)
    assert list(as_json["runs"]) == list(jepakit.open_sweep(copied).runs)
    assert as_json["verdict"]["word"] == jepakit.open_sweep(copied).verdict.word
    assert as_json["runs"][best.path.name]["after"] == best.comparison.model_dump()["after"]
    assert json.loads(CliRunner().invoke(app, command(copied, "--json")).stdout) == as_json


@pytest.mark.parametrize(
    ("word", "asked", "kept"),
    [("better", {}, BUNDLE), ("cannot tell", {}, START), ("worse", {"which": "last"}, BUNDLE)],
)
def test_a_sweep_exports_what_its_own_verdict_says_to_keep(
    finished: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: Any, asked: dict[str, Any], kept: str
) -> None:
    chosen: list[Path] = []
    monkeypatch.setattr(Run, "export", lambda run, out, which: chosen.append(_of_run(run, which).path))
    sweep = jepakit.open_sweep(finished.path)
    sweep.verdict = Verdict(word=word, reason="")
    sweep.export(tmp_path / "exported", **asked)
    assert chosen == [sweep.best.path / kept]


def test_a_dry_run_estimates_every_run_and_keeps_nothing(
    images: Path, weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    asked = [
        "sweep", str(images), "--out", str(out), "--vary", "steps=3,5", "--backbone", "test_vit", "--dry-run",
        "--weights", str(weights_file("test_vit")), "--image-size", "64", "--set", "batch_size=8", "--set", "workers=0",
    ]  # fmt: skip
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert [line.split(":")[0] for line in told.stdout.splitlines()] == ["steps=3", "steps=5", "2 runs"]
    assert not out.exists()
    as_json = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert as_json["total_s"] == pytest.approx(sum(run["total_s"] for run in as_json["runs"].values()))

"""A run's folder: its owner, what it was started with, and its lock, tested with real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.training.forked import start
from tests.training.full_disk import files_no_longer_than

from jepakit import _frontdoor
from jepakit._run_files import BUNDLE, CONFIG, ENVIRONMENT, METRICS, SKIPPED, START
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError, WriteError
from jepakit.run import Run
from jepakit.sources import list_images
from jepakit_training.run.folder import FREE_SETTINGS, LOCK, RAY_FOLDER, locked, open_folder
from jepakit_training.run.records import StepLog

Begin = Callable[..., Run]


def hold(out: Path, *, with_a_loader: bool = False) -> None:
    with locked(out):
        if with_a_loader and os.fork() == 0:
            (out.parent / "loader").write_text(str(os.getpid()))
            time.sleep(120)
            os._exit(0)
        (out.parent / "held").touch()
        time.sleep(120)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or (path.name == "loader" and not path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(hold, out, log=tmp_path / "log")
    wait_for(tmp_path / "held")
    with (
        pytest.raises(
            ConfigError, match=f"run is in use by process {process.pid} on {socket.gethostname()}, which trains there"
        ),
        locked(out),
    ):
        pass
    process.kill()
    process.join()
    with locked(out):
        assert (out / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(out.iterdir()) == []


def test_a_killed_trainers_loader_does_not_hold_the_folder(tmp_path: Path) -> None:
    """DataLoader's processes notice that their parent is gone only after seconds."""
    out = tmp_path / "run"
    process = start(hold, out, with_a_loader=True, log=tmp_path / "log")
    for name in ("held", "loader"):
        wait_for(tmp_path / name)
    loader = int((tmp_path / "loader").read_text())
    process.kill()
    process.join()
    try:
        with locked(out):
            os.kill(loader, 0)  # it does live
    finally:
        os.kill(loader, signal.SIGKILL)


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_only_the_last_holder_is_named_after_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(
        "process 12345678901234567890 on a machine whose name is far longer than this one's\n" * 2
    )
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_lock_that_the_last_holder_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    """Between opening and locking: what is locked then is a file without a name."""
    real, calls = fcntl.flock, iter(range(10))

    def remove_first(descriptor: int, how: int) -> None:
        if next(calls) == 0:
            (tmp_path / LOCK).unlink()
        real(descriptor, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_first)
        with locked(tmp_path):
            patch.undo()
            with pytest.raises(ConfigError, match="is in use by"), locked(tmp_path):
                pass


def test_a_holder_that_lets_go_while_it_is_looked_up_is_another_process(tmp_path: Path) -> None:
    real = fcntl.flock

    def let_go_after(descriptor: int, how: int) -> None:
        try:
            real(descriptor, how)
        finally:
            (tmp_path / LOCK).unlink()

    with locked(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", let_go_after)
        with (
            pytest.raises(ConfigError, match="is in use by another process, which trains there: wait for it"),
            locked(tmp_path),
        ):
            pass


def test_only_the_first_rank_locks(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path, main=False):
        assert (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with (
            pytest.raises(ConfigError, match=r"cannot be written to \(.+\): name another folder for the run"),
            locked(out),
        ):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with locked(tmp_path):
            pass
    assert "files cannot be locked" in capsys.readouterr().err


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """`begin("runs/set", **settings)`: a run on the three images of the folder `set`, its start measured."""
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for name in "abc":
        Path(f"set/{name}.png").write_text(name)

    def call(out: str | Path, images: str = "set", **settings: Any) -> Run:
        config = AdaptConfig(**{"images": images, "backbone": "test_vit", "weights": "random", **settings})
        open_folder(Path(out), config, list_images(images))
        (Path(out) / START).mkdir(exist_ok=True)
        return Run(Path(out))

    return call


def test_a_disk_that_is_full_at_the_start_is_told(begin: Begin, tmp_path: Path) -> None:
    words = r"cannot be written to \(File too large\): make room there, then run the same command again"
    with files_no_longer_than(0), pytest.raises(WriteError, match=f"run {words}"):
        begin("run")
    run = begin("run")
    assert run.metrics() == []
    with closing(StepLog(run.path / METRICS, 0, main=True)) as log:
        log.write({"step": 9})
    with files_no_longer_than(0), pytest.raises(WriteError, match=f"run {words}"):
        StepLog(run.path / METRICS, 10, main=True)
    assert run.metrics() == [{"step": 9}]


@pytest.mark.parametrize("name", [CONFIG, SKIPPED, ENVIRONMENT])
def test_files_that_are_only_named_like_a_runs_are_left_alone(begin: Begin, name: str) -> None:
    theirs = Path("exp") / name
    theirs.parent.mkdir()
    theirs.write_text('{"theirs": 1}')
    with pytest.raises(
        ConfigError, match=rf"exp is not empty and is not a run \(it holds {name}\): name another folder for the run"
    ):
        begin("exp")
    assert [path.read_text() for path in Path("exp").iterdir()] == ['{"theirs": 1}']


def test_what_a_run_that_hardly_began_has_left_is_no_stranger(begin: Begin) -> None:
    run = begin("run")
    (run.path / START).rmdir()
    for name in (LOCK, SKIPPED, ".tmp-1-config.toml", f"{RAY_FOLDER}1"):
        (run.path / name).touch()
    begin("run", seed=1)
    assert run.config["seed"] == 1
    assert not (run.path / SKIPPED).exists()


def test_images_may_be_spelt_otherwise_or_have_moved(begin: Begin) -> None:
    begin("run")
    begin("run", "./set/")
    Path("set").rename("moved")
    begin("run", "moved")
    Path("moved/d.png").write_text("d")
    with pytest.raises(DataError, match="the images are not those run was started with"):
        begin("run", "moved")


@pytest.mark.parametrize("damage", ["gone", "cut short", "of another kind"])
@pytest.mark.parametrize("name", [CONFIG, ENVIRONMENT])
def test_a_damaged_folder_is_told_with_its_file_and_what_to_do(begin: Begin, name: str, damage: str) -> None:
    file = begin("run").path / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text()[:-4] + "[" if damage == "cut short" else "7")
    if (name, damage) == (CONFIG, "gone"):
        with pytest.raises(ConfigError, match="name another folder for the run"):
            begin("run")
        return
    with pytest.raises(
        DataError, match=rf"run/{name} is gone or damaged \(.+\): put it back, or name another folder for the run"
    ):
        begin("run")
    if (name, damage) == (CONFIG, "cut short"):
        with pytest.raises(DataError, match=rf"run/{name} is gone or damaged"):
            _ = Run(file.parent).config


@pytest.fixture
def by_another_version(begin: Begin) -> Run:
    """A run that was begun by a version without the setting `clip_norm`."""
    run = begin("run")
    for name, old, new in ((CONFIG, r"clip_norm = .*\n", ""), (ENVIRONMENT, '("jepakit": )".*?"', r'\1"0.0.9"')):
        text, count = re.subn(old, new, (run.path / name).read_text())
        assert count == 1
        (run.path / name).write_text(text)
    return run


def test_settings_of_another_version_are_told_with_it(begin: Begin, by_another_version: Run) -> None:
    told = r"\(clip_norm was None, now 1\.0\) by jepakit 0\.0\.9, and this is "
    with pytest.raises(ConfigError, match=told):
        begin("run")
    (by_another_version.path / BUNDLE).mkdir()
    with pytest.raises(ConfigError, match=r"\(clip_norm was 1\.0, now 2\.0\) by jepakit 0\.0\.9"):
        begin("run", clip_norm=2.0)


def test_a_run_that_goes_on_with_other_packages_says_so(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin("run")
    begin("run")
    assert "packages" not in capsys.readouterr().err
    text = (run.path / ENVIRONMENT).read_text()
    (run.path / ENVIRONMENT).write_text(re.sub('("pillow": )".*?"', r'\1"9.0"', text))
    begin("run")
    assert re.search(
        r"run was started with other packages \(pillow 9\.0, now [\d.]+\): the result may differ",
        capsys.readouterr().err,
    )
    (run.path / BUNDLE).mkdir()
    begin("run")
    assert "packages" not in capsys.readouterr().err, "a finished run is only reported"


def test_a_finished_run_need_not_know_a_later_versions_settings(begin: Begin, by_another_version: Run) -> None:
    (by_another_version.path / BUNDLE).mkdir()
    begin("run")
    with pytest.raises(ConfigError, match=r"\(seed was 0, now 1\) by jepakit 0\.0\.9"):
        begin("run", seed=1)


def test_a_setting_that_is_not_utf_8_stays_the_same_one(begin: Begin) -> None:
    labels = os.fsdecode(b"labels\xfe.csv")
    Path(labels).touch()
    run = begin("run", labels=labels)
    begin("run", labels=labels)
    assert run.config["labels"] == "labels?.csv"


@pytest.mark.parametrize("kind", [iter, lambda paths: np.array(paths)])
def test_paths_that_come_one_by_one_or_in_a_column_are_recorded(kind: Callable[[list[str]], Any], begin: Begin) -> None:
    paths = sorted(map(str, Path("set").glob("*.png")))
    config, images = _frontdoor._to_adapt(kind(paths), None, {"backbone": "test_vit", "weights": "random"})
    assert config.images == tuple(paths)
    assert len(images) == len(paths)


def test_without_out_a_run_goes_on_where_it_was_begun_on_another_day(begin: Begin) -> None:
    def folder(images: str = "set", **settings: Any) -> Path:
        config = AdaptConfig(**{"images": images, "backbone": "test_vit", "weights": "random", **settings})
        return _frontdoor._folder(config, list_images(images))

    today = folder()
    assert today.parent == Path("runs")
    for day, settings in (("01", {}), ("02", {}), ("03", {"seed": 1}), ("04", {})):
        begin(f"runs/set-2001-01-{day}", **settings)
    Path("runs/set-2001-01-05").mkdir()  # no run
    assert folder() == folder("./set") == Path("runs/set-2001-01-04")
    Path("runs/set-2001-01-04", BUNDLE).mkdir()
    assert folder() == Path("runs/set-2001-01-04"), "finished, and only reported"
    config = Path("runs/set-2001-01-04/config.toml")
    config.write_text(config.read_text().replace('resize = "auto"\n', ""))
    assert folder() == Path("runs/set-2001-01-04"), "though its version did not know a setting"
    assert folder(seed=1) == Path("runs/set-2001-01-03")
    assert folder(seed=2) == today
    assert folder(out="here") == Path("here")
    for name in ("w", "other"):
        Path(f"{name}.safetensors").touch()
    assert folder(weights="w.safetensors") == folder(cache="cached") == today
    begin("runs/set-2001-01-06", cache="cached")
    begin("runs/set-2001-01-07", weights="w.safetensors")
    assert folder(cache="elsewhere") == Path("runs/set-2001-01-06")
    assert folder(weights="w.safetensors") == Path("runs/set-2001-01-07")
    assert folder(weights="other.safetensors") == today, "another model"
    Path("set/d.png").write_text("d")
    assert folder() == folder("set/*.png") == today
    begin(today, seed=7)
    second = today.with_name(f"{today.name}-2")
    assert folder() == second, "today's belongs to another run"
    begin(second)
    assert folder() == second
    assert folder(seed=7) == today
    assert folder(seed=8) == today.with_name(f"{today.name}-3")


def test_the_page_names_the_settings_that_may_change_when_a_run_goes_on() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    sentence = page.partition("may differ when a run is resumed: ")[2].partition("All others are refused")[0]
    # Where images and run lie is said in words there, and how many processes a run has may not change.
    assert set(re.findall(r"`(\w+)`", sentence)) == FREE_SETTINGS - {"images", "out", "processes"}

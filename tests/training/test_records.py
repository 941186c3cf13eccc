"""What a run writes while it trains, on full disks and about files with odd names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.training.full_disk import files_no_longer_than

from jepakit._run_files import METRICS, SKIPPED
from jepakit.errors import DataError
from jepakit.run import read_metrics
from jepakit_training.run.records import SkippedFiles, StepLog


def test_a_disk_too_full_for_metrics_is_tolerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / METRICS
    log = StepLog(path, 0, main=True)
    log.write({"step": 9})
    with files_no_longer_than(path.stat().st_size):
        for step in (19, 29):
            log.write({"step": step})
    log.write({"step": 39})
    assert [row["step"] for row in read_metrics(path)] == [9, 19, 29, 39]
    with files_no_longer_than(path.stat().st_size):
        log.write({"step": 49})
        log.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} could not be written (File too large): make room there; training goes on")
    assert [row["step"] for row in read_metrics(path)] == [9, 19, 29, 39]


def test_a_disk_too_full_for_skipped_files_is_tolerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / SKIPPED
    skipped = SkippedFiles(path, 100, most=0.03, main=True)
    with files_no_longer_than(0):
        skipped.add(("a.png", "a.png: cannot be read"))
        skipped.add(("b.png", "b.png: cannot be read"))
    skipped.add(("c.png", "c.png: cannot be read"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} could not be written (File too large)")
    assert path.read_text().splitlines() == ["id,reason", "c.png,c.png: cannot be read"]
    with pytest.raises(DataError, match="over 3 % of the images cannot be read"):  # those without room count
        skipped.add(("d.png", "d.png: cannot be read"))


def test_names_that_are_not_utf_8_are_listed_and_known_again(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xfe.png")
    for _ in range(2):
        skipped = SkippedFiles(tmp_path / SKIPPED, 9, most=0.5, main=True)
        skipped.add((name, f"{name}: cannot be read"))
    assert (tmp_path / SKIPPED).read_bytes().count(b"\nbad\xfe.png,") == 1


def test_a_resumed_run_counts_the_images_listed_before_and_no_more(tmp_path: Path) -> None:
    for _ in range(3):
        skipped = SkippedFiles(tmp_path / SKIPPED, 100, most=0.02, main=True)
        skipped.add(("a.png", "damaged"), ("b.png", "damaged"))
        assert len(skipped) == 2
    with pytest.raises(DataError, match=r"3 of 100 so far"):
        skipped.add(("c.png", "damaged"))


def test_a_resumed_log_drops_the_line_of_the_first_step_that_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 9}\n{"step": 19}\n{"step": 29}\n')
    StepLog(path, 19, main=True).close()
    assert [row["step"] for row in read_metrics(path)] == [9]

"""How many threads a process may keep busy: its affinity, or what its container grants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jepakit._cpus import usable_cpus

CORES = 8


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(CORES)))


def by_v2(folder: Path, text: str) -> int:
    file = folder / "cpu.max"
    file.write_text(text)
    return usable_cpus(file, folder / "none")


def by_v1(folder: Path, quota: str, period: str = "100000\n") -> int:
    (folder / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu.cfs_period_us").write_text(period)
    return usable_cpus(folder / "none", folder)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", CORES),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("30000 100000\n", 1),
        ("400000 50000\n", CORES),
        ("6400000 100000\n", CORES),
    ],
)
def test_a_quota_of_control_groups_2_rounds_up_and_never_passes_the_affinity(
    tmp_path: Path, text: str, cores: int
) -> None:
    assert by_v2(tmp_path, text) == cores


@pytest.mark.parametrize(
    "text", ["", "many 100000\n", "150000\n", "150000 0\n", "1 2 3\n", "-1 100000\n", "0 100000\n"]
)
def test_a_file_of_nonsense_is_no_quota(tmp_path: Path, text: str) -> None:
    assert by_v2(tmp_path, text) == CORES


@pytest.mark.parametrize(("quota", "cores"), [("-1\n", CORES), ("150000\n", 2), ("20000\n", 1), ("many\n", CORES)])
def test_control_groups_1_are_read_where_there_are_no_others(tmp_path: Path, quota: str, cores: int) -> None:
    assert by_v1(tmp_path, quota) == cores


def test_a_period_of_0_is_no_quota(tmp_path: Path) -> None:
    assert by_v1(tmp_path, "150000\n", "0\n") == CORES


def test_without_control_groups_the_affinity_decides(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == CORES

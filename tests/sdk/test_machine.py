"""How many threads and how much memory a process may use: what the machine has, or what its container grants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jepakit import _machine
from jepakit._machine import memory_limit, memory_room, usable_cpus

CORES = 8


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(CORES)))
    monkeypatch.setattr(_machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(_machine, "_OWN_GROUP", tmp_path / "own")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def by_v2(folder: Path, text: str) -> int:
    write(folder, {"cpu.max": text})
    return usable_cpus()


def by_v1(folder: Path, quota: str, period: str = "100000\n") -> int:
    write(folder, {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": period})
    return usable_cpus()


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


@pytest.mark.parametrize(("counted", "cores"), [(6, 6), (None, 1)])
def test_without_an_affinity_all_cores_are_usable(
    monkeypatch: pytest.MonkeyPatch, counted: int | None, cores: int
) -> None:
    """macOS and Windows have none."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_cpus() == cores


UNIT = "system.slice/jepakit.service"


@pytest.mark.parametrize("above", [True, False])
def test_the_limits_of_a_systemd_unit_hold_and_so_do_those_around_it(tmp_path: Path, above: bool) -> None:
    """On a machine of its own, the root of the control groups has none of these files."""
    least, other = ("system.slice", UNIT) if above else (UNIT, "system.slice")
    write(
        tmp_path,
        {
            "own": f"1:cpu:/elsewhere\n0::/{UNIT}\n",
            f"{least}/cpu.max": "200000 100000\n",
            f"{other}/cpu.max": "400000 100000\n",
            **{f"{least}/{name}": text for name, text in MEMORY_2.items()},
            **{f"{other}/{name}": text for name, text in {**MEMORY_2, "memory.max": "5000\n"}.items()},
        },
    )
    assert (usable_cpus(), memory_limit(), memory_room()) == (2, 1000, 700)


@pytest.mark.parametrize("own", ["/unit", "/../../unit", "/docker/not-seen-here"])
def test_groups_of_version_1_are_known_by_their_controller(tmp_path: Path, own: str) -> None:
    folder = "unit/" if own == "/unit" else ""
    write(
        tmp_path,
        {
            "own": f"4:memory:{own}\n3:cpuset:/\n2:cpu,cpuacct:{own}\n0::/\n",
            f"cpu/{folder}cpu.cfs_quota_us": "150000\n",
            f"cpu/{folder}cpu.cfs_period_us": "100000\n",
            **{name.replace("/", f"/{folder}"): text for name, text in MEMORY_1.items()},
        },
    )
    assert (usable_cpus(), memory_limit(), memory_room()) == (2, 1000, 700)


def test_without_control_groups_the_affinity_decides() -> None:
    assert usable_cpus() == CORES


MEMORY_2 = {
    "memory.max": "1000\n",
    "memory.current": "900\n",
    "memory.stat": "anon 100\nfile 700\nshmem 100\ninactive_file 200\nactive_file 400\n",
}
MEMORY_1 = {
    "memory/memory.limit_in_bytes": "1000\n",
    "memory/memory.usage_in_bytes": "900\n",
    "memory/memory.stat": "cache 600\ninactive_file 1\ntotal_inactive_file 200\ntotal_active_file 400\n",
}


@pytest.mark.parametrize("files", [MEMORY_2, MEMORY_1, {**MEMORY_1, **MEMORY_2, "memory/memory.limit_in_bytes": "5"}])
def test_memory_is_what_the_control_group_grants_and_cached_files_make_room(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert (memory_limit(), memory_room()) == (1000, 700)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({**MEMORY_2, "memory.max": "max\n"}, None),
        ({**MEMORY_2, "memory.max": ""}, None),
        ({"memory.max": "1000\n"}, 1000),
        ({**MEMORY_2, "memory.stat": "anon 300\n"}, 1000),
        ({**MEMORY_2, "memory.stat": "inactive_file 300\n"}, 1000),
    ],
)
def test_without_a_limit_or_what_is_used_of_it_there_is_no_room_to_tell(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    write(tmp_path, files)
    assert (memory_limit(), memory_room()) == (limit, None)

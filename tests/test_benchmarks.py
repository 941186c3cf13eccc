"""Every benchmark runs alone, quickly when asked to, and ends with one JSON object of its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from _blocks import Ratio, at_least, at_most, overhead_at_most
from _processes import EndedError, Script

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_run_prints_its_figures(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)


@pytest.mark.parametrize(
    ("low", "high", "reached", "undercut"),
    [
        (1.0, 1.2, "met", "within the noise"),
        (0.9, 1.0, "within the noise", "met"),
        (0.8, 0.9, "MISSED", "met"),
        (1.1, 1.2, "met", "MISSED"),
    ],
)
def test_a_goal_is_judged_by_the_interval(low: float, high: float, reached: str, undercut: str) -> None:
    assert (at_least(1.0, low, high), at_most(1.0, low, high)) == (reached, undercut)


def test_an_overhead_is_not_told_where_the_control_strays_as_far() -> None:
    small, large, steady = Ratio(1.01, 0.99, 1.04), Ratio(1.01, 0.99, 1.06), Ratio(1.0, 0.97, 1.03)
    assert overhead_at_most(1.02, 1.05, small, steady) == "met"
    assert overhead_at_most(1.02, 1.05, large, steady) == "MISSED"
    assert overhead_at_most(1.0, 1.05, small, steady) == "MISSED"
    for control in (large, Ratio(1.0, 0.94, 1.0)):
        assert overhead_at_most(1.02, 1.05, small, control).startswith("not to be told here")


def test_a_script_answers_lines_until_it_ends() -> None:
    echo = "import json, sys; print('[]', flush=True); print(json.dumps(sys.stdin.readline()), flush=True)"
    with Script([sys.executable, "-c", echo]) as script:
        assert script.answer() == []
        assert script.asked("one") == "one\n"
        for _ in range(2):
            with pytest.raises(EndedError, match="it ended early"):
                script.asked()

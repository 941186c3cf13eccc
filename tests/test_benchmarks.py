"""Every benchmark runs alone, quickly when asked to, and ends with one JSON object of its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path.name for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if not path.name.startswith("_")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_run_prints_its_figures(script: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / script
    done = subprocess.run(
        [sys.executable, str(path), "--quick"], capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)

"""The image's steps, run without Docker: the installer builds an environment that serves, and holds no torch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_dockerfile_runs_the_installer_as_another_user_than_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "sh docker/install.sh /opt/jepakit" in text
    assert re.search(r"^USER (?!0\b|root\b)", text, re.MULTILINE)
    assert "--api-key-file" in text


@pytest.mark.slow
def test_the_installer_builds_an_environment_that_serves_without_torch(tmp_path: Path) -> None:
    import jepakit
    from tests.test_pipeline import serving

    jepakit.export("test_vit:random", tmp_path / "tiny", image_size=32)
    subprocess.run(["sh", str(ROOT / "docker" / "install.sh"), str(tmp_path / "env"), "serve"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert found.returncode == 1, "the serving image must not hold torch"
    with (
        serving(tmp_path / "tiny", "--no-ray", program=python.with_name("jepakit")) as url,
        jepakit.Client(url) as client,
    ):
        assert client.verify(tmp_path / "tiny") < 1e-5

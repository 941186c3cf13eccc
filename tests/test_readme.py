"""The snippets in the README and docs/export.md, run as they stand; only step counts are lowered."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from jepakit.cli import app
from jepakit.config import AdaptConfig, ExportConfig
from tests.test_pipeline import ROOT, images, serving

__all__ = ["images"]

README = (ROOT / "README.md").read_text()
EXPORT = (ROOT / "docs/export.md").read_text()
OF_OTHER_PROGRAMS = {"--data-binary", "--shm-size"}


def blocks(language: str, *, under: str) -> list[str]:
    """The code blocks of a language in one section."""
    section = README.split(f"### {under}\n", 1)[1].split("\n### ", 1)[0].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return result.stdout


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_you_do_on_your_own_images(images: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").symlink_to(images)
    (tmp_path / "labelled").mkdir()
    for side in ("train", "test"):
        (tmp_path / "labelled" / side).symlink_to(images)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    Image.open(next(images.rglob("*.jpg"))).save(tmp_path / "one.jpg", exif=on_its_side)
    programs = str(Path(sys.executable).parent)

    (look,) = blocks("sh", under="1. Inspect")
    assert "8-bit RGB" in run([f"{programs}/{shlex.split(look)[0]}", *shlex.split(look)[1:]], tmp_path)
    assert (tmp_path / "contact-sheet.png").exists()

    (adapt,) = blocks("python", under="2. Adapt")
    (plain,) = re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL)
    fewer = adapt.replace("steps=300", "steps=2, image_size=64, batch_size=16")
    assert fewer != adapt
    assert "points" in run([sys.executable, "-c", fewer], tmp_path)
    own = 'import jepakit; print(abs(jepakit.load("bundles/scans").embed(["one.jpg"]).vectors - vectors).max() < 1e-5)'
    assert re.search(r"^\(1, \d+\)\nTrue$", run([sys.executable, "-c", plain + own], tmp_path), re.MULTILINE)
    (shell,) = blocks("sh", under="2. Adapt")
    for line in shell.replace("--steps 300", "--steps 2 --image-size 64 --batch-size 16").splitlines():
        run([f"{programs}/{shlex.split(line)[0]}", *shlex.split(line)[1:]], tmp_path)

    (sweep,) = re.findall(r"`jepakit (sweep .*?)`", README)
    tiny = "--backbone test_resnet --weights random --steps 1 --image-size 64 --set batch_size=16"
    assert "the start" in run([f"{programs}/jepakit", *shlex.split(f"{sweep} {tiny}")], tmp_path)

    (compare,) = re.findall(r"`jepakit (compare .*?)`", README)
    assert "points" in run([f"{programs}/jepakit", *shlex.split(compare)], tmp_path)

    (serve,) = blocks("sh", under="3. Serve")
    assert serve == "jepakit serve bundles\n"
    with serving(tmp_path / "bundles", "--no-ray") as url:
        (embed,) = blocks("python", under="4. Embed")
        (probe,) = blocks("python", under="5. Probe")
        out = run([sys.executable, "-c", embed.replace("http://127.0.0.1:8000", url) + probe], tmp_path)
        assert "accuracy" in out
        (curl,) = blocks("sh", under="4. Embed")
        if shutil.which("curl"):  # a bare Debian has none; .ci/run installs it
            assert '"embedding":[' in run(shlex.split(curl.replace("http://127.0.0.1:8000", url)), tmp_path)
    assert (tmp_path / "train.npz").exists()
    assert (tmp_path / "probe.safetensors").exists()


def options_of(command: Any) -> set[str]:
    """The options of a command and of those below it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{page}.md" for page in ("client", "export", "images", "training"))]
)
def test_every_option_and_setting_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - OF_OTHER_PROGRAMS
    assert len(options) > 3
    assert options <= {"--help", *options_of(get_command(app))}
    settings = set(re.findall(r"--set ([a-z_]+)[=.]", text))
    assert settings <= {*AdaptConfig.model_fields, *ExportConfig.model_fields}

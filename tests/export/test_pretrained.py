"""Pretrained weights from a hub: the real client, with a server on this machine in place of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.hub import serving_hub

from jepakit import Bundle, open_bundle

REPOSITORY = "timm/test_vit.r160_in1k/resolve/main/model.safetensors"


def jepakit(*arguments: object, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `jepakit …` as a user whose hub is at `hub` and whose downloads are all in `home`."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.run(
        [sys.executable, "-c", "from jepakit.cli import main; main()", *map(str, arguments)],
        env={**environment, "HF_ENDPOINT": hub, "HF_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def exported(source: str, place: Path, *, hub: str, home: Path) -> Bundle:
    done = jepakit("export", source, "--out", place, "--image-size", 64, hub=hub, home=home)
    assert done.returncode == 0, done.stderr
    return open_bundle(place)


@pytest.mark.slow
def test_pretrained_weights_come_from_the_hub_once_or_by_a_file_from_another_machine(
    weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    nowhere, home, file = "http://127.0.0.1:9", tmp_path / "home", tmp_path / "weights" / "vit.safetensors"
    with serving_hub({REPOSITORY: weights_file("test_vit").read_bytes()}) as (address, asked):
        done = jepakit("weights", "fetch", "test_vit", "--out", file, hub=address, home=home)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{file}: timm test_vit.r160_in1k, licence: ")
    assert {path for path, _ in asked} == {REPOSITORY}
    assert not any("torch/" in agent for _, agent in asked), "which packages are installed is nobody's business"
    kept = exported("test_vit", tmp_path / "kept", hub=nowhere, home=home)
    carried = exported(f"test_vit:{file}", tmp_path / "carried", hub=nowhere, home=tmp_path / "other home")
    assert kept.manifest.model_id == carried.manifest.model_id
    start, of_file = kept.manifest.backbone.start, carried.manifest.backbone.start
    assert (start.source, of_file.source) == ("timm test_vit.r160_in1k", "file vit.safetensors")
    assert start.license == of_file.license != "unknown"
    with safe_open(file, framework="numpy") as opened:
        assert not any(name.startswith("head.") for name in opened.keys()), "the classifier is left out"  # noqa: SIM118


def test_what_cannot_be_fetched_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    done = jepakit("weights", "fetch", "test_vit", "--out", file, hub="http://127.0.0.1:9", home=tmp_path)
    assert done.returncode == 2
    assert "could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr
    done = jepakit("weights", "fetch", "tast_vit", "--out", file, hub="http://127.0.0.1:9", home=tmp_path)
    assert done.returncode == 2
    assert "did you mean test_vit" in done.stderr
    assert not file.exists()

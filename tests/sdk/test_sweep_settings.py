"""What a sweep would run, and the settings that it refuses; all of it before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jepakit
from jepakit._sweep import combinations
from jepakit.cli import app
from jepakit.config import ViewsConfig
from jepakit.errors import ConfigError, DataError


def test_every_combination_has_a_name_and_its_settings() -> None:
    runs = combinations({"lamb": [0.02, 0.05], "projector": [[64, 64, 16]]}, {"steps": 3})
    assert runs == {
        "lamb=0.02,projector=64-64-16": {"steps": 3, "lamb": 0.02, "projector": [64, 64, 16]},
        "lamb=0.05,projector=64-64-16": {"steps": 3, "lamb": 0.05, "projector": [64, 64, 16]},
    }


def test_an_array_is_a_list_of_values() -> None:
    vary: dict[str, Any] = {"lr": np.logspace(-4, -3, 2), "batch_size": np.array([32, 64])}
    runs = combinations(vary, {})
    assert [settings["batch_size"] for settings in runs.values()] == [32, 64, 32, 64]
    assert "lr=0.001,batch_size=64" in runs


@pytest.mark.parametrize("views", [{"blur": 0.5}, ViewsConfig(blur=0.5)])
def test_a_setting_of_views_joins_those_that_are_given(views: Any) -> None:
    (settings,) = combinations({"views.hue": [0.1]}, {"views": views}).values()
    assert settings == {"views": {"blur": 0.5, "hue": 0.1}}


@pytest.mark.parametrize(
    "name",
    ["seed", "held_out", "labels", "backbone", "weights", "image_size", "resize", "pooling", "images", "out", "views"],
)
def test_what_is_measured_cannot_vary(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot vary within a sweep: .*These can: .*lamb.*views.hue"):
        combinations({name: [1]}, {})


@pytest.mark.parametrize(
    ("vary", "settings", "words"),
    [
        ({}, {}, "vary names no setting"),
        (["lr"], {}, "give a dict of settings and their values"),
        ({"lamd": [1]}, {}, "unknown setting 'lamd'; did you mean lamb"),
        ({"views.hoe": [1]}, {}, "unknown setting 'views.hoe'; did you mean views.hue"),
        ({"lamb": 0.1}, {}, "lamb = 0.1: give a list of values"),
        ({"unfreeze": "all"}, {}, "unfreeze = 'all': give a list of values"),
        ({"lamb": []}, {}, "give a list of values"),
        ({"lamb": [0.1, 0.1]}, {}, "two of the sweep's runs would be called lamb=0.1"),
        (
            {"projector": [[64] * 70]},
            {},
            "longer than a folder's name may be (200 characters): let fewer settings vary",
        ),
        ({"lamb": [0.1]}, {"lamb": 0.2}, "lamb is given twice"),
        ({"views.hue": [0.1]}, {"views": {"hue": 0.2}}, "views.hue is given twice"),
        ({"views.hue": [0.1]}, {"views": ViewsConfig(hue=0.2)}, "views.hue is given twice"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(
    vary: Mapping[str, Sequence[Any]], settings: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        combinations(vary, settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lamb", "write KEY=VALUE,VALUE"),
        ("lamb=", "write KEY=VALUE,VALUE"),
        ("lamb=2", "lamb = 2: input should be less than 1"),
        ("views.global_area=[0.3, 1.0],[0.5, 0.1]", "the smallest and the largest share"),
        ("unfreeze=all,everything", "unfreeze = 'everything'"),
    ],
)
def test_the_command_refuses_a_wrong_value_at_once(tmp_path: Path, given: str, words: str) -> None:
    asked = ["sweep", str(tmp_path), "--out", str(tmp_path / "out"), "--vary", given]
    code = f"import sys\nfrom jepakit.cli import main\nsys.argv = ['jepakit', *{asked!r}]\ntry:\n main()\nfinally:\n assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 2, told.stderr
    assert words in told.stderr
    assert told.stderr.count("\n") == 1


def test_values_of_a_setting_that_is_named_twice_are_joined(tmp_path: Path) -> None:
    asked = ["sweep", str(tmp_path), "--out", str(tmp_path / "out"), "--vary", "lamb=0.1", "--vary", "lamb = 0.1"]
    assert "two of the sweep's runs would be called lamb=0.1" in str(CliRunner().invoke(app, asked).exception)


def test_what_is_wrong_in_all_runs_is_told_without_a_combination(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^views = 3: "):
        jepakit.sweep(tmp_path, out=tmp_path / "out", vary={"views.hue": [0.1]}, views=3)  # type: ignore[arg-type]


def test_a_folder_without_runs_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a sweep: it holds no runs"):
        jepakit.open_sweep(tmp_path)
    assert "is not a run" in str(CliRunner().invoke(app, ["report", str(tmp_path)]).exception)

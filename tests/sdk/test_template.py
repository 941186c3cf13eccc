"""`jepakit init`: a file with every setting, in agreement with the settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jepakit.cli import app
from jepakit.cli.template import template
from jepakit.config import AdaptConfig, ViewsConfig
from jepakit.errors import ConfigError


def test_what_the_file_shows_are_all_settings_with_their_defaults() -> None:
    shown = re.findall(r"^#(\w+) =", template(), re.MULTILINE)
    assert shown == [name for name in AdaptConfig.model_fields if name not in ("images", "views")] + list(
        ViewsConfig.model_fields
    )
    whole = re.sub(r"^#(\w+ = .+)", r"\1", template(), flags=re.MULTILINE)
    assert AdaptConfig(images="scans", **tomllib.loads(whole)) == AdaptConfig(images="scans", views=ViewsConfig())
    assert all(line.startswith("#") for line in template().splitlines() if line and line != "[views]")
    assert max(map(len, template().splitlines())) <= 120


def test_the_views_shown_are_those_of_the_domain_that_is_named() -> None:
    (domain,) = re.findall(r'domain = "(\w+)" means', template())
    assert AdaptConfig(images="scans", domain=domain).resolved_views() == ViewsConfig()
    assert AdaptConfig(images="scans", domain="radiology").resolved_views() != ViewsConfig()


@pytest.mark.parametrize("given", ["{}/new/own.toml", "~/new/own.toml"])
def test_the_file_is_written_once_and_taken_by_adapt(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given, file = given.format(tmp_path), tmp_path / "new" / "own.toml"
    done = CliRunner().invoke(app, ["init", given])
    assert f"next: jepakit adapt IMAGES --config {file}" in done.stdout
    file.write_text(file.read_text().replace("#seed = 0", "seed = 7"))
    again = CliRunner().invoke(app, ["init", given])
    assert isinstance(again.exception, ConfigError)
    assert "seed = 7" in file.read_text()
    images = tmp_path / "none"
    taken = CliRunner().invoke(app, ["adapt", str(images), "--config", str(file)])
    assert str(images) in str(taken.exception), "all of it is a right setting: what is missing are the images"

"""One class of settings, three doors: flags, JEPAKIT_SERVE_* variables, a YAML file; in this order of weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jepakit._frontdoor import serve
from jepakit.errors import ConfigError
from jepakit_service.settings import ServeSettings, as_yaml, load


def test_flags_win_over_the_environment_and_it_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("bundles: [a, b]\nport: 1001\nreplicas: 2\nmax_images: 7\n")
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "1002")
    monkeypatch.setenv("JEPAKIT_SERVE_REPLICAS", "3")
    monkeypatch.setenv("JEPAKIT_SERVE_RAY", "false")
    found = load({"replicas": 4}, file)
    assert (found.bundles, found.port, found.replicas, found.ray, found.max_images) == (("a", "b"), 1002, 4, False, 7)


def test_several_words_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPAKIT_SERVE_BUNDLES", "one,two")
    assert load({}).bundles == ("one", "two")


def test_the_environment_counts_for_load_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JEPAKIT_SERVE_PORT", "1002")
    assert ServeSettings(bundles=("a",)).port == 8000


def test_what_is_printed_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve({"bundles": ("a", "b"), "expect": ("0" * 64,), "max_memory_mb": 900}, print_config=True)
    printed = capsys.readouterr().out
    (tmp_path / "serve.yaml").write_text(printed)
    assert load({}, tmp_path / "serve.yaml") == ServeSettings(bundles=("a", "b"), expect=("0" * 64,), max_memory_mb=900)
    assert set(yaml.safe_load(printed)) == set(ServeSettings.model_fields)
    assert "# Images in one request." in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bundles: [a]\nprot: 1\n", "did you mean port"),
        ("bundles: [a]\nport: http\n", "port"),
        ("- a\n", "holds no settings"),
        ("bundles: [a\n", "is not YAML"),
        ("port: 1\n", "name a bundle"),
        ("bundles: [a]\nhost: 0.0.0.0\n", "--api-key-file"),
        ("bundles: [a]\nreplicas: 3\nmax_replicas: 2\n", "less than replicas"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load({}, file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load({}, tmp_path / "none.yaml")


def test_every_setting_says_what_it_is_or_is_plain() -> None:
    plain = {"host", "port", "provider", "replicas", "max_body_mb"}
    for name, field in ServeSettings.model_fields.items():
        assert field.description or name in plain | {"log_format"}, name
    assert as_yaml(ServeSettings(bundles=("a",)))

"""Settings from the command line: options, a TOML file, `--set NAME=VALUE` and `--vary NAME=VALUE,VALUE`."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from jepakit._files import as_path, reason_of
from jepakit._machine import in_command
from jepakit.errors import ConfigError


class WithSettings(TyperCommand):
    """A command with --set; an unknown option or a word that names a setting is an error that says to use it."""

    def invoke(self, ctx: Any) -> Any:
        before = in_command.set(True)
        try:
            return super().invoke(ctx)
        finally:
            in_command.reset(before)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {
            option for parameter in self.get_params(ctx) for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for option in {word.partition("=")[0] for word in args if word.startswith("--")} - options:
            name = option.lstrip("-").replace("-", "_")
            if f"--{name.replace('_', '-')}" not in options and (setting := self._setting(name)):
                raise ConfigError(f"{option} is a setting without an option of its own: give --set {setting}=VALUE")
        for before, word in pairwise(["", *args]):
            name, equals, _ = word.partition("=")
            if equals and not before.startswith("-") and self._setting(name) and not Path(word).exists():
                raise ConfigError(f"{word} is a setting: give --set {word}")
        return super().parse_args(ctx, args)

    def _setting(self, name: str) -> str | None:
        from jepakit._frontdoor import setting_named

        return setting_named(name, self.name)


def given_ones(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def settings_of(assignments: list[str] | None = None, file: Path | None = None, **options: Any) -> dict[str, Any]:
    """Settings by name: from a TOML file, overridden by the `options` given, both overridden by `--set`."""
    settings = _read_toml(file) if file else {}
    settings.update(given_ones(**options))
    for assignment in assignments or []:
        _assign(settings, assignment)
    return settings


def to_vary(given: str) -> tuple[str, list[Any]]:
    """A setting and its values from `lamb=0.02,0.05`; values are parsed as TOML, else taken as plain strings."""
    key, equals, text = given.partition("=")
    key = key.strip()
    if not equals or not text:
        raise ConfigError(f"--vary {given}: write KEY=VALUE,VALUE, e.g. --vary unfreeze=auto,all")
    try:
        return key, list(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:
        return key, [_value(word.strip()) for word in text.split(",")]


def number_or_word(text: str | None) -> int | str | None:
    """A whole number, or the text as it is."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def _read_toml(path: Path) -> dict[str, Any]:
    """The settings of a file, but for the images: a run's config.toml has them, and a command takes them as arguments."""
    path = as_path(path, "config")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    settings.pop("images", None)
    return settings


def _assign(settings: dict[str, Any], assignment: str) -> None:
    """Set `views.n_local=6` in nested settings; the value is parsed as TOML, else taken as a plain string."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: write KEY=VALUE, e.g. --set views.n_local=6")
    if key == "images":
        raise ConfigError(f"--set {assignment}: images cannot be set with --set: give them as arguments of the command")
    value = _value(text)
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment}: {parent} is not a group of settings")
    place[last] = value


def _value(text: str) -> Any:
    """The value of a setting: parsed as TOML, else a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

"""Every setting of `adapt` as a TOML file to start from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from jepakit.config import AdaptConfig, ViewsConfig

_HEAD = "# Settings for `jepakit adapt IMAGES --config FILE`. Those that are commented out have their defaults; None: left out."
_VIEWS_HEAD = (
    '# How views are cut and changed. Shown is what domain = "general" means: the other domains change some of these, and\n'
    "# a line that is not commented out overrides them."
)
_ELSEWHERE = ("images", "views")
"""`images` is an argument of the command, `views` a table of its own."""
_WIDTH = 118


def template() -> str:
    """The file: each setting with its description and default, commented out; empty for None, as TOML has no null."""
    return "\n".join([_HEAD, *_lines(AdaptConfig), "", _VIEWS_HEAD, "[views]", *_lines(ViewsConfig)]) + "\n"


def _lines(settings: type[BaseModel]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        if name not in _ELSEWHERE:
            yield ""
            yield from textwrap.wrap(
                " ".join((field.description or "").split()), _WIDTH, initial_indent="# ", subsequent_indent="# "
            )
            yield f"#{name} = {_toml(field.default)}".rstrip()


def _toml(default: Any) -> str:
    """JSON's numbers, strings, lists and booleans are also valid TOML."""
    return "" if default is None else json.dumps(default)

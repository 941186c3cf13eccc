"""Which timm names exist, known without importing timm (9 s), so that a typo fails at once.

`timm_names.txt` is written by `python -m jepakit._timm_names` (`make timm-names`), and a test compares it with the
installed timm. A line is an architecture followed by the tags of its pretrained weights.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jepakit._messages import did_you_mean
from jepakit.errors import BackboneError

_FILE = "timm_names.txt"


@cache
def known_names() -> dict[str, tuple[str, ...]]:
    """Architecture → tags of its pretrained weights (none for some)."""
    lines = resources.files("jepakit").joinpath(_FILE).read_text().splitlines()
    return {name: tuple(tags) for name, *tags in (line.split() for line in lines if not line.startswith("#"))}


def check_name(name: str) -> None:
    """Raise BackboneError unless `name` is a timm architecture, with or without a known tag."""
    architecture, _, tag = name.partition(".")
    names = known_names()
    if architecture not in names:
        raise BackboneError(f"timm has no backbone {architecture!r}{did_you_mean(architecture, names)}")
    if tag and tag not in names[architecture]:
        tags = ", ".join(names[architecture]) or "none"
        raise BackboneError(f"{architecture} has no weights {tag!r}; its pretrained tags: {tags}")


def render_names() -> str:
    """The text of `timm_names.txt` for the installed timm."""
    import timm

    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for full_name in timm.list_models(pretrained=True):
        name, _, tag = full_name.partition(".")
        if tag:
            tags[name].append(tag)
    lines = [" ".join([name, *sorted(tags[name])]) for name in sorted(tags)]
    return "\n".join([f"# timm {timm.__version__}: architecture, then the tags of its pretrained weights", *lines, ""])


if __name__ == "__main__":
    Path(__file__).with_name(_FILE).write_text(render_names())

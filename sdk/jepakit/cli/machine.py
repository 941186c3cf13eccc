"""Commands for the machine itself."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from jepakit._say import show
from jepakit.cli.output import check_out
from jepakit.cli.stopping import exit_on_signals


def doctor() -> None:
    """Report what this machine has, and what to fix.

    The exit code is 1 if there is something to fix.
    """
    from jepakit.doctor import examine

    lines, problems = examine()
    show("\n".join(lines))
    for problem in problems:
        show(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)
    show("nothing to fix")


def weights_fetch(
    name: Annotated[str, typer.Argument(help="timm model name, with or without the tag of its weights")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
) -> None:
    """Fetch a backbone's pretrained weights into a file, for a machine without network access."""
    from jepakit._frontdoor import fetch_weights

    out = check_out(out, ".safetensors")
    exit_on_signals()
    start = fetch_weights(name, out)
    show(f"{out}: {start.source}, licence: {start.license}")
    show(f"next, on the other machine: jepakit adapt IMAGES --backbone {name} --weights {quote(str(out))}")

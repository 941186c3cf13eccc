"""The `jepakit` program: its commands, and how their errors are reported.

Exit codes: 0 done, 1 the work failed, 2 the user's input was wrong.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from jepakit import __version__
from jepakit._say import drop_unwritten, flush_shown, say, show
from jepakit.cli import machine, probe, serving, training, vectors
from jepakit.cli.settings import WithSettings
from jepakit.errors import JepakitError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapt an image backbone to your own images, export it, serve it, probe it.",
)
probe_app = typer.Typer(no_args_is_help=True, help="Fit and use probes on embeddings.")
app.add_typer(probe_app, name="probe")
weights_app = typer.Typer(no_args_is_help=True, help="Pretrained weights for machines without network access.")
app.add_typer(weights_app, name="weights")


def _print_version(asked: bool) -> None:
    if asked:
        show(f"jepakit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Options that come before any command."""
    # Escape what the terminal cannot show (`猫` in Latin-1, names that are not UTF-8): it must not fail finished work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


# In the order of `jepakit --help`.
app.command(cls=WithSettings)(training.adapt)
app.command(cls=WithSettings)(training.sweep)
app.command()(training.init)
app.command()(training.report)
app.command(cls=WithSettings)(training.inspect)
app.command()(serving.export)
app.command("show")(serving.show_bundle)
app.command(cls=WithSettings)(serving.serve)
app.command()(serving.deploy)
app.command()(vectors.embed)
app.command()(vectors.compare)
app.command()(vectors.nearest)
app.command()(machine.doctor)
weights_app.command("fetch", short_help="Fetch pretrained weights into a file.")(machine.weights_fetch)
probe_app.command("fit")(probe.probe_fit)
probe_app.command("evaluate")(probe.probe_evaluate)
probe_app.command("predict", short_help="Print each image's class and probability.")(probe.probe_predict)


def main() -> None:
    """Entry point: every JepakitError becomes one line on standard error and its exit code."""
    try:
        code = _run()
        flush_shown()
    except JepakitError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        say("stopped")
        code = 130
    except ImportError as error:
        if "failed to map segment" not in str(error):
            raise
        say(f"error: {error}: this process may not have enough address space; raise its limit (ulimit -v)")
        code = 1
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        code = 1
    finally:
        drop_unwritten(sys.stdout)
    sys.exit(code)


def _run() -> str | int | None:
    """Run the command; returns its exit code, or raises its error."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        return ended.code
    return 0

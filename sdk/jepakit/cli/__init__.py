"""The command line: `main` is the entry point, `app` the commands, in modules by what they are for."""

from jepakit.cli.program import app, main

__all__ = ["app", "main"]

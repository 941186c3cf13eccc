"""The base of all records that are stored as JSON and read back: no extra fields, no changes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A record with exactly these fields, which never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Printed:
    """What `print` shows, a notebook shows too, as the last value of a cell."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

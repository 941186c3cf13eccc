"""The base of everything that is written down as JSON and read back: no other fields, no changes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A record of exactly these fields, which never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

"""Numbers of things in notes and messages."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """`1 tile`, `2 tiles`, `3 classes`."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"

"""Wording shared by messages: counts, shortened lists, suggestions for typos."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_MEANT = {"gpu": "cuda"}
"""Words that mean a known word other than the one spelt most like them."""


def did_you_mean(word: str, known: Iterable[str], *, within: str = "") -> str:
    """`"; did you mean a, b?"` with the known words closest to `word`, or an empty string.

    within  what each of them is to be written behind, such as `views.`
    """
    known = list(known)
    nearest = [_MEANT[word]] if _MEANT.get(word) in known else difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(within + one for one in nearest)}?" if nearest else ""


def counted(number: int, thing: str) -> str:
    """`1 tile`, `2 tiles`, `3 classes`."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def joined(*notes: str) -> str:
    """The notes that are not empty, with semicolons between them."""
    return "; ".join(filter(None, notes))


def first_few(words: Sequence[str], most: int) -> str:
    """`a, b and 7 more`: the first `most` words, and how many more there are."""
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def plain_text(text: str) -> str:
    """The text itself, also of a string enum's member, whose `str()` may be the member's name."""
    return str.__str__(text)


def lines_of(error: BaseException) -> list[str]:
    """The lines of an exception's message; the name of its type if the message is empty."""
    return str(error).strip().splitlines() or [type(error).__name__]

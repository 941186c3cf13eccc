"""Warnings about labels and groups that may not be meant as written."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from jepakit._messages import counted, joined

_MISSING = frozenset({"nan", "none", "null", "na", "n/a", "#n/a", "<na>"})
_FEW = 10


def remarks_on_labels(labels: Sequence[str | None] | None, *, written: bool) -> str:
    """A remark on labels; empty if there is nothing to say.

    written  whether they come from a table or a list, where `none` may stand for a missing value; as a folder it is a name
    """
    given = Counter(label for label in labels or () if label is not None)
    missing = _missing(given, "label", "leave it empty") if written else ""
    return joined(_alike(given, "classes"), missing, _mostly_different(given))


def remarks_on_groups(groups: Sequence[str] | None, *, written: bool) -> str:
    """A remark on groups, as `remarks_on_labels` makes on labels."""
    given = Counter(groups or ())
    missing = _missing(given, "group", "give each of these images a group of its own") if written else ""
    return joined(_alike(given, "groups"), missing)


def _alike(given: Counter[str], things: str) -> str:
    spellings: dict[str, str] = {}
    for name in sorted(given):
        if (first := spellings.setdefault(_plain(name), name)) == name:
            continue
        if first.casefold() == name.casefold():
            return f"warning: {first} and {name} are two {things}, though only their letters' case differs"
        return (
            f"warning: {first!a} and {name!a} are two {things}, though they differ only in spaces, or in how "
            "their letters are stored or cased"
        )
    return ""


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _missing(given: Counter[str], thing: str, remedy: str) -> str:
    word = next((name for name in sorted(given) if name.casefold() in _MISSING), None)
    if word is None:
        return ""
    return f"warning: {counted(given[word], 'image')} of the {thing} {word}: if that stands for a missing {thing}, {remedy}"


def _mostly_different(given: Counter[str]) -> str:
    if len(given) < _FEW or 2 * len(given) <= given.total():
        return ""
    return f"warning: {given.total():,} images have {len(given):,} different labels: are these classes?"

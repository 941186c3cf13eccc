"""The tree of errors, as drawn in the module's docstring."""

from __future__ import annotations

import re

from jepakit import errors
from jepakit.errors import JepakitError


def drawn() -> dict[str, str]:
    """Each class in the drawing, with its parent."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            above[depth:] = [found[2]]
            parents[found[2]] = above[depth - 1] if depth else "Exception"
    return parents


def test_the_drawing_is_the_tree() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JepakitError)]
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in classes}


def test_input_that_is_wrong_ends_with_2_and_work_that_failed_with_1() -> None:
    assert {kind.exit_code for kind in errors.InputError.__subclasses__()} == {2}
    assert {kind.exit_code for kind in (*errors.WorkError.__subclasses__(), *errors.ClientError.__subclasses__())} == {
        1
    }

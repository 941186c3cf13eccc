"""The tree of errors, as drawn in the module's docstring."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

from jepakit import errors
from jepakit.errors import JepakitError

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JepakitError)]
DETAILS: dict[type, dict[str, Any]] = {
    errors.ImageError: {"code": "unreadable"},
    errors.ResponseError: {"status": 429, "code": "busy", "param": None, "request_id": "7"},
}


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
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_input_that_is_wrong_ends_with_2_and_work_that_failed_with_1() -> None:
    assert {kind.exit_code for kind in errors.InputError.__subclasses__()} == {2}
    assert {kind.exit_code for kind in (*errors.WorkError.__subclasses__(), *errors.ClientError.__subclasses__())} == {
        1
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_reaches_another_process_whole(kind: type[JepakitError]) -> None:
    details = next((given for base, given in DETAILS.items() if issubclass(kind, base)), {})
    error = kind("a.png: cannot be read", **details)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == "a.png: cannot be read"
        assert vars(other) == details

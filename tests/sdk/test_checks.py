"""Which numbers arguments take: Python's and numpy's alike, and no booleans."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import jepakit
from jepakit._checks import exceeds, is_number, is_share, is_whole
from jepakit.errors import ConfigError, DataError


@pytest.mark.parametrize("value", [0, -3, 10**30, np.int64(7), np.uint8(1)])
def test_integers_are_whole(value: object) -> None:
    assert is_whole(value)
    assert is_number(value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(1), Fraction(1, 3)])
def test_real_numbers_are_shares_from_0_to_1(value: object) -> None:
    assert is_share(value)
    assert not is_whole(value)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, 1j, float("nan"), -0.1, 1.1, np.float32(2)])
def test_anything_else_is_no_share(value: object) -> None:
    assert not is_share(value)


@pytest.mark.parametrize(("found", "of", "share", "over"), [(29, 100, 0.29, False), (30, 100, 0.29, True), (0, 9, 0, False), (1, 9, 0, True)])  # fmt: skip
def test_a_share_of_them_is_not_more_than_that_share(found: int, of: int, share: float, over: bool) -> None:
    assert exceeds(found, of, share) is over


def test_true_is_no_number_of_seconds_and_one_of_numpy_is() -> None:
    with pytest.raises(ConfigError, match="timeout_s = True"):
        jepakit.Client("http://127.0.0.1:8000", timeout_s=True)
    with jepakit.Client("http://127.0.0.1:8000", deadline_s=np.float32(5)) as client:  # type: ignore[arg-type]
        assert client._connection.deadline_s == 5
    with pytest.raises(ConfigError, match="seed = True"):
        jepakit.LinearProbe(seed=True).fit(np.eye(2), ["a", "b"])


@pytest.mark.parametrize(
    ("what", "take"),
    [
        ("vectors", lambda masked: jepakit.KNNProbe().fit(masked(np.eye(4)), [0, 1, 0, 1])),
        ("labels", lambda masked: jepakit.KNNProbe().fit(np.eye(4), masked([0, 1, 0, 1]))),
        ("labels", lambda masked: jepakit.KNNProbe().fit(np.eye(4), masked(list("abab")))),
        ("groups", lambda masked: jepakit.LinearProbe().fit(np.eye(4), [0, 1, 0, 1], groups=masked([0, 1, 2, 3]))),
        ("vectors", lambda masked: jepakit.KNNProbe().fit([*masked(np.eye(4))], [0, 1, 0, 1])),
        ("labels", lambda masked: jepakit.KNNProbe().fit(np.eye(4), [*masked([0, 1, 0, 1])])),
        ("vectors", lambda masked: jepakit.Embeddings(masked(np.eye(4)), "0123456789abcdef", list("abcd"))),
    ],
)
def test_arrays_with_masked_entries_are_refused(what: str, take: Callable[[Any], Any]) -> None:
    def masked(values: Any) -> Any:
        array = np.ma.masked_array(values, np.zeros(np.shape(values), bool))
        array[1] = np.ma.masked
        return array

    with pytest.raises(DataError, match=rf"the {what} are an array with masked entries: fill them \(array\.filled"):
        take(masked)

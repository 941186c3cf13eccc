"""Checks of user input that several modules share: numbers of Python or numpy, masked arrays, enough images."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard

import numpy as np

from jepakit.errors import DataError

FEWEST_IMAGES = 16
"""The fewest to adapt on."""


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer of Python or numpy, but not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python or numpy, but not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_share(value: object) -> TypeGuard[float]:
    """Whether it is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def exceeds(found: int, of: int, share: float) -> bool:
    """Whether `found` out of `of` items are more than the share `share`."""
    return found > 0 and found / of > share


def refuse_masked(what: str, values: object) -> None:
    """Raise DataError for an array of numpy or pandas with masked entries, or a list with one: numpy would pass on what
    lies under the mask as data."""
    if np.ma.is_masked(values) or (isinstance(values, list | tuple) and any(map(np.ma.is_masked, values))):
        raise DataError(
            f"{what} are an array with masked entries: fill them (array.filled(…), or fillna(…) in pandas) or leave them out"
        )


def check_enough(count: int) -> None:
    """Raise DataError for fewer images than one can adapt on."""
    if count < FEWEST_IMAGES:
        raise DataError(
            f"{count} images are too few to adapt on: at least {FEWEST_IMAGES} are needed, hundreds are better"
        )

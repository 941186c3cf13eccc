"""Images that `embed` may leave out because they cannot be embedded: `most_skipped`, in process and in the client."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from jepakit._checks import exceeds, is_share
from jepakit._messages import counted, first_few
from jepakit._say import say
from jepakit.errors import ConfigError, ImageError
from jepakit.sources import ImageList

OnSkipped = Callable[[str, str], object]
_NAMED = 3


def check_skipping(most_skipped: float, on_skipped: OnSkipped | None) -> None:
    """Raise ConfigError for anything but a share of the images, 0 to 1, or a function that takes an id and a reason."""
    if not is_share(most_skipped):
        raise ConfigError(f"most_skipped = {most_skipped!r}: give a share of the images, 0 to 1, e.g. 0.01")
    if on_skipped is not None and not _takes_two(on_skipped):
        raise ConfigError(
            f"on_skipped = {on_skipped!r}: give a function of two arguments, an image's id and the reason, such as "
            "lambda id, reason: skipped.append(id)"
        )


def _takes_two(function: object) -> bool:
    if not callable(function) or inspect.iscoroutinefunction(function):  # nobody would await it
        return False
    try:
        inspect.signature(function).bind("id", "reason")
    except TypeError:
        return False
    except ValueError:  # some that are written in C do not say what they take
        return True
    return True


class Skipped:
    """The images of one `embed` that are left out, by place; at most a share `most` of all images."""

    def __init__(self, images: ImageList, most: float) -> None:
        self._images, self._most = images, most
        self._errors: dict[int, ImageError] = {}

    def __contains__(self, place: int) -> bool:
        return place in self._errors

    @property
    def allowed(self) -> bool:
        """Whether any image may be left out."""
        return self._most > 0

    def add(self, place: int, error: ImageError) -> None:
        """Leave out one image. Raises ImageError if none may be left out, if too many are, or if none remains."""
        if not self.allowed:
            remedy = "; to leave such images out, allow a share of them (most_skipped)" if len(self._images) > 1 else ""
            raise ImageError(f"{error}{remedy}", code=error.code) from None
        self._errors[place] = error
        found, of = len(self._errors), len(self._images)
        if exceeds(found, of, self._most) or found == of:
            first = self._errors[min(self._errors)]
            raise ImageError(
                f"{first}; {found:,} of {counted(of, 'image')} cannot be embedded so far, and at most a share of "
                f"{self._most:g} may be left out, never all: repair or remove them, or allow a larger one (most_skipped)",
                code=first.code,
            ) from None

    def told(self, first: int, end: int) -> list[tuple[int, str, str]]:
        """Place, message and code of those from place `first` up to `end`, in order."""
        found = ((place, self._errors[place]) for place in range(first, end) if place in self._errors)
        return [(place, str(error), error.code) for place, error in found]

    def tell(self, on_skipped: OnSkipped | None, *, progress: bool) -> None:
        """Call `on_skipped` with each id and reason in order; with `progress`, name the first few on standard error."""
        told = [(self._images.ids[place], str(error)) for place, error in sorted(self._errors.items())]
        if told and progress:
            names = first_few([name for name, _ in told], _NAMED)
            line = (
                f"{counted(len(told), 'image')} left out, as they cannot be embedded: {names}; the first: {told[0][1]}"
            )
            say(line)
        if on_skipped is not None:
            for name, reason in told:
                on_skipped(name, reason)

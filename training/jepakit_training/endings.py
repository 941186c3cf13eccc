"""How a training process tells its parent why it ended: in a file for each rank, FOLDER/rank-N.json."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepakit import errors
from jepakit._files import replacing


@dataclass(frozen=True)
class Ending:
    """Why the process `rank` ended early: an exception's class, message, other attributes and origin."""

    rank: int
    kind: str
    message: str
    extra: dict[str, Any]
    traceback: str

    @property
    def asked_for(self) -> bool:
        """Whether it was told to stop."""
        return self.kind in ("KeyboardInterrupt", "SystemExit")

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"

    def error(self) -> errors.JepakitError | None:
        """The same error in this process; None if jepakit did not raise it on purpose."""
        kind = getattr(errors, self.kind, None)
        if not isinstance(kind, type) or not issubclass(kind, errors.JepakitError):
            return None
        error = kind.__new__(kind, self.message)  # some classes need more than a message
        error.__dict__.update(self.extra)
        return error


@contextmanager
def reporting_ending(folder: Path, rank: int) -> Iterator[None]:
    """Record in `folder` the ending of any exception raised inside, and let it propagate."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ours = isinstance(error, errors.JepakitError | KeyboardInterrupt | SystemExit)
        ending = {
            "rank": rank,
            "kind": type(error).__name__,
            "message": str(error),
            "extra": vars(error) if ours else {},
            "traceback": "" if ours else "".join(traceback.format_exception(error)),
        }
        with replacing(folder / f"rank-{rank}.json") as file:
            file.write(json.dumps(ending, default=str).encode())
        raise


def read_endings(folder: Path) -> list[Ending]:
    """The endings reported so far, earliest first: later ones mostly come from processes that lost a peer."""
    files = sorted(folder.glob("rank-*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [Ending(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def raise_first(endings: Iterable[Ending]) -> None:
    """Raise the first of the errors that jepakit raised on purpose, if there is one."""
    for error in filter(None, (ending.error() for ending in endings)):
        raise error

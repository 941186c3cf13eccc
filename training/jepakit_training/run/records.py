"""What a run writes: its plan and split, one line per logged step, and the images that could not be read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from jepakit._checks import exceeds
from jepakit._files import reason_of
from jepakit._run_files import PLAN, SKIPPED, SPLIT, START
from jepakit._say import say
from jepakit.errors import ConfigError, DataError
from jepakit.run import read_metrics, read_record
from jepakit.sources import ImageList
from jepakit_training.plan import Plan
from jepakit_training.run.folder import must_write, write_atomically

_NAMED = 5
_FREE = ("micro_batch", "workers", "prefetch", "batch_bytes", "notes", "caveats", "device", "threads")
"""Fields of a plan that may differ where a run resumes: none of them changes the result."""


def check_plan(run: Path, plan: Plan, images: ImageList) -> None:
    """ConfigError if a resumed run began with another plan, such as another version of jepakit may have made.

    A run whose start has not been measured starts over, whatever its plan was.
    """
    if not (run / START).exists() or not (run / PLAN).exists():
        return
    then = read_record(run / PLAN, json.loads, "remove it, or name another folder for the run")
    now = json.loads(json.dumps(_settled(plan)))
    changed = [
        f"{name} = {then[name]}, now {now[name]}"
        for name in now.keys() & then.keys() - set(_FREE)
        if then[name] != now[name]
    ]
    if (run / SPLIT).exists() and _split_of(run / SPLIT) != _splits(plan, images):
        changed.append(f"other images are held out than {SPLIT} says")
    if changed:
        raise ConfigError(
            f"{run} began with another plan ({'; '.join(sorted(changed))}): finish it with the jepakit that began it, or name another folder "
            "for the run"
        )


def _settled(plan: Plan) -> dict[str, Any]:
    """The plan as plan.json holds it, without what describes the machine."""
    settled = {name: value for name, value in vars(plan).items() if name != "split"}
    return settled | {"train": len(plan.split.train), "held_out": len(plan.split.held_out)}


def _splits(plan: Plan, images: ImageList) -> list[str]:
    """`train` or `test` for each image, as in split.csv's column `split`."""
    is_held_out = np.zeros(len(images), bool)
    is_held_out[plan.split.held_out] = True
    words: list[str] = np.where(is_held_out, "test", "train").tolist()
    return words


def _split_of(table: Path) -> list[str | None]:
    """The column `split` of a written split.csv, without the paths: images may have moved since."""
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        return [row.get("split") for row in csv.DictReader(file)]


def write_plan(run: Path, plan: Plan, images: ImageList, device: torch.device) -> None:
    """Write plan.json and split.csv; WriteError if that fails.

    split.csv has the columns of a manifest: beside a folder's images, it holds the same ones out in any other run.
    """
    columns = {
        "path": images.ids,
        "split": _splits(plan, images),
        **({} if images.labels is None else {"label": [label or "" for label in images.labels]}),
        **({} if images.groups is None else {"group": images.groups}),
    }
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    settled = {**_settled(plan), "device": device_name(device), "threads": torch.get_num_threads()}
    with must_write(run):
        write_atomically(run / PLAN, json.dumps(settled, indent=1))
        write_atomically(run / SPLIT, table.getvalue())


def device_name(device: torch.device) -> str:
    """What a GPU is called; the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class TolerateWriteErrors:
    """A block in which a failed write, e.g. to a full disk, only gives a warning, the first time; training goes on.

    what  what is written in the block, for the warning
    """

    def __init__(self, what: Path | str) -> None:
        self._what, self._warned = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._warned:
            say(
                f"warning: {self._what} could not be written ({reason_of(error)}): make room there; training goes on, and "
                "what has no room is missing there"
            )
        self._warned = True
        return True


class StepLog:
    """metrics.jsonl: one line per logged step. A resumed run drops the lines of steps that it repeats.

    main  whether this process is the one that writes it

    Raises WriteError if it cannot be created; a disk that fills up later only gives a warning.
    """

    def __init__(self, path: Path, first_step: int, *, main: bool) -> None:
        self._file, self._tolerate = None, TolerateWriteErrors(path)
        if main:
            kept = [line for line in read_metrics(path) if line["step"] < first_step]
            with must_write(path.parent):
                write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))
                self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: dict[str, float]) -> None:
        """Append one line."""
        if self._file is not None:
            with self._tolerate:
                self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with self._tolerate:
                self._file.close()


class SkippedFiles:
    """Images that could not be read, each once, with the reason; DataError once they exceed a share `most` of all images.

    path  skipped.csv, where they are listed; None: not listed
    main  whether this process is the one that writes it

    A full disk only gives a warning.
    """

    def __init__(self, path: Path | None, n_images: int, *, most: float, main: bool) -> None:
        self._path, self._of, self._share = path, n_images, most
        self._writes_to = path if main else None
        self._seen: dict[str, str] = {}
        self._tolerate = TolerateWriteErrors(path or SKIPPED)
        if path is not None and path.is_file():
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._seen = {row[0]: row[1] for row in csv.reader(file) if len(row) == 2 and row[0] != "id"}

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def where(self) -> str:
        """Where they are listed, or which they are, in words."""
        if self._path is not None:
            return f"listed in {self._path}"
        return f"among them {', '.join(list(self._seen)[:_NAMED])}"

    def add(self, *found: tuple[str, str]) -> None:
        """Note images by (id, reason); DataError when there are too many."""
        new = {name: reason for name, reason in found if name not in self._seen}
        if not new:
            return
        self._seen |= new
        if self._writes_to is not None:
            with (
                self._tolerate,
                self._writes_to.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                heading = [] if file.tell() else [("id", "reason")]
                csv.writer(file).writerows([*heading, *new.items()])
        if exceeds(len(self._seen), self._of, self._share):
            more = f", and {len(self._seen) - 1} more, {self.where}" if len(self._seen) > 1 else ""
            raise DataError(
                f"{next(iter(new.values()))}{more}; over {100 * self._share:g} % of the images cannot be read ({len(self._seen)} "
                f"of {self._of} so far): repair or remove them, then run the same command again, in another folder if the run "
                "had begun to train (or allow a larger share: most_skipped=SHARE)"
            )


class SharedSkippedFiles:
    """`SkippedFiles` of all ranks: noted by each and shared, as skipped.csv and its limit belong to the run.

    skipped  those of this rank
    ids      the images' names, by index
    n_ranks  number of ranks
    """

    def __init__(self, skipped: SkippedFiles, ids: Sequence[str], n_ranks: int) -> None:
        self._skipped, self._ids, self._n_ranks = skipped, ids, n_ranks
        self._own: list[tuple[str, str]] = []

    def note(self, found: Iterable[tuple[int, str]]) -> None:
        """Note (index, reason) of images that this rank could not read; DataError if there are too many."""
        for index, reason in found:
            self._own.append((self._ids[index], reason))
            self._skipped.add(self._own[-1])

    def share(self) -> None:
        """Share with all ranks what each could not read since the last call; DataError on all if it is too much."""
        if self._n_ranks > 1:
            self._skipped.add(*gather_object(self._own))
        self._own.clear()

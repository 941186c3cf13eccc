"""Clients that keep a service busy and check every answer; and the service's processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

import jepakit
from jepakit.errors import JepakitError

RECOVERY_S = 120.0


class Load:
    """Clients that embed the same images over and over and check each answer: a missing or wrong vector is a failure.

    right  the vectors [N, D] of each model_id that may answer
    """

    def __init__(
        self, url: str, images: list[bytes], right: Mapping[str, NDArray[np.float32]], clients: int = 4
    ) -> None:
        self._url, self._images, self._right = url, images, right
        self._stop = threading.Event()
        self._answers: list[list[str]] = [[] for _ in range(clients)]
        self._threads = [threading.Thread(target=self._run, args=(mine,), daemon=True) for mine in self._answers]
        self.failures: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=RECOVERY_S + 60)

    def wait_for(self, more: int) -> None:
        """Wait until every client has received `more` further answers."""
        wanted = [len(mine) + more for mine in self._answers]
        wait_until(
            lambda: bool(self.failures) or all(len(mine) >= n for mine, n in zip(self._answers, wanted, strict=True)),
            "the clients get no more answers",
        )

    def newest(self) -> set[str]:
        """The model_id of every client's newest answer."""
        return {mine[-1] for mine in self._answers if mine}

    def _run(self, mine: list[str]) -> None:
        with jepakit.Client(self._url, deadline_s=RECOVERY_S) as client:
            while not self._stop.is_set():
                try:
                    found = client.embed(self._images, progress=False)
                except JepakitError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                else:
                    right = self._right.get(found.model_id)
                    if right is None or not alike(found.vectors, right):
                        self.failures.append(f"wrong vectors of {found.model_id}")
                    mine.append(found.model_id)


def alike(found: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    """Equal except for the order of float sums, which depends on the batch."""
    return found.shape == right.shape and bool(np.abs(found - right).max() < 1e-5 * np.abs(right).max())


def wait_until(wanted: Callable[[], Any], otherwise: str, within_s: float = RECOVERY_S, every_s: float = 0.1) -> Any:
    """Wait until `wanted` is true and return its value; fail with `otherwise` if that takes too long."""
    deadline = time.monotonic() + within_s
    while not (found := wanted()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(every_s)
    return found


def is_ready(url: str) -> bool:
    """Whether the service at `url` answers that it is ready."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def processes(title: str) -> list[psutil.Process]:
    """Direct and indirect child processes whose program name or title begins with `title`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if command and Path(command[0]).name.startswith(title):
            found.append(process)
    return found

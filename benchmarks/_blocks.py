"""Compare pieces of code by the CPU time of short blocks, run in turns in random order.

On a shared machine wall-clock time says little, and a single run even less. Here each round runs every case once, in
random order, on the same work; cases are compared within rounds, and a case measured twice under two names (A/A)
shows how far a ratio of 1 strays by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Block = Callable[[], float]
"""Does one block of work and returns the CPU seconds it took."""
_RESAMPLES = 4000


def timed(work: Callable[[], object]) -> Block:
    """`work` as a block, by the CPU time of this process, including all threads and the kernel's share."""

    def block() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return block


def measure(cases: Mapping[str, Block], *, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """CPU seconds of each case's block in each round, after one round that is not counted."""
    random = np.random.default_rng(seed)
    names = list(cases)
    for name in names:
        cases[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for place in random.permutation(len(names)):
            seconds[names[place]].append(cases[names[place]]())
    return seconds


class Ratio(NamedTuple):
    """How many times as long one case takes as another: the median over rounds and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def at_least(goal: float, low: float, high: float) -> str:
    """Whether a figure reaches the goal, by its 95 % interval, in words."""
    return "met" if low >= goal else "within the noise" if high >= goal else "MISSED"


def at_most(goal: float, low: float, high: float) -> str:
    """Whether a figure stays under the goal, by its 95 % interval, in words."""
    return at_least(-goal, -high, -low)


def overhead_at_most(middle: float, upper: float, times: Ratio, control: Ratio) -> str:
    """Whether an overhead is small enough, in words: its median and the upper end of its interval.

    Unknown if the same code under two names (`control`) differs by as much as `upper`.
    """
    if max(control.high, 1 / control.low) > upper:
        return "not to be told here, the control strays as far"
    return "met" if times.median <= middle and times.high <= upper else "MISSED"


def ratio(slow: list[float], fast: list[float], *, seed: int = 0) -> Ratio:
    """`slow` over `fast`, paired by round; the interval is bootstrapped over rounds."""
    logs = np.log(slow) - np.log(fast)
    drawn = np.random.default_rng(seed).integers(len(logs), size=(_RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(logs[drawn], axis=1), [0.025, 0.975])
    return Ratio(*(float(np.exp(value)) for value in (np.median(logs), low, high)))

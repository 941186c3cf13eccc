"""Warnings drawn from a run's log: what is wrong, what it means, what to change. Each is given once.

SIGReg alone cannot say what is wrong: with 64 images and 64 outputs it is 10 for projections of standard
deviation 0.5, for ones that vary along one direction, and for a healthy run of a hundred steps. So the width and
the rank of the projections are logged with it, and SIGReg only says whether to look.

N images per batch, K projector outputs. SIGReg at these points (exact for N(0, s²) in each direction) is a N + b:

    s   0      0.3    0.5    1      1.5    2      16
    a   0.40   0.28   0.15   0      0.08   0.24   1.3
    b   0      0.2    0.5    1.05   1.4    1.7    2.3
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from statistics import median

import numpy as np
import torch
from torch import Tensor

from jepakit.config import DEFAULT_STEPS
from jepakit.run import COLLAPSED_STD

FLOOR = 1.05
_TOTAL_COLLAPSE = 0.40205
"""SIGReg divided by N if all projections are 0; no floor is added to it."""
_HEALTHY = 2.5
# Alarms look at the median of three logged values, once the projector has moved away from its start; at the end of a run
# too short for that, the projections are judged by what was logged after the warm-up. Narrow ones are no fault in the first
# steps: new projectors have a standard deviation of 0.34, and healthy runs of up to ten steps ended at 0.2 to 0.3.
_SMOOTH, _FIRST_STEPS = 3, 50
_NARROW_STD, _WIDE_STD, _DEAD_STD = 0.3, 2.0, 16.0
# Healthy runs begin narrow and along few directions: a pretrained MobileNetV2 with batches of 64 satellite images had
# std 0.39 at step 10, rank 2.1 at step 20 and 1.3 at step 30 (of 32).
_RANK_SHARE, _RANK_FROM_STEP = 0.05, 200
_NO_GRADIENT = 1e-6
_FEWEST_LOSSES = 12


def projection_stats(proj_VNK: Tensor) -> dict[str, Tensor]:
    """Width and effective rank of the projections about each view's mean, scalars on their device.

    proj_std   standard deviation over images, root mean square over views and outputs: SIGReg wants 1
    proj_rank  (Σ eigenvalues)² / Σ eigenvalues² of their covariance: how many directions they vary along; Gaussian
               ones of full rank have K·N / (K + N)
    """
    with torch.no_grad():
        centred = (proj_VNK.float() - proj_VNK.float().mean(dim=1, keepdim=True)).flatten(0, 1)
        covariance_KK = centred.T @ centred / len(centred)
        trace = covariance_KK.diagonal().sum()
        rank = trace.square() / covariance_KK.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        return {"proj_std": (trace / len(covariance_KK)).sqrt(), "proj_rank": rank}


@dataclass
class Alarms:
    """Watches one run."""

    steps: int
    warmup_steps: int
    batch_size: int
    n_outputs: int
    lamb: float
    lr: float
    workers: int
    cached: bool
    on_gpu: bool
    trains: bool
    _recent: dict[str, deque[float]] = field(default_factory=dict)
    _losses: array[float] = field(default_factory=lambda: array("d"))
    _settled: int = 0
    _given: set[str] = field(default_factory=set)

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """New warnings after this logged step (from 0), ready to print.

        values  loss, prediction, sigreg, grad_norm, data_wait, proj_std, proj_rank; if any is not finite, the optimizer
                skipped the step, and none of them counts
        """
        if all(map(isfinite, values.values())):
            self._note(step, values)
        now = {name: median(recent) for name, recent in self._recent.items()}
        last = step + 1 >= self.steps
        found: dict[str, str] = {}
        if self._settled >= _SMOOTH:
            found = self._projections(step, now) or self._gradient(now)
            found |= self._loss(last) | self._waiting(now)
        elif last and now:
            found = self._projections(step, now)
        if last and not found and self.trains and now.get("sigreg", 0.0) > _HEALTHY:
            found = self._unfinished(now["sigreg"])
        new = [text for name, text in found.items() if name not in self._given]
        self._given |= found.keys()
        return new

    def _note(self, step: int, values: Mapping[str, float]) -> None:
        if step < self.warmup_steps:
            return
        for name, value in values.items():
            self._recent.setdefault(name, deque(maxlen=_SMOOTH)).append(value)
        self._losses.append(values["loss"])
        self._settled += step >= _FIRST_STEPS

    def _projections(self, step: int, now: Mapping[str, float]) -> dict[str, str]:
        """At most one warning, since one fault of a distribution shows in several ways."""
        sigreg, std, rank = now["sigreg"], now["proj_std"], now["proj_rank"]
        if sigreg <= _HEALTHY:
            return {}
        seen = f"SIGReg is {sigreg:.1f} (floor {FLOOR})"
        if std < COLLAPSED_STD:
            return {
                "collapse": f"warning: the projections collapsed: {seen}, total collapse is {_TOTAL_COLLAPSE * self.batch_size:.1f} with "
                f"{self.batch_size} images, and their standard deviation is {std:.2g} instead of 1. All images look alike to "
                f"the model, and it will not recover: start a new run with a larger lamb (now {self.lamb:g})"
            }
        if std < _NARROW_STD and step >= _FIRST_STEPS:
            return {
                "narrow": f"warning: the projections are too narrow: {seen}, their standard deviation is {std:.2f} instead of 1. "
                f"SIGReg is too weak against the prediction: a larger lamb (now {self.lamb:g}) widens them"
            }
        if std > _DEAD_STD:
            return {
                "dead": f"warning: the projections are so wide that SIGReg has no gradient left: {seen}, their standard deviation is "
                f"{std:.3g} instead of 1. Start a new run with a lower projector_lr and a lower lr (now {self.lr:g})"
            }
        if std > _WIDE_STD:
            return {
                "wide": f"warning: the projections are too wide: {seen}, their standard deviation is {std:.2f} instead of 1. They "
                f"are torn apart faster than SIGReg can hold them: lower lr (now {self.lr:g}) and projector_lr"
            }
        full = self.n_outputs * self.batch_size / (self.n_outputs + self.batch_size)
        if rank < _RANK_SHARE * full and step >= max(_RANK_FROM_STEP, self.steps // 2):
            return {
                "rank": f"warning: the projections vary along {rank:.0f} of {self.n_outputs} directions only ({seen}): the model tells "
                f"few things apart. A larger lamb (now {self.lamb:g}) or batch_size (now {self.batch_size}) spreads them, "
                "as does a run on images that differ more"
            }
        return {}

    def _gradient(self, now: Mapping[str, float]) -> dict[str, str]:
        if now["grad_norm"] >= _NO_GRADIENT:
            return {}
        return {
            "gradient": f"warning: the gradient is {now['grad_norm']:.1g}: nothing is learned any more. Start a new run with a "
            f"lower lr (now {self.lr:g})"
        }

    def _loss(self, last: bool) -> dict[str, str]:
        """Compare thirds of the losses logged since the warm-up; a rise must exceed the noise within them."""
        if len(self._losses) < _FEWEST_LOSSES:
            return {}
        losses, size = np.frombuffer(self._losses), len(self._losses) // 3
        thirds = losses[:size], losses[-2 * size : -size], losses[-size:]
        first, middle, end = (float(third.mean()) for third in thirds)
        noise = float(sum(third.var(ddof=1) / size for third in thirds[1:])) ** 0.5
        rise = end - middle
        if rise > 4 * noise and rise > 0.2 * middle:
            return {
                "rising": f"warning: the loss rises: {middle:.3f}, then {end:.3f} in the last third of the steps so far. Start a "
                f"new run with a lower lr (now {self.lr:g})"
            }
        if last and end >= first:
            return {
                "not falling": f"warning: the loss did not fall: {first:.3f} in the first third of the steps, {end:.3f} in the last. "
                f"Try another lr (now {self.lr:g}), or more trained layers (unfreeze)"
            }
        return {}

    def _waiting(self, now: Mapping[str, float]) -> dict[str, str]:
        # On a CPU the loader's processes and the model share the same cores, so some waiting is normal.
        if now["data_wait"] <= (0.3 if self.on_gpu else 0.6):
            return {}
        cache = "" if self.cached else ", or keep decoded images with cache=FOLDER"
        return {
            "waiting": f"warning: {now['data_wait']:.0%} of the time is spent waiting for images: more workers (now {self.workers}) "
            f"where there are cores for them{cache}"
        }

    def _unfinished(self, sigreg: float) -> dict[str, str]:
        return {
            "unfinished": f"note: SIGReg was {sigreg:.1f} over the last steps logged, still far from its floor of {FLOOR}; more steps may help: "
            f"steps = {max(2 * self.steps, DEFAULT_STEPS)}, in a new run"
        }

"""`Recorder`: a run's reports while it trains, to metrics.jsonl, trackers, warnings and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from jepakit._progress import Steps
from jepakit._run_files import METRICS
from jepakit._say import say
from jepakit.config import AdaptConfig
from jepakit.run import Run, read_metrics
from jepakit_training.learning.learner import Outcome
from jepakit_training.memory import peak_gb
from jepakit_training.plan import Plan
from jepakit_training.run.alarms import FLOOR, Alarms, projection_stats
from jepakit_training.run.records import StepLog
from jepakit_training.run.trackers import Trackers

_LOG_EVERY = 10


class Clock:
    """Images per second and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self._images, self._waited = 0, 0.0
        self._start = time.perf_counter()

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the loader's batches, timing the wait for each."""
        start = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def step(self, images: int) -> None:
        """Count the images of a finished step."""
        self._images += images

    def rates(self) -> dict[str, float]:
        """images_per_s and data_wait; starts a new measurement."""
        spent = time.perf_counter() - self._start
        rates = {"images_per_s": round(self._images / spent, 2), "data_wait": round(self._waited / spent, 4)}
        self._images, self._waited, self._start = 0, 0.0, time.perf_counter()
        return rates


@dataclass
class Recorder:
    """Records the steps of one run; made by `recording`. Every rank records every step, but only the first reports."""

    plan: Plan
    accelerator: Accelerator
    progress: Steps
    log: StepLog
    trackers: Trackers
    alarms: Alarms
    clock: Clock = field(default_factory=Clock)

    def logs(self, step: int) -> bool:
        """Whether the numbers of `step` are logged: every tenth step, and the last."""
        return (step + 1) % _LOG_EVERY == 0 or step + 1 == self.plan.steps

    def record(self, step: int, outcome: Outcome) -> None:
        """Show that `step` is done, and log its numbers if they are to be logged; only that waits for a GPU."""
        self.clock.step(self.plan.batch_size)
        numbers = ""
        if self.logs(step):
            values = self._values(step, outcome)
            self.log.write({"step": step, **values})
            self.trackers.log(step, values)
            for line in self.alarms.check(step, values) if self.accelerator.is_main_process else ():
                say(line)
            numbers = describe(values)
        self.progress.update(step + 1, numbers)

    def _values(self, step: int, outcome: Outcome) -> dict[str, float]:
        return {
            **_numbers(outcome, self.accelerator),
            "lr": self.plan.lr * self.plan.backbone_ramp(step),
            **self.clock.rates(),
            "peak_memory_gb": round(peak_gb(self.accelerator.device), 3),
        }


@contextmanager
def recording(
    config: AdaptConfig, plan: Plan, accelerator: Accelerator, run: Run, first: int, *, extra_s: float
) -> Iterator[Recorder]:
    """The recorder of the steps from `first` on; closed at the block's end.

    extra_s  seconds of work expected after the last step
    """
    main, epochs = accelerator.is_main_process, plan.steps * plan.batch_size / len(plan.split.train)
    with (
        Steps(plan.steps, first=first, progress=main, epochs=epochs, extra_s=extra_s) as progress,
        closing(StepLog(run.path / METRICS, first, main=main)) as log,
        closing(
            Trackers(config.trackers, run.path, config.resolved().model_dump(mode="json"), first, main=main)
        ) as trackers,
    ):
        yield Recorder(plan, accelerator, progress, log, trackers, _alarms(config, plan, accelerator, run))


def describe(values: Mapping[str, float]) -> str:
    """A step's numbers, named as in the docs; SIGReg with its floor."""
    return (
        f"loss {values['loss']:.4f}  prediction {values['prediction']:.4f}  sigreg {values['sigreg']:.2f} (floor {FLOOR})  "
        f"{values['images_per_s']:.0f} images/s  data wait {values['data_wait']:.0%}  "
        f"peak memory {values['peak_memory_gb']:.1f} GB"
    )


def _alarms(config: AdaptConfig, plan: Plan, accelerator: Accelerator, run: Run) -> Alarms:
    """The alarms of this run; they have seen what was logged before a resume, and do not repeat themselves."""
    alarms = Alarms(
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        batch_size=plan.batch_size,
        n_outputs=config.projector[-1],
        lamb=plan.lamb,
        lr=plan.lr,
        workers=plan.workers,
        cached=config.cache is not None,
        on_gpu=accelerator.device.type == "cuda",
        trains=config.unfreeze != "none",
    )
    for row in read_metrics(run.path / METRICS) if accelerator.is_main_process else ():
        alarms.check(int(row["step"]), row)
    return alarms


def _numbers(outcome: Outcome, accelerator: Accelerator) -> dict[str, float]:
    """The losses and the gradient norm of the whole batch, by name, and the width and rank of its projections."""
    shares = {"loss": outcome.loss, "prediction": outcome.prediction}
    if outcome.anchor is not None:
        shares["anchor"] = outcome.anchor
    means = accelerator.reduce(torch.stack(list(shares.values())), "mean").tolist()
    proj_NVK = accelerator.gather(outcome.projections.transpose(0, 1).contiguous())
    whole = {"sigreg": outcome.sigreg, "grad_norm": outcome.grad_norm, **projection_stats(proj_NVK.transpose(0, 1))}
    return {**dict(zip(shares, means, strict=True)), **{name: float(value) for name, value in whole.items()}}

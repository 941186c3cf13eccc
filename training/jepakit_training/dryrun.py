"""A few steps of the real run, to estimate what all of it would take. Nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jepakit._say import say
from jepakit.bundles.manifest import Pooling, Preprocess
from jepakit.config import AdaptConfig
from jepakit.run import DryRun
from jepakit.sources import ImageList, evenly_spread
from jepakit_training import measuring
from jepakit_training.alone import own_process
from jepakit_training.data.batches import iterating, views_on
from jepakit_training.launch import count_processes
from jepakit_training.learning.learner import Learner
from jepakit_training.loop import explaining_out_of_memory, step_loader
from jepakit_training.measuring import Features, Measuring
from jepakit_training.memory import GB, memory_gb, peak_gb
from jepakit_training.setup import Setup, prepare

_STEPS = 4
_MEASURED_IMAGES = 40


def dry_run(config: AdaptConfig, images: ImageList) -> DryRun:
    """Four steps with the backbone frozen, four with it training, and some images measured, in one process.

    Raises the errors of `adapt` before and in its first steps: InputError, and TrainingError when memory runs out.
    """
    count = (config.processes or 1) if config.launcher == "ray" else count_processes(config, images)
    if count > 1:
        say(f"the dry run uses one process, for the whole batch; the run itself would use {count}")
    with own_process():
        setup = prepare(config, images, None)
        plan = setup.plan
        with explaining_out_of_memory(config, plan, setup.backbone, setup.accelerator):
            learner = Learner(config, plan, setup.backbone, setup.spec, setup.accelerator)
            frozen = range(min(_STEPS, plan.warmup_steps))
            training = range(plan.warmup_steps, min(plan.warmup_steps + _STEPS, plan.steps))
            loading_s = _seconds_to_load(setup)
            warmup_s, step_s = (_seconds_a_step(setup, learner, steps, loading_s) for steps in (frozen, training))
            measuring_s = _seconds_to_measure(setup)
        device = setup.accelerator.device
        queued_gb = plan.queued_bytes / GB if device.type == "cpu" else 0.0
        return DryRun(
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            batch_size=plan.batch_size,
            warmup_step_s=warmup_s,
            step_s=step_s,
            measuring_s=measuring_s,
            peak_memory_gb=peak_gb(device) + queued_gb,
            total_memory_gb=memory_gb(device),
            device=device.type,
        )


def _seconds_to_load(setup: Setup) -> float:
    """Seconds from batch to batch where nothing is computed, after the first of each loader process, which has to start."""
    workers, steps = max(1, setup.plan.workers), setup.plan.steps
    count = max(2, min(2 * workers, steps))
    with iterating(step_loader(setup, range(count))) as batches:
        arrivals = [time.perf_counter() for _ in batches]
    first = min(workers, count - 1)
    return (arrivals[-1] - arrivals[first - 1]) / (count - first)


def _seconds_a_step(setup: Setup, learner: Learner, steps: range, loading_s: float) -> float:
    """Seconds per step: the median of what is computed, the first left out unless it is the only one, and the loading of a batch,
    which costs nothing more where loader processes do it beside a GPU and are faster."""
    device, seconds = setup.accelerator.device, []
    with iterating(step_loader(setup, steps)) as batches:
        for step, batch in zip(steps, batches, strict=True):
            began = time.perf_counter()
            learner.step(step, views_on(device, batch))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    if not seconds:
        return 0.0
    computing_s = median(seconds[1:] or seconds)
    # On a CPU, loading and computing take the same cores.
    beside = device.type == "cuda" and setup.plan.workers > 0
    return max(computing_s, loading_s) if beside else computing_s + loading_s


def _seconds_to_measure(setup: Setup) -> float:
    """Seconds to measure the start and the result: passes over the images are extrapolated from a few, probes are fitted in full."""
    sampling = _Sampling()
    measuring = Measuring(
        setup.config,
        setup.images,
        setup.plan.split,
        setup.spec,
        caveats=setup.plan.caveats,
        device=setup.accelerator.device,
        workers=setup.plan.workers,
        skipped=setup.skipped,
        progress=False,
        extract=sampling,
    )
    began = time.perf_counter()
    before = measuring.start(setup.backbone)
    measuring.conclude(before, measuring.end(setup.backbone, before))
    return time.perf_counter() - began + sampling.left_out_s


class _Sampling:
    """Replaces `measuring.extract`: reads a few of the images, and returns random vectors for all, to fit probes on.

    `left_out_s` is the estimated time for the images that it did not read.
    """

    left_out_s = 0.0

    def __call__(
        self,
        backbone: Any,
        images: ImageList,
        indices: NDArray[np.intp],
        spec: Preprocess,
        poolings: Sequence[Pooling],
        **how: Any,
    ) -> Features:
        began, count = time.perf_counter(), len(indices)
        some = evenly_spread(count, _MEASURED_IMAGES)
        few = measuring.extract(backbone, images, indices[some], spec, poolings, **how)
        self.left_out_s += (time.perf_counter() - began) * (count / len(some) - 1)
        random, rows = np.random.default_rng(0), count if few.readable.any() else 0
        stand_ins = {
            pooling: random.standard_normal((rows, vectors.shape[1]), np.float32)
            for pooling, vectors in few.by_pooling.items()
        }
        return Features(stand_ins, np.full(count, few.readable.any()), few.skipped, np.zeros(rows, np.uint64))

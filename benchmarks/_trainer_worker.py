"""One training loop in its own process, block by block: the product's, or the same one written by hand.

    _trainer_worker.py {product|bare|returning} {files|memory} STEPS_A_BLOCK FOLDER '{"backbone": …}'

`returning` is `bare` with the C library's defaults: it returns freed memory to the system at once, which the product
prevents. The last argument holds settings of `jepakit.adapt`. Each input line asks for one block of steps. The answer
is a line of JSON: seconds (CPU time of the process, wall-clock time on a GPU), loss of the block's last step (0 if
unknown), peak_gb of memory, and flops, torch's count of one step (0 except for views in memory, uncompiled).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from jepakit._run_files import METRICS
from jepakit.config import AdaptConfig
from jepakit.run import Run, read_metrics
from jepakit.sources import list_images
from jepakit_training import loop
from jepakit_training.data.batches import Batch, views_on
from jepakit_training.learning.batchnorm import freeze_norm_statistics
from jepakit_training.learning.sigreg import directions, lejepa_loss
from jepakit_training.learning.trainable import freeze, parameter_groups
from jepakit_training.memory import freed_memory_kept, peak_gb
from jepakit_training.randomness import derive_seed
from jepakit_training.run import checkpoint
from jepakit_training.setup import Setup, prepare

_IN_MEMORY = 4
ON_GPU = torch.cuda.is_available()


def now() -> float:
    """CPU seconds of this process, all threads; wall-clock seconds if a GPU does the work."""
    if not ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class OverError(Exception):
    """Nobody asks for another block."""


class Turns:
    """Hands batches to any loop, and pauses it after each block until the next block is asked for.

    The loop itself is unchanged: a block lasts from the request for its first batch to that for the first batch of the
    next block, including whatever the loop does in between, so that all of its work is in some block.
    """

    def __init__(self, steps: int, *, count_flops: bool) -> None:
        self._steps, self._count_flops = steps, count_flops
        self.loss, self.run = torch.zeros(()), Path()

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        source, flops = iter(batches), 0
        answer: dict[str, float] = {"ready": 1}
        while True:
            print(json.dumps(answer), flush=True)
            if not sys.stdin.readline():
                raise OverError
            start = now()
            for _ in range(self._steps):
                batch = next(source)
                if self._count_flops:
                    with FlopCounterMode(display=False) as counter:
                        yield batch
                    flops, self._count_flops = int(counter.get_total_flops()), False
                else:
                    yield batch
            seconds = now() - start
            answer = {"seconds": seconds, "loss": self._loss(), "peak_gb": peak_gb(_device()), "flops": flops}

    def _loss(self) -> float:
        logged = read_metrics(self.run / METRICS) if (self.run / METRICS).is_file() else []
        return float(logged[-1]["loss"]) if logged else float(self.loss)


def product(setup: Setup, run: Run, turns: Turns, memory: bool) -> None:
    """The product's own loop, with everything in it that is on by default."""
    real = loop.step_loader

    def step_loader(setup: Setup, steps: range) -> Any:
        loader = real(setup, steps)
        return turns.of(_held(loader) if memory else loader)

    turns.run = run.path
    # A step that waited for its turn is not a slow step, after which the product would save at once.
    with patch.object(loop, "step_loader", step_loader), patch.object(checkpoint, "_SLOW_STEP_S", math.inf):
        loop._train(setup, run, 0.0)


def bare(setup: Setup, run: Run, turns: Turns, memory: bool) -> None:
    """The same model, loss, optimizer and batches in the plainest loop that trains the same weights."""
    config, backbone, plan, spec, device = setup.config, setup.backbone, setup.plan, setup.spec, _device()
    freeze(backbone, config.unfreeze, from_random=config.weights == "random")  # type: ignore[arg-type]
    backbone.train()
    if plan.norm_statistics == "frozen":
        freeze_norm_statistics(backbone)
    projector = plain_projector(backbone.num_features, config).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        parameter_groups(
            backbone,
            projector,
            lr=plan.lr,
            projector_lr=config.projector_lr,
            weight_decay=config.weight_decay,
            layer_decay=plan.layer_decay,
        ),
        betas=(0.9, 0.98),
    )
    trained = [weights for weights in (*backbone.parameters(), *projector.parameters()) if weights.requires_grad]
    mean, std = (255 * torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std))
    loader: Iterable[Batch] = loop.step_loader(setup, range(plan.steps))
    for step, batch in enumerate(turns.of(_held(loader) if memory else loader)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * plan.ramp(step)
        views = views_on(device, batch)
        with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
            features = torch.cat(
                [
                    backbone((group.flatten(0, 1).float() - mean) / std).unflatten(0, group.shape[:2])
                    for group in views
                    if len(group)
                ]
            )
            projections = projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        slices = directions(config.projector[-1], config.n_slices, seed=config.seed, step=step, device=device)
        loss, _, _ = lejepa_loss(projections, len(views.global_), plan.lamb, slices)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.loss = loss.detach()


def plain_projector(features: int, config: AdaptConfig) -> nn.Sequential:
    """The product's projector built from torch's own layers, with the same weights."""
    first, second, outputs = config.projector
    torch.manual_seed(derive_seed(config.seed, "projector"))
    return nn.Sequential(
        nn.Linear(features, first),
        nn.BatchNorm1d(first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.BatchNorm1d(second),
        nn.ReLU(),
        nn.Linear(second, outputs),
    )


def _held(loader: Iterable[Batch] | DataLoader[Batch]) -> Iterator[Batch]:
    """A few of the loader's batches over and over, so that nothing is loaded after the start."""
    return itertools.cycle(list(itertools.islice(loader, _IN_MEMORY)))


def _device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(torch|accelerate|timm)\b")
    kind, source, steps, folder, settings = sys.argv[1:]
    config = AdaptConfig(**json.loads(settings))
    images, run = list_images(config.images, config.labels), Run(Path(folder))
    run.path.mkdir()
    # torch.compile gives up for good on code that it first sees while operations are counted.
    turns = Turns(int(steps), count_flops=source == "memory" and not config.compile)
    setup = prepare(config, images, run)
    kept = contextlib.nullcontext() if kind == "returning" else freed_memory_kept()
    with contextlib.suppress(OverError), kept:
        (product if kind == "product" else bare)(setup, run, turns, source == "memory")


if __name__ == "__main__":
    main()

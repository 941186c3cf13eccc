"""`adapt`: measure, train, measure again, and say which embeddings to keep. A step is `Learner.step`, in learner.py."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader

from jepakit._progress import Steps
from jepakit.backbone import is_hierarchical, start_backbone, start_preprocess
from jepakit.bundle import Backbone, EmbeddingSpec, Preprocess, Provenance, name_for
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError
from jepakit.evaluate import Comparison
from jepakit.run import BUNDLE, CHECKPOINTS, METRICS, SKIPPED, START, Run
from jepakit.sources import ImageList
from jepakit_training import checkpoint
from jepakit_training.cache import open_cache
from jepakit_training.data import Batch, StepBatches, ViewDataset, make_loader, views_on
from jepakit_training.evaluation import Measuring
from jepakit_training.frozen import cpu_has_bf16
from jepakit_training.learner import Learner, Losses
from jepakit_training.plan import Plan, make_plan
from jepakit_training.randomness import derive_seed
from jepakit_training.records import FREE_SETTINGS, SkippedFiles, StepLog, open_folder, versions, write_run_bundle
from jepakit_training.values import choose_preprocess, describe_values, look_at
from jepakit_training.views import ViewMaker

_LOG_EVERY = 10


def adapt(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """Continue LeJEPA pretraining of a backbone on `images`; returns the finished run in `out`.

    Running it again with the same settings resumes an interrupted run, or returns a finished one; other
    settings or data are refused. Raises InputError for what the user can mend, TrainingError otherwise.
    """
    if int(os.environ.get("RANK", "0")) == 0:  # the launcher's; accelerate has not started yet
        open_folder(out, config, images)
    run = Run(out)
    if run.finished:
        print(
            f"{out} is finished already; to go on from it: --weights {out / BUNDLE} --out NEW",
            file=sys.stderr,
        )
        return run
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|accelerate|timm)\b")  # not the user's to act on
        _adapt(config, images, run)
    return run


def _adapt(config: AdaptConfig, images: ImageList, run: Run) -> None:
    setup = prepare(config, images, run)
    main, plan = setup.accelerator.is_main_process, setup.plan
    before = setup.measuring.start(setup.backbone)

    def write(path: Path, embedding: EmbeddingSpec, steps: int, comparison: Comparison | None, name: str) -> None:
        provenance = _provenance(config, images, steps=steps, batch_size=plan.batch_size)
        write_run_bundle(
            path, setup.backbone, setup.described, setup.spec, embedding, provenance, comparison, name=name
        )

    if main and not (run.path / START).exists():
        write(run.path / START, before.embedding, 0, None, f"{name_for(run.path)}-start")
    _train(config, setup, run)
    if main and len(setup.skipped):
        print(
            f"{len(setup.skipped)} images could not be read and were left out: see {run.path / SKIPPED}",
            file=sys.stderr,
        )
    after = setup.measuring.end(setup.backbone, before.embedding.pooling)
    if main:
        comparison = setup.measuring.conclude(before, after)
        write(run.path / BUNDLE, after.embedding, plan.steps, comparison, name_for(run.path))
    setup.accelerator.wait_for_everyone()


@dataclass
class Setup:
    """What a run is made of, before its first step."""

    accelerator: Accelerator
    backbone: nn.Module
    described: Backbone
    spec: Preprocess
    plan: Plan
    dataset: ViewDataset
    skipped: SkippedFiles
    measuring: Measuring


def prepare(config: AdaptConfig, images: ImageList, run: Run) -> Setup:
    """Look at the images, build the backbone, make the plan and tell it; raises InputError where they do not go together."""
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision),
        # A backbone may hold parameters that its pooled output does not depend on. Its buffers are the same on every
        # rank: frozen, or of statistics that are reduced over the ranks.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    main = accelerator.is_main_process
    torch.manual_seed(derive_seed(config.seed, "weights"))
    found = look_at(images, config, show=main)
    backbone, described = start_backbone(config.backbone, config.weights, config.image_size, found.kind.bands)
    plan = make_plan(config, images, backbone, accelerator.num_processes, found.kind.bands)
    spec = choose_preprocess(found, config, start_preprocess(backbone, config.weights, plan.image_size))
    for note in (images.note, *describe_values(found, spec, images.ids), *plan.notes) if main else ():
        print(note, file=sys.stderr)

    make_views = ViewMaker(config.resolved_views(), plan.image_size, plan.local_size, spec.scaling)
    cache = open_cache(config, make_views.least_side, spec)
    dataset = ViewDataset(images, plan.split.train, spec, make_views, config.seed, cache)
    skipped = SkippedFiles(run.path / SKIPPED, len(images), most=config.most_skipped, enabled=main)
    for index, reason in found.unreadable:
        skipped.add(images.ids[index], reason)
    backbone = backbone.to(accelerator.device)
    if is_hierarchical(backbone):
        # 1.8 times the images/s of a MobileNetV2 step on a CPU; a ViT has no convolutions worth it.
        backbone = backbone.to(memory_format=torch.channels_last)
    measuring = Measuring(
        config, images, plan.split, spec,
        device=accelerator.device, workers=plan.workers, skipped=skipped, show=main,
    )  # fmt: skip
    return Setup(accelerator, backbone, described, spec, plan, dataset, skipped, measuring)


def mixed_precision(asked: Literal["auto", "fp32", "bf16"]) -> Literal["bf16", "no"]:
    """What accelerate's autocast computes in; ConfigError for bfloat16 on a machine without it."""
    on_gpu = torch.cuda.is_available()
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else cpu_has_bf16()
    if asked == "bf16" and not has_bf16:
        raise ConfigError("precision = bf16: this machine has no bfloat16 instructions; use auto or fp32")
    return "bf16" if asked == "bf16" or (asked == "auto" and on_gpu and has_bf16) else "no"


def _train(config: AdaptConfig, setup: Setup, run: Run) -> None:
    """Train the backbone in place, from the newest checkpoint where there is one."""
    accelerator, plan, dataset = setup.accelerator, setup.plan, setup.dataset
    learner = Learner(config, plan, setup.backbone, setup.spec, accelerator)
    first = _restore(run.path / CHECKPOINTS, learner)
    main, clock = accelerator.is_main_process, Clock()
    with (
        _stop_signal() as stop,
        closing(Steps(plan.steps, first, enabled=main)) as show,
        closing(StepLog(run.path / METRICS, first, enabled=main)) as log,
    ):
        loader = step_loader(config, setup, range(first, plan.steps))
        for step, batch in zip(range(first, plan.steps), clock.waiting(loader), strict=True):
            for index, reason in batch.skipped:
                setup.skipped.add(dataset.images.ids[index], reason)
            losses = learner.step(step, views_on(accelerator.device, batch))

            clock.step(plan.batch_size)
            last = step + 1 == plan.steps
            stopping = _any_rank(stop.requested, accelerator)
            if (step + 1) % _LOG_EVERY == 0 or last:
                values = {**_reduced(losses, accelerator), "lr": plan.lr * plan.backbone_ramp(step), **clock.rates()}
                log.write({"step": step, **values})
                show.update(step + 1, values)
            if last or stopping or clock.since_save() > config.save_every_s:
                if main:
                    checkpoint.save(run.path / CHECKPOINTS, step + 1, learner.state_dict())
                clock.saved()
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run the same command again to go on")
    learner.finish()


def step_loader(config: AdaptConfig, setup: Setup, steps: range) -> DataLoader[Batch]:
    """This rank's batches for `steps`."""
    accelerator, plan = setup.accelerator, setup.plan
    batches = StepBatches(
        len(plan.split.train), plan.batch_size, config.seed, steps,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    on_gpu = accelerator.device.type == "cuda"
    on_device = on_gpu if config.augment_on == "auto" else config.augment_on == "device"
    return make_loader(setup.dataset, batches, plan.workers, pin=on_gpu, finished=not on_device)


def _reduced(losses: Losses, accelerator: Accelerator) -> dict[str, float]:
    """The numbers of the whole batch, by name; SIGReg and the norm are global already."""
    shares = {"loss": losses.loss, "prediction": losses.prediction}
    if losses.anchor is not None:
        shares["anchor"] = losses.anchor
    means = accelerator.reduce(torch.stack(list(shares.values())), "mean").tolist()
    return {
        **dict(zip(shares, means, strict=True)),
        "sigreg": losses.sigreg.item(),
        "grad_norm": float(losses.grad_norm),
    }


def _restore(folder: Path, learner: Learner) -> int:
    """Load the newest whole checkpoint; returns the step to go on from."""
    found = checkpoint.load_newest(folder)
    if found is None:
        return 0
    step, state = found
    learner.load_state_dict(state)
    print(f"going on from step {step}", file=sys.stderr)
    return step


def _any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is up on any rank: all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _provenance(config: AdaptConfig, images: ImageList, *, steps: int, batch_size: int) -> Provenance:
    told = config.model_dump(mode="json", exclude_none=True, exclude={"images", "cache", *FREE_SETTINGS})
    for setting in ("weights", "labels", "group"):  # a bundle is for sharing: no path of this machine
        told[setting] = Path(told[setting]).name
    return Provenance(
        config=told,
        steps=steps,
        images_seen=steps * batch_size,
        data_digest=images.digest(),
        versions=versions(),
    )


class Clock:
    """Images a second and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self._images, self._waited = 0, 0.0
        self._start = self._save = time.perf_counter()

    def waiting(self, loader: Any) -> Iterator[Any]:
        """Yield the loader's batches, timing the wait for each."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def step(self, images: int) -> None:
        self._images += images

    def rates(self) -> dict[str, float]:
        spent = time.perf_counter() - self._start
        rates = {"images_per_s": round(self._images / spent, 2), "data_wait": round(self._waited / spent, 4)}
        self._images, self._waited, self._start = 0, 0.0, time.perf_counter()
        return rates

    def since_save(self) -> float:
        return time.perf_counter() - self._save

    def saved(self) -> None:
        self._save = time.perf_counter()


class _Stop:
    requested = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second SIGINT stops at once."""
    stop = _Stop()

    def request(*_: object) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): signals stay as they are
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

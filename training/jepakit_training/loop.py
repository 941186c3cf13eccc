"""`adapt`: measure, train, measure again, and say which embeddings to keep. The training loop is `_train`."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from jepakit._progress import Steps
from jepakit.backbone import is_hierarchical, start_backbone, start_preprocess
from jepakit.bundle import Preprocess, Provenance, name_for
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, TrainingError
from jepakit.run import BUNDLE, CHECKPOINTS, METRICS, SKIPPED, START, Run
from jepakit.sources import ImageList
from jepakit_training import checkpoint
from jepakit_training.cache import open_cache
from jepakit_training.data import StepBatches, ViewDataset, make_loader, views_on
from jepakit_training.evaluation import Measuring
from jepakit_training.model import LejepaModel, freeze, freeze_norm_statistics, parameter_groups
from jepakit_training.plan import Plan, make_plan
from jepakit_training.randomness import derive_seed
from jepakit_training.records import FREE_SETTINGS, SkippedFiles, StepLog, open_folder, versions, write_run_bundle
from jepakit_training.sigreg import directions, lejepa_loss
from jepakit_training.values import choose_preprocess, describe_values, look_at
from jepakit_training.views import ViewMaker

_LOG_EVERY = 10
_MOST_BAD_STEPS = 3


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
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        # The backbone's parameters are unused while the projector warms up.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    main = accelerator.is_main_process
    torch.manual_seed(derive_seed(config.seed, "weights"))
    found = look_at(images, config, show=main)
    backbone, described = start_backbone(config.backbone, config.weights, config.image_size, found.kind.bands)
    plan = make_plan(config, images, backbone, accelerator.num_processes)
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
    before = measuring.start(backbone)
    nothing_yet = _provenance(config, images, steps=0, batch_size=plan.batch_size)
    if main and not (run.path / START).exists():
        write_run_bundle(
            run.path / START,
            backbone,
            described,
            spec,
            before.embedding,
            nothing_yet,
            None,
            name=f"{name_for(run.path)}-start",
        )
    _train(config, plan, dataset, backbone, spec, run, accelerator, skipped)
    if main and len(skipped):
        print(f"{len(skipped)} images could not be read and were left out: see {run.path / SKIPPED}", file=sys.stderr)
    after = measuring.end(backbone, before.embedding.pooling)
    if main:
        done = _provenance(config, images, steps=plan.steps, batch_size=plan.batch_size)
        comparison = measuring.conclude(before, after)
        write_run_bundle(
            run.path / BUNDLE,
            backbone,
            described,
            spec,
            after.embedding,
            done,
            comparison,
            name=name_for(run.path),
        )
    accelerator.wait_for_everyone()


def _train(
    config: AdaptConfig, plan: Plan, dataset: ViewDataset, backbone: nn.Module, spec: Preprocess,
    run: Run, accelerator: Accelerator, skipped: SkippedFiles,
) -> None:  # fmt: skip
    """Train the backbone in place, from the newest checkpoint where there is one."""
    recipe = config.resolved_views()
    from_random = config.weights == "random"
    trainable = freeze(backbone, config.unfreeze, from_random=from_random)
    start_state = {
        name: value.detach().clone() for name, value in backbone.named_parameters() if name in set(trainable)
    }
    model = LejepaModel(backbone, spec, config.projector, backbone.num_features)  # type: ignore[arg-type]
    _seed_projector(model, config.seed)
    if from_random and accelerator.num_processes > 1 and _has_batch_norm(backbone):
        raise ConfigError(
            "training a ConvNet's BatchNorm from random weights over several processes is not supported yet: use one"
        )
    groups = parameter_groups(model, lr=plan.lr, projector_lr=config.projector_lr, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    first = _restore(run.path / CHECKPOINTS, model, optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    batches = StepBatches(
        len(plan.split.train), plan.batch_size, config.seed, range(first, plan.steps),
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    on_gpu = accelerator.device.type == "cuda"
    on_device = on_gpu if config.augment_on == "auto" else config.augment_on == "device"
    loader = make_loader(dataset, batches, plan.workers, pin=on_gpu, finished=not on_device)
    main = accelerator.is_main_process
    clock = _Clock()
    bad_steps = 0

    with (
        _stop_signal() as stop,
        closing(Steps(plan.steps, first, enabled=main)) as show,
        closing(StepLog(run.path / METRICS, first, enabled=main)) as log,
    ):
        for step, batch in zip(range(first, plan.steps), clock.waiting(loader), strict=True):
            for index, reason in batch.skipped:
                skipped.add(dataset.images.ids[index], reason)
            torch.manual_seed(derive_seed(config.seed, "step", step, accelerator.process_index))
            model.backbone_frozen = step < plan.warmup_steps or not trainable
            model.train()
            if not from_random:
                freeze_norm_statistics(backbone)
            _set_learning_rates(optimizer, plan, step)

            views = views_on(accelerator.device, batch)
            with accelerator.autocast():
                proj_VNK = prepared(views)
            slices_KS = directions(
                config.projector[-1], config.n_slices, seed=config.seed, step=step, device=accelerator.device
            )
            loss, prediction, regulariser = lejepa_loss(proj_VNK, recipe.n_global, plan.lamb, slices_KS)
            accelerator.backward(loss)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            # One step on a NaN would poison AdamW for ever. The norm is the same on every rank.
            if torch.isfinite(grad_norm):
                optimizer.step()
                bad_steps = 0
            else:
                bad_steps += 1
            optimizer.zero_grad(set_to_none=True)
            if bad_steps == _MOST_BAD_STEPS:
                raise TrainingError(
                    f"the gradient was not finite {bad_steps} times in a row, up to step {step}: lower --lr "
                    f"(now {plan.lr:g}), then start a new run; the last checkpoint is sound"
                )

            clock.step(plan.batch_size)
            last = step + 1 == plan.steps
            stopping = _any_rank(stop.requested, accelerator)
            if (step + 1) % _LOG_EVERY == 0 or last:
                # SIGReg and the norm are global already; the prediction is this rank's share.
                loss, prediction = accelerator.reduce(torch.stack([loss.detach(), prediction.detach()]), "mean")
                values = {
                    "loss": loss.item(), "prediction": prediction.item(), "sigreg": regulariser.item(),
                    "grad_norm": float(grad_norm), "lr": plan.lr * plan.backbone_ramp(step), **clock.rates(),
                }  # fmt: skip
                log.write({"step": step, **values})
                show.update(step + 1, values)
            if last or stopping or clock.since_save() > config.save_every_s:
                if main:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    checkpoint.save(run.path / CHECKPOINTS, step + 1, state)
                clock.saved()
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run the same command again to go on")
    _assert_moved(backbone, start_state)
    backbone.eval()


def _set_learning_rates(optimizer: Any, plan: Plan, step: int) -> None:
    for group in optimizer.param_groups:
        ramp = plan.ramp(step) if group["role"] == "projector" else plan.backbone_ramp(step)
        group["lr"] = group["base_lr"] * ramp


def _restore(folder: Path, model: LejepaModel, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint; returns the step to go on from."""
    found = checkpoint.load_newest(folder)
    if found is None:
        return 0
    step, state = found
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on from step {step}", file=sys.stderr)
    return step


def _any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is up on any rank: all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _seed_projector(model: LejepaModel, seed: int) -> None:
    """Give the projector weights that depend on the seed alone, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "projector"))
        for module in model.projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def _assert_moved(backbone: nn.Module, start_state: dict[str, torch.Tensor]) -> None:
    """Published runs have saved the untouched start; this one must not."""
    now = dict(backbone.named_parameters())
    if start_state and all(torch.equal(now[name], value) for name, value in start_state.items()):
        raise TrainingError(
            "training left every trained weight as it was: no step was taken; raise --steps above the warm-up"
        )


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


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


class _Clock:
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

"""`adapt_here`: measure, train, measure again, and say which embeddings to keep. A step is `Learner.step`, in learner.py."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from safetensors.torch import load, save_file
from torch import nn
from torch.utils.data import DataLoader

from jepakit._messages import counted
from jepakit.backbone import start_backbone, start_preprocess, tensors_of
from jepakit.bundle import (
    WEIGHTS,
    Backbone,
    EmbeddingSpec,
    Manifest,
    Preprocess,
    Provenance,
    compute_model_id,
    name_for,
    open_bundle,
    write_bundle,
)
from jepakit.config import AdaptConfig
from jepakit.errors import BundleError, ConfigError, DataError, TrainingError
from jepakit.evaluate import Comparison
from jepakit.run import BUNDLE, CHECKPOINTS, METRICS, SKIPPED, START, Run
from jepakit.sources import ImageList
from jepakit_training import ranks
from jepakit_training.cache import open_cache
from jepakit_training.checkpoint import Saver, load_newest, set_aside_newer
from jepakit_training.data import Batch, StepBatches, ViewDataset, iterating, make_loader, views_on
from jepakit_training.distributed import SharedFlag
from jepakit_training.evaluation import Measuring
from jepakit_training.learner import Learner
from jepakit_training.memory import freed_memory_kept, memory_errors
from jepakit_training.model import layout_of
from jepakit_training.plan import Plan, make_plan
from jepakit_training.precision import mixed_precision, own_precision
from jepakit_training.randomness import derive_seed
from jepakit_training.recorder import recording
from jepakit_training.records import SharedSkippedFiles, SkippedFiles
from jepakit_training.run_folder import FREE_SETTINGS, locked, open_folder, versions
from jepakit_training.stopping import stopping
from jepakit_training.trainable import can_checkpoint_activations, check_trainable
from jepakit_training.values import choose_preprocess, describe_values, look_at
from jepakit_training.views import ViewMaker


def adapt_here(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """`launch.adapt` in this process, alone or as the rank of several that the environment says."""
    first_rank = ranks.rank() == 0  # accelerate has not started yet
    run = Run(out)
    with locked(out, main=first_rank), warnings.catch_warnings(), freed_memory_kept(), own_precision():
        if first_rank:
            open_folder(out, config, images)
        if run.finished:
            print(f"{out} is finished already; to go on from it: --weights {out / BUNDLE} --out NEW", file=sys.stderr)
            return run
        warnings.filterwarnings("ignore", module=r"(torch|accelerate|timm|peft)\b")  # not the user's to act on
        _adapt(config, images, run)
    return run


def _adapt(config: AdaptConfig, images: ImageList, run: Run) -> None:
    setup = prepare(config, images, run)
    main, plan = setup.accelerator.is_main_process, setup.plan
    _check_start(config, setup, run)
    began = time.monotonic()
    before = setup.measuring.start(setup.backbone)
    measuring_s = time.monotonic() - began

    def write(path: Path, embedding: EmbeddingSpec, steps: int, comparison: Comparison | None, name: str) -> None:
        provenance = _provenance(config, images, steps=steps, batch_size=plan.batch_size)
        write_run_bundle(
            path, setup.backbone, setup.described, setup.spec, embedding, provenance, comparison, name=name
        )

    if main and not (run.path / START).exists():
        write(run.path / START, before.embedding, 0, None, f"{name_for(run.path)}-start")
    _train(config, setup, run, measuring_s)
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


def write_run_bundle(
    path: Path, backbone: nn.Module, described: Backbone, spec: Preprocess, embedding: EmbeddingSpec,
    provenance: Provenance, comparison: Comparison | None, *, name: str,
) -> None:  # fmt: skip
    """Write a bundle without a graph: the backbone's weights and everything needed to export them.

    Half-written files that a killed process left in the run's folder are removed: the folder is locked, so they are nobody's.
    """
    for stale in path.parent.glob(".tmp-*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    tensors = tensors_of(backbone)
    manifest = Manifest(
        name=name,
        model_id=compute_model_id(described, spec, embedding, {key: value.numpy() for key, value in tensors.items()}),
        backbone=described,
        preprocess=spec,
        embedding=embedding,
        provenance=provenance,
        comparison=comparison,
    )
    write_bundle(path, manifest, lambda folder: save_file(tensors, folder / WEIGHTS))


def _check_start(config: AdaptConfig, setup: Setup, run: Run) -> None:
    """ConfigError where a resumed run would go on from other weights than it began with: the verdict and `mix` compare with
    them."""
    if not (run.path / START).exists():
        return
    before, now = _start_weights(run), tensors_of(setup.backbone)
    if before.keys() != now.keys() or not all(torch.equal(now[name], value) for name, value in before.items()):
        raise ConfigError(
            f"{run.path} was started with other weights: weights = {config.weights} has changed since. Put it back, or name "
            "another --out"
        )


def _start_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights that a run began with; BundleError where they are damaged."""
    start = run.path / START
    try:
        data = open_bundle(start).read(WEIGHTS)
    except BundleError as error:
        raise BundleError(
            f"{run.path} cannot go on: {error}. Put {start} back as it was, or name another --out"
        ) from None
    weights: dict[str, torch.Tensor] = load(data)
    return weights


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


def prepare(config: AdaptConfig, images: ImageList, run: Run | None) -> Setup:
    """Look at the images, build the backbone, make the plan and print it; raises InputError where they do not go together.

    run  where images that cannot be read are listed; None: nowhere
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision),
        # A backbone may hold parameters that its pooled output does not depend on. Its buffers are the same on every
        # rank: frozen, or of statistics that are reduced over the ranks.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    main = accelerator.is_main_process
    _check_same_images(images, accelerator)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    found = look_at(images, config, progress=main)
    backbone, described = start_backbone(config.backbone, config.weights, config.image_size, found.kind.bands)
    check_trainable(backbone, config)
    plan = make_plan(
        config, images, backbone, accelerator.num_processes, bands=found.kind.bands, value_bytes=1 if found.is_8_bit else 4
    )  # fmt: skip
    spec = choose_preprocess(found, config, start_preprocess(backbone, config.weights, plan.image_size))
    for note in (images.note, *describe_values(found, spec, images.ids), *plan.notes) if main else ():
        print(note, file=sys.stderr)

    make_views = ViewMaker(config.resolved_views(), plan.image_size, plan.local_size, spec.scaling)
    cache = open_cache(config, make_views.least_side, spec)
    dataset = ViewDataset(images, plan.split.train, spec, make_views, config.seed, cache)
    listing = None if run is None else run.path / SKIPPED
    skipped = SkippedFiles(listing, len(images), most=config.most_skipped, main=main)
    for index, reason in found.unreadable:
        skipped.add(images.ids[index], reason)
    backbone = backbone.to(accelerator.device, memory_format=layout_of(backbone))  # type: ignore[call-overload]
    measuring = Measuring(
        config, images, plan.split, spec,
        device=accelerator.device, workers=plan.workers, skipped=skipped, progress=main,
    )  # fmt: skip
    return Setup(accelerator, backbone, described, spec, plan, dataset, skipped, measuring)


def _check_same_images(images: ImageList, accelerator: Accelerator) -> None:
    """DataError where ranks have different images: each draws the split from its own list, and one's training images may be
    the other's held-out ones."""
    if accelerator.num_processes == 1:
        return
    found = gather_object([(images.digest(), len(images))])
    if len(set(found)) > 1:
        counts = ", ".join(f"process {rank} finds {counted(count, 'image')}" for rank, (_, count) in enumerate(found))
        raise DataError(
            f"the images are not the same on all nodes ({counts}; names, labels or contents differ): put the same ones on each, "
            "or all on a file system that the nodes share, then run the same command again"
        )


def _train(config: AdaptConfig, setup: Setup, run: Run, measuring_s: float) -> None:
    """Train the backbone in place, from the newest checkpoint where there is one."""
    accelerator, plan = setup.accelerator, setup.plan
    learner = Learner(config, plan, setup.backbone, setup.spec, accelerator)
    first = _restore(run.path / CHECKPOINTS, learner, accelerator)
    saver = Saver(run.path / CHECKPOINTS, config.save_every_s, first, main=accelerator.is_main_process)
    skips = SharedSkippedFiles(setup.skipped, setup.dataset.images.ids, accelerator.num_processes)
    told_to_stop = SharedFlag()
    with (
        stopping(lambda: saver.newest) as stop,
        explaining_out_of_memory(config, plan, setup.backbone, accelerator),
        recording(config, plan, accelerator, run, first, extra_s=measuring_s) as recorder,
        iterating(step_loader(config, setup, range(first, plan.steps))) as loaded,
    ):
        batches = recorder.clock.waiting(loaded)
        for step, batch in zip(range(first, plan.steps), batches, strict=True):
            skips.note(batch.skipped)
            outcome = learner.step(step, views_on(accelerator.device, batch))

            logs = recorder.logs(step)
            if logs or accelerator.device.type == "cpu":  # a GPU would have to be waited for
                learner.check(step)
            leave = told_to_stop.any(stop.at_boundary())  # on all ranks after the same step
            recorder.record(step, outcome)
            saver.after_step(step + 1, learner.state_dict, must=leave or step + 1 == plan.steps)
            if logs or leave:
                skips.share()
            if leave:
                raise stop.leaving(step + 1)
        # A stop may have been asked for while the last checkpoint was written, and measuring can take minutes.
        if told_to_stop.any(stop.at_boundary()):
            raise stop.leaving(plan.steps)
    learner.finish()


def explaining_out_of_memory(
    config: AdaptConfig, plan: Plan, backbone: nn.Module, accelerator: Accelerator
) -> AbstractContextManager[None]:
    """Turns "out of memory" into an error that names what to change in this run."""
    whole = plan.norm_statistics == "trained"  # BatchNorms that train see a whole batch, once
    return memory_errors(
        micro_batch=1 if whole else plan.micro_batch or plan.batch_size // accelerator.num_processes,
        activation_checkpointing=whole or config.activation_checkpointing or not can_checkpoint_activations(backbone),
        image_size=plan.image_size, workers=plan.workers,
    )  # fmt: skip


def step_loader(config: AdaptConfig, setup: Setup, steps: range) -> DataLoader[Batch]:
    """This rank's batches for `steps`."""
    accelerator, plan = setup.accelerator, setup.plan
    batches = StepBatches(
        len(plan.split.train), plan.batch_size, config.seed, steps,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    on_gpu = accelerator.device.type == "cuda"
    on_device = on_gpu if config.augment_on == "auto" else config.augment_on == "device"
    return make_loader(
        setup.dataset, batches, plan.workers, prefetch=plan.prefetch, pin=on_gpu, finished=not on_device
    )  # fmt: skip


def _restore(folder: Path, learner: Learner, accelerator: Accelerator) -> int:
    """Load the newest whole checkpoint; returns the step to go on from, the same on every rank.

    Raises TrainingError where ranks find checkpoints of different steps, CheckpointError where one cannot be read.
    """
    found = load_newest(folder)
    step = 0 if found is None else found[0]
    _check_same_step(step, folder.parent, accelerator)  # all ranks have looked: what is damaged may go aside
    if accelerator.is_main_process:
        set_aside_newer(folder, step)
    if found is not None:
        learner.load_state_dict(found[1])
        if accelerator.is_main_process:
            print(f"going on from step {step}", file=sys.stderr)
    elif accelerator.is_main_process and (folder.parent / METRICS).exists():
        print("no checkpoint had been saved: beginning anew", file=sys.stderr)
    return step


def _check_same_step(step: int, run: Path, accelerator: Accelerator) -> None:
    """TrainingError where other ranks would go on from another step."""
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        found = ", ".join(f"process {rank} at step {each}" for rank, each in enumerate(steps))
        raise TrainingError(
            f"{run} is not the same folder on all nodes: by its checkpoints {found} would go on. Put it where all nodes find "
            "it under the same name, then run the same command again"
        )


def _provenance(config: AdaptConfig, images: ImageList, *, steps: int, batch_size: int) -> Provenance:
    settings = config.resolved().model_dump(mode="json", exclude_none=True, exclude={"images", "cache", *FREE_SETTINGS})
    for setting in ("weights", "labels", "group"):  # a bundle is for sharing: no path of this machine
        settings[setting] = Path(settings[setting]).name
    return Provenance(
        config=settings,
        steps=steps,
        images_seen=steps * batch_size,
        data_digest=images.digest(),
        versions=versions(),
    )

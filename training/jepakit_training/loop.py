"""`adapt_here`: measure, train, measure again, and say which embeddings to keep. Steps are `Learner.step`."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from jepakit._messages import lines_of
from jepakit._run_files import BUNDLE, CHECKPOINTS, ENVIRONMENT, METRICS, SKIPPED, START
from jepakit._say import say
from jepakit.bundles.bundle import name_for
from jepakit.config import AdaptConfig
from jepakit.errors import CheckpointError, TrainingError
from jepakit.run import Run
from jepakit.sources import ImageList
from jepakit_training import ranks
from jepakit_training.alone import own_process
from jepakit_training.data.batches import Batch, StepBatches, iterating, make_loader, views_on
from jepakit_training.learning.distributed import SharedFlag
from jepakit_training.learning.learner import Learner
from jepakit_training.learning.trainable import can_checkpoint_activations
from jepakit_training.memory import memory_errors
from jepakit_training.pictures.neighbours import write_neighbours
from jepakit_training.plan import Plan
from jepakit_training.run.bundles import check_measured, check_start, write_run_bundle
from jepakit_training.run.checkpoint import Saver, load_newest, set_aside_newer
from jepakit_training.run.folder import keep_settings, locked, open_folder
from jepakit_training.run.recorder import recording
from jepakit_training.run.records import SharedSkippedFiles, check_plan, write_plan
from jepakit_training.setup import Setup, prepare
from jepakit_training.stopping import stopping


def adapt_here(config: AdaptConfig, images: ImageList, out: Path) -> Run:
    """`launch.adapt` in this process, alone or as one of several ranks, as the environment says."""
    first_rank = ranks.rank() == 0  # accelerate has not started yet
    run = Run(out)
    with own_process(), locked(out, main=first_rank):
        if first_rank:
            open_folder(out, config, images)
        if run.finished:
            say(f"{out} is finished already; to go on from it: weights={out / BUNDLE}, out=NEW")
            return run
        _adapt(config, images, run)
    return run


def _adapt(config: AdaptConfig, images: ImageList, run: Run) -> None:
    setup = prepare(config, images, run)
    main, name = setup.accelerator.is_main_process, name_for(run.path) or "model"
    check_start(setup, run)
    check_plan(run.path, setup.plan, images)
    if main:
        keep_settings(run.path, config)
        write_plan(run.path, setup.plan, images, setup.accelerator.device)
    resumed = (run.path / START).exists()  # asked first: on a new run, rank 0 writes it while others still measure
    began = time.monotonic()
    before = setup.measuring.start(setup.backbone)
    measuring_s = time.monotonic() - began
    if main:
        say(f"embeddings of {before.embedding.dim} numbers (pooling {before.embedding.pooling})")
    if resumed:
        check_measured(before.embedding, run)
    elif main:
        write_run_bundle(run.path / START, setup, before.embedding, name=f"{name}-start", steps=0)
    _train(setup, run, measuring_s)
    if main and len(setup.skipped):
        say(f"{len(setup.skipped)} images could not be read and were left out: see {run.path / SKIPPED}")
    after = setup.measuring.end(setup.backbone, before)
    if main:
        comparison = setup.measuring.conclude(before, after)
        if run.collapsed:
            comparison = comparison.noting(
                "the projections collapsed, so the result gives all images nearly the same vector: raise lamb"
            )
        measured = setup.measuring.images
        write_neighbours(run.neighbours, images, measured, before.vectors, after.vectors, setup.spec)
        write_run_bundle(
            run.path / BUNDLE, setup, after.embedding, name=name, steps=setup.plan.steps, comparison=comparison
        )
    setup.accelerator.wait_for_everyone()


def _train(setup: Setup, run: Run, measuring_s: float) -> None:
    """Train the backbone in place, from the newest checkpoint if there is one."""
    config, accelerator, plan = setup.config, setup.accelerator, setup.plan
    learner = Learner(config, plan, setup.backbone, setup.spec, accelerator)
    with explaining_out_of_memory(config, plan, setup.backbone, accelerator):
        first = _restore(run.path / CHECKPOINTS, learner, accelerator)
    saver = Saver(run.path / CHECKPOINTS, config.save_every_s, first, main=accelerator.is_main_process)
    skips = SharedSkippedFiles(setup.skipped, setup.dataset.images.ids, accelerator.num_processes)
    told_to_stop = SharedFlag()
    with (
        stopping(lambda: saver.newest) as stop,
        explaining_out_of_memory(config, plan, setup.backbone, accelerator),
        recording(config, plan, accelerator, run, first, extra_s=measuring_s) as recorder,
        iterating(step_loader(setup, range(first, plan.steps))) as loaded,
    ):
        batches = recorder.clock.waiting(loaded)
        for step, batch in zip(range(first, plan.steps), batches, strict=True):
            skips.note(batch.skipped)
            outcome = learner.step(step, views_on(accelerator.device, batch))

            logs = recorder.logs(step)
            if logs or accelerator.device.type == "cpu":  # this would wait for a GPU
                learner.check(step)
            leave = told_to_stop.any(stop.at_boundary())  # on all ranks after the same step
            recorder.record(step, outcome)
            saver.after_step(step + 1, learner.state_dict, must=leave or step + 1 == plan.steps)
            if logs or leave:
                skips.share()
            if leave:
                raise stop.leaving(step + 1)
        # A stop may have been requested while the last checkpoint was written, and measuring can take minutes.
        if told_to_stop.any(stop.at_boundary()):
            raise stop.leaving(plan.steps)
    learner.finish()


def explaining_out_of_memory(
    config: AdaptConfig, plan: Plan, backbone: nn.Module, accelerator: Accelerator
) -> AbstractContextManager[None]:
    """Turns "out of memory" into an error that names what to change in this run."""
    whole = plan.norm_statistics == "trained"  # trained BatchNorms must see a whole batch, once
    return memory_errors(
        micro_batch=1 if whole else plan.micro_batch or plan.batch_size // accelerator.num_processes,
        activation_checkpointing=whole or config.activation_checkpointing or not can_checkpoint_activations(backbone),
        image_size=plan.image_size,
        workers=plan.workers,
    )


def step_loader(setup: Setup, steps: range) -> DataLoader[Batch]:
    """This rank's batches for `steps`."""
    config, accelerator, plan = setup.config, setup.accelerator, setup.plan
    batches = StepBatches(
        len(plan.split.train),
        plan.batch_size,
        config.seed,
        steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    on_gpu = accelerator.device.type == "cuda"
    on_device = on_gpu if config.augment_on == "auto" else config.augment_on == "device"
    return make_loader(setup.dataset, batches, plan.workers, prefetch=plan.prefetch, pin=on_gpu, finished=not on_device)


def _restore(folder: Path, learner: Learner, accelerator: Accelerator) -> int:
    """Load the newest intact checkpoint; returns the step to resume from, the same on every rank.

    Raises TrainingError if ranks find checkpoints of different steps, CheckpointError if one cannot be read.
    """
    found = load_newest(folder)
    step = 0 if found is None else found[0]
    _check_same_step(step, folder.parent, accelerator)  # all ranks have looked: damaged ones may be renamed
    if accelerator.is_main_process:
        set_aside_newer(folder, step)
    if found is not None:
        try:
            learner.load_state_dict(found[1])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} holds the state of another model than these versions of the libraries build ({lines_of(error)[0]}): install "
                f"those in {folder.parent / ENVIRONMENT} again, or remove the folder to start over"
            ) from error
        if accelerator.is_main_process:
            say(f"resuming from step {step}")
    elif accelerator.is_main_process and (folder.parent / METRICS).exists():
        say("no checkpoint had been saved: starting over")
    return step


def _check_same_step(step: int, run: Path, accelerator: Accelerator) -> None:
    """TrainingError if other ranks would resume from another step."""
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        found = ", ".join(f"process {rank} at step {each}" for rank, each in enumerate(steps))
        raise TrainingError(
            f"{run} is not the same folder on all nodes: by its checkpoints {found} would resume. Put it where all nodes find "
            "it under the same name, then run the same command again"
        )

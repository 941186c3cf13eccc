"""`prepare`: from settings and images to everything that a run needs before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object
from torch import nn

from jepakit._messages import counted
from jepakit._one_line import one_line
from jepakit._run_files import SKIPPED
from jepakit._say import say
from jepakit.backbones.backbone import start_backbone, start_preprocess
from jepakit.bundles.manifest import Backbone, Preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError
from jepakit.inference.runtime import has_nvidia_driver
from jepakit.run import Run
from jepakit.sources import ImageList
from jepakit_training.data.batches import ViewDataset
from jepakit_training.data.cache import open_cache
from jepakit_training.data.doubts import doubts, unseen_ends
from jepakit_training.data.values import choose_preprocess, describe_values, look_at
from jepakit_training.data.views import ViewMaker
from jepakit_training.learning.model import layout_of
from jepakit_training.learning.precision import mixed_precision
from jepakit_training.learning.trainable import check_trainable
from jepakit_training.measuring import Measuring
from jepakit_training.plan import Plan, make_plan
from jepakit_training.randomness import derive_seed
from jepakit_training.run.records import SkippedFiles, device_name

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass
class Setup:
    """Everything that a run needs before its first step."""

    config: AdaptConfig
    images: ImageList
    accelerator: Accelerator
    backbone: nn.Module
    described: Backbone
    spec: Preprocess
    plan: Plan
    dataset: ViewDataset
    skipped: SkippedFiles
    measuring: Measuring


def prepare(config: AdaptConfig, images: ImageList, run: Run | None) -> Setup:
    """Look at the images, build the backbone, make the plan and print it; raises InputError if they do not fit.

    run  where to list images that cannot be read; None: nowhere
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision),
        # A backbone may have parameters that its pooled output does not depend on. Its buffers are the same on every
        # rank: frozen, or statistics reduced over the ranks.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    _check_accelerate(accelerator)
    main = accelerator.is_main_process
    _check_same_images(images, accelerator)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    found = look_at(images, config, progress=main)
    listing = None if run is None else run.path / SKIPPED
    skipped = SkippedFiles(listing, len(images), most=config.most_skipped, main=main)
    skipped.add(*((images.ids[index], reason) for index, reason in found.unreadable))
    backbone, described = start_backbone(config.backbone, config.weights, config.image_size, found.kind.bands)
    check_trainable(backbone, config)
    plan = make_plan(
        config,
        images,
        backbone,
        accelerator.num_processes,
        bands=found.kind.bands,
        value_bytes=1 if found.is_8_bit else 4,
    )
    spec = choose_preprocess(found, config, start_preprocess(backbone, config.weights, plan.image_size))
    if main:
        notes = (
            images.note,
            f"starts from {described.start.source}, licence: {described.start.license}",
            _where(accelerator.device),
            *describe_values(found, spec, images.ids),
            *doubts(images, found),
            *unseen_ends(found, spec),
            *plan.notes,
        )
        for note in filter(None, notes):
            say(one_line(note))

    make_views = ViewMaker(config.resolved_views(), plan.image_size, plan.local_size, spec.scaling, resize=spec.resize)
    cache = open_cache(config, make_views.least_side, spec)
    dataset = ViewDataset(images, plan.split.train, spec, make_views, config.seed, cache)
    backbone = backbone.to(accelerator.device, memory_format=layout_of(backbone))  # type: ignore[call-overload]
    measuring = Measuring(
        config,
        images,
        plan.split,
        spec,
        caveats=plan.caveats,
        device=accelerator.device,
        workers=plan.workers,
        skipped=skipped,
        progress=main,
    )
    return Setup(config, images, accelerator, backbone, described, spec, plan, dataset, skipped, measuring)


def _check_accelerate(accelerator: Accelerator) -> None:
    """ConfigError where accelerate's own settings, often another project's, would shard the model or scale the losses."""
    if (kind := accelerator.distributed_type) not in _DISTRIBUTED:
        raise ConfigError(
            f"accelerate is configured for {kind.value}, but jepakit trains whole copies: give `accelerate launch` a configuration for "
            "several GPUs (--multi_gpu), or use torchrun"
        )
    if (count := accelerator.gradient_accumulation_steps) != 1:
        raise ConfigError(
            f"accelerate is configured to accumulate the gradients of {count} steps, which SIGReg does not allow: unset "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and set micro_batch=N to save memory"
        )


def _where(device: torch.device) -> str:
    """A note on the device that the run trains on; empty on a machine without a GPU."""
    if device.type == "cuda":
        return f"trains on {device_name(device)}"
    if torch.cuda.is_available():
        return "warning: trains on the CPU, as accelerate was told to here (ACCELERATE_USE_CPU, or Accelerator(cpu=True) in this process)"
    if has_nvidia_driver():
        return "warning: trains on the CPU, as torch cannot use this machine's GPU: see `jepakit doctor`"
    return ""


def _check_same_images(images: ImageList, accelerator: Accelerator) -> None:
    """DataError if ranks have different images: each draws the split from its own list, so one rank might train on
    images that another holds out."""
    if accelerator.num_processes == 1:
        return
    found = gather_object([(images.digest(), len(images))])
    if len(set(found)) > 1:
        counts = ", ".join(f"process {rank} finds {counted(count, 'image')}" for rank, (_, count) in enumerate(found))
        raise DataError(
            f"the images are not the same on all nodes ({counts}; names, labels or contents differ): put the same ones on each, "
            "or all on a file system that the nodes share, then run the same command again"
        )

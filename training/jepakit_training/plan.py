"""Every choice that the settings leave to the data and the backbone, made in one place and described in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from jepakit._machine import MORE_SHARED, SHARED, main_memory, usable_cpus
from jepakit._messages import counted
from jepakit.backbones.backbone import fitting_size, is_hierarchical, round_size, size_multiple
from jepakit.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_STEPS,
    LAMBDA_PER_VIEW,
    LAYER_DECAY,
    LOCAL_SHARE,
    LR_CONVNET,
    LR_SCRATCH,
    LR_VIT,
    MOST_LAMBDA,
    RAMP_STEPS,
    AdaptConfig,
    ViewsConfig,
)
from jepakit.errors import ConfigError
from jepakit.sources import ImageList
from jepakit_training import ranks
from jepakit_training.holdout import Split, hold_out
from jepakit_training.learning.batchnorm import batch_norms
from jepakit_training.learning.trainable import trained_share
from jepakit_training.loader_limits import can_share, shared_bytes
from jepakit_training.memory import GB

FEW_IMAGES = 64
_QUEUED_SHARE = 0.25


@dataclass(frozen=True)
class Plan:
    """What one run does. `notes` says what a user should know about it, `caveats` what makes its verdict optimistic."""

    steps: int
    batch_size: int
    warmup_steps: int
    lr: float
    lamb: float
    layer_decay: float
    norm_statistics: Literal["frozen", "trained"]
    micro_batch: int | None
    bands: int
    image_size: int
    local_size: int
    workers: int
    prefetch: int
    """Batches that each loader process prepares in advance."""
    batch_bytes: int
    """Size of the views in a process's share of a batch."""
    split: Split
    notes: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def queued_bytes(self) -> int:
        """The most main memory that prefetched batches take."""
        return self.workers * self.prefetch * self.batch_bytes

    def ramp(self, step: int, *, first: int = 0) -> float:
        """The factor on the projector's learning rate: up over 10 steps from step `first`, then a cosine to 0."""
        since = step - first
        return 0.0 if since < 0 else min(1.0, (since + 1) / RAMP_STEPS) * _cosine(step / self.steps)

    def backbone_ramp(self, step: int) -> float:
        """The factor on the backbone's learning rate: 0 while the projector warms up, then like the projector's."""
        return self.ramp(step, first=self.warmup_steps)


def make_plan(
    config: AdaptConfig, images: ImageList, backbone: Any, world: int, *, bands: int, value_bytes: int
) -> Plan:
    """Resolve `config` for these images and this backbone over `world` processes; InputError if they do not fit.

    bands, value_bytes  bands of the images' views, and bytes of each of their values
    """
    parts, caveats = hold_out(config, images)
    batch_size, batch_notes = _batch(config, len(images), len(parts.train), world)
    steps = _count_steps(config, len(parts.train), batch_size)
    views = config.resolved_views()
    image_size, local_size, size_notes = _sizes(config, views, backbone, bands)
    norm_statistics = _norm_statistics(config, backbone)
    if config.activation_checkpointing:
        _check_norms_frozen(config, norm_statistics, "activation_checkpointing", "would see each batch twice")
    pixels = views.n_global * image_size**2 + views.n_local * local_size**2
    batch_bytes = batch_size // world * pixels * bands * value_bytes
    workers, prefetch, loader_notes = _loader_processes(config, batch_bytes)
    from_random, trains = config.weights == "random", config.unfreeze != "none"
    lamb, lamb_notes = _lamb(config, views, batch_size)
    notes = [
        *(caveat.warning for caveat in caveats),
        *batch_notes,
        *lamb_notes,
        *size_notes,
        *loader_notes,
        f"{counted(len(parts.train), 'image')} train, {len(parts.held_out)} held out; {steps} steps of {batch_size} images, "
        f"{views.n_global} × {image_size} px + {views.n_local} × {local_size} px views",
    ]
    if not trains:
        notes.append("unfreeze = none: only the projector trains, and the start is what is exported")
    elif config.unfreeze != "lora":
        share = trained_share(backbone, config)
        notes.append(f"unfreeze = {config.unfreeze}: {share:.1%} of the weights of {config.backbone} train")
    return Plan(
        steps=steps,
        batch_size=batch_size,
        warmup_steps=0 if from_random or not trains else min(round(config.warmup * steps), steps - 1),
        lr=config.lr or (LR_SCRATCH if from_random else LR_CONVNET if is_hierarchical(backbone) else LR_VIT),
        layer_decay=config.layer_decay or (LAYER_DECAY if config.unfreeze == "all" and not from_random else 1.0),
        norm_statistics=norm_statistics,
        micro_batch=_micro_batch(config, batch_size, world, norm_statistics),
        bands=bands,
        lamb=lamb,
        image_size=image_size,
        local_size=local_size,
        workers=workers,
        prefetch=prefetch,
        batch_bytes=batch_bytes,
        split=parts,
        notes=tuple(notes),
        caveats=tuple(caveat.kept for caveat in caveats),
    )


def local_size_of(image_size: int, views: ViewsConfig, backbone: Any) -> int:
    """Pixels a side of local views, rounded to the backbone's patch or stride."""
    wanted = round(image_size * LOCAL_SHARE) if views.local_size is None else views.local_size
    return round_size(wanted, size_multiple(backbone))


def _batch(config: AdaptConfig, images: int, trained_on: int, world: int) -> tuple[int, list[str]]:
    """Images per batch over all processes, with notes; ConfigError if a process would get none."""
    batch_size, notes = min(config.batch_size, trained_on) // world * world, []
    if batch_size == 0:
        if trained_on < world:
            raise ConfigError(
                f"{counted(trained_on, 'image')} to train on for {world} processes is less than one each: use fewer processes"
            )
        raise ConfigError(
            f"batch_size = {config.batch_size} over {world} processes is less than one image per process: raise batch_size"
        )
    if batch_size < config.batch_size:
        reason = (
            f"there are only {trained_on} to train on"
            if trained_on < config.batch_size
            else f"it must be a multiple of the {world} processes"
        )
        notes.append(f"batch of {batch_size} images instead of {config.batch_size}: {reason}")
    if images < FEW_IMAGES:
        notes.append(f"warning: {images} images are very few to train and to measure on")
    return batch_size, notes


def _lamb(config: AdaptConfig, views: ViewsConfig, batch_size: int) -> tuple[float, list[str]]:
    """λ, with a note if it is raised for a small batch. SIGReg is the batch size times a distance that does not depend on it:
    with the same λ in a small batch, a collapse would gain more in prediction loss than it costs in SIGReg."""
    if config.lamb is not None:
        return config.lamb, []
    usual = LAMBDA_PER_VIEW * (views.n_global + views.n_local)
    if batch_size >= DEFAULT_BATCH_SIZE or usual >= MOST_LAMBDA:
        return usual, []
    lamb = min(MOST_LAMBDA, usual * DEFAULT_BATCH_SIZE / batch_size)
    return lamb, [
        f"lamb = {lamb:.3g} instead of {usual:g}: SIGReg weighs less in batches of fewer than {DEFAULT_BATCH_SIZE} images"
    ]


def _count_steps(config: AdaptConfig, trained_on: int, batch_size: int) -> int:
    """`steps` if set, else enough to see every image `epochs` times; by default once, but at least 300."""
    passes = math.ceil((config.epochs or 1) * trained_on / batch_size)
    return config.steps or (passes if config.epochs else max(DEFAULT_STEPS, passes))


def _sizes(config: AdaptConfig, views: ViewsConfig, backbone: Any, bands: int) -> tuple[int, int, list[str]]:
    """Pixels a side of global and of local views, with notes; ConfigError if the backbone does not take them."""
    image_size = fitting_size(backbone, config.image_size)
    notes = []
    if image_size != config.image_size:
        notes.append(
            f"image_size = {image_size} instead of {config.image_size}: {config.backbone} takes only multiples of {size_multiple(backbone)}"
        )
    if not _takes(backbone, bands, image_size):
        own = backbone.pretrained_cfg["input_size"][-1]
        raise ConfigError(f"image_size = {image_size}: {config.backbone} does not take this size; its own is {own}")
    local_size = local_size_of(image_size, views, backbone)
    if views.n_local and local_size >= image_size:
        raise ConfigError(
            f"local views of {local_size} px are not smaller than the image size {image_size}: raise image_size"
        )
    if views.n_local and not _takes(backbone, bands, local_size):
        notes.append(f"{config.backbone} takes images of one size only: local views are enlarged to {image_size} px")
        return image_size, image_size, notes
    return image_size, local_size, notes


def _norm_statistics(config: AdaptConfig, backbone: Any) -> Literal["frozen", "trained"]:
    """Whether BatchNorm learns the images' statistics; "frozen" if there is no BatchNorm."""
    chosen, trains, norms = config.norm_statistics, config.unfreeze != "none", batch_norms(backbone)
    if chosen == "trained" and not trains:
        raise ConfigError(
            "norm_statistics = trained changes a backbone that unfreeze = none leaves unchanged: leave one of them out"
        )
    if chosen == "auto" or not norms:
        return "trained" if config.weights == "random" and trains and norms else "frozen"
    return chosen


def _micro_batch(config: AdaptConfig, batch_size: int, world: int, norm_statistics: str) -> int | None:
    """Images in one backbone call of a process; None for its whole share of the batch."""
    micro_batch = None if (config.micro_batch or batch_size) >= batch_size // world else config.micro_batch
    if micro_batch:
        _check_norms_frozen(
            config, norm_statistics, f"micro_batch = {micro_batch}", "need the statistics of the whole batch"
        )
    return micro_batch


def _check_norms_frozen(config: AdaptConfig, norm_statistics: str, setting: str, why: str) -> None:
    """ConfigError for a setting with which trained BatchNorms would not see each batch whole and exactly once."""
    if norm_statistics == "trained":
        raise ConfigError(
            f"{setting}: the BatchNorms of {config.backbone} train, and {why}: leave it out, set norm_statistics = frozen, or "
            "use a backbone without BatchNorm"
        )


def _loader_processes(config: AdaptConfig, batch_bytes: int) -> tuple[int, int, list[str]]:
    """The number of loader processes, and of batches that each prefetches, with notes; ConfigError for more than can run.

    One per core of this process's share, minus one for the model; at most 8, or 16 if there is a GPU. Fewer if the
    prefetched batches would take over a quarter of this process's share of main memory, or its share of /dev/shm.
    """
    sharing = ranks.local_world_size()
    room = int(_QUEUED_SHARE * main_memory() / sharing / batch_bytes)
    shared = _room_in_shared(batch_bytes * sharing)
    workers, notes = config.workers, []
    if workers is None:
        most = 16 if torch.cuda.is_available() else 8
        wanted = max(0, min(most, usable_cpus() // sharing - 1, max(1, room)))
        workers = int(min(wanted, shared))
        if workers < wanted:
            notes.append(f"{counted(workers, 'loader process')} instead of {wanted}: {_little_shared(batch_bytes)}")
    if workers > shared:
        raise ConfigError(f"workers = {workers}: {_little_shared(batch_bytes)}, or take workers={int(shared)}")
    if workers > room:
        notes.append(
            f"warning: {counted(workers, 'loader process')} may prepare {workers * batch_bytes / GB:.1f} GB of "
            f"views in advance, but there are only {main_memory() / GB:.0f} GB of main memory: lower workers or image_size"
        )
    return workers, 2 if 2 * workers <= min(room, shared) else 1, notes


def _room_in_shared(batch_bytes: int) -> float:
    """How many batches fit in /dev/shm, beside the one that is trained on."""
    return max(0.0, shared_bytes() / batch_bytes - 1) if can_share() else 0.0


def _little_shared(batch_bytes: int) -> str:
    """Why there cannot be more loader processes, and what to do."""
    if not can_share():
        return f"{SHARED} cannot be written, and loader processes need it: mount it as a tmpfs"
    return (
        f"{SHARED} has {shared_bytes() / 1e6:,.1f} MB free, and each batch that they prepare takes {batch_bytes / 1e6:,.1f} MB "
        f"there: {MORE_SHARED}"
    )


def _takes(backbone: Any, bands: int, size: int) -> bool:
    """Whether the backbone takes images of `size` pixels a side."""
    device = next(backbone.parameters()).device
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, bands, size, size, device=device))
    except (AssertionError, RuntimeError):
        return False
    return True


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

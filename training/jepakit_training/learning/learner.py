"""One step of LeJEPA, and everything that a step changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jepakit.bundles.manifest import Preprocess
from jepakit.config import AdaptConfig
from jepakit.errors import TrainingError
from jepakit_training.data.views import Views
from jepakit_training.learning.averaging import Average, mix_with_start
from jepakit_training.learning.batchnorm import (
    RunningStatistics,
    batch_norms,
    freeze_norm_statistics,
    make_norm_statistics_global,
)
from jepakit_training.learning.model import Encoder, Projector, TwoPass, layout_of, split_views
from jepakit_training.learning.precision import cpu_has_bf16
from jepakit_training.learning.sigreg import directions, lejepa_loss
from jepakit_training.learning.trainable import (
    add_lora,
    checkpoint_activations,
    freeze,
    parameter_groups,
    switch_off_dropout,
)
from jepakit_training.learning.twin import twin_of
from jepakit_training.plan import Plan
from jepakit_training.randomness import derive_seed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

_MOST_BAD_STEPS = 3


class Outcome(NamedTuple):
    """Results of one step, float32 scalars on the training device. SIGReg and the norm are for the global batch, the
    other losses for this rank's share."""

    loss: Tensor
    prediction: Tensor
    sigreg: Tensor
    grad_norm: Tensor
    anchor: Tensor | None
    """1 - cosine to the start's features; None without an anchor."""
    projections: Tensor
    """[V, N, K] of this rank."""


class Learner:
    """The backbone in training with its projector and optimizer.

    backbone  on its device, with the start weights; trained in place
    """

    def __init__(
        self, config: AdaptConfig, plan: Plan, backbone: nn.Module, spec: Preprocess, accelerator: Accelerator
    ) -> None:
        self._config, self._plan, self._accelerator = config, plan, accelerator
        self._backbone = backbone
        self._bad_steps = self._most_bad_steps = torch.zeros((), device=accelerator.device)
        """How many steps in a row have had no finite gradient, now and at most so far."""
        # The order matters: each line depends on what the lines before did to the backbone.
        switch_off_dropout(backbone)
        self._start = _copied_to_cpu(backbone)
        n_features = self._count_features()
        self._anchor = self._frozen_start(spec) if config.anchor else None
        self._lora = self._choose_trained()
        self._trained = {name: value for name, value in backbone.named_parameters() if value.requires_grad}
        self._average = self._begin_average()
        encoder = self._make_encoder(spec)
        self._learning_norms = batch_norms(encoder) if plan.norm_statistics == "trained" else []
        self._statistics = RunningStatistics(self._learning_norms)
        # Keep both the raw and the wrapped objects. DistributedDataParallel refuses a module with nothing to train.
        self._raw_projector = _seeded_projector(n_features, config)
        self._raw_optimizer = self._make_optimizer()
        self.encoder = accelerator.prepare(encoder) if self._trained else encoder
        self.projector, self.optimizer = accelerator.prepare(self._raw_projector, self._raw_optimizer)
        self._two_pass = (
            None
            if plan.micro_batch is None
            else TwoPass(self.encoder, plan.micro_batch, lambda: accelerator.no_sync(self.encoder))
        )

    def step(self, step: int, views: Views) -> Outcome:
        """One optimizer step on this rank's views, [V, N, C, H, W] at each size.

        Nothing here waits for the GPU, so that it always has work queued.
        """
        config, plan, rank = self._config, self._plan, self._accelerator.process_index
        self._set_learning_rates(step)
        seed = derive_seed(config.seed, "step", step, rank)
        trains_backbone = bool(self._trained) and step >= plan.warmup_steps
        for norm in self._learning_norms:
            norm.train(trains_backbone)
        statistics = self._statistics.copied()

        with torch.set_grad_enabled(trains_backbone), self._accelerator.autocast():
            features_VNE = self._embed(views, seed)
        proj_VNK = self.projector(features_VNE)
        slices_KS = directions(
            config.projector[-1], config.n_slices, seed=config.seed, step=step, device=proj_VNK.device
        )
        loss, prediction, regulariser = lejepa_loss(proj_VNK, views.global_.shape[0], plan.lamb, slices_KS)
        anchor = None if self._anchor is None else self._distance_to_start(features_VNE, views)
        self._accelerator.backward(loss if anchor is None else loss + config.anchor * anchor)
        if self._two_pass is not None and trains_backbone:
            self._two_pass.backward()

        grad_norm = self._accelerator.clip_grad_norm_(
            [*self._trained.values(), *self._raw_projector.parameters()], config.clip_norm
        )
        # A single NaN would poison AdamW forever, so the step is skipped. The norm is the same on every rank.
        bad = (~torch.isfinite(grad_norm)).float()
        self._raw_optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch's GradScaler does
        self.optimizer.step()
        self._statistics.undo(statistics, bad)
        self._bad_steps = (self._bad_steps + 1) * bad
        self._most_bad_steps = torch.maximum(self._most_bad_steps, self._bad_steps)
        self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(step)
        return Outcome(
            loss.detach(),
            prediction.detach(),
            regulariser.detach(),
            grad_norm,
            None if anchor is None else anchor.detach(),
            proj_VNK.detach(),
        )

    def check(self, step: int) -> None:
        """Raise TrainingError if the gradient was not finite for several steps in a row, at any time up to `step`.

        Waits for the GPU.
        """
        if (bad := int(self._most_bad_steps)) >= _MOST_BAD_STEPS:
            raise TrainingError(
                f"the gradient was not finite {bad} times in a row, up to step {step}: lower lr (now {self._plan.lr:g}), "
                "then start a new run; the last checkpoint is intact"
            )

    def finish(self) -> None:
        """Set the backbone to its final weights: averaged, merged, mixed; TrainingError if none of them changed."""
        if self._average is not None:
            self._average.apply()
        if self._lora is not None:
            self._lora.merge_and_unload()
        if self._trained and not self._moved():
            raise TrainingError(
                "training left every trained weight as it was: no step was taken; raise steps above the warm-up"
            )
        if self._config.mix < 1:
            mix_with_start(self._backbone, self._start, self._config.mix)
        self._backbone.eval()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue exactly here; random numbers need no state."""
        state = {
            "backbone": self._backbone.state_dict(),
            "projector": self._raw_projector.state_dict(),
            "optimizer": self._raw_optimizer.state_dict(),
        }
        return state if self._average is None else {**state, "average": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; KeyError, ValueError or RuntimeError if it is that of another learner."""
        if strange := state.keys() ^ self.state_dict().keys():
            raise KeyError(*strange)
        self._backbone.load_state_dict(state["backbone"])
        self._raw_projector.load_state_dict(state["projector"])
        self._raw_optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    def _count_features(self) -> int:
        """Width of the backbone's output: not its `num_features` if timm has a layer after the pooling."""
        with torch.no_grad():
            return int(self._backbone.eval()(self._noise()).shape[1])

    def _choose_trained(self) -> LoraModel | None:
        """Freeze what does not train, and set up LoRA and activation checkpointing if asked for; returns the LoRA model."""
        config, backbone = self._config, self._backbone
        lora = None
        if config.unfreeze == "lora":
            lora = add_lora(backbone, config.lora_rank, config.seed)
        else:
            freeze(backbone, config.unfreeze, from_random=config.weights == "random")
        if config.activation_checkpointing:
            checkpoint_activations(backbone, config.backbone)
        return lora

    def _begin_average(self) -> Average | None:
        """The running average of the trained tensors, if asked for."""
        config, plan = self._config, self._plan
        if config.average == "none":
            return None
        moving = self._backbone.named_buffers() if plan.norm_statistics == "trained" else ()
        averaged = {**self._trained, **{name: value for name, value in moving if value.is_floating_point()}}
        return Average(averaged, config.average, steps=plan.steps, share=config.average_over)

    def _make_encoder(self, spec: Preprocess) -> Encoder:
        """The encoder to train: normalisation and backbone (or its twin), compiled if asked for."""
        encoder = Encoder(self._twin(), spec).to(self._accelerator.device).train()
        if self._plan.norm_statistics == "frozen":
            freeze_norm_statistics(encoder)
        elif self._accelerator.num_processes > 1:
            make_norm_statistics_global(encoder)
        if self._config.compile:
            encoder.compile(dynamic=False)
        return encoder

    def _make_optimizer(self) -> torch.optim.AdamW:
        config, plan = self._config, self._plan
        groups = parameter_groups(
            self._backbone,
            self._raw_projector,
            lr=plan.lr,
            projector_lr=config.projector_lr,
            weight_decay=config.weight_decay,
            layer_decay=plan.layer_decay,
        )
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def _embed(self, views: Views, seed: int) -> Tensor:
        if self._two_pass is not None:
            return self._two_pass.forward(views, seed)
        torch.manual_seed(seed)
        features: Tensor = self.encoder(views)
        return features

    def _distance_to_start(self, features_VNE: Tensor, views: Views) -> Tensor:
        """1 - cosine between the features of global views and those of the start, averaged."""
        assert self._anchor is not None
        if not features_VNE.requires_grad:  # while the projector warms up, the backbone is the start
            return features_VNE.new_zeros(())
        with torch.no_grad(), self._accelerator.autocast():
            globals_ = Views(views.global_, views.local[:0])
            parts = split_views(globals_, self._plan.micro_batch or views.global_.shape[1])
            start_VNE = torch.cat([self._anchor(part) for part in parts], dim=1)
        return 1 - cosine_similarity(features_VNE[: len(start_VNE)], start_VNE, dim=-1).mean()

    def _set_learning_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            ramp = self._plan.ramp(step) if group["role"] == "projector" else self._plan.backbone_ramp(step)
            group["lr"] = group["base_lr"] * ramp

    def _twin(self) -> nn.Module:
        """The module to train: the backbone, or a cheaper twin if a part of it is frozen (never for LoRA or trained BatchNorms)."""
        frozen_part = self._lora is None and self._plan.norm_statistics == "frozen"
        if not frozen_part or len(self._trained) == len(list(self._backbone.parameters())):
            return self._backbone
        in_bf16 = self._config.precision == "auto" and self._accelerator.device.type == "cpu" and cpu_has_bf16()
        return twin_of(self._backbone, self._noise(), bf16=in_bf16)

    def _frozen_start(self, spec: Preprocess) -> Encoder:
        start = copy.deepcopy(self._backbone).requires_grad_(False)
        return Encoder(twin_of(start, self._noise(), bf16=False), spec).to(self._accelerator.device).eval()

    def _noise(self) -> Tensor:
        size = self._plan.image_size
        noise = torch.randn(2, self._plan.bands, size, size, generator=torch.Generator().manual_seed(0))
        return noise.to(self._accelerator.device, memory_format=layout_of(self._backbone))

    def _moved(self) -> bool:
        """Whether any weight or statistic differs from the start: some published runs saved the untouched start."""
        now = self._backbone.state_dict()
        return any(not torch.equal(now[name].cpu(), value) for name, value in self._start.items())


def _copied_to_cpu(backbone: nn.Module) -> dict[str, Tensor]:
    """A copy of the backbone's weights and statistics."""
    state = backbone.state_dict()
    return {name: value.to("cpu", copy=True) for name, value in state.items() if value.is_floating_point()}


def _seeded_projector(n_features: int, config: AdaptConfig) -> Projector:
    """A projector whose weights depend only on the seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "projector"))
        return Projector(n_features, config.projector)

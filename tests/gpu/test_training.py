"""Training on a GPU: the same numbers as on a CPU, in the requested precision, and resumed as reliably."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jepakit
from jepakit._run_files import CHECKPOINTS, START
from jepakit.backbones.backbone import start_backbone
from jepakit.config import AdaptConfig, Domain
from jepakit.errors import ConfigError, TrainingError
from jepakit.run import Run
from jepakit_training import loop
from jepakit_training.data import photometric
from jepakit_training.data.batches import Batch, views_on
from jepakit_training.data.views import Views
from jepakit_training.learning.batchnorm import batch_norms
from jepakit_training.learning.learner import Learner
from jepakit_training.learning.precision import own_precision
from jepakit_training.learning.sigreg import directions, sigreg
from jepakit_training.learning.twin import twin_of
from tests.training.runs import TINY, Adapt, adapting, stopping_in_step, weights_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS = 12
SHORT: dict[str, Any] = {"steps": STEPS, "warmup": 4 / STEPS}


@pytest.fixture(scope="module")
def images(image_folder: Callable[..., Path]) -> Path:
    return image_folder()


@pytest.fixture(scope="module")
def adapt(images: Path, weights_file: Callable[[str], Path]) -> Adapt:
    return adapting(images, weights_file, **SHORT)


@pytest.fixture(scope="module")
def adapt_on_cpu(images: Path, weights_file: Callable[[str], Path]) -> Adapt:
    """The same `adapt` in a process that sees no GPU."""

    def call(out: Path, backbone: str = "test_vit", **settings: Any) -> Run:
        told = {**TINY, **SHORT, **settings, "images": str(images), "out": str(out), "backbone": backbone}
        told["weights"] = str(weights_file(backbone))
        work = "import json, sys, jepakit; jepakit.adapt(**json.loads(sys.argv[1]))"
        subprocess.run(
            [sys.executable, "-c", work, json.dumps(told)], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
        return jepakit.open_run(out)

    return call


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())


# The last one is several blocks on a GPU too.
@pytest.mark.parametrize("shape", [(8, 64, 64, 256), (8, 512, 512, 1024), (2, 4096, 32, 4096)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3)])
def test_sigreg_has_the_cpus_loss_and_gradient(shape: tuple[int, int, int, int], scale: float, shift: float) -> None:
    views, count, outputs, slices = shape
    random = torch.Generator().manual_seed(0)
    proj_VNK = scale * torch.randn(views, count, outputs, generator=random) + shift
    slices_KS = directions(outputs, slices, seed=0, step=0, device=torch.device("cpu"))
    found = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        own = proj_VNK.to(device, dtype).requires_grad_()
        loss = sigreg(own, slices_KS.to(device, dtype))
        found.append((loss.item(), torch.autograd.grad(loss, own)[0]))
    (loss_gpu, grad_gpu), (loss_cpu, grad_cpu) = found
    assert loss_gpu == pytest.approx(loss_cpu, rel=1e-5)
    assert distance(grad_gpu, grad_cpu) < 5e-6


def test_sigreg_takes_little_memory() -> None:
    """Autograd of the same formula would take 6.8 GB."""
    proj_VNK = torch.randn(8, 512, 64, device="cuda", requires_grad=True)
    slices_KS = directions(64, 4096, seed=0, step=0, device=proj_VNK.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sigreg(proj_VNK, slices_KS).backward()  # type: ignore[no-untyped-call]
    assert torch.cuda.max_memory_allocated() - before < 0.6e9


@pytest.mark.parametrize("domain", ["natural", "histology", "radiology", "multispectral"])
def test_views_are_changed_as_on_the_cpu(domain: Domain) -> None:
    bands = {"radiology": 1, "multispectral": 6}.get(domain, 3)
    recipe = AdaptConfig(images="x", domain=domain).resolved_views()
    changes = photometric.draw(recipe, np.random.default_rng(0), 200, bands, 96)
    views = torch.randint(0, 256, (200, bands, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cpu, gpu = photometric.apply(views, changes), photometric.apply(views.cuda(), changes).cpu()
    apart = (cpu.int() - gpu.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.01
    floats = views / 255
    cpu, gpu = photometric.apply(floats, changes), photometric.apply(floats.cuda(), changes).cpu()
    # A place in a rotated view is known to 1e-5 of a pixel, and noise may change by all of its range in one.
    assert (cpu - gpu).abs().max() < (1e-4 if domain == "radiology" else 2e-6)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_float32_takes_the_cpus_steps(adapt: Adapt, adapt_on_cpu: Adapt, tmp_path: Path, backbone: str) -> None:
    gpu = adapt(tmp_path / "gpu", backbone, precision="fp32")
    cpu = adapt_on_cpu(tmp_path / "cpu", backbone, precision="fp32")
    assert gpu.metrics()[-1]["loss"] == pytest.approx(cpu.metrics()[-1]["loss"], rel=1e-3)
    start, ended, on_cpu = weights_of(gpu, START), weights_of(gpu), weights_of(cpu)
    way = {name: on_cpu[name] - start[name] for name in start if not torch.equal(on_cpu[name], start[name])}
    assert len(way) >= 2
    moved = torch.cat([value.flatten() for value in way.values()])
    apart = torch.cat([(ended[name] - on_cpu[name]).flatten() for name in way])
    assert apart.norm() < 0.1 * moved.norm()


def test_the_start_is_measured_in_float32(adapt: Adapt, adapt_on_cpu: Adapt, tmp_path: Path) -> None:
    """TF32 convolutions would be off by a thousandth, and the service does not use TF32."""
    told = {"backbone": "mobilenetv2_100", "steps": 2, "warmup": 0.0, "pooling": "head"}
    gpu = adapt(tmp_path / "gpu", **told)
    cpu = adapt_on_cpu(tmp_path / "cpu", **told)
    centres = [torch.tensor(jepakit.open_bundle(run.path / START).manifest.embedding.center) for run in (gpu, cpu)]
    assert distance(*centres) < 1e-5


def test_frozen_batch_norms_are_folded(mobilenet_weights: Path) -> None:
    backbone, _ = start_backbone("mobilenetv2_100", str(mobilenet_weights), 96, 3)
    backbone = backbone.requires_grad_(False).cuda()
    with own_precision():
        twin = twin_of(backbone, torch.randn(2, 3, 96, 96, device="cuda"), bf16=False)
    assert len(list(batch_norms(backbone))) > 50
    assert not list(batch_norms(twin))


def test_by_itself_it_trains_in_bfloat16(adapt: Adapt, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            seen.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        run = adapt(tmp_path / "auto")
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}
    whole = adapt(tmp_path / "fp32", precision="fp32")
    assert run.metrics()[-1]["loss"] == pytest.approx(whole.metrics()[-1]["loss"], rel=0.05)
    assert {value.dtype for value in weights_of(run).values() if value.is_floating_point()} == {torch.float32}
    bundle = jepakit.export(run, tmp_path / "bundle")
    assert bundle.manifest.graph is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"unfreeze": "all"}, {"unfreeze": "lora"}, {"anchor": 1.0}, {"average": "swa"}, {"micro_batch": 4},
        {"activation_checkpointing": True}, {"compile": True}, {"augment_on": "cpu"}, {"mix": 0.5}, {"workers": 2},
        {"backbone": "test_resnet", "norm_statistics": "trained"}, {"backbone": "test_resnet", "unfreeze": "lora"},
    ],
    ids=lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()),
)  # fmt: skip
def test_every_way_to_train_runs(adapt: Adapt, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = adapt(tmp_path / "run", **settings)
    before, after = weights_of(run, START), weights_of(run)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(np.isfinite(row["loss"]) for row in run.metrics())


@pytest.mark.parametrize("settings", [{}, {"anchor": 1.0}, {"average": "ema"}, {"backbone": "test_resnet"}], ids=str)
def test_no_step_waits_for_the_gpu(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """The GPU would be idle meanwhile. The first step of each kind may wait: that is when cuDNN and cuBLAS start."""
    real, done = Learner.step, list[int]()

    def watched(self: Learner, step: int, views: Views) -> Any:
        torch.cuda.set_sync_debug_mode("error" if step not in (0, 4) else "default")
        try:
            outcome = real(self, step, views)
            views_on(torch.device("cuda"), held[-1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        done.append(step)
        return outcome

    def holding(device: torch.device, batch: Batch) -> Views:
        held.append(batch)
        return views_on(device, batch)

    held = list[Batch]()
    monkeypatch.setattr(Learner, "step", watched)
    monkeypatch.setattr(loop, "views_on", holding)
    adapt(tmp_path / "run", domain="natural", **settings)
    assert done == list(range(STEPS))


def test_micro_batches_take_the_same_steps(adapt: Adapt, tmp_path: Path) -> None:
    whole = adapt(tmp_path / "whole", precision="fp32")
    parts = adapt(tmp_path / "parts", precision="fp32", micro_batch=2)
    assert parts.metrics()[-1]["loss"] == pytest.approx(whole.metrics()[-1]["loss"], rel=1e-4)


def test_sixteen_bits_of_six_bands_train(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    random = np.random.default_rng(0)
    scenes = [random.integers(0, 4000, (80, 72, 6), np.uint16) for _ in range(28)]
    run = jepakit.adapt(
        scenes, out=tmp_path / "run", backbone="test_vit", weights=str(weights_file("test_vit")), domain="multispectral",
        **TINY, **SHORT,
    )  # fmt: skip
    assert run.finished
    assert jepakit.export(run, tmp_path / "bundle").manifest.preprocess.dtype == "float32"


def stopped_and_resumed(adapt: Adapt, out: Path, monkeypatch: pytest.MonkeyPatch, *told: Any, **settings: Any) -> Run:
    with stopping_in_step(7, monkeypatch), pytest.raises(SystemExit):
        adapt(out, *told, **settings)
    assert list((out / CHECKPOINTS).iterdir())
    return adapt(out, *told, **settings)


# At 224 pixels attention is over more than one block of keys, whose gradients meet in a sum.
@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("test_vit", {}), ("test_resnet", {}), ("test_resnet", {"unfreeze": "all"}),
        ("vit_tiny_patch16_224", {"image_size": 224}),
    ],
    ids=str,
)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_weights(
    adapt: Adapt, tmp_path: Path, backbone: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights_of(adapt(tmp_path / "whole", backbone, **settings))
    resumed = weights_of(stopped_and_resumed(adapt, tmp_path / "stopped", monkeypatch, backbone, **settings))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_trained_position_embeddings_go_on_to_what_any_run_may_end_with(
    adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of their resampling to local views is summed in no fixed order on a GPU: runs may differ in bits.

    AdamW amplifies that where a gradient is nearly zero, so all weights are judged together, by how far they moved.
    """
    settings = {"image_size": 224, "unfreeze": "all"}
    name = "vit_tiny_patch16_224"
    whole = adapt(tmp_path / "whole", name, **settings)
    resumed = weights_of(stopped_and_resumed(adapt, tmp_path / "stopped", monkeypatch, name, **settings))
    start, ended = weights_of(whole, START), weights_of(whole)
    way = torch.cat([(ended[key] - start[key]).flatten() for key in start])
    apart = torch.cat([(resumed[key] - ended[key]).flatten() for key in start])
    print(f"{(apart.norm() / way.norm()).item():.1e} of the way")
    assert apart.norm() < 0.01 * way.norm()


def test_out_of_memory_says_what_to_change(
    image_folder: Callable[..., Path], weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, weights = image_folder(per_class=80), weights_file("vit_tiny_patch16_224")
    torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(TrainingError, match=r"out of the GPU's memory \(asked for .*micro_batch=64"):
            jepakit.adapt(
                folder, out=tmp_path / "run", backbone="vit_tiny_patch16_224", weights=str(weights), steps=4, warmup=0.0,
                unfreeze="all",
            )  # fmt: skip
        run = jepakit.adapt(
            folder, out=tmp_path / "run", backbone="vit_tiny_patch16_224", weights=str(weights), steps=4, warmup=0.0,
            unfreeze="all", micro_batch=8,
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.finished


def test_a_dry_run_tells_the_gpus_memory(
    images: Path, weights_file: Callable[[str], Path], adapt: Adapt, tmp_path: Path
) -> None:
    torch.cuda.reset_peak_memory_stats()
    told = jepakit.dry_run(images, backbone="test_vit", weights=str(weights_file("test_vit")), **TINY, **SHORT)
    assert told.device == "cuda"
    assert told.total_memory_gb == pytest.approx(torch.cuda.get_device_properties(0).total_memory / 1e9)
    torch.cuda.reset_peak_memory_stats()
    run = adapt(tmp_path / "run")
    assert told.peak_memory_gb == pytest.approx(run.metrics()[-1]["peak_memory_gb"], rel=0.2, abs=0.002)


def test_more_processes_than_gpus_are_refused(adapt: Adapt, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start at most one process per GPU"):
        adapt(tmp_path / "run", processes=torch.cuda.device_count() + 1)

"""What the trainer costs beside the model: against the plainest loop of the same steps, and against lightly-train.

    python benchmarks/trainer.py [--quick] [--rounds N] [--lightly-env DIR]

The product's own loop, with all that is on by default in it, and a loop written by hand for the same model, loss,
optimizer and batches; each from JPEG files and with its views in memory. Both train the same weights: the table says
how far their losses are apart. Both keep freed memory (`freed_memory_kept`); what that gains stands in a row of its own. Every loop is a process of its own on one thread and is held up between blocks of 5
steps, which are taken in turns and in random order; short ones, so that a machine's slow minutes hit all alike. Seconds
are CPU time, and an A/A control tells how far a ratio of 1 strays. For a GPU: gpu_trainer.py. `adapt` is also run once in full, to see what measuring, logging and checkpoints take of it. lightly-train
(AGPL) runs in an environment of its own, made in DIR or, without it, in a temporary folder. Prints tables, and one JSON
object as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from safetensors.torch import save_file

import jepakit
from _blocks import Ratio, at_least, measure, overhead_at_most, ratio
from _processes import EndedError, Script
from _trainer_worker import ON_GPU, now
from jepakit_training import loop
from jepakit_training.learning.learner import Learner
from jepakit_training.measuring import Measuring
from jepakit_training.run import checkpoint
from views import LightlyMissingError, lightly_python, make_images

STEPS, BATCH, QUICK_BATCH, DISTINCT = 5, 32, 8, 32
ROUNDS, QUICK_ROUNDS = 31, 3
"""Odd, so that with the uncounted round the last step is a tenth one, after which the product logs its loss."""
FILES, MEMORY = "files", "memory"
AGAIN = " (again)"
PRODUCT, BARE, RETURNING = "jepakit", "by hand", "by hand, memory handed back"
PRODUCT_MEMORY, BARE_MEMORY = "jepakit, views in memory", "by hand, views in memory"
PRODUCT_AUTO = "jepakit, precision = auto"
MIDDLE_LIMIT, UPPER_LIMIT = 1.03, 1.05
"""How many times as long as the hand-written loop jepakit may take: the median, and the interval's upper end."""
REST_LIMIT, DEFAULT_STEPS = 0.05, 300

# Name, timm's name, settings. The first two have no frozen BatchNorm to fold, which would favour the product.
VIT, CONVNET, FOLDED = "ViT-Ti/16, last 2 blocks", "ResNet-10-T, all of it", "MobileNetV2, last level"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    VIT: ("vit_tiny_patch16_224", {"image_size": 64}),
    CONVNET: ("resnet10t", {"image_size": 64, "weights": "random"}),
    FOLDED: ("mobilenetv2_100", {"image_size": 96}),
}
PEERS: dict[str, dict[str, Any]] = {
    "simclr": {
        "model": "timm/vit_tiny_patch16_224", "ours": "vit_tiny_patch16_224", "batch": 32, "size": 64, "goal": 1.0,
        "views": {"n_global": 2, "n_local": 0}, "transform_args": {},
    },
    "dinov2": {
        "model": "dinov2/vits14-noreg", "ours": "vit_small_patch14_dinov2", "batch": 16, "size": 56, "goal": 1.15,
        "views": {"n_global": 2, "n_local": 4, "local_size": 28},
        "transform_args": {"local_view": {"num_views": 4, "view_size": [28, 28]}},
    },
}  # fmt: skip
"""lightly-train's methods with its settings, and ours with as many views and pixels; all weights train."""


class Loop:
    """A training loop in its own process; calling it does one block and returns its seconds."""

    def __init__(self, name: str, worker: Script, log: Path) -> None:
        self._name, self._worker, self._log = name, worker, log
        self.answers: list[dict[str, float]] = []

    def wait(self) -> None:
        """Wait until it has started; once, before the first block, so that loops start in parallel."""
        self._told(self._worker.answer)

    def __call__(self) -> float:
        self.answers.append(self._told(self._worker.asked))
        return self.answers[-1]["seconds"]

    def _told(self, answer: Callable[[], Any]) -> Any:
        try:
            return answer()
        except EndedError:
            raise EndedError(f"{self._name} ended early:\n{self._log.read_text()[-2000:]}") from None

    @property
    def peak_gb(self) -> float:
        return self.answers[-1]["peak_gb"]


@contextmanager
def started(name: str, command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> Iterator[Loop]:
    log = folder / "log.txt"
    own = environment | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as errors, Script(command, stderr=errors, env=own, cwd=folder) as worker:
        yield Loop(name, worker, log)


def ours(name: str, settings: dict[str, Any], folder: Path) -> contextlib.AbstractContextManager[Loop]:
    """The loop called `name`, with `settings` of `adapt`."""
    folder.mkdir(parents=True)
    kind = "returning" if name == RETURNING else "bare" if name.startswith(BARE) else "product"
    source = MEMORY if name.endswith("in memory") else FILES
    if "auto" in name:
        settings = settings | {"precision": "auto"}
    worker = Path(__file__).with_name("_trainer_worker.py")
    command: list[str | Path] = [sys.executable, worker, kind, source, str(STEPS), folder / "run", json.dumps(settings)]
    return started(name, command, folder, dict(os.environ))


def lightly(
    method: str, peer: dict[str, Any], images: Path, env: Path, folder: Path
) -> contextlib.AbstractContextManager[Loop]:
    """lightly-train's `method`, without the checkpoints at the end of its epochs."""
    folder.mkdir(parents=True)
    where = (
        {"accelerator": "gpu", "precision": "bf16-mixed"} if ON_GPU else {"accelerator": "cpu", "precision": "32-true"}
    )
    settings = {
        "out": str(folder / "out"),
        "model": peer["model"],
        "method": method,
        "batch_size": peer["batch"],
        "num_workers": peer.get("workers", 0),
        "epochs": 1000,
        "devices": 1,
        **where,
        "transform_args": {"image_size": [peer["size"]] * 2, **peer["transform_args"]},
        "callbacks": {"model_checkpoint": None, "model_export": None},
    }
    worker = Path(__file__).with_name("_lightly_worker.py")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return started(
        f"lightly-train's {method}",
        [lightly_python(env), worker, images, str(STEPS), json.dumps(settings)],
        folder,
        own | {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"},
    )


def settings_of(backbone: str, images: Path, folder: Path, rounds: int, **more: Any) -> dict[str, Any]:
    """Settings of `adapt`: the defaults except for what makes the loops comparable; every step trains the backbone."""
    settings: dict[str, Any] = {
        "images": str(images),
        "labels": "none",
        "backbone": backbone,
        "warmup": 0.0,
        "steps": STEPS * (rounds + 2),
        "workers": 0,
        "save_every_s": 1e9,
        "precision": "auto" if ON_GPU else "fp32",
        **more,
    }
    return settings if "weights" in more else settings | {"weights": weights_of(backbone, folder)}


def weights_of(backbone: str, folder: Path) -> str:
    """Random weights in a file, which are trained like pretrained ones."""
    path = folder / f"{backbone}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = timm.create_model(backbone)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def many(paths: list[Path], folder: Path, count: int, classes: int = 1) -> Path:
    """`count` files under other names, in `classes` folders."""
    for number in range(count):
        target = folder / f"class-{number % classes}" / f"{number:05}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(paths[number % len(paths)], target)
    return folder


def measured(loops: dict[str, Loop], batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per image, peak memory and losses of each loop, and the seconds behind them."""
    for each in loops.values():
        each.wait()
    seconds = measure(loops, rounds=rounds)
    return {
        "seconds": seconds,
        "ms_per_image": {name: 1000 * float(np.median(taken)) / (STEPS * batch) for name, taken in seconds.items()},
        "peak_gb": {name: loop.peak_gb for name, loop in loops.items()},
        "loss": {name: loop.answers[-1]["loss"] for name, loop in loops.items()},
        "gflop_per_step": max(loop.answers[0]["flops"] for loop in loops.values()) / 1e9,
    }


def overhead(name: str, images: Path, folder: Path, rounds: int, batch: int) -> dict[str, Any]:
    """One model: the product's loop and the hand-written one."""
    backbone, more = MODELS[name]
    cases = [PRODUCT, BARE, BARE + AGAIN, RETURNING]
    cases += [PRODUCT_AUTO] if name == FOLDED else [PRODUCT_MEMORY, BARE_MEMORY]
    with ExitStack() as stack:
        settings = settings_of(backbone, images, folder.parent, rounds, batch_size=batch, **more)
        loops = {
            case: stack.enter_context(ours(case, settings, folder / str(place))) for place, case in enumerate(cases)
        }
        found = measured(loops, batch, rounds) | {"batch": batch}
    seconds = found.pop("seconds")
    pairs = [(BARE + AGAIN, BARE), (PRODUCT, BARE), (RETURNING, BARE)]
    pairs += [(PRODUCT_AUTO, BARE)] if name == FOLDED else [(PRODUCT_MEMORY, BARE_MEMORY)]
    found["ratios"] = {f"{slow} / {fast}": ratio(seconds[slow], seconds[fast])._asdict() for slow, fast in pairs}
    if name != FOLDED:
        ms = found["ms_per_image"]
        found["loader_share"] = 1 - ms[BARE_MEMORY] / ms[BARE]
        found["share_of_peak"] = found["gflop_per_step"] / (ms[PRODUCT_MEMORY] * batch / 1000) / peak_gflops()
    return found


def peak_gflops(size: int = 2048, times: int = 8) -> float:
    """This device's fastest matrix product, in the model's precision: bfloat16 on a GPU, float32 on a CPU."""
    dtype, device = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")
    size, times = (8192, 50) if ON_GPU else (size, times)
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = now()
        for _ in range(times):
            left @ right
        best = min(best, now() - start)
    return times * 2 * size**3 / best / 1e9


def against_lightly(
    method: str, peer: dict[str, Any], images: Path, env: Path, folder: Path, rounds: int
) -> dict[str, Any]:
    """The product, training every weight, next to lightly-train's method with as many views of as many pixels."""
    settings = settings_of(
        peer["ours"],
        images,
        folder,
        rounds,
        weights="random",
        batch_size=peer["batch"],
        image_size=peer["size"],
        views=peer["views"],
        workers=peer.get("workers", 0),
    )
    theirs = f"lightly-train {method}"
    with (
        ours(PRODUCT, settings, folder / "ours") as product,
        ours(PRODUCT, settings, folder / "again") as again,
        lightly(method, peer, images, env, folder / "theirs") as other,
    ):
        found = measured({PRODUCT: product, PRODUCT + AGAIN: again, theirs: other}, peer["batch"], rounds)
    seconds = found.pop("seconds")
    pairs = [(PRODUCT + AGAIN, PRODUCT), (theirs, PRODUCT)]
    found["ratios"] = {f"{slow} / {fast}": ratio(seconds[slow], seconds[fast])._asdict() for slow, fast in pairs}
    found["images_per_s"] = {name: 1000 / ms for name, ms in found["ms_per_image"].items()}
    return found


class Account:
    """Adds up the CPU seconds of wrapped functions, by purpose."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def charging(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def charged(*args: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        return charged

    def patched(self, owner: Any, function: str, name: str) -> Any:
        return patch.object(owner, function, self.charging(name, getattr(owner, function)))


def whole_run(images: Path, folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """A complete `adapt`; what it spends beyond loading and steps, once and for every step."""
    account = Account()
    real_loader = loop.step_loader

    def step_loader(*args: Any) -> Iterator[Any]:
        batches = iter(real_loader(*args))
        for _ in range(steps):
            yield account.charging("loader", next)(batches)

    settings = settings_of(
        MODELS[VIT][0],
        images,
        folder,
        0,
        **MODELS[VIT][1],
        labels="folder",
        batch_size=batch,
        steps=steps,
        warmup=0.1,
        save_every_s=300.0,
        weights=weights_of(MODELS[VIT][0], folder),
    )
    with ExitStack() as stack, contextlib.redirect_stderr(io.StringIO()):
        for owner, function, name in (
            (loop, "_train", "training"),
            (Learner, "__init__", "setting up"),
            (Learner, "step", "steps"),
            (checkpoint, "save", "checkpoint"),
            (loop, "write_run_bundle", "bundles"),
            (Measuring, "start", "measuring"),
            (Measuring, "end", "measuring"),
            (Measuring, "conclude", "measuring"),
        ):
            stack.enter_context(account.patched(owner, function, name))
        stack.enter_context(patch.object(loop, "step_loader", step_loader))
        start = time.process_time()
        run = jepakit.adapt(**settings, out=folder / "run")
        total = time.process_time() - start
    spent = account.seconds
    comparison = run.comparison
    assert run.finished
    log = spent["training"] - sum(spent[name] for name in ("setting up", "steps", "loader", "checkpoint"))
    training = (spent["steps"] + spent["loader"]) * DEFAULT_STEPS / steps
    expected = {
        "steps and their loader": training,
        "measuring, twice": spent["measuring"],
        "logging and the rest of the loop": log * DEFAULT_STEPS / steps,
        "checkpoints": spent["checkpoint"] * (1 + int(training // 300)),
        "bundles": spent["bundles"],
        "set-up": total - spent["training"] - spent["measuring"] - spent["bundles"] + spent["setting up"],
    }
    rest = sum(seconds for name, seconds in expected.items() if name not in ("steps and their loader", "set-up"))
    return {
        "steps_run": steps,
        "batch": batch,
        "images_measured": comparison.n_train + comparison.n_held_out,
        "seconds_of_default_run": expected,
        "rest_share": rest / sum(expected.values()),
    }


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    print(f"{'':<36}{'ms an image' if ON_GPU else 'CPU ms an image':>16}{'peak GB':>9}{'loss':>11}")
    for name, ms in found["ms_per_image"].items():
        loss = f"{found['loss'][name]:.5f}" if found["loss"][name] else "-"
        print(f"{name:<36}{ms:>16.3f}{found['peak_gb'][name]:>9.2f}{loss:>11}")
    for name, times in found["ratios"].items():
        print(f"{name:<66}{times['median']:.3f} [{times['low']:.3f}, {times['high']:.3f}]")


def show_overhead(name: str, found: dict[str, Any]) -> None:
    """Print one model's table, and whether its goal is met."""
    show(f"{name}, batches of {found['batch']}", found)
    if name == FOLDED:
        return
    print(
        f"loader: {found['loader_share']:.0%} of the loop by hand; model: {found['share_of_peak']:.0%} of the best matrix product"
    )
    control = Ratio(**found["ratios"][f"{BARE}{AGAIN} / {BARE}"])
    for slow, fast in ((PRODUCT, BARE), (PRODUCT_MEMORY, BARE_MEMORY)):
        times = Ratio(**found["ratios"][f"{slow} / {fast}"])
        verdict = overhead_at_most(MIDDLE_LIMIT, UPPER_LIMIT, times, control)
        print(f"{slow}: overhead at most 3 % in the middle, 5 % at the interval's end: {verdict}")


def show_peer(method: str, peer: dict[str, Any], found: dict[str, Any]) -> None:
    theirs = f"lightly-train {method}"
    show(f"{peer['ours']}, {peer['size']} px, batches of {peer['batch']}, views {peer['views']}", found)
    times, peak = found["ratios"][f"{theirs} / {PRODUCT}"], found["peak_gb"]
    met = at_least(peer["goal"], times["low"], times["high"])
    print(f"at least {peer['goal']:g} times the images/s of {method}: {met}")
    print(f"peak memory not above: {'met' if peak[PRODUCT] <= peak[theirs] else 'MISSED'}")


def show_run(found: dict[str, Any]) -> None:
    print(
        f"\nCPU seconds of a default run of {DEFAULT_STEPS} steps ({VIT}, batches of {found['batch']}, "
        f"{found['images_measured']} images measured), from a whole run of {found['steps_run']}"
    )
    for name, seconds in found["seconds_of_default_run"].items():
        print(f"{name:<36}{seconds:>9.1f}")
    met = "met" if found["rest_share"] <= REST_LIMIT else "MISSED"
    print(f"measuring, logging, checkpoints and bundles: {found['rest_share']:.1%}, at most 5 %: {met}")


def lightly_ready(env: Path) -> Path:
    """An environment with lightly-train and this environment's timm, made or completed."""
    python = lightly_python(env)
    wanted = f"timm=={timm.__version__}"
    if subprocess.run([python, "-c", "import timm"], stderr=subprocess.DEVNULL).returncode and (
        subprocess.run([python, "-m", "pip", "install", "--quiet", wanted]).returncode
    ):
        raise LightlyMissingError(f"{wanted} could not be installed into {env}")
    return env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one model, small batches, few rounds; lightly-train only with --lightly-env",
    )
    parser.add_argument("--rounds", type=int, help=f"rounds of each case ({ROUNDS}; {QUICK_ROUNDS} with --quick)")
    parser.add_argument("--only", action="append", choices=[*MODELS, *PEERS, "run"], help="a part alone; repeatable")
    parser.add_argument("--lightly-env", type=Path, metavar="DIR", help="environment of lightly-train, made if missing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    wanted = options.only or [*([VIT] if options.quick else MODELS), "run", *PEERS]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        paths = make_images(folder / "source", DISTINCT)
        images = many(paths, folder / "images", 640, classes=4)
        for part in [part for part in MODELS if part in wanted]:
            results[part] = overhead(
                part, images, folder / MODELS[part][0], rounds, QUICK_BATCH if options.quick else BATCH
            )
            show_overhead(part, results[part])
        if "run" in wanted:
            (folder / "whole").mkdir()
            results["run"] = whole_run(images, folder / "whole", *((2, 32) if options.quick else (10, 128)))
            show_run(results["run"])
        try:
            if options.quick and not options.lightly_env:
                raise LightlyMissingError("--quick without --lightly-env")
            for method in [part for part in PEERS if part in wanted]:
                env = lightly_ready(options.lightly_env or folder / "lightly")
                results[method] = against_lightly(method, PEERS[method], images, env, folder / method, rounds)
                show_peer(method, PEERS[method], results[method])
        except LightlyMissingError as reason:
            print(f"lightly-train left out: {reason}")
    results |= {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "rounds": rounds}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

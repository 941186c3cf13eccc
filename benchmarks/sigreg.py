"""What SIGReg costs: the product's lean form against plain autograd of the same formula.

    python benchmarks/sigreg.py [--quick | --only N K S] [--seconds SECONDS] [--rows FILE] [--device cuda]

For 8 views of N images, K projector outputs and S directions, float32, forward and backward, one thread:

- time: CPU time of the process, the two forms and the lean one once more (A/A) in turns, in random order;
- peak: the most memory that one pass takes above its inputs, by the kernel's own count, in a process that does
  nothing else;
- saved: what autograd keeps from forward to backward, inputs apart, which adds to the model's activations;
- error: of the gradient, ‖g − g64‖ / ‖g64‖, the worse of standard normal projections (converged, where the gradient is
  least) and of wider, shifted ones. g64 is autograd's in float64 where that takes little, else the lean form's.

Every figure has a process of its own. On a GPU time is by the clock, memory what torch's allocator hands out, and all
is measured in one process. The autograd form runs only where it is predicted to stay under 8 GB and half of
the memory that is free; beyond, the prediction is printed, in brackets. All of it takes about 40 minutes of a core;
--rows keeps the rows in a file and measures those that it lacks. Prints a table, how each figure grows
with N (exponent of a fitted power), the goals, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import _processes
from _blocks import Block, Ratio, measure, ratio, timed
from _processes import EndedError
from jepakit_training.learning.sigreg import directions, sigreg

VIEWS = 8
IMAGES, OUTPUTS, SLICES = (64, 128, 256, 512, 1024, 2048, 4096), (64, 512), (256, 1024, 4096)
QUICK_IMAGES, QUICK_SLICES = (64, 128, 256), (256,)
T_MAX, N_NODES = 3.0, 17
MOST_BYTES, MOST_SHARE = 8e9, 0.5
"""Limits of the autograd form: in all, and as a share of the machine's free memory."""
REFERENCE_BYTES = 1e9
"""Limit of autograd in float64, the reference for the gradient."""
LEAN, AGAIN, PLAIN = "lean", "lean (again)", "autograd"
DEVICE = torch.device("cpu")
"""Set once, from the command line."""


class Size(NamedTuple):
    images: int
    outputs: int
    slices: int

    @property
    def predicted_bytes(self) -> float:
        """Peak of the autograd form: 5.9 times its [V, N, S, T] tensor."""
        return 5.9 * VIEWS * self.images * self.slices * N_NODES * 4

    def inputs(self, *, scale: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        """Projections [V, N, K] that ask for a gradient, and directions [K, S]."""
        random = torch.Generator().manual_seed(0)
        proj_VNK = scale * torch.randn(VIEWS, self.images, self.outputs, generator=random) + shift
        slices_KS = directions(self.outputs, self.slices, seed=0, step=0, device=DEVICE)
        return proj_VNK.to(DEVICE).requires_grad_(), slices_KS


def autograd_sigreg(proj_VNK: Tensor, directions_KS: Tensor) -> Tensor:
    """The formula as written, differentiated by autograd."""
    nodes_T = torch.linspace(0, T_MAX, N_NODES, dtype=proj_VNK.dtype, device=proj_VNK.device)
    phi_T = torch.exp(-nodes_T.square() / 2)
    weights_T = 2 * (nodes_T[1] - nodes_T[0]) * phi_T
    weights_T[[0, -1]] /= 2
    angles_VNST = (proj_VNK @ directions_KS)[..., None] * nodes_T
    cos_VST, sin_VST = angles_VNST.cos().mean(dim=1), angles_VNST.sin().mean(dim=1)
    per_slice_VS = proj_VNK.shape[1] * (((cos_VST - phi_T).square() + sin_VST.square()) @ weights_T)
    return per_slice_VS.mean()


FORMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {LEAN: sigreg, AGAIN: sigreg, PLAIN: autograd_sigreg}


def gradient(form: str, proj_VNK: Tensor, directions_KS: Tensor) -> Tensor:
    (grad_VNK,) = torch.autograd.grad(FORMS[form](proj_VNK, directions_KS), proj_VNK)
    return grad_VNK


def seconds_of(size: Size, forms: tuple[str, ...], budget_s: float) -> dict[str, list[float]]:
    """CPU seconds of each form in each round: 3 to 20 rounds, as many as fit into `budget_s`."""
    proj_VNK, slices_KS = size.inputs()
    block_of = timed if DEVICE.type == "cpu" else on_gpu
    blocks = {form: block_of(partial(gradient, form, proj_VNK, slices_KS)) for form in forms}
    start = time.perf_counter()
    for block in blocks.values():
        block()
    round_s = time.perf_counter() - start
    return measure(blocks, rounds=int(np.clip(budget_s / round_s, 3, 20)))


def on_gpu(work: Callable[[], object]) -> Block:
    """`work` as a block, by wall-clock time, averaged over ten runs: a single one would mostly measure the launches."""

    def block() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 10

    return block


def peak_bytes(size: Size, form: str) -> int:
    """Peak memory of one pass beyond its inputs and the warm process."""
    gradient(form, *Size(8, size.outputs, 8).inputs())
    inputs = size.inputs()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        gradient(form, *inputs)
        return torch.cuda.max_memory_allocated() - allocated
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = _proc_bytes("self/status", "VmRSS")
    gradient(form, *inputs)
    return _proc_bytes("self/status", "VmHWM") - before


def fits(size: Size) -> bool:
    """Whether the autograd form may run."""
    free = _proc_bytes("meminfo", "MemAvailable") if DEVICE.type == "cpu" else torch.cuda.mem_get_info()[0]
    return size.predicted_bytes <= min(MOST_BYTES, MOST_SHARE * free)


def _proc_bytes(file: str, field: str) -> int:
    lines = (Path("/proc") / file).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def saved_bytes(size: Size, form: str) -> int:
    """Bytes that autograd keeps for the backward pass, each counted once, without the inputs."""
    inputs = size.inputs()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = FORMS[form](*inputs)
    total = sum(kept.values())
    del value
    return total - sum(kept.get(tensor.untyped_storage().data_ptr(), 0) * (tensor.numel() > 0) for tensor in inputs)


def gradient_errors(size: Size, forms: tuple[str, ...]) -> dict[str, float]:
    """Relative L2 error of each form's gradient, and between the two forms if both were run."""
    reference = PLAIN if 2 * size.predicted_bytes <= REFERENCE_BYTES else LEAN
    errors: dict[str, float] = {}
    for scale, shift in ((1.0, 0.0), (1.5, 0.3)):
        proj_VNK, slices_KS = size.inputs(scale=scale, shift=shift)
        wanted = gradient(reference, proj_VNK.detach().double().requires_grad_(), slices_KS.double())
        got = {form: gradient(form, proj_VNK, slices_KS).double() for form in forms}
        now = {form: _distance(grad, wanted) for form, grad in got.items()}
        if PLAIN in got:
            now["lean to autograd"] = _distance(got[LEAN], got[PLAIN])
        errors = {name: max(value, errors.get(name, 0.0)) for name, value in now.items()}
    return errors | {"autograd in float64": float(reference == PLAIN)}


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def isolated(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in its own process with one thread; on a GPU, in this process."""
    if DEVICE.type == "cuda":
        return work(*arguments)
    try:
        return _processes.isolated(work, *arguments, preload=["jepakit_training.learning.sigreg"])
    except EndedError as error:
        raise SystemExit(f"{work.__name__}{arguments}: {error}") from None


class Row(NamedTuple):
    """Figures of one size by form, without the autograd form if it would not fit."""

    size: Size
    ms: dict[str, float]
    peak: dict[str, int]
    saved: dict[str, int]
    errors: dict[str, float]
    faster: Ratio | None
    again: Ratio | None


def row_of(size: Size, budget_s: float) -> Row:
    forms = (LEAN, PLAIN) if fits(size) else (LEAN,)
    both = PLAIN in forms
    seconds = isolated(seconds_of, size, (*forms, AGAIN) if both else forms, budget_s)
    return Row(
        size,
        ms={form: 1000 * float(np.median(seconds[form])) for form in forms},
        peak={form: isolated(peak_bytes, size, form) for form in forms},
        saved={form: isolated(saved_bytes, size, form) for form in forms},
        errors=isolated(gradient_errors, size, forms),
        faster=ratio(seconds[PLAIN], seconds[LEAN]) if both else None,
        again=ratio(seconds[AGAIN], seconds[LEAN]) if both else None,
    )


def load_rows(file: Path | None) -> dict[Size, Row]:
    """The rows of `file`, if there is one."""
    if file is None or not file.exists():
        return {}
    rows = []
    for size, *figures, faster, again in json.loads(file.read_text()):
        rows.append(Row(Size(*size), *figures, *(pair and Ratio(*pair) for pair in (faster, again))))
    return {row.size: row for row in rows}


HEADING = (
    "| N | K | S | autograd, ms | lean, ms | times faster | autograd, peak MB | lean, peak MB | "
    "autograd, saved MB | lean, saved MB | autograd, error | lean, error |"
)


def line(row: Row) -> str:
    """One line of a Markdown table."""
    here = PLAIN in row.ms
    cells = [
        *map(str, row.size),
        f"{row.ms[PLAIN]:,.0f}" if here else "",
        f"{row.ms[LEAN]:,.1f}",
        str(row.faster or ""),
        f"{row.peak[PLAIN] / 1e6:,.0f}" if here else f"({row.size.predicted_bytes / 1e6:,.0f})",
        f"{row.peak[LEAN] / 1e6:,.1f}",
        f"{row.saved[PLAIN] / 1e6:,.0f}" if here else "",
        f"{row.saved[LEAN] / 1e6:,.2f}",
        f"{row.errors[PLAIN]:.1e}" if here else "",
        f"{row.errors[LEAN]:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def exponents(rows: list[Row]) -> list[dict[str, Any]]:
    """How each figure grows with N: the exponent of a power fitted over at least three sizes, for each K, S and form."""
    found = []
    for outputs, slices, form in product(OUTPUTS, SLICES, (PLAIN, LEAN)):
        here = [row for row in rows if row.size[1:] == (outputs, slices) and form in row.ms]
        if len(here) >= 3:
            images = [row.size.images for row in here]
            fits = {
                name: round(
                    float(np.polyfit(np.log(images), np.log([getattr(row, name)[form] for row in here]), 1)[0]), 2
                )
                for name in ("ms", "peak", "saved")
            }
            found.append({"outputs": outputs, "slices": slices, "form": form, "largest": images[-1], **fits})
    return found


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """Goals beside what was measured; without the goals of a size that was not measured."""
    found = {row.size: row for row in rows}
    lines = []
    for outputs, least in ((64, 6.0), (512, 3.0)):
        row = found.get(Size(512, outputs, 1024))
        if row is not None and row.faster is not None:
            lines.append(
                {"goal": f"N 512, K {outputs}, S 1024: times faster", "least": least, "measured": row.faster.median}
            )
            if outputs == 64:
                share = row.saved[LEAN] / row.saved[PLAIN]
                lines.append(
                    {"goal": "N 512, K 64, S 1024: share of the saved memory", "most": 0.05, "measured": share}
                )
    lines.append({"goal": "gradient error anywhere", "most": 5e-6, "measured": max(row.errors[LEAN] for row in rows)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="small sizes only")
    chosen.add_argument("--only", nargs=3, type=int, metavar=("N", "K", "S"), help="this size only")
    parser.add_argument(
        "--seconds", type=float, default=20, help="for the rounds of one size, 3 at least and 20 at most"
    )
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON file of rows to add to; made if missing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    global DEVICE
    DEVICE = torch.device(options.device)
    grid = product(OUTPUTS, QUICK_SLICES if options.quick else SLICES, QUICK_IMAGES if options.quick else IMAGES)
    sizes = (
        [Size(*options.only)] if options.only else [Size(images, outputs, slices) for outputs, slices, images in grid]
    )
    found = load_rows(options.rows)
    print(f"{HEADING}\n|{' --- |' * (HEADING.count('|') - 1)}", flush=True)
    for size in sizes:
        if size not in found:
            found[size] = row_of(size, 2 if options.quick else options.seconds)
            if options.rows is not None:
                options.rows.write_text(json.dumps(list(found.values())))
        print(line(found[size]), flush=True)
    rows = [found[size] for size in sizes]
    again = [row.again.median for row in rows if row.again is not None]
    predicted = [row.peak[PLAIN] / row.size.predicted_bytes for row in rows if PLAIN in row.peak]
    if predicted:
        print(f"\nthe same form twice (A/A): {min(again):.2f} to {max(again):.2f}")
        print(f"autograd's peak over its prediction: {min(predicted):.2f} to {max(predicted):.2f}")
    for fit in exponents(rows):
        print(
            f"K {fit['outputs']}, S {fit['slices']}, {fit['form']}, to N {fit['largest']}: "
            f"time ~ N^{fit['ms']}, peak ~ N^{fit['peak']}, saved ~ N^{fit['saved']}"
        )
    for goal in goals(rows):
        print(goal)
    figures = {
        "rows": [row._asdict() | {"size": row.size._asdict()} for row in rows],
        "exponents": exponents(rows),
        "goals": goals(rows),
        "torch": torch.__version__,
        "machine": torch.backends.cpu.get_cpu_capability() if DEVICE.type == "cpu" else torch.cuda.get_device_name(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

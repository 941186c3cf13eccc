"""How fast a model answers: ONNX Runtime alone, jepakit round it, torch, OpenVINO, and how far the machine itself goes.

    python benchmarks/engine.py [--quick] [--rounds N]

ViT-S/16 and ResNet-50 at 224 pixels with random weights, images/s. With one thread by the CPU time of the process,
with all threads by the clock, which on a shared machine also counts what others take. Every runtime runs at its own
best batch of 1, 2, 4 and 8. `% of peak` is against the best matrix product of the same run, in torch's count of
floating-point operations. Prints tables, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load as load_tensors
from torch.utils.flop_counter import FlopCounterMode

import jepakit
from _blocks import Block, Ratio, measure, overhead_at_most, ratio, timed
from jepakit._machine import usable_cpus
from jepakit.backbones.backbone import restore
from jepakit.backbones.embedder import Embedder
from jepakit.bundles import golden
from jepakit.bundles.bundle import GRAPH, WEIGHTS, Bundle
from jepakit.errors import MissingExtraError
from jepakit.inference.ort import import_ort
from jepakit.inference.session import Model, Session
from jepakit_service.models.batcher import Batcher, Capacity, Decoded
from jepakit_training.learning.precision import cpu_has_bf16

ort = import_ort()

MODELS = {"ViT-S/16": "vit_small_patch16_224", "ResNet-50": "resnet50"}
IMAGES, BATCHES = 8, (1, 2, 4, 8)
COMPILE_LIMIT_S = 120
ORT, ORT_AGAIN, SESSION, ENGINE = "ONNX Runtime alone", "ONNX Runtime alone (again)", "Session.run", "service's batcher"
SPINNING = "ONNX Runtime, spinning"
EMBED = "Model.embed, JPEG to vector"
EAGER, COMPILED, OV_FP32, OV_BF16 = "torch eager", "torch.compile", "OpenVINO fp32", "OpenVINO bf16"
GEMM_SIZES = (1024, 2048)
MIDDLE_LIMIT, UPPER_LIMIT = 1.02, 1.05
"""How many times as long as ONNX Runtime alone jepakit may take: the median, and the interval's upper end."""

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class NotFinishedError(Exception):
    """A case that cannot be measured, and why."""


def clocked(work: Callable[[], object]) -> Block:
    """`work` as a block, by wall-clock time."""

    def block() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return block


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise NotFinishedError if the body takes longer."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise NotFinishedError(f"not finished in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain_runtime(graph: bytes, threads: int, *, spinning: bool) -> Run:
    """Plain ONNX Runtime; `spinning` is its default for waiting threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def torch_runtime(module: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


def compiled_runtime(embedder: Embedder, images: NDArray[np.uint8]) -> Run:
    """The embedder through inductor, compiled for batches like `images`. Raises NotFinishedError."""
    torch._dynamo.reset()
    run = torch_runtime(torch.compile(embedder, dynamic=False))
    try:
        with within(COMPILE_LIMIT_S):
            run(images)
    except NotFinishedError:
        raise
    except Exception as error:  # whatever the compiler chain runs into on this machine
        raise NotFinishedError(str(error).splitlines()[0]) from None
    return run


def batched(run: Run, images: NDArray[np.uint8], batch: int) -> Callable[[], object]:
    return lambda: [run(images[start : start + batch]) for start in range(0, len(images), batch)]


def torch_gemm(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """`GEMM_FLOPS` of work, in matrix products of `size`."""
    left, right = torch.rand(2, size, size).to(dtype)
    return lambda: [left @ right for _ in range(GEMM_FLOPS // (2 * size**3))]


def ort_gemm(size: int, threads: int) -> Callable[[], object]:
    """The same in ONNX Runtime, as torch's fp32 product takes a slow path on some CPUs."""
    right = np.random.default_rng(0).random((size, size), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["left", "right"], ["product"])],
        "gemm",
        [onnx.helper.make_tensor_value_info("left", onnx.TensorProto.FLOAT, [size, size])],
        [onnx.helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, [size, size])],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: [session.run(None, {"left": right}) for _ in range(GEMM_FLOPS // (2 * size**3))]


GEMM_FLOPS = 2 * 4 * 2048**3


def flops_an_image(embedder: Embedder, image: NDArray[np.uint8]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        embedder(torch.from_numpy(image[None]))
    return int(counter.get_total_flops())


def jpegs(count: int) -> list[bytes]:
    """JPEG files of 500 × 375 pixels, about as hard to decode as photographs."""
    files = []
    for pixels in golden.synthetic_images(count, 500, 3, seed=1):
        buffer = io.BytesIO()
        Image.fromarray(pixels[:375]).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    return files


class Bench:
    """One model on a number of threads: its cases, measured against each other."""

    def __init__(self, bundle: Bundle, threads: int, rounds: int) -> None:
        torch.set_num_threads(threads)
        self._threads, self._rounds = threads, rounds
        self._block = timed if threads == 1 else clocked
        self._graph, self._bundle = bundle.read(GRAPH), bundle
        self._images = golden.synthetic_images(IMAGES, bundle.manifest.preprocess.size, 3)
        backbone = restore(bundle.manifest.backbone, load_tensors(bundle.read(WEIGHTS)))
        self._embedder = Embedder(backbone, bundle.manifest.preprocess, bundle.manifest.embedding).eval()
        self.left_out: dict[str, str] = {}
        self.agreement: dict[str, golden.Agreement] = {}

    def run(self) -> dict[str, Any]:
        """Images/s, batch sizes, ratios to ONNX Runtime alone, shares of the peak."""
        runs = self._runtimes()
        best = self._best_batches(runs)
        try:
            runs[COMPILED] = compiled_runtime(self._embedder, self._images[: best[EAGER]])
            best[COMPILED] = best[EAGER]
        except NotFinishedError as reason:
            self.left_out[COMPILED] = str(reason)
        session = Session.open(self._bundle, provider="cpu", threads=self._threads)
        runs[SESSION] = session.run
        best[SESSION] = best[ENGINE] = best[ORT_AGAIN] = best[ORT]
        runs[ORT_AGAIN] = runs[ORT]
        cases = {name: self._block(batched(run, self._images, best[name])) for name, run in runs.items()}
        for size in GEMM_SIZES:
            cases[f"GEMM fp32 torch {size}"] = self._block(torch_gemm(size, torch.float32))
            cases[f"GEMM fp32 ONNX Runtime {size}"] = self._block(ort_gemm(size, self._threads))
            if cpu_has_bf16():  # elsewhere a product takes minutes
                cases[f"GEMM bf16 torch {size}"] = self._block(torch_gemm(size, torch.bfloat16))
        files, model = jpegs(IMAGES), Model(session)
        cases[EMBED] = self._block(lambda: model.embed(files, progress=False))
        batcher = Batcher(
            lambda image: Decoded(np.asarray(image), 0),
            session.run,
            session.run,
            Capacity(best[ENGINE], lanes=1, few=0, cores=self._threads, lane_cores=self._threads, batch_s=math.inf),
            Nobody(),
        )
        with asyncio.Runner() as loop:
            cases[ENGINE] = self._block(lambda: loop.run(through(batcher, self._images)))
            seconds = measure(cases, rounds=self._rounds)
            batcher.close()
        return self._numbers(seconds, best)

    def _runtimes(self) -> dict[str, Run]:
        eager = torch_runtime(self._embedder)
        runs = {ORT: plain_runtime(self._graph, self._threads, spinning=False), EAGER: eager}
        if self._threads > 1:
            runs[SPINNING] = plain_runtime(self._graph, self._threads, spinning=True)
        for name, arithmetic in ((OV_FP32, "model"), (OV_BF16, "bf16")):
            if name == OV_BF16 and not cpu_has_bf16():
                self.left_out[name] = "this CPU has no bfloat16 instructions"
                continue
            try:
                session = Session.open(self._bundle, provider="openvino", threads=self._threads, arithmetic=arithmetic)  # type: ignore[arg-type]
                runs[name] = session.run
            except MissingExtraError as reason:
                self.left_out[name] = str(reason)
        expected = eager(self._images)
        self.agreement = {name: golden.agreement(run(self._images), expected) for name, run in runs.items()}
        return runs

    def _best_batches(self, runs: dict[str, Run]) -> dict[str, int]:
        seconds = measure(
            {
                f"{name} {batch}": self._block(batched(run, self._images, batch))
                for name, run in runs.items()
                for batch in BATCHES
            },
            rounds=max(3, self._rounds // 3),
        )
        return {name: min(BATCHES, key=lambda batch: np.median(seconds[f"{name} {batch}"])) for name in runs}

    def _numbers(self, seconds: dict[str, list[float]], best: dict[str, int]) -> dict[str, Any]:
        flops = flops_an_image(self._embedder, self._images[0])
        rates = {name: GEMM_FLOPS / float(np.median(blocks)) for name, blocks in seconds.items() if "GEMM" in name}
        kinds = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
        peaks = {kind: max(rate for name, rate in rates.items() if kind in name) for kind in kinds}
        rows = {}
        for name, blocks in seconds.items():
            if name.startswith("GEMM"):
                continue
            rate = IMAGES / float(np.median(blocks))
            peak = peaks["bf16" if name == OV_BF16 else "fp32"]
            rows[name] = {
                "images_per_s": rate,
                "batch": best.get(name),
                "share_of_peak": rate * flops / peak,
                "times_ort": ratio(blocks, seconds[ORT])._asdict(),
            }
        return {
            "threads": self._threads,
            "measured_by": "process CPU time" if self._threads == 1 else "clock",
            "gflop_per_image": flops / 1e9,
            "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
            "gemm_gflops": {name: rate / 1e9 for name, rate in rates.items()},
            "cases": rows,
            "agreement_with_torch": {name: found._asdict() for name, found in self.agreement.items()},
            "left_out": self.left_out,
        }


class Nobody:
    """An observer that ignores everything: counting is the service's job, not the batcher's."""

    def decoded(self, seconds: float) -> None:
        """Nothing."""

    def ran(self, size: int, queued: Sequence[float], seconds: float) -> None:
        """Nothing."""


async def through(batcher: Batcher, images: NDArray[np.uint8]) -> None:
    await asyncio.gather(*(batcher.embed([image], 600.0) for image in images))


def show(name: str, numbers: dict[str, Any]) -> None:
    """Print one model's table, and whether its goals are met."""
    peaks, cases = numbers["peak_gflops"], numbers["cases"]
    print(
        f"\n{name}, {numbers['threads']} thread(s), by {numbers['measured_by']}; {numbers['gflop_per_image']:.2f} GFLOP an image; "
        f"best matrix product {', '.join(f'{kind} {rate:.0f}' for kind, rate in peaks.items())} GFLOP/s"
    )
    print(f"{'':<30}{'batch':>6}{'images/s':>10}{'% of peak':>11}   time over ONNX Runtime alone")
    for case, row in cases.items():
        times = row["times_ort"]
        batch = "" if row["batch"] is None else row["batch"]
        print(
            f"{case:<30}{batch:>6}{row['images_per_s']:>10.1f}{row['share_of_peak']:>11.0%}   "
            f"{times['median']:.3f} [{times['low']:.3f}, {times['high']:.3f}]"
        )
    for case, reason in numbers["left_out"].items():
        print(f"{case:<30}left out: {reason}")
    for case, found in numbers["agreement_with_torch"].items():
        print(
            f"{case:<30}to torch: relative error {found['relative_error']:.1e}, centred cosine {found['centred_cosine']:.5f}"
        )
    for case in (SESSION, ENGINE):
        print(f"{case}: overhead at most 2 % in the middle, 5 % at the interval's end: {verdict(cases, case)}")
    fastest = max((EAGER, COMPILED), key=lambda case: cases[case]["images_per_s"] if case in cases else 0)
    met = cases[ORT]["images_per_s"] >= cases[fastest]["images_per_s"]
    print(f"{ORT} at least as fast as {fastest}: {'met' if met else 'MISSED'}")


def verdict(cases: dict[str, Any], case: str) -> str:
    """Whether jepakit's overhead is small enough, in words."""
    times, control = (Ratio(**cases[name]["times_ort"]) for name in (case, ORT_AGAIN))
    return overhead_at_most(MIDDLE_LIMIT, UPPER_LIMIT, times, control)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, few rounds, one thread alone")
    parser.add_argument("--rounds", type=int, help="rounds of each case (15; 4 with --quick)")
    options = parser.parse_args()
    rounds = options.rounds or (4 if options.quick else 15)
    cores = usable_cpus()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, backbone in list(MODELS.items())[: 1 if options.quick else None]:
            bundle = jepakit.export(f"{backbone}:random", Path(folder, backbone), image_size=224)
            for threads in (1,) if options.quick or cores == 1 else (1, cores):
                numbers = results[f"{name}, {threads}"] = Bench(bundle, threads, rounds).run()
                show(name, numbers)
                gc.collect()
    results |= {
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

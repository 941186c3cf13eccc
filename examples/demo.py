"""The whole workflow on real images: adapt → export → serve → embed → probe. Run by `make demo`.

Uses tiles cut from photographs inside scikit-image and real ImageNet weights from this repository; downloads nothing.
docs/tested.md says what it reaches on two CPU cores.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import jepakit
from demo_map import draw_map
from demo_tiles import write_tiles

HERE = Path(__file__).parent
OUT = Path("demo-out")
WEIGHTS = HERE / "weights" / "mobilenetv2_100.safetensors"
STEPS = int(os.environ.get("JEPAKIT_DEMO_STEPS", "100"))
START_TIMEOUT_S = 180.0


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)

    say("1/6  cutting tiles from scikit-image's photographs; no test pixel is in a training tile")
    counts = write_tiles(OUT / "images")
    print(f"     {counts['train']} training and {counts['test']} test tiles, {counts['classes']} classes")

    say(f"2/6  adapting an ImageNet MobileNetV2 to the training tiles with LeJEPA ({STEPS} steps, CPU)")
    run = jepakit.adapt(
        OUT / "images" / "train",
        out=OUT / "run",
        backbone="mobilenetv2_100",
        weights=str(WEIGHTS),
        domain="microscopy",
        image_size=96,
        steps=STEPS,
    )
    print(f"     verdict on held-out training tiles: {run.verdict}")

    say("3/6  exporting start and result to ONNX, verified against torch")
    exports = run.export(OUT / "bundles" / "before", which="start"), run.export(OUT / "bundles" / "after")
    for bundle in exports:
        assert bundle.manifest.graph is not None
        print(f"     {bundle.path}  relative error {bundle.manifest.graph.relative_error:.1e}")

    say("4/6  starting the service (Ray Serve, its HTTP on loopback)")
    with service(OUT / "bundles", OUT / "service.log") as url, jepakit.Client(url) as client:
        say("5/6  embedding over HTTP, fitting probes in the client")
        embedded, rate = {}, 0.0
        for name in ("before", "after"):
            start = time.monotonic()
            embedded[name] = [
                client.embed(OUT / "images" / side, model=name, progress=False) for side in ("train", "test")
            ]
            rate = sum(map(len, embedded[name])) / (time.monotonic() - start)

    say("6/6  drawing the map")
    before, after = embedded["before"][1], embedded["after"][1]
    draw_map(OUT / "map.png", OUT / "images" / "test", before, after)

    rows = {"raw 16 × 16 pixels": [raw_pixels(OUT / "images" / side) for side in ("train", "test")]}
    rows["embeddings before adaptation"] = embedded["before"]
    rows["embeddings after adaptation"] = embedded["after"]
    print(f"\n{'on ' + str(counts['test']) + ' test tiles':<30} linear probe   k-NN")
    for words, (train, test) in rows.items():
        linear = jepakit.LinearProbe().fit(train).score(test)
        knn = jepakit.KNNProbe().fit(train).score(test)
        print(f"{words:<30} {linear:>11.1%} {knn:>7.1%}")
    print(f"\nverdict    {run.verdict}")
    print(f"served     {rate:.0f} images/s over HTTP on {len(os.sched_getaffinity(0))} cores")
    print(f"bundle     {OUT / 'bundles' / 'after'}    map {OUT / 'map.png'}    neighbours {run.neighbours}")
    print(f"took       {time.monotonic() - started:.0f} s\n")
    print("the same with your own folder of images (class folders, if you have some, only measure):")
    print(
        f"  .venv/bin/jepakit adapt  YOUR_IMAGES --out runs/mine --backbone mobilenetv2_100 --weights {os.path.relpath(WEIGHTS)}"
    )
    print("  .venv/bin/jepakit export runs/mine --out bundles/mine")
    print("  .venv/bin/jepakit serve  bundles/mine")


def say(words: str) -> None:
    print(f"\n{words}", flush=True)


def raw_pixels(folder: Path) -> jepakit.Embeddings:
    """The baseline that needs no network: tiles shrunk to 16 × 16 RGB, flattened to 768 numbers."""
    paths = sorted(folder.rglob("*.png"))
    vectors: list[NDArray[np.float32]] = []
    for path in paths:
        with Image.open(path) as image:
            vectors.append(np.asarray(image.resize((16, 16)), np.float32).ravel())
    names = tuple(str(path) for path in paths)
    return jepakit.Embeddings(np.stack(vectors), "raw-pixels", names, tuple(path.parent.name for path in paths))


@contextmanager
def service(bundles: Path, log: Path) -> Iterator[str]:
    """Run `jepakit serve` beside this process and stop it again, whatever happens; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("jepakit")), "serve", str(bundles), "--port", str(port)]
    with log.open("w") as output:
        # A process group of its own: Ctrl-C reaches only this process, which then stops the service in order.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready:" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not start; the end of {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        print(f"     ready at http://127.0.0.1:{port} (log: {log})")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    try:
        main()
    except jepakit.JepakitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")

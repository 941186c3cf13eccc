"""Runs lightly-train in its own process and environment, block by block.

    _lightly_worker.py FOLDER                                    its DINO transform
    _lightly_worker.py FOLDER STEPS_A_BLOCK '{"method": …}'      its training, with these settings of `pretrain`

Each input line asks for one block. The first form answers with the CPU seconds of decoding, augmenting and collating
the images of the folder, the second with a line of JSON as in `_trainer_worker.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly_train._methods.dino.dino_transform import DINOTransform, DINOTransformArgs
from PIL import Image


def transform(folder: Path) -> None:
    paths = sorted(folder.glob("*.jpg"))
    # The defaults are 2 views of 224 pixels and 6 of 96; only the number of channels has no default.
    views_of = DINOTransform(DINOTransformArgs(num_channels=3))
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        images = [views_of({"image": np.asarray(Image.open(path).convert("RGB"))}) for path in paths]
        for views in zip(*images, strict=True):
            torch.stack([view["image"] for view in views])
        print(time.process_time() - start, flush=True)


def train(folder: Path, steps: int, settings: dict[str, Any]) -> None:
    """`lightly_train.pretrain` as it comes, plus one callback that pauses the training between blocks."""
    import lightly_train
    from lightly_train._callbacks import callback_helpers
    from lightly_train._models.dinov2_vit.dinov2_vit_package import DINOV2_VIT_PACKAGE
    from pytorch_lightning import Callback  # type: ignore[import-not-found]

    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what the training prints goes to standard error
    os.dup2(2, 1)

    class Turns(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._done, self._start = 0, 0.0

        def on_train_start(self, *_: Any) -> None:
            self._wait({"ready": True})

        def on_train_batch_end(self, *_: Any) -> None:
            self._done += 1
            if self._done % steps == 0:
                seconds = _now() - self._start
                self._wait({"seconds": seconds, "loss": 0.0, "peak_gb": _peak_gb(), "flops": 0})

        def _wait(self, answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            if not sys.stdin.readline():
                os._exit(0)
            self._start = _now()

    its_own = callback_helpers.get_callbacks
    callback_helpers.get_callbacks = lambda **asked: [*its_own(**asked), Turns()]
    family, _, name = settings["model"].partition("/")
    if family == "dinov2":  # by name alone it would download weights
        settings["model"] = DINOV2_VIT_PACKAGE.get_model(name, load_weights=False)
    lightly_train.pretrain(data=folder, **settings)


def _now() -> float:
    """CPU seconds of this process; wall-clock seconds if a GPU does the work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        transform(Path(sys.argv[1]))
    else:
        train(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))


if __name__ == "__main__":
    main()

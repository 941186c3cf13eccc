"""Runs lightly-train's DINO transform in its own process and environment, block by block.

Reads lines "run" from its input; answers each with the CPU seconds of decoding, changing and collating the
images of the folder it is given.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightly_train._methods.dino.dino_transform import DINOTransform, DINOTransformArgs
from PIL import Image


def main() -> None:
    torch.set_num_threads(1)
    paths = sorted(Path(sys.argv[1]).glob("*.jpg"))
    # Its defaults are 2 views of 224 pixels and 6 of 96; only the number of channels has none.
    transform = DINOTransform(DINOTransformArgs(num_channels=3))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        images = [transform({"image": np.asarray(Image.open(path).convert("RGB"))}) for path in paths]
        for views in zip(*images, strict=True):
            torch.stack([view["image"] for view in views])
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()

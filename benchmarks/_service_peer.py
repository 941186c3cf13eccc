"""What the peers of benchmarks/service.py share: the graph in ONNX Runtime, fed as its own metadata says.

Runs in the peer's own environment: Pillow, numpy, ONNX Runtime, and nothing of jepakit.
"""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

PATIENCE_S = 600
"""Seconds that a request may wait: 32 clients' 32 images take a ViT-S on two cores more than a minute."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Model:
    """The graph at `path`, on the provider that PROVIDER names; on a CPU an inference uses `threads` threads."""

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # As in jepakit: with few cores, threads that spin while waiting take cores from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = os.environ["PROVIDER"]
        if provider == "cuda":
            onnxruntime.preload_dlls()
        # TF32 off, as in jepakit: the vectors are compared.
        chosen = (_PROVIDERS[provider], {"use_tf32": 0} if provider == "cuda" else {})
        self._session = onnxruntime.InferenceSession(path, options, providers=[chosen])
        wants = json.loads(self._session.get_modelmeta().custom_metadata_map["jepakit.preprocess"])
        self._size, self._resize_to = wants["size"], wants["resize_to"]

    def decode(self, data: bytes) -> Any:
        """A file's pixels as the graph takes them, uint8 [size, size, 3]: shorter side resized, centre cropped."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = self._resize_to / min(image.size)
        width, height = (round(scale * side) for side in image.size)
        left, top = round((width - self._size) / 2), round((height - self._size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self._size, top + self._size)))

    def run(self, images: list[Any]) -> Any:
        """Vectors, float32 [B, D]."""
        return self._session.run(["embeddings"], {"images": np.stack(images)})[0]


def from_data_uri(text: str) -> bytes:
    """The bytes of a file in OpenAI's JSON."""
    return base64.b64decode(text.partition(",")[2])


def openai_answer(vectors: Any) -> dict[str, Any]:
    """OpenAI's JSON for vectors [B, D]."""
    rows = enumerate(vectors.tolist())
    return {"object": "list", "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in rows]}

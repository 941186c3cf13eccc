"""What a run writes about itself: settings, versions, metrics, skipped files, bundles."""

from __future__ import annotations

import csv
import json
import os
import platform
import tomllib
from importlib import metadata
from pathlib import Path

import tomli_w
import torch
from safetensors.torch import save_file

from jepakit.bundle import (
    WEIGHTS,
    Backbone,
    EmbeddingSpec,
    Manifest,
    Preprocess,
    Provenance,
    compute_model_id,
    write_bundle,
)
from jepakit.config import AdaptConfig
from jepakit.errors import ConfigError, DataError
from jepakit.evaluate import Comparison
from jepakit.run import CONFIG, ENVIRONMENT
from jepakit.sources import ImageList

# These may differ between a run and its resumption: they change nothing in the result.
_FREE_SETTINGS = frozenset({"out", "workers", "save_every_s"})
_SKIPPED_SHARE = 0.01
_PACKAGES = ("jepakit", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow")


def open_folder(out: Path, config: AdaptConfig, images: ImageList) -> None:
    """Start the run's folder, or check that an existing one was started with the same settings and data.

    Raises ConfigError or DataError naming what differs.
    """
    settings = config.model_dump(mode="json", exclude_none=True)
    if not (out / CONFIG).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and is not a run: name another --out")
        out.mkdir(parents=True, exist_ok=True)
        environment = {
            "versions": versions(),
            "platform": platform.platform(),
            "data": images.digest(),
            "images": len(images),
        }
        _write_atomically(out / ENVIRONMENT, json.dumps(environment, indent=1))
        _write_atomically(out / CONFIG, tomli_w.dumps(settings))
        return
    before = tomllib.loads((out / CONFIG).read_text(encoding="utf-8"))
    changed = [
        f"{key} was {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted({*before, *settings} - _FREE_SETTINGS)
        if before.get(key) != settings.get(key)
    ]
    new = f"to go on with other settings: --weights {out / 'bundle'} --out NEW"
    if changed:
        raise ConfigError(f"{out} was started with other settings ({'; '.join(changed)}); {new}")
    if json.loads((out / ENVIRONMENT).read_text())["data"] != images.digest():
        raise DataError(
            f"the images are not those {out} was started with (files were added, removed or changed); {new}"
        )


def versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    return {name: metadata.version(name) for name in _PACKAGES}


class StepLog:
    """metrics.jsonl: a line per logged step. A resumed run drops the lines of steps it does again."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first_step]
        _write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: dict[str, float]) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()


class SkippedFiles:
    """skipped.csv: files that could not be read, each once, with the reason; stops above 1 % of the images."""

    def __init__(self, path: Path, n_images: int) -> None:
        self._path, self._most = path, int(_SKIPPED_SHARE * n_images)
        self._seen: dict[str, str] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self._seen = {row[0]: row[1] for row in csv.reader(file) if len(row) == 2 and row[0] != "path"}

    def add(self, path: Path, reason: str) -> None:
        """Note one file; DataError when there are too many."""
        if str(path) in self._seen:
            return
        self._seen[str(path)] = reason
        with self._path.open("w", newline="", encoding="utf-8") as file:
            file.write("# holds paths of your images: keep it to yourself\n")
            csv.writer(file).writerows([("path", "reason"), *self._seen.items()])
        if len(self._seen) > self._most:
            more = f", and {len(self._seen) - 1} more listed in {self._path}" if len(self._seen) > 1 else ""
            raise DataError(
                f"{reason}{more}; over 1 % of the images cannot be read: mend or remove them, then run the same command again"
            )


def write_run_bundle(
    path: Path, backbone: torch.nn.Module, described: Backbone, spec: Preprocess, embedding: EmbeddingSpec,
    provenance: Provenance, comparison: Comparison | None, *, name: str,
) -> None:  # fmt: skip
    """Write a bundle without a graph: the backbone's weights and everything needed to export them."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    manifest = Manifest(
        name=name,
        model_id=compute_model_id(described, spec, embedding, {key: value.numpy() for key, value in tensors.items()}),
        backbone=described,
        preprocess=spec,
        embedding=embedding,
        provenance=provenance,
        comparison=comparison,
    )
    write_bundle(path, manifest, lambda folder: save_file(tensors, folder / WEIGHTS))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

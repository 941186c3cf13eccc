"""Starting from a bundle's weights: checked before they are used, and read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from jepakit.backbones.backbone import build, start_backbone, stock_preprocess
from jepakit.bundles.bundle import WEIGHTS, Bundle, open_bundle, write_bundle
from jepakit.bundles.manifest import Backbone, EmbeddingSpec, Manifest, Provenance, StartWeights
from jepakit.errors import BundleError


@pytest.fixture
def bundle(weights_file: Callable[[str], Path], tmp_path: Path) -> Bundle:
    manifest = Manifest(
        name="start", model_id="0" * 16,
        backbone=Backbone(name="test_resnet", arguments={}, start=StartWeights(source="made", license="mit")),
        preprocess=stock_preprocess(build("test_resnet", {}), 64),
        embedding=EmbeddingSpec(dim=64, pooling="head", standardize="none"),
        provenance=Provenance(config={}, steps=0, images_seen=0, data_digest=None, versions={}),
    )  # fmt: skip
    state = load_file(weights_file("test_resnet"))
    write_bundle(tmp_path / "start", manifest, lambda folder: save_file(state, folder / WEIGHTS))
    return open_bundle(tmp_path / "start")


def test_weights_of_a_bundle_are_checked_without_a_copy_in_memory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Bundle, "read")
    _, described = start_backbone("test_resnet", str(bundle.path), 64)
    assert (described.start.source, described.start.license) == (f"file {WEIGHTS}", "mit")


def test_damaged_weights_of_a_bundle_are_refused(bundle: Bundle) -> None:
    file = bundle.path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        start_backbone("test_resnet", str(bundle.path), 64)

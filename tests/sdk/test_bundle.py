"""The bundle on disk: written completely or not at all, every change detected; and the golden inputs inside it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tests.files import npy

from jepakit._run_files import BUNDLE
from jepakit.bundles.bundle import (
    GOLDEN,
    GRAPH,
    MANIFEST,
    WEIGHTS,
    Bundle,
    check_new,
    is_bundle,
    open_bundle,
    write_bundle,
)
from jepakit.bundles.comparison import Comparison, Scores, Verdict
from jepakit.bundles.golden import TOLERANCES, Golden, agreement, pack, relative_error, synthetic_images, unpack
from jepakit.bundles.manifest import (
    Backbone,
    EmbeddingSpec,
    Graph,
    Manifest,
    Preprocess,
    Provenance,
    Scaling,
    StartWeights,
    canonical_json,
    compute_model_id,
)
from jepakit.errors import BundleError, ConfigError, WriteError
from jepakit.run import Run

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "stem.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "steps": np.array(5, dtype=np.int64),
}
START = StartWeights(source="random", license="none needed")
BACKBONE = Backbone(name="resnet18", arguments={"drop_rate": 0.1, "in_chans": 3}, start=START)
PREPROCESS = Preprocess(
    size=16, resize_to=18, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
EMBEDDING = EmbeddingSpec(dim=4, pooling="head", standardize="center", center=(0.1 + 0.2, -1e-05, 0.0, 2.5e-17))
FACTS = Graph(
    precision="fp32", opset=20, relative_error=3.1e-07, centred_cosine=1, same_neighbour=1, batch_sizes=(1, 3),
    verified_on="golden inputs",
)  # fmt: skip


def make_manifest(**changes: Any) -> Manifest:
    scores = Scores(linear=2 / 3, linear_balanced=0.5, knn=0.1 + 0.2, knn_balanced=1.0)
    verdict = Verdict(word="cannot tell", reason="café, 95 %", difference=-0.0123456789, low=-1 / 3, high=0.01)
    fields: dict[str, Any] = {
        "name": "scans",
        "model_id": compute_model_id(BACKBONE, PREPROCESS, EMBEDDING, TENSORS),
        "backbone": BACKBONE,
        "preprocess": PREPROCESS,
        "embedding": EMBEDDING,
        "provenance": Provenance(
            config={"lr": 3e-4, "views": {"n_local": 4}}, steps=300, images_seen=38400, data_digest=None,
            versions={"torch": "2.15.0"},
        ),
        "comparison": Comparison(before=scores, after=scores, verdict=verdict, n_train=80, n_held_out=20),
        "graph": FACTS,
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


def write_files(folder: Path) -> None:
    save_file(TENSORS, folder / WEIGHTS)
    images = synthetic_images(2, 16, 3)
    (folder / GOLDEN).write_bytes(pack(Golden(images, np.ones((2, 4), np.float32))))
    (folder / GRAPH).write_bytes(b"\x08\x09 not really a graph")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_bundle(tmp_path / "scans", make_manifest(), write_files)
    return open_bundle(tmp_path / "scans")


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> None:
    """Change the manifest like somebody who also recomputes its digest."""
    values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    change(values)
    if sign:
        unsigned = {key: value for key, value in values.items() if key != "digest"}
        values["digest"] = hashlib.sha256(canonical_json(unsigned)).hexdigest()
    (path / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# Writing


def test_a_bundle_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "scans"
    written = write_bundle(path, make_manifest(), write_files)
    bundle = open_bundle(str(path))
    bundle.verify()
    assert bundle.manifest == written
    assert bundle.manifest.comparison == make_manifest().comparison
    assert bundle.digest == written.digest != ""
    assert set(bundle.manifest.files) == {WEIGHTS, GOLDEN, GRAPH}
    for name, digest in bundle.manifest.files.items():
        assert hashlib.sha256(bundle.read(name)).hexdigest() == digest
    assert "scans" in repr(bundle)
    assert bundle.manifest.model_id in repr(bundle)


def test_every_file_can_be_read_by_a_service_that_runs_as_another_user(bundle: Bundle) -> None:
    assert {oct(file.stat().st_mode & 0o777) for file in bundle.path.iterdir()} == {"0o644"}
    assert bundle.path.stat().st_mode & 0o777 == 0o755


def test_the_digest_tells_two_bundles_apart_and_only_them(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "a", make_manifest(), write_files)
    again = write_bundle(tmp_path / "b", make_manifest(), write_files)
    renamed = write_bundle(tmp_path / "c", make_manifest(name="other"), write_files)
    assert first.digest == again.digest
    assert first.digest != renamed.digest


@pytest.mark.parametrize("files_before", [0, 2])
def test_a_failing_write_leaves_nothing_behind(tmp_path: Path, files_before: int) -> None:
    def failing(folder: Path) -> None:
        for i in range(files_before):
            (folder / f"{i}.bin").write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_bundle(tmp_path / "scans", make_manifest(), failing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_told_with_the_folder_and_what_to_do(tmp_path: Path, error: Exception) -> None:
    def failing(_: Path) -> None:
        raise error

    with pytest.raises(WriteError) as caught:
        write_bundle(tmp_path / "scans", make_manifest(), failing)
    assert str(caught.value).startswith(f"{tmp_path / 'scans'} cannot be written (")
    assert "No space left on device" in str(caught.value)
    assert str(caught.value).endswith(f"make room in {tmp_path}, and run the same command again")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_digest_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = make_manifest(graph=FACTS.model_copy(update={"relative_error": float("nan")}))
    with pytest.raises(ValueError, match="JSON"):
        write_bundle(tmp_path / "scans", broken, write_files)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "new", Path("/proc/new"), tmp_path / ("n" * 250)):
        with pytest.raises(ConfigError, match=rf"^{place} cannot be written \(.+\): name another place"):
            write_bundle(place, make_manifest(), write_files)
    with pytest.raises(ConfigError, match=r"cannot be written \(embedded null byte\): name another place"):
        check_new(tmp_path / "a\0b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_already_exists_is_never_overwritten(bundle: Bundle) -> None:
    before = bundle.digest
    with pytest.raises(BundleError, match=r"scans already exists.*name another place"):
        write_bundle(bundle.path, make_manifest(name="new"), write_files)
    assert open_bundle(bundle.path).digest == before

    empty = bundle.path.parent / "empty"
    empty.mkdir()
    with pytest.raises(BundleError, match="is a folder, but not a bundle"):
        write_bundle(empty, make_manifest(), write_files)


def test_a_link_to_nothing_is_taken_for_something_that_exists(tmp_path: Path) -> None:
    (tmp_path / "scans").symlink_to("nowhere")
    with pytest.raises(BundleError, match=r"scans already exists.*name another place"):
        check_new(tmp_path / "scans")


def test_what_appears_while_a_bundle_is_written_is_not_overwritten_and_told(tmp_path: Path) -> None:
    def slower(folder: Path) -> None:
        write_files(folder)
        write_bundle(tmp_path / "scans", make_manifest(name="faster"), write_files)

    with pytest.raises(BundleError, match=r"scans already exists.*name another place"):
        write_bundle(tmp_path / "scans", make_manifest(name="slower"), slower)
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]
    assert open_bundle(tmp_path / "scans").name == "faster"


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, GRAPH])
def test_a_changed_byte_in_a_file_is_an_error_that_names_it(bundle: Bundle, name: str) -> None:
    file = bundle.path / name
    whole = file.read_bytes()
    for position in [*range(0, len(whole), 50), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=rf"{name} is damaged"):
            open_bundle(bundle.path).verify()
        with pytest.raises(BundleError, match=rf"{name} is damaged"):
            bundle.read(name)
        with pytest.raises(BundleError, match=rf"{name} is damaged"):
            bundle.check(name)
    file.write_bytes(whole + b"\0")
    with pytest.raises(BundleError, match=rf"{name} is damaged"):
        bundle.verify()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=rf"{name} is damaged"):
        bundle.verify()


def undetected(path: Path, whole: bytes, changed: list[tuple[int, int]]) -> list[str]:
    """Replacements of the byte at a position that go unnoticed, or raise anything but a BundleError."""
    found = []
    for position, value in changed:
        damaged = bytearray(whole)
        damaged[position] = value
        (path / MANIFEST).write_bytes(damaged)
        around = bytes(whole[max(0, position - 12) : position + 6])
        try:
            open_bundle(path)
            found.append(f"{position}: {whole[position]:#x} → {value:#x} in {around!r} passed")
        except BundleError as error:
            if MANIFEST not in str(error):
                found.append(f"{position}: {error} does not name the file")
        except Exception as error:
            found.append(f"{position}: {whole[position]:#x} → {value:#x} in {around!r} gave {type(error).__name__}")
    return found


def test_any_flipped_bit_of_the_manifest_is_a_bundle_error_that_names_it(bundle: Bundle) -> None:
    whole = (bundle.path / MANIFEST).read_bytes()
    flips = [(position, byte ^ 1 << bit) for position, byte in enumerate(whole) for bit in {0, 5, position % 8}]
    assert undetected(bundle.path, whole, flips) == []


def test_other_changed_bytes_of_the_manifest_are_noticed_too(bundle: Bundle) -> None:
    whole = (bundle.path / MANIFEST).read_bytes()
    changes = [(i, ord(" ")) for i, byte in enumerate(whole) if byte == ord("\n")]
    changes += [(i, ord("\t")) for i, byte in enumerate(whole) if byte == ord(" ")]
    changes += [(i, ord("9")) for i, byte in enumerate(whole) if byte in b"-+."]
    changes += [(i, ord(digit)) for i, byte in enumerate(whole) if chr(byte).isdigit() for digit in "0123456789"]
    changes = [(i, value) for i, value in changes if whole[i] != value]
    assert undetected(bundle.path, whole, changes) == []


def test_a_manifest_cut_short_anywhere_is_noticed(bundle: Bundle) -> None:
    whole = (bundle.path / MANIFEST).read_bytes()
    for length in range(0, len(whole.rstrip()), 37):
        (bundle.path / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(BundleError, match=MANIFEST):
            open_bundle(bundle.path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"schema_version": 1}',
        b"\xff\xfe",
        b"PK\x03\x04",
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b'{"schema_version": ' + b"9" * 10_000 + b"}", id="huge number"),
    ],
)
def test_a_manifest_that_is_none_is_a_bundle_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"\\ud800"'])
def test_values_that_json_should_not_hold_are_a_bundle_error(bundle: Bundle, value: str) -> None:
    text = (bundle.path / MANIFEST).read_text(encoding="utf-8")
    assert '"lr":0.0003' in text.replace(" ", "")
    (bundle.path / MANIFEST).write_text(text.replace("0.0003", value), encoding="utf-8")
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle.path)


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.path / GOLDEN).unlink()
    with pytest.raises(BundleError, match=rf"{GOLDEN} cannot be read .*incomplete"):
        bundle.verify()


@pytest.mark.parametrize("stranger", ["notes.txt", ".hidden", "model.onnx.data"])
def test_an_extra_file_is_named(bundle: Bundle, stranger: str) -> None:
    (bundle.path / stranger).write_bytes(b"")
    with pytest.raises(BundleError, match=rf"{stranger} does not belong to the bundle, .*: remove it"):
        bundle.verify()


@pytest.mark.parametrize("name", ["manifest.json", "golden.npz"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_be_read_for_ever_is_refused(bundle: Bundle, name: str, kind: str) -> None:
    """Archives and copies preserve pipes and links to devices."""
    (bundle.path / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle.path / name)
    else:
        (bundle.path / name).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=rf"{name} is not a regular file: do not use this bundle"):
        open_bundle(bundle.path).verify()


def test_an_extra_folder_is_named(bundle: Bundle) -> None:
    (bundle.path / "more").mkdir()
    with pytest.raises(BundleError, match="more does not belong to the bundle"):
        bundle.verify()


def test_asking_for_a_graph_before_export_says_how_to_get_one(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make_manifest(graph=None), lambda folder: save_file(TENSORS, folder / WEIGHTS))
    for name in (GRAPH, GOLDEN):
        with pytest.raises(BundleError, match=rf"has no {name}; run `jepakit export`"):
            open_bundle(tmp_path / "b").read(name)


def test_another_schema_version_is_told_from_damage(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, lambda values: values.update(schema_version=2, novelty=1))
    with pytest.raises(BundleError, match=r"schema version 2, this jepakit reads version 1: upgrade") as refused:
        open_bundle(bundle.path)
    assert "damaged" not in str(refused.value)
    rewrite_manifest(bundle.path, lambda values: values.pop("schema_version"))
    with pytest.raises(BundleError, match="schema version None"):
        open_bundle(bundle.path)


def test_an_unknown_field_is_refused_even_under_a_right_digest_and_not_called_damage(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, lambda values: values.update(surprise=1))
    with pytest.raises(BundleError, match=r"is intact, but .*'surprise'.*: upgrade jepakit"):
        open_bundle(bundle.path)


def test_a_field_of_an_optional_part_is_told_by_its_own_name(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, lambda values: values["comparison"]["before"].update(linaer=1))
    with pytest.raises(
        BundleError, match=r"\(unknown setting 'comparison\.before\.linaer'; did you mean comparison\.before\.linear"
    ):
        open_bundle(bundle.path)
    rewrite_manifest(bundle.path, lambda values: values["comparison"]["before"].pop("linaer"))
    rewrite_manifest(bundle.path, lambda values: values["comparison"]["verdict"].pop("word"))
    with pytest.raises(BundleError, match=r"\(setting 'comparison\.verdict\.word' is missing\)"):
        open_bundle(bundle.path)


def test_a_run_whose_bundle_holds_no_comparison_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    rewrite_manifest(bundle.path, lambda values: values.update(comparison=None))
    (tmp_path / "run").mkdir()
    bundle.path.rename(tmp_path / "run" / BUNDLE)
    with pytest.raises(BundleError, match="run/bundle holds no comparison, so no run wrote it: put the run's own"):
        _ = Run(tmp_path / "run").verdict


def test_other_spaces_under_a_right_digest_are_not_called_damage(bundle: Bundle) -> None:
    manifest = bundle.path / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    with pytest.raises(BundleError, match="has the right digest, but other spaces or numbers than this jepakit writes"):
        open_bundle(bundle.path)


def test_a_manifest_from_before_a_field_was_added_is_whole(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, lambda values: values["preprocess"].pop("tile"))
    assert open_bundle(bundle.path).manifest.preprocess == PREPROCESS
    rewrite_manifest(bundle.path, lambda values: values["preprocess"].pop("frame"), sign=False)
    with pytest.raises(BundleError, match="does not match its own digest"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("outside", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "a\0b"])
def test_a_file_outside_the_bundle_is_refused(bundle: Bundle, outside: str) -> None:
    (bundle.path.parent / "secret").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    rewrite_manifest(bundle.path, lambda values: values["files"].update({outside: digest}))
    with pytest.raises(BundleError, match="lists a file outside the bundle"):
        open_bundle(bundle.path)


def test_a_graph_of_which_the_manifest_says_nothing_is_refused(bundle: Bundle) -> None:
    rewrite_manifest(bundle.path, lambda values: values.update(graph=None))
    with pytest.raises(
        BundleError, match=r"manifest\.json lists model\.onnx and says nothing of its graph: do not use it"
    ):
        open_bundle(bundle.path)


def test_what_is_no_bundle_says_so_and_points_into_a_run(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a bundle: there is no such folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(bundle.path / WEIGHTS)
    (tmp_path / "run").mkdir()
    bundle.path.rename(tmp_path / "run" / "bundle")
    with pytest.raises(
        BundleError,
        match=r"run is a run, not a bundle: .*\(jepakit export .*run --out bundles/run\); .* give .*run/bundle$",
    ):
        open_bundle(tmp_path / "run")


# The manifest's own rules


def test_a_manifest_is_frozen_and_takes_no_unknown_field() -> None:
    with pytest.raises(ValidationError):
        make_manifest().name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="surprise"):
        make_manifest(surprise=1)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "é", "x" * 129])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        make_manifest(name=name)


def test_a_crop_larger_than_what_was_resized_is_refused() -> None:
    with pytest.raises(ValidationError, match="resize_to"):
        Preprocess(**{**PREPROCESS.model_dump(), "resize_to": PREPROCESS.size - 1})


@pytest.mark.parametrize("field", ["mean", "std"])
def test_mean_and_std_hold_one_number_a_band(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Preprocess(**{**PREPROCESS.model_dump(), field: (0.5,)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_of_a_preprocess_may_be_other_than_finite(bad: float) -> None:
    for field in ("mean", "std"):
        with pytest.raises(ValidationError, match="finite number"):
            Preprocess(**{**PREPROCESS.model_dump(), field: (0.5, bad, 0.5)})
    with pytest.raises(ValidationError, match="finite number"):
        Scaling(low=(0.0,), high=(bad,), measured=True)


# The name of the vector space


def model_id(**changes: Any) -> str:
    parts: dict[str, Any] = {
        "backbone": BACKBONE,
        "preprocess": PREPROCESS,
        "embedding": EMBEDDING,
        "tensors": TENSORS,
        **changes,
    }
    return compute_model_id(**parts)


def with_tensor(name: str, tensor: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {**TENSORS, name: tensor}


def test_model_id_is_16_hex_digits_and_the_same_each_time() -> None:
    assert len(model_id()) == 16
    assert int(model_id(), 16) >= 0
    assert model_id() == model_id()


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": with_tensor("stem.weight", TENSORS["stem.weight"] + np.float32(1e-6))},
        {"tensors": with_tensor("stem.weight", TENSORS["stem.weight"].reshape(4, 3))},
        {"tensors": with_tensor("stem.weight", TENSORS["stem.weight"].view(np.int32))},
        {"tensors": with_tensor("steps", np.array([5], dtype=np.int64))},
        {"tensors": with_tensor("one.more", np.zeros(0, np.float32))},
        {"tensors": {"stem.bias": TENSORS["stem.weight"], "steps": TENSORS["steps"]}},
        {"preprocess": PREPROCESS.model_copy(update={"resize_to": 20})},
        {"preprocess": PREPROCESS.model_copy(update={"interpolation": "bilinear"})},
        {"preprocess": PREPROCESS.model_copy(update={"mean": (0.485, 0.456, 0.407)})},
        {"embedding": EMBEDDING.model_copy(update={"pooling": "stages"})},
        {"embedding": EMBEDDING.model_copy(update={"normalize": True})},
        {"embedding": EMBEDDING.model_copy(update={"center": (0.3, -1e-05, 0.0, 2.5e-17)})},
        {"backbone": BACKBONE.model_copy(update={"name": "resnet34"})},
        {"backbone": BACKBONE.model_copy(update={"arguments": {"drop_rate": 0.1, "in_chans": 1}})},
        {"precision_class": "int8"},
    ],
    ids=str,
)
def test_model_id_changes_with_whatever_changes_the_vectors(changes: dict[str, Any]) -> None:
    assert model_id(**changes) != model_id()


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": dict(reversed(TENSORS.items()))},
        {"tensors": {name: tensor.astype(tensor.dtype.newbyteorder(">")) for name, tensor in TENSORS.items()}},
        {"tensors": with_tensor("stem.weight", np.asfortranarray(TENSORS["stem.weight"]))},
        {"backbone": BACKBONE.model_copy(update={"arguments": {"in_chans": 3, "drop_rate": 0.1}})},
        {"backbone": BACKBONE.model_copy(update={"start": StartWeights(source="timm x", license="MIT")})},
    ],
    ids=["dict order", "byte order", "memory order", "argument order", "start weights"],
)
def test_model_id_does_not_depend_on_how_the_same_model_is_held(changes: dict[str, Any]) -> None:
    assert model_id(**changes) == model_id()


def test_canonical_json_gives_the_same_bytes_for_the_same_value() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert canonical_json({"a": "é", "b": (1, 2.5, None)}) == canonical_json({"b": [1, 2.5, None], "a": "é"})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


# Golden inputs


def test_synthetic_images_are_the_same_for_a_seed_and_others_for_another() -> None:
    images = synthetic_images(3, 24, 3, seed=1)
    assert images.dtype == np.uint8
    assert images.shape == (3, 24, 24, 3)
    assert images.flags.c_contiguous
    np.testing.assert_array_equal(images, synthetic_images(3, 24, 3, seed=1))
    assert (images != synthetic_images(3, 24, 3, seed=2)).any()
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(("size", "bands"), [(8, 1), (25, 3), (224, 3)])
def test_synthetic_images_use_the_range_as_photographs_do(size: int, bands: int) -> None:
    images = synthetic_images(4, size, bands)
    assert images.shape == (4, size, size, bands)
    for image in images:
        assert 15 < image.std() < 100
        assert 40 < image.mean() < 215


def test_relative_error_is_the_largest_difference_over_the_largest_value() -> None:
    expected = np.array([[1.0, -4.0]], np.float32)
    assert relative_error(expected, expected) == 0
    assert relative_error(expected + np.array([[0, 0.5]], np.float32), expected) == pytest.approx(0.125)


@pytest.mark.parametrize(
    "got",
    [np.array([[np.nan, 1]]), np.array([[np.inf, 1]]), np.array([1, 2]), np.zeros((2, 2), np.float32)],
    ids=str,
)
def test_relative_error_of_nan_or_another_shape_is_infinite(got: np.ndarray[Any, Any]) -> None:
    assert relative_error(got, np.array([[1, 2]])) == float("inf")


def test_golden_inputs_come_back_as_they_were_packed() -> None:
    golden = Golden(synthetic_images(2, 16, 3), np.random.default_rng(0).standard_normal((2, 5), np.float32))
    images, vectors = unpack(pack(golden))
    np.testing.assert_array_equal(images, golden.images)
    np.testing.assert_array_equal(vectors, golden.vectors)
    assert vectors.dtype == np.float32


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(b"PK\x03\x04garbage", id="zip garbage"),
        pytest.param(npz(images=np.zeros(1))[:-30], id="cut short"),
        pytest.param(npy(np.zeros(3)), id="npy"),
        pytest.param(npz(images=np.zeros(1)), id="no vectors"),
        pytest.param(npz(images=np.array([{}], dtype=object), vectors=np.zeros(1)), id="pickle"),
    ],
)
def test_golden_inputs_that_cannot_be_read_are_a_bundle_error(data: bytes) -> None:
    with pytest.raises(BundleError, match=GOLDEN):
        unpack(data)


@pytest.mark.parametrize(
    ("images", "vectors"),
    [
        (np.zeros((0, 18, 18, 3), np.uint8), np.zeros((0, 4), np.float32)),
        (np.zeros((65, 8, 8, 3), np.uint8), np.zeros((65, 4), np.float32)),
        (np.zeros((2, 18, 18), np.uint8), np.zeros((2, 4), np.float32)),
        (np.zeros((2, 18, 18, 3), np.uint8), np.zeros((1, 4), np.float32)),
        (np.zeros((2, 18, 18, 3), np.uint8), np.zeros((2, 4, 1), np.float32)),
        (np.zeros((2, 18, 18, 3), np.uint8), np.zeros((2, 4), np.float64)),
    ],
    ids=["none", "many", "no bands", "fewer vectors", "three axes", "doubles"],
)
def test_golden_inputs_are_a_few_images_with_a_vector_each(
    images: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(
        BundleError, match=r"golden\.npz holds images of uint8 \[.*\] and vectors of float.*: do not use this bundle"
    ):
        unpack(npz(images=images, vectors=vectors))


def test_golden_inputs_that_would_fill_the_memory_are_refused_before_they_are_inflated() -> None:
    bomb = pack(Golden(np.zeros((64, 512, 512, 3), np.uint8), np.zeros((64, 4), np.float32)))
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=r"bytes would inflate to 50,33\d,\d+, over 10 times as many"):
            unpack(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("images", "vectors", "message"),
    [
        (
            synthetic_images(2, 16, 3),
            np.ones((2, 4), np.float32),
            r"images of uint8 \[2, 16, 16, 3\], .* \[2, 18, 18, 3\]",
        ),
        (
            synthetic_images(2, 18, 1),
            np.ones((2, 4), np.float32),
            r"images of uint8 \[2, 18, 18, 1\], .* \[2, 18, 18, 3\]",
        ),
        (np.ones((2, 18, 18, 3), np.float32), np.ones((2, 4), np.float32), r"images of float32 .* manifest says uint8"),
        (synthetic_images(2, 18, 3), np.ones((2, 1), np.float32), r"vectors of float32 \[2, 1\], .* float32 \[2, 4\]"),
    ],
    ids=["size", "bands", "dtype", "dim"],
)
def test_golden_inputs_of_another_model_are_refused_by_what_the_manifest_says(
    images: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Golden(images, vectors).check(PREPROCESS, EMBEDDING.dim)


def test_damaged_golden_inputs_are_never_another_error() -> None:
    whole = pack(Golden(synthetic_images(1, 8, 3), np.ones((1, 2), np.float32)))
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        try:
            unpack(bytes(damaged))
        except BundleError:
            refused += 1
    assert refused


def test_a_bundle_is_a_folder_with_a_manifest(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_bundle(bundle.path)
    assert not any(
        is_bundle(path)
        for path in (bundle.path.parent, bundle.path / MANIFEST, tmp_path / "none", Path("x" * 300), Path("\0"))
    )

    def closed(_path: Path, **_: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # as from Python 3.14 on
    assert is_bundle(bundle.path), "opening it says that it is closed"


def test_a_number_that_hardly_moves_is_divided_by_the_typical_spread() -> None:
    """Like a channel behind a ReLU that fires in one image of thousands."""
    vectors = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32) * 0.5
    vectors[:, 0], vectors[:, 1] = 0, 3
    vectors[7, 0] = 1e-3
    plain = EmbeddingSpec(dim=8, pooling="stages", standardize="none")
    scale = np.array(plain.standardized_by(vectors, "scale").scale)
    np.testing.assert_allclose(scale[2:], vectors[:, 2:].std(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scale[:2], 0.5, rtol=0.05)
    still = plain.standardized_by(np.ones((5, 8), np.float32), "scale")
    assert still.scale == (1,) * 8


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_vectors_that_are_not_finite_or_of_another_shape_miss_every_tolerance(precision: str) -> None:
    expected = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    limit = TOLERANCES[precision, "cpu"]
    assert agreement(expected, expected).misses(limit) is None
    assert agreement(expected[:1], expected[:1]).misses(limit) is None, "one vector has no others to be centred by"
    broken = expected.copy()
    broken[3, 2] = np.nan
    for got in (broken, expected[:7], expected[:, :4]):
        assert agreement(got, expected).misses(limit) is not None


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_vectors_of_another_length_are_told_though_their_directions_are_right(precision: str, factor: float) -> None:
    expected = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    expected -= expected.mean(axis=0)
    expected[3] = 0
    found = agreement(factor * expected, expected)
    assert found.centred_cosine > 0.999
    assert str(found.misses(TOLERANCES[precision, "cpu"])).startswith("vectors longer or shorter by 10.0%, at most ")
    assert agreement(1.01 * expected, expected).misses(TOLERANCES[precision, "cpu"]) is None


def test_one_image_that_is_wrong_is_told_behind_a_mean_that_all_vectors_share() -> None:
    expected = 100 + np.random.default_rng(0).standard_normal((32, 16))
    turned = expected.copy()
    turned[3] = 2 * expected.mean(axis=0) - expected[3]
    assert agreement(turned, expected).centred_cosine == pytest.approx(-1)
    assert agreement(expected + 3, expected).centred_cosine < 0.6, "the mean is torch's, and no runtime's own"


def test_the_nearest_neighbour_of_an_image_is_another_one() -> None:
    expected = np.array([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
    assert agreement(expected, expected).same_neighbour == 1
    assert agreement(expected[[0, 2, 1, 3]], expected).same_neighbour == 0


def test_one_vector_of_another_length_is_no_matter_of_all() -> None:
    expected = np.random.default_rng(0).standard_normal((9, 4))
    assert agreement(np.where(np.arange(9)[:, None] == 4, 3, 1) * expected, expected).length_error == 0

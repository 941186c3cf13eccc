"""`jepakit.export`: torch's vectors in ONNX Runtime, the same bytes every time, nothing of this machine inside."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from typer.testing import CliRunner

import jepakit
import jepakit._frontdoor
import jepakit_export.exporter
import jepakit_export.verify
from jepakit import _frontdoor
from jepakit._run_files import BUNDLE, CHECKPOINTS, CONFIG, START
from jepakit.backbones.backbone import restore
from jepakit.backbones.embedder import Embedder
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, GRAPH, MANIFEST, WEIGHTS, Bundle, name_for
from jepakit.bundles.comparison import Comparison, Scores, Verdict
from jepakit.cli import app
from jepakit.config import ExportConfig
from jepakit.errors import BackboneError, BundleError, ConfigError, DataError, ExportError, WriteError
from jepakit.images import preprocess
from jepakit.inference.session import Session
from jepakit.run import Run

SIZE = 64


@pytest.fixture(scope="module")
def images(image_folder: Callable[..., Path]) -> Path:
    return image_folder(height=100, width=130)


@pytest.fixture(scope="module")
def run(images: Path, weights_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return jepakit.adapt(
        images, out=tmp_path_factory.mktemp("runs") / "textures", backbone="test_resnet",
        weights=str(weights_file("test_resnet")), image_size=SIZE, steps=4, batch_size=8, projector=(32, 32, 8),
        n_slices=16, views={"n_local": 1}, workers=0, pooling="stages",
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(
    run: Run, weights_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """`exported("run")`: one bundle per source, made on first use."""
    folder = tmp_path_factory.mktemp("bundles")
    sources: dict[str, tuple[str, dict[str, Any]]] = {
        "run": (str(run.path), {}),
        "start": (str(run.path), {"which": "start"}),
        "bundle": (str(run.path / BUNDLE), {"normalize": True}),
        "random": ("test_convnext:random", {"image_size": SIZE, "normalize": True}),
        "file": (f"test_vit:{weights_file('test_vit')}", {"image_size": SIZE, "name": "my-vit"}),
    }
    made: dict[str, Bundle] = {}

    def get(which: str) -> Bundle:
        if which not in made:
            source, settings = sources[which]
            made[which] = jepakit.export(source, folder / which, **settings)
        return made[which]

    return get


@pytest.fixture
def ready(exported: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is converted: the exporter is given the run's graph."""
    file = exported("run").path / GRAPH
    monkeypatch.setattr(jepakit_export.exporter, "to_onnx", lambda *_, **__: ir.load(file))


ALL = ("run", "start", "bundle", "random", "file")


def torch_vectors(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The bundle's vectors by torch alone, from its weights and manifest."""
    manifest = bundle.manifest
    backbone = restore(manifest.backbone, load(bundle.read(WEIGHTS)))
    with torch.inference_mode():
        embedder = Embedder(backbone, manifest.preprocess, manifest.embedding).eval()
        vectors: NDArray[np.float32] = embedder(torch.from_numpy(pixels)).numpy()
    return vectors


@pytest.mark.parametrize("which", ALL)
def test_onnx_runtime_gives_torchs_vectors_at_any_batch_size(
    exported: Callable[[str], Bundle], images: Path, which: str
) -> None:
    bundle = exported(which)
    pixels = np.stack([preprocess(file, bundle.manifest.preprocess) for file in sorted(images.rglob("*.png"))])
    expected = torch_vectors(bundle, pixels)
    session = Session.open(bundle, provider="cpu")
    for size in (1, 2, 5, 16, 28):
        assert golden.relative_error(session.run(pixels[:size]), expected[:size]) < 2e-5
    # The images differ, so must the vectors: a graph of constants would pass the above.
    centred = expected - expected.mean(axis=0)
    assert np.linalg.norm(centred, axis=1).min() > 0
    assert expected.shape == (28, bundle.manifest.embedding.dim)


@pytest.mark.parametrize("which", ALL)
def test_the_bundle_is_whole_and_says_what_it_is(exported: Callable[[str], Bundle], which: str) -> None:
    bundle = exported(which)
    bundle.verify()
    assert set(bundle.manifest.files) == {WEIGHTS, GRAPH, GOLDEN}
    assert {path.name for path in bundle.path.iterdir()} == {WEIGHTS, GRAPH, GOLDEN, MANIFEST}
    graph = bundle.manifest.graph
    assert graph is not None
    assert (graph.precision, graph.opset) == ("fp32", 20)
    assert graph.relative_error < 1e-4
    assert graph.centred_cosine > 0.9999
    assert graph.same_neighbour == 1
    assert bundle.manifest.name == ("my-vit" if which == "file" else which)


@pytest.mark.parametrize("which", ALL)
def test_names_batch_and_metadata_of_the_graph(exported: Callable[[str], Bundle], which: str) -> None:
    manifest, graph = exported(which).manifest, onnx.load(exported(which).path / GRAPH)
    (taken,), (given,) = graph.graph.input, graph.graph.output
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in (taken, given)
    ]
    assert (taken.name, given.name) == ("images", "embeddings")
    assert shapes == [["batch", SIZE, SIZE, 3], ["batch", manifest.embedding.dim]]
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {opset.domain: opset.version for opset in graph.opset_import}[""] == 20
    assert graph.ir_version == onnx.helper.find_min_ir_version_for(graph.opset_import) == 9
    stamp = {entry.key: entry.value for entry in graph.metadata_props}
    assert stamp["jepakit.model_id"] == manifest.model_id
    assert stamp["jepakit.name"] == manifest.name
    assert stamp["jepakit.license"] == manifest.backbone.start.license
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.graph.initializer)


@pytest.mark.parametrize("which", ALL)
def test_no_path_of_this_machine_is_in_any_file(exported: Callable[[str], Bundle], which: str, run: Run) -> None:
    bundle = exported(which)
    for file in bundle.path.iterdir():
        data = file.read_bytes()
        for path in (b"site-packages", b"/home", b"/tmp", str(run.path.parent).encode(), b"texture0", b".py"):
            assert path not in data, f"{path!r} in {file.name}"


def test_two_exports_give_the_same_bytes(
    exported: Callable[[str], Bundle], weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    once = exported("file")
    source = tmp_path / "elsewhere" / "test_vit.safetensors"
    source.parent.mkdir()
    shutil.copy(weights_file("test_vit"), source)
    torch.rand(5)
    twice = jepakit.export(f"test_vit:{source}", tmp_path / "again", image_size=SIZE, name="my-vit")
    for name in (*once.manifest.files, MANIFEST):
        assert (once.path / name).read_bytes() == (twice.path / name).read_bytes(), name
    assert once.digest == twice.digest


def test_random_weights_are_the_same_each_time_and_the_caller_s_random_numbers_stay(tmp_path: Path) -> None:
    config = ExportConfig(source="test_resnet:random", out=str(tmp_path / "x"))
    once = jepakit_export.exporter._of_timm(config).backbone.state_dict()
    torch.rand(5)
    random_numbers = torch.random.get_rng_state()
    again = jepakit_export.exporter._of_timm(config).backbone.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert torch.equal(torch.random.get_rng_state(), random_numbers)


def test_start_and_end_of_a_run_are_two_spaces_and_keep_their_words(
    exported: Callable[[str], Bundle], run: Run
) -> None:
    end, start = exported("run").manifest, exported("start").manifest
    assert end.model_id == run.bundle.manifest.model_id
    assert start.model_id == jepakit.open_bundle(run.path / START).manifest.model_id
    assert end.model_id != start.model_id
    assert end.comparison == run.comparison
    assert (end.provenance.steps, start.provenance.steps) == (4, 0)
    assert end.backbone.start.license == start.backbone.start.license == "cc0-1.0"
    assert end.embedding.pooling == start.embedding.pooling == "stages"
    assert end.embedding.standardize == "scale"


def test_normalised_vectors_have_length_one_and_a_space_of_their_own(
    exported: Callable[[str], Bundle], images: Path
) -> None:
    plain = jepakit.load(exported("run").path).embed(images, progress=False)
    normalised = jepakit.load(exported("bundle").path).embed(images, progress=False)
    np.testing.assert_allclose(np.linalg.norm(normalised.vectors, axis=1), 1, rtol=1e-5)
    lengths = np.linalg.norm(plain.vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(plain.vectors / lengths, normalised.vectors, atol=1e-5)
    assert plain.model_id != normalised.model_id
    measured, noted = (exported(source).manifest.comparison for source in ("run", "bundle"))
    assert measured is not None
    note = f"measured on vectors of model {plain.model_id}, of which these are a variant"
    assert noted == measured.noting(note)


def test_a_few_lines_of_plain_onnx_runtime_give_the_same_vectors(
    exported: Callable[[str], Bundle], images: Path
) -> None:
    bundle = exported("run")
    embeddings = jepakit.load(bundle.path).embed(images, progress=False)
    assert embeddings.labels is not None
    assert embeddings.model_id == bundle.manifest.model_id
    files = sorted(images.rglob("*.png"))
    session = onnxruntime.InferenceSession(bundle.path / GRAPH, providers=["CPUExecutionProvider"])
    pixels = np.stack([preprocess(file, bundle.manifest.preprocess) for file in files])
    (vectors,) = session.run(None, {"images": pixels})
    assert embeddings.ids == tuple(file.relative_to(images).as_posix() for file in files)
    np.testing.assert_allclose(embeddings.vectors, vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, GOLDEN, MANIFEST])
def test_one_flipped_byte_in_any_file_is_refused(exported: Callable[[str], Bundle], tmp_path: Path, name: str) -> None:
    shutil.copytree(exported("file").path, tmp_path / "bundle")
    file = tmp_path / "bundle" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        jepakit.load(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("word", "which"),
    [("worse", "start"), ("same", "start"), ("cannot tell", "start"), ("better", "last")],
)
def test_best_follows_the_verdict(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, which: str
) -> None:
    verdict = Verdict.model_validate({"word": word, "reason": ""})
    comparison = run.comparison.model_copy(update={"verdict": verdict})
    monkeypatch.setattr(Run, "comparison", comparison)
    best = jepakit_export.exporter._of_run(run, "best")
    assert best.path == run.path / {"start": START, "last": BUNDLE}[which]


def test_the_start_is_exported_whatever_became_of_the_trained_bundle(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns(CHECKPOINTS))
    (tmp_path / "run" / BUNDLE / MANIFEST).write_text("{")
    assert jepakit_export.exporter._of_run(Run(tmp_path / "run"), "start").path == tmp_path / "run" / START


@pytest.mark.parametrize(
    ("word", "which", "labelled", "warned"),
    [
        ("worse", None, True, True), ("worse", "last", True, False), ("better", None, True, False),
        ("cannot tell", None, True, True), ("cannot tell", None, False, False),
    ],
)  # fmt: skip
def test_weights_that_the_verdict_does_not_call_better_are_not_exported_without_a_word(
    capsys: pytest.CaptureFixture[str], word: str, which: str | None, *, labelled: bool, warned: bool
) -> None:
    verdict, after = SimpleNamespace(word=word), object() if labelled else None
    run = SimpleNamespace(
        verdict=verdict, comparison=SimpleNamespace(after=after, verdict=verdict), bundle="the trained one"
    )
    assert cast("Any", jepakit_export.exporter._of_run)(run, which) == "the trained one"
    told = capsys.readouterr().err
    assert told.startswith(f"warning: the run's verdict on these weights is {word}; which=best follows it") == warned
    assert bool(told) == warned


@pytest.mark.parametrize("word", ["better", "same"])
def test_what_the_verdict_says_of_a_bundle_is_said_where_it_is_exported_again(
    exported: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    bundle = exported("file")
    verdict = Verdict.model_validate({"word": word, "reason": ""})
    scores = Scores(linear=0, linear_balanced=0, knn=0, knn_balanced=0)
    comparison = Comparison(before=scores, after=scores, verdict=verdict, n_train=9, n_held_out=9)
    judged = Bundle(bundle.path, bundle.manifest.model_copy(update={"comparison": comparison}))
    monkeypatch.setattr(jepakit_export.exporter, "open_bundle", lambda path: judged)
    capsys.readouterr()
    jepakit_export.exporter._source(ExportConfig(source=str(bundle.path), out="b"))
    told = "" if word == "better" else "warning: the run's verdict on these weights is same\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("word", "told"), [("better", "adapted weights"), ("same", "weights that the run began with")])
def test_what_follows_the_verdict_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, word: str, told: str
) -> None:
    run = SimpleNamespace(verdict=SimpleNamespace(word=word), path=tmp_path, bundle=tmp_path / "bundle")
    monkeypatch.setattr(jepakit_export.exporter, "open_bundle", lambda path: path)
    chosen = jepakit_export.exporter._of_run(cast("Run", run), "best")
    assert cast("Path", chosen).name == ("bundle" if word == "better" else "start")
    assert capsys.readouterr().err == f"the verdict is {word}: exports the {told}\n"


def test_golden_vectors_of_another_model_are_noticed(exported: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = exported("file")
    right = golden.unpack(bundle.read(GOLDEN))
    session = Session.open(bundle, provider="cpu")
    assert session.check_golden(right).relative_error < 1e-5
    with pytest.raises(BundleError, match=r"computes other vectors here .* relative error"):
        session.check_golden(golden.Golden(right.images, right.vectors * 1.01))


def left_nothing(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_a_graph_that_does_not_reproduce_torch_is_refused_and_nothing_is_written(
    exported: Callable[[str], Bundle], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = ir.load(exported("start").path / GRAPH)
    monkeypatch.setattr(jepakit_export.exporter, "to_onnx", lambda *_, **__: other)
    with pytest.raises(
        ExportError, match=r"does not reproduce torch at batch size 1: relative error .* at most 0.0001"
    ):
        jepakit.export(run.path, tmp_path / "bundle")
    assert left_nothing(tmp_path)


def test_a_graph_of_one_batch_size_is_refused(
    exported: Callable[[str], Bundle], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fixed = ir.load(exported("run").path / GRAPH)
    fixed.graph.inputs[0].shape = ir.Shape([2, SIZE, SIZE, 3])
    monkeypatch.setattr(jepakit_export.exporter, "to_onnx", lambda *_, **__: fixed)
    with pytest.raises(ExportError, match="fails at batch size 1"):
        jepakit.export(run.path, tmp_path / "bundle")
    assert left_nothing(tmp_path)


def test_weights_that_are_not_finite_are_refused(weights_file: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(weights_file("test_vit"))
    state["blocks.3.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ExportError, match="not finite"):
        jepakit.export(f"test_vit:{tmp_path / 'nan.safetensors'}", tmp_path / "bundle", image_size=SIZE)
    assert not (tmp_path / "bundle").exists()


def test_an_exporter_that_fails_is_told_in_our_words(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> ir.Model:
        raise RuntimeError("unsupported operator\nand 300 lines more")

    monkeypatch.setattr(jepakit_export.exporter, "to_onnx", fail)
    with pytest.raises(ExportError, match=r"^torch cannot export test_resnet: unsupported operator$"):
        jepakit.export(run.path, tmp_path / "bundle")
    assert left_nothing(tmp_path)


def test_an_exporter_that_fails_without_words_is_told_by_its_errors_name(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> ir.Model:
        raise AssertionError

    monkeypatch.setattr(jepakit_export.exporter, "to_onnx", fail)
    with pytest.raises(ExportError, match=r"^torch cannot export test_resnet: AssertionError$"):
        jepakit.export(run.path, tmp_path / "bundle")


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("step", "precision", "told"),
    [
        ("to_int8", "int8", "test_resnet cannot be quantised"),
        ("seal", "fp32", "the graph of test_resnet cannot be made a file"),
    ],
)
def test_a_full_temporary_folder_is_told_as_what_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, precision: Any, told: str
) -> None:
    def fail(*_: Any, **__: Any) -> ir.Model:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jepakit_export.exporter, step, fail)
    with pytest.raises(WriteError, match=rf"^{told}: .*No space left on device; make room in .*TMPDIR"):
        jepakit.export(run.path, tmp_path / "bundle", precision=precision)
    assert left_nothing(tmp_path)


@pytest.mark.usefixtures("ready")
def test_a_disk_that_is_full_at_the_end_is_told_with_the_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(jepakit_export.exporter, "save_file", fail)
    with pytest.raises(WriteError, match=rf"^{tmp_path / 'bundle'} cannot be written .*make room in {tmp_path}, and"):
        jepakit.export(run.path, tmp_path / "bundle")
    assert left_nothing(tmp_path)


@pytest.mark.usefixtures("ready")
def test_what_is_open_already_is_exported_as_its_folder_is(run: Run, tmp_path: Path) -> None:
    from_run = jepakit.export(run, tmp_path / "a")
    from_bundle = jepakit.export(run.bundle, tmp_path / "b")
    assert from_run.manifest.model_id == from_bundle.manifest.model_id == run.bundle.manifest.model_id


def test_an_existing_folder_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BundleError, match=r"is a folder, but not a bundle: name a new folder, such as .*bundle/NAME"):
        jepakit.export(run.path, tmp_path / "bundle")
    assert left_nothing(tmp_path / "bundle")
    with pytest.raises(BundleError, match="already exists, and a bundle is never overwritten"):
        jepakit.export(run.path, run.bundle.path)


def test_a_run_that_has_not_finished_is_refused(run: Run, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(run.path, unfinished, ignore=shutil.ignore_patterns(BUNDLE, CHECKPOINTS))
    with pytest.raises(BundleError, match="has not finished: run its `jepakit adapt` command again"):
        jepakit.export(unfinished, tmp_path / "bundle")
    with pytest.raises(BundleError, match="has not finished: run its `jepakit adapt` command again"):
        _ = jepakit.open_run(unfinished).verdict


def test_the_start_of_a_run_that_has_hardly_begun_is_refused(run: Run, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copy(run.path / CONFIG, unfinished / CONFIG)
    with pytest.raises(BundleError, match="has not finished"):
        jepakit.export(unfinished, tmp_path / "bundle", which="start")


def test_a_damaged_runs_weights_are_refused(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run.path, damaged)
    file = damaged / BUNDLE / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=f"{WEIGHTS} is damaged"):
        jepakit.export(damaged, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 96}, "was measured at 64 px"),
        ({"resize": "squash"}, "was measured with resize shorter: adapt with resize=squash instead"),
        ({"pooling": "head"}, "was measured with pooling stages"),
        ({"standardize": "center"}, "measures the domain's images: give some with verify_images"),
    ],
)
def test_what_a_run_has_measured_is_not_changed_at_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(_frontdoor, "require", lambda _: pytest.fail("that needs torch"))
    with pytest.raises(ConfigError, match=message):
        jepakit.export(run.path, tmp_path / "bundle", **settings)
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns(BUNDLE))
    with pytest.raises(BundleError, match="has not finished"):
        jepakit.export(tmp_path / "run", tmp_path / "bundle")


@pytest.mark.parametrize("which", ["best", "last", "start"])
@pytest.mark.parametrize("source", [BUNDLE, "test_vit:random"])
def test_what_is_asked_of_a_run_is_refused_of_anything_else(run: Run, tmp_path: Path, source: str, which: Any) -> None:
    with pytest.raises(ConfigError, match=f"which = '{which}' chooses weights of a run, but .* is not a run"):
        jepakit.export(run.path / BUNDLE if source == BUNDLE else source, tmp_path / "bundle", which=which)


def test_a_bundle_is_exported_as_it_is_fed_and_not_as_weights_of_a_name(run: Run, tmp_path: Path) -> None:
    """Preprocessed with timm's statistics it would silently give other vectors."""
    source = run.path / BUNDLE
    with pytest.raises(ConfigError, match=f"is a bundle, .*: jepakit export {source}"):
        jepakit.export(f"test_resnet:{source}", tmp_path / "bundle")


def test_a_folder_named_like_a_backbone_is_told_apart_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_vit").mkdir()
    with pytest.raises(DataError, match=r"neither a run nor a bundle.*; for timm's backbone say test_vit:pretrained"):
        jepakit.export("test_vit", "bundle")
    assert jepakit.export("test_vit:random", "bundle", image_size=SIZE).manifest.backbone.name == "test_vit"


def test_a_folder_that_is_neither_run_nor_bundle(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="neither a run nor a bundle"):
        jepakit.export(tmp_path / "folder", tmp_path / "bundle")


@pytest.mark.parametrize("source", ["test_vitt:random", "test_vit:/no/such/file.safetensors"])
def test_a_source_that_does_not_exist(tmp_path: Path, source: str) -> None:
    with pytest.raises(BackboneError, match=r"did you mean test_vit|/no/such/file.safetensors"):
        jepakit.export(source, tmp_path / "bundle")


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be entered, as another user's, whoever runs the tests."""
    folder = tmp_path / "closed"
    folder.mkdir()

    def refuse(real: Callable[..., Any], path: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(path, str | Path) and Path(path).is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **named)

    for name in ("stat", "lstat", "open", "mkdir"):
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))
    return folder


@pytest.mark.parametrize(
    ("source", "out", "error", "told"),
    [
        ("{}/run", "out", BundleError, r"closed/run/manifest\.json cannot be read: Permission denied"),
        (
            "test_vit:{}/weights.pth",
            "out",
            BackboneError,
            r"closed/weights\.pth cannot be read \(Permission denied\): let",
        ),
        ("test_vit:random", "{}/out", ConfigError, r"closed/out cannot be written \(Permission denied\): name another"),
    ],
)
def test_what_this_user_may_not_enter_is_told_as_that(
    closed: Path, tmp_path: Path, source: str, out: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        jepakit.export(source.format(closed), tmp_path / out.format(closed))


def test_what_cannot_be_read_is_not_said_to_be_no_run(closed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: Permission denied"):
        jepakit.export(closed / "run", tmp_path / "out", which="best")
    with pytest.raises(DataError, match=r"is not a run: it has no config\.toml that this user can read"):
        jepakit.open_run(closed / "run")
    with pytest.raises(DataError, match=r"nowhere does not exist: name the folder of a run"):
        jepakit.open_run(tmp_path / "nowhere")


def test_a_missing_weights_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="does not exist"):
        jepakit.export(f"test_vit:{tmp_path / 'absent.safetensors'}", tmp_path / "bundle")


@pytest.mark.parametrize("setting", [{"name": "my model"}, {"opset": 99}, {"poling": "head"}], ids=str)
def test_a_wrong_setting_is_a_config_error_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    monkeypatch.setattr(_frontdoor, "require", lambda _: pytest.fail("that needs torch"))
    with pytest.raises(ConfigError, match=next(iter(setting))):
        jepakit.export(run.path, tmp_path / "bundle", **setting)
    assert left_nothing(tmp_path)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my scans", "my-scans"), (".hidden", "hidden"), ("größe", "gr--e"), ("___", ""), ("x" * 200, "x" * 128)],
)
def test_a_folder_name_that_is_no_model_name_is_made_one(tmp_path: Path, folder: str, name: str) -> None:
    assert name_for(tmp_path / folder) == name


def test_a_folder_of_which_no_model_name_is_left_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two of them would replace each other in a service."""
    monkeypatch.setattr(_frontdoor, "require", lambda _: pytest.fail("that needs torch"))
    with pytest.raises(ConfigError, match=r"клетки has no ASCII letter or digit that could name .*: .* with name=NAME"):
        jepakit.export("test_vit:random", tmp_path / "клетки")


def test_the_verification_runs_at_the_batch_sizes_that_the_manifest_lists(exported: Callable[[str], Bundle]) -> None:
    graph = exported("run").manifest.graph
    assert graph is not None
    assert graph.batch_sizes == jepakit_export.verify.BATCH_SIZES


@pytest.mark.slow
def test_the_examples_mobilenet_is_exported(mobilenet_weights: Path, images: Path, tmp_path: Path) -> None:
    bundle = jepakit.export(
        f"mobilenetv2_100:{mobilenet_weights}", tmp_path / "mobilenet", image_size=SIZE, pooling="stages"
    )
    pixels = np.stack([preprocess(file, bundle.manifest.preprocess) for file in sorted(images.rglob("*.png"))[:5]])
    assert golden.relative_error(Session.open(bundle).run(pixels), torch_vectors(bundle, pixels)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "twins_pcpvt_small"])
def test_backbones_with_fused_attention_that_the_exporter_cannot_take(name: str, tmp_path: Path) -> None:
    bundle = jepakit.export(f"{name}:random", tmp_path / "bundle")
    assert Session.open(bundle, provider="cpu").run(np.zeros((3, 224, 224, 3), np.uint8)).shape[0] == 3


def test_a_bundle_is_shown_and_its_files_are_checked(
    exported: Callable[[str], Bundle], run: Run, tmp_path: Path
) -> None:
    bundle = exported("run")
    shown = CliRunner().invoke(app, ["show", str(bundle.path), "--verify"], catch_exceptions=False).stdout
    for part in (
        bundle.name,
        bundle.model_id,
        bundle.digest,
        bundle.manifest.backbone.start.license,
        "fp32: relative error",
    ):
        assert part in shown
    assert f"adapted in {run.config['steps']} steps" in shown
    assert str(run.verdict) in shown
    assert shown.endswith("its files are intact, and it computes its golden vectors here, on cpu\n")
    bare = CliRunner().invoke(app, ["show", str(run.path / START)], catch_exceptions=False).stdout
    assert "weights alone: `jepakit export` makes the graph" in bare
    assert "training none: the start weights as they are" in bare
    damaged = shutil.copytree(bundle.path, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes(b"x" + (damaged / WEIGHTS).read_bytes()[1:])
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        CliRunner().invoke(app, ["show", str(damaged)], catch_exceptions=False)

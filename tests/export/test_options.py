"""The options of `export`: poolings, precisions, tokens, standardising, other sizes, the user's own images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime.quantization
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from PIL import Image
from safetensors.torch import load, save_file

import jepakit
from jepakit.backbones.backbone import build, restore, stock_preprocess
from jepakit.backbones.embedder import Embedder
from jepakit.bundles import golden
from jepakit.bundles.bundle import GRAPH, WEIGHTS, Bundle
from jepakit.bundles.golden import Agreement, Tolerance, agreement, synthetic_images
from jepakit.bundles.manifest import INPUT, EmbeddingSpec, Preprocess
from jepakit.errors import ConfigError, DataError, ExportError
from jepakit.images import center_crop, preprocess
from jepakit.inference.session import Session
from jepakit.readers import Limits
from jepakit.sources import ImageList, tiles
from jepakit_export import convert, exporter, quantize, verify
from jepakit_export.verify import (
    BATCH_SIZES,
    Expected,
    calibration_and_check,
    check,
    int8_is_exact_here,
    read_users_images,
)

VIT = "test_vit:random"


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Bundle]:
    def run(source: str = VIT, **settings: Any) -> Bundle:
        return jepakit.export(
            source, tmp_path / f"bundle{len(list(tmp_path.glob('bundle*')))}", image_size=64, **settings
        )

    return run


@pytest.fixture
def made(exported: Callable[..., Path]) -> Callable[..., Bundle]:
    """The bundle of a backbone and settings, which other tests may share."""
    return lambda source=VIT, **settings: jepakit.open_bundle(exported(source, image_size=64, **settings))


def run_graph(bundle: Bundle, images: NDArray[Any]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(bundle.read(GRAPH), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {"images": images})
    return outputs


def backbone_and_input(bundle: Bundle, images: NDArray[np.uint8]) -> tuple[Any, torch.Tensor]:
    """timm's own module with the bundle's weights, and its input."""
    spec = bundle.manifest.preprocess
    x = (torch.from_numpy(images).float() / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    return restore(bundle.manifest.backbone, load(bundle.read(WEIGHTS))), x.permute(0, 3, 1, 2)


IMAGES = synthetic_images(5, 64, 3, seed=3)


@pytest.mark.parametrize(
    "pooling",
    ["stages", "cls+mean", "last2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("head", "cls", "mean"))],
)
@torch.inference_mode()
def test_each_pooling_is_what_timm_gives(export: Callable[..., Bundle], pooling: str) -> None:
    bundle = export(pooling=pooling)
    module, x = backbone_and_input(bundle, IMAGES)
    features = module.forward_features(x)
    cls, mean = features[:, 0], features[:, 1:].mean(dim=1)
    norms = {"return_prefix_tokens": True, "norm": True, "intermediates_only": True, "output_fmt": "NLC"}
    levels = module.forward_intermediates(x, indices=4, intermediates_only=True, output_fmt="NCHW")
    last2 = [prefix[:, 0] for _, prefix in module.forward_intermediates(x, indices=2, **norms)]
    expected = {
        "head": module(x), "stages": torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1), "cls": cls,
        "mean": mean, "cls+mean": torch.cat([cls, mean], dim=1), "last2": torch.cat(last2, dim=1),
    }[pooling].numpy()  # fmt: skip
    assert agreement(run_graph(bundle, IMAGES)[0], expected).relative_error < 1e-5
    assert bundle.manifest.embedding.dim == expected.shape[1]


def test_a_squashed_image_is_seen_whole(export: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = export("mobilenetv2_050:random", resize="squash")
    assert (bundle.manifest.preprocess.resize, bundle.manifest.preprocess.resize_to) == ("squash", 64)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 240, 3), np.uint8))
    photograph.save(tmp_path / "long.png")
    photograph.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "square.png")
    long, square = jepakit.load(bundle, provider="cpu").embed([tmp_path / "long.png", tmp_path / "square.png"]).vectors
    assert np.array_equal(long, square)


def test_a_pooling_that_the_backbone_lacks_is_refused_with_those_it_has(export: Callable[..., Bundle]) -> None:
    with pytest.raises(ConfigError, match="test_resnet has head, stages, mean"):
        export("test_resnet:random", pooling="cls")


@pytest.mark.parametrize("source", [VIT, "test_resnet:random"])
@torch.inference_mode()
def test_patch_tokens_are_a_second_output(made: Callable[..., Bundle], source: str) -> None:
    bundle = made(source, tokens=True)
    module, x = backbone_and_input(bundle, IMAGES)
    features = module.forward_features(x)
    expected = features[:, 1:] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    vectors, tokens = run_graph(bundle, IMAGES)
    np.testing.assert_allclose(tokens, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    assert bundle.manifest.graph is not None
    assert bundle.manifest.graph.tokens == tokens.shape[1:]
    np.testing.assert_array_equal(Session.open(bundle).run(IMAGES), vectors)
    assert [output.name for output in onnx.load_model_from_string(bundle.read(GRAPH)).graph.output] == [
        "embeddings", "tokens",
    ]  # fmt: skip


def test_tokens_are_held_to_account_image_by_image_not_pair_by_pair(
    export: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of the tokens of 256 images would take tens of gigabytes."""
    compared: list[int] = []
    nearest = golden._nearest

    def counted(unit: NDArray[np.float64]) -> NDArray[np.intp]:
        compared.append(len(unit))
        return nearest(unit)

    monkeypatch.setattr(golden, "_nearest", counted)
    export(tokens=True, verify_images=films(tmp_path / "films", 16, frames=1))
    assert max(compared) == 16


def test_fp16_halves_the_file_and_keeps_the_space(made: Callable[..., Bundle]) -> None:
    whole, half = made(), made(precision="fp16")
    assert len(half.read(GRAPH)) < 0.6 * len(whole.read(GRAPH))
    assert half.manifest.model_id == whole.manifest.model_id
    graph = half.manifest.graph
    assert graph is not None
    assert graph.precision == "fp16"
    assert 1e-5 < graph.relative_error < 1e-2
    assert graph.centred_cosine >= 0.999


def with_large_activations(file: Path, out: Path, largest: float) -> Path:
    """test_resnet's weights with the same vectors, but values up to `largest` inside for the golden inputs at 64 px."""
    module: Any = build("test_resnet", {})
    module.load_state_dict(load(file.read_bytes()))
    spec = stock_preprocess(module, 64)
    block, seen = module.layer1[0], []
    hook = block.bn1.register_forward_hook(lambda *call: seen.append(float(call[2].abs().max())))
    embedder = Embedder(module, spec, EmbeddingSpec(dim=1, pooling="head", standardize="none", normalize=False)).eval()
    with torch.inference_mode():
        embedder(torch.from_numpy(center_crop(golden.make_images(spec), 64)))
        hook.remove()
        scale = largest / seen[0]
        for tensor in (block.bn1.weight, block.bn1.bias):
            tensor *= scale
        block.conv2.weight /= 200
        block.bn2.running_var *= (scale / 200) ** 2
        block.bn2.running_mean *= scale / 200
    save_file(module.state_dict(), out)
    return out


@pytest.mark.parametrize(
    ("largest", "told"), [(60_000.0, r"of 7 images are not finite"), (80_000.0, r"of 8 images are not finite")]
)
def test_fp16_that_overflows_in_half_precision_is_refused_though_a_cpu_computes_it(
    export: Callable[..., Bundle], weights_file: Callable[[str], Path], tmp_path: Path, largest: float, told: str
) -> None:
    """At 60,000, the golden inputs are within fp16's range, and images of greater contrast are not."""
    file = with_large_activations(weights_file("test_resnet"), tmp_path / "large.safetensors", largest)
    with pytest.raises(ExportError, match=rf"in half precision .* {told}: .* exceed 65504.*; use precision=fp32"):
        export(f"test_resnet:{file}", precision="fp16")


@pytest.mark.slow
def test_half_precision_is_tried_on_the_users_images_as_well(
    export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = list[Any]()
    monkeypatch.setattr(exporter, "check_half", lambda _, spec, sets: tried.extend([spec, *sets]))
    source = str(films(tmp_path / "films", 16, frames=1))
    export(precision="fp16", verify_images=source)
    spec, _, users = tried
    np.testing.assert_array_equal(users, read_users_images(source, spec))


def test_half_precision_is_tried_on_images_spread_over_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[NDArray[Any]]()
    monkeypatch.setattr(verify, "use_plain_attention", lambda _: None)
    monkeypatch.setattr(verify, "_check_finite", lambda _, images: tried.append(images))
    monkeypatch.setattr(verify, "_stark_images", lambda _: IMAGES)
    many = np.arange(2 * verify._MOST_HALVED - 1)
    verify.check_half(None, None, [many])  # type: ignore[arg-type]
    np.testing.assert_array_equal(tried[0], many[::2])


def test_the_worst_agreement_of_all_batch_sizes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    each = Agreement(1, 0.9, 1, 0), Agreement(3, 1, 1, 0), Agreement(2, 1, 0.5, 0), Agreement(0, 1, 1, 4)
    found = dict(zip(BATCH_SIZES, each, strict=True))
    monkeypatch.setattr(verify, "_compare", lambda *arguments: found[arguments[-1]])
    monkeypatch.setattr(verify, "_check_mates", lambda *_: None)
    assert check(None, "fp32", Expected(IMAGES, IMAGES, None)) == Agreement(3, 0.9, 0.5, 4)  # type: ignore[arg-type]


def test_patch_tokens_that_overflow_in_half_precision_are_refused() -> None:
    class Overflowing(torch.nn.Module):
        tokens = True

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = torch.zeros(len(images), 4, 8)
            tokens[0, 3] = torch.inf
            return torch.zeros(len(images), 8), tokens

    with pytest.raises(ExportError, match="in half precision the vectors of 1 of 3 images are not finite"):
        verify._check_finite(Overflowing(), IMAGES[:3])  # type: ignore[arg-type]


@pytest.mark.slow
def test_patch_tokens_that_differ_from_torchs_are_refused(made: Callable[..., Bundle]) -> None:
    bundle = made(tokens=True)
    session = Session.open(bundle, provider="cpu")
    vectors, tokens = session.run_all(IMAGES)
    assert verify._compare(session, "fp32", Expected(IMAGES, vectors, tokens), 2).relative_error < 1e-3
    others = np.roll(tokens, 1, axis=1)
    with pytest.raises(ExportError, match="does not reproduce torch at batch size 2: patch tokens: "):
        verify._compare(session, "fp32", Expected(IMAGES, vectors, others), 2)


def test_int8_is_a_space_of_its_own(
    made: Callable[..., Bundle],
    export: Callable[..., Bundle],
    weights_file: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU without VNNI instructions computes other vectors: there they are not looked at."""
    source, exact = f"test_vit:{weights_file('test_vit')}", int8_is_exact_here()
    if not exact:
        monkeypatch.setattr(exporter, "check", lambda *_: Agreement(0.0, 1.0, 1.0, 0.0))
    whole, small = made(source), export(source, precision="int8")
    assert len(small.read(GRAPH)) < 0.5 * len(whole.read(GRAPH))
    assert small.model_id != whole.model_id
    if exact:
        assert small.manifest.graph is not None
        assert small.manifest.graph.centred_cosine >= 0.99
        assert Session.open(small).precision == "int8"


@pytest.mark.slow
def test_each_int8_graph_is_a_space_of_its_own_and_float_ones_are_not(
    export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whether they are close enough to torch depends on the CPU, and is not tested here."""
    monkeypatch.setattr(exporter, "check", lambda *_: Agreement(0.0, 1.0, 1.0, 0.0))
    source = f"test_resnet:{weights_file('test_resnet')}"
    some, others = str(films(tmp_path / "some", 16)), str(films(tmp_path / "others", 17, frames=1))

    def model_id(precision: str, images: str | None) -> str:
        return export(source, precision=precision, verify_images=images).manifest.model_id

    first, again, other, none = (model_id("int8", images) for images in (some, some, others, None))
    assert first == again
    assert len({first, other, none}) == 3
    assert model_id("fp16", some) == model_id("fp32", others)


def test_operator_sets_that_no_node_uses_are_not_declared() -> None:
    def node(domain: str, **attributes: Any) -> onnx.NodeProto:
        return onnx.helper.make_node("Op", ["x"], [f"of {domain}"], domain=domain, **attributes)

    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    deep = onnx.helper.make_graph([node("in.branch")], "deep", [], [])
    branch = onnx.helper.make_graph([node("", body=deep)], "branch", [], [])
    sets = [onnx.helper.make_opsetid(domain, 1) for domain in ("", "of.node", "in.branch", "of.function")]
    its_own = [onnx.helper.make_opsetid("in.function", 1)]
    function = onnx.helper.make_function("of.function", "F", ["x"], ["of in.function"], [node("in.function")], its_own)
    graph = onnx.helper.make_graph([node("of.node"), node("", branches=[branch])], "g", [x], [])
    unused = [onnx.helper.make_opsetid(domain, 1) for domain in ("com.microsoft", "ai.onnx.ml")]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=[unused[0], *sets, unused[1]])
    stripped = ir.serde.deserialize_model(model)
    convert._strip(stripped)
    declared = ir.serde.serialize_model(stripped)
    assert list(declared.opset_import) == sets
    assert list(declared.functions[0].opset_import) == its_own


def test_int8_is_calibrated_on_images_from_everywhere_among_those_given(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[NDArray[Any]] = []
    quantize_static = onnxruntime.quantization.quantize_static

    def noted(model: Path, written: Path, reader: Any, **settings: Any) -> None:
        batches = list(iter(reader.get_next, None))
        seen.append(np.concatenate([batch[INPUT] for batch in batches]))
        quantize_static(model, written, SimpleNamespace(get_next=partial(next, iter(batches), None)), **settings)

    monkeypatch.setattr(onnxruntime.quantization, "quantize_static", noted)
    images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    quantize.to_int8(ir.load(made("test_resnet:random").path / GRAPH), images)
    assert len(seen[0]) == quantize.MOST_CALIBRATED
    np.testing.assert_array_equal(seen[0][[0, -1]], images[[0, -1]])


def test_int8_is_verified_on_other_images_of_the_users_than_it_is_calibrated_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    users = synthetic_images(20, 64, 3, seed=40)
    calibrating, others = calibration_and_check("int8", IMAGES, users)
    assert others is not None
    assert len(calibrating) == len(others) == 10
    assert not {image.tobytes() for image in calibrating} & {image.tobytes() for image in others}
    assert capsys.readouterr().err == ""
    assert calibration_and_check("fp32", IMAGES, users)[1] is users


def test_int8_without_the_users_images_says_that_real_ones_may_do_worse(capsys: pytest.CaptureFixture[str]) -> None:
    calibrating, others = calibration_and_check("int8", IMAGES, None)
    assert (calibrating is IMAGES, others) == (True, None)
    assert "verified on synthetic images only, and real ones may do worse: give some" in capsys.readouterr().err


@pytest.mark.parametrize("exact", [True, False])
def test_int8_of_other_vectors_is_refused_with_the_numbers_and_what_the_cpu_lacks(
    made: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, *, exact: bool
) -> None:
    monkeypatch.setattr(verify, "int8_is_exact_here", lambda: exact)
    session = Session.open(made(), provider="cpu")
    others = np.roll(session.run(IMAGES), 1, axis=0)
    with pytest.raises(ExportError, match=r"centred cosine -?0\.\d+, at least 0\.99 is required") as refused:
        verify._compare(session, "int8", Expected(IMAGES, others, None), 2)
    assert ("this CPU has no VNNI instructions" in str(refused.value)) == (not exact)


@pytest.mark.slow
def test_int8_that_would_give_other_vectors_is_not_written(tmp_path: Path, mobilenet_weights: Path) -> None:
    with pytest.raises(ExportError, match=r"centred cosine 0\.\d+, at least 0\.99 is required"):
        jepakit.export(f"mobilenetv2_100:{mobilenet_weights}", tmp_path / "b", image_size=64, precision="int8")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_two_exports_of_each_precision_are_the_same_bytes(
    export: Callable[..., Bundle], weights_file: Callable[[str], Path]
) -> None:
    source = f"test_vit:{weights_file('test_vit')}"
    for precision in ("fp16", "int8") if int8_is_exact_here() else ("fp16",):
        first, second = (export(source, precision=precision, name="same").read(GRAPH) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("how", ["center", pytest.param("scale", marks=pytest.mark.slow)])
def test_standardising_is_measured_on_the_users_images_and_done_inside(
    export: Callable[..., Bundle], image_folder: Callable[..., Path], weights_file: Callable[[str], Path], how: str
) -> None:
    folder = image_folder()
    bundle = export(f"test_vit:{weights_file('test_vit')}", standardize=how, verify_images=str(folder))
    vectors = jepakit.load(bundle.path).embed(folder, progress=False).vectors
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4 * np.abs(vectors).max())
    if how == "scale":
        np.testing.assert_allclose(vectors.std(axis=0), 1, atol=1e-3)
    assert bundle.manifest.graph is not None
    assert bundle.manifest.graph.verified_on == "the user's images"


def test_standardising_without_images_and_verifying_on_too_few_are_refused(
    export: Callable[..., Bundle], image_folder: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match="give some with verify_images"):
        export(standardize="center")
    with pytest.raises(DataError, match="4 images can be read, 16 are the fewest"):
        export(verify_images=str(image_folder(classes=0, per_class=4)))


def films(folder: Path, count: int, *, frames: int = 2) -> Path:
    """Files of several frames, the later frames from other seeds."""
    folder.mkdir()
    for place in range(count):
        pixels = synthetic_images(frames, 64, 3, seed=100 * frames + place)
        tifffile.imwrite(folder / f"{place:03}.tif", pixels, photometric="rgb")
    return folder


def test_every_frame_is_verified_on_unless_the_model_means_one(tmp_path: Path) -> None:
    spec = stock_preprocess(build("test_vit", {}), 64)
    folder = films(tmp_path / "films", 16)
    assert read_users_images(str(folder), spec).shape == (32, 64, 64, 3)
    second = read_users_images(str(folder), spec.model_copy(update={"frame": 1}))
    assert second.shape == (16, 64, 64, 3)
    np.testing.assert_array_equal(second[3], preprocess(tifffile.imread(folder / "003.tif")[1], spec))


def test_images_spread_over_the_whole_source_are_verified_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Preprocess(
        size=32, resize_to=32, resize="shorter", interpolation="bicubic", bands=3, dtype="uint8", mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )  # fmt: skip
    folder = str(films(tmp_path / "films", 46, frames=1))
    whole = read_users_images(folder, spec)
    monkeypatch.setattr(verify, "MOST_IMAGES", 16)
    opened, real = list[int](), tiles._open

    def noted(images: ImageList, index: int, limits: Limits) -> Any:
        opened.append(index)
        return real(images, index, limits)

    monkeypatch.setattr(tiles, "_open", noted)
    np.testing.assert_array_equal(read_users_images(folder, spec), whole[::3])
    assert sorted(opened) == [*range(0, 46, 3)], "only those are looked into for their frames"


@pytest.mark.slow
def test_few_images_that_cannot_be_read_are_told_and_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = stock_preprocess(build("test_vit", {}), 64)
    folder = films(tmp_path / "films", 120, frames=1)
    capsys.readouterr()
    read_users_images(str(folder), spec)
    assert capsys.readouterr().err == "120 frames of 120 images\n"
    blank = np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(folder / "030.tif", blank, photometric="rgb")
    assert len(read_users_images(str(folder), spec)) == 119
    told = f"{folder}: 1 of 120 images cannot be read, the first: 030.tif: every pixel has the value 0, 0, 0"
    assert told in capsys.readouterr().err
    (folder / "050.tif").write_bytes(b"")
    assert len(read_users_images(str(folder), spec)) == 118
    assert "1 file that cannot be opened left out (050.tif: " in capsys.readouterr().err
    tifffile.imwrite(folder / "070.tif", blank, photometric="rgb")
    with pytest.raises(DataError, match=r"2 of 119 images cannot be read, the first: 030\.tif: .*; 1% may be left out"):
        read_users_images(str(folder), spec)


@pytest.mark.parametrize(
    ("source", "multiple"), [(VIT, 16), pytest.param("test_resnet:random", 1, marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_a_graph_of_dynamic_size_takes_the_sizes_that_torch_takes(
    made: Callable[..., Bundle], source: str, multiple: int
) -> None:
    bundle = made(source, dynamic_size=True)
    assert bundle.manifest.graph is not None
    assert bundle.manifest.graph.size_multiple == multiple
    session = Session.open(bundle, provider="cpu")
    for height, width in ((64, 64), (64 + multiple, 64), (128 - multiple, 160)):
        images = np.ascontiguousarray(synthetic_images(2, 160, 3)[:, :height, :width])
        module, x = backbone_and_input(bundle, images)
        assert agreement(session.run(images), module(x).numpy()).relative_error < 1e-4


@pytest.mark.parametrize(("wrong_at", "told"), [((32, 32), "32 × 32"), ((48, 96), "48 × 96")])
def test_a_graph_that_is_wrong_at_another_size_is_refused(
    made: Callable[..., Bundle],
    export: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    wrong_at: tuple[int, int],
    told: str,
) -> None:
    converted = ir.load(made(dynamic_size=True).path / GRAPH)
    monkeypatch.setattr(exporter, "to_onnx", lambda *_, **__: converted)

    class Elsewhere(Session):
        def run_all(self, images: NDArray[Any]) -> list[NDArray[np.float32]]:
            wrong = images.shape[1:3] == wrong_at
            return [output + np.float32(wrong) for output in super().run_all(images)]

    monkeypatch.setattr(exporter, "Session", Elsewhere)
    message = (
        rf"at {told} px: the exported graph does not reproduce torch .* relative error .*; export without dynamic_size"
    )
    with pytest.raises(ExportError, match=message):
        export(dynamic_size=True)
    assert "to ONNX (fp32, for other sizes too: some backbones take minutes) …\n" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_graph_that_fixes_its_size_is_caught(
    made: Callable[..., Bundle], export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = ir.load(made().path / GRAPH)
    monkeypatch.setattr(exporter, "to_onnx", lambda *_, **__: converted)
    with pytest.raises(ExportError, match="at 32 × 32 px: the exported graph fails at batch size 8"):
        export(dynamic_size=True)


def test_a_fixed_size_is_fixed(made: Callable[..., Bundle]) -> None:
    with pytest.raises(InvalidArgument, match="Got invalid dimensions"):
        run_graph(made(), synthetic_images(1, 96, 3))


def test_the_file_itself_says_what_it_is(made: Callable[..., Bundle]) -> None:
    bundle = made("test_resnet:random", normalize=True)
    properties = {entry.key: entry.value for entry in onnx.load_model_from_string(bundle.read(GRAPH)).metadata_props}
    assert properties["jepakit.model_id"] == bundle.manifest.model_id
    assert '"normalize":true' in properties["jepakit.embedding"]
    np.testing.assert_allclose(np.linalg.norm(run_graph(bundle, IMAGES)[0], axis=1), 1, atol=1e-5)


def test_a_graph_that_fixes_its_batch_is_caught(export: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(embedder: Any, example: Any, opset: int, dynamic_size: bool) -> Any:
        return torch.onnx.export(
            embedder, (example,), dynamo=True, opset_version=opset, verbose=False, input_names=["images"],
            output_names=["embeddings"],
        )  # fmt: skip

    monkeypatch.setattr(convert, "_export", fixed)
    with pytest.raises(ExportError, match="fails at batch size 1"):
        export()


def test_agreement_tells_what_falls_short() -> None:
    assert Agreement(0.1, 0.9, 0.5, 0.0).misses(Tolerance(relative=1e-4)) is not None
    assert Agreement(1e-6, 0.9, 0.5, 0.0).misses(Tolerance(relative=1e-4)) is None
    assert "nearest" in str(Agreement(0, 1, 0.5, 0).misses(Tolerance(cosine=0.9, neighbour=0.95)))
    wrong = agreement(np.full((3, 2), np.nan), np.ones((3, 2)))
    assert wrong == Agreement(float("inf"), -1.0, 0.0, float("inf"))


@pytest.mark.slow
def test_what_is_taken_off_does_not_depend_on_the_length_afterwards(
    export: Callable[..., Bundle], image_folder: Callable[..., Path], weights_file: Callable[[str], Path]
) -> None:
    source, folder = f"test_vit:{weights_file('test_vit')}", str(image_folder())
    plain, unit = (
        export(source, standardize="center", normalize=normalize, verify_images=folder).manifest.embedding
        for normalize in (False, True)
    )
    center = np.array(plain.center)
    np.testing.assert_allclose(np.array(unit.center), center, atol=1e-5 * np.abs(center).max())


@pytest.mark.parametrize("wrong_at", [1, 2, 7, 33])
def test_a_graph_that_is_wrong_at_one_batch_size_is_refused(wrong_at: int) -> None:
    class Runtime:
        def run_all(self, images: NDArray[Any]) -> list[NDArray[np.float32]]:
            return [of(images) + np.float32(len(images) == wrong_at)]

    def of(images: NDArray[Any]) -> NDArray[np.float32]:
        return images[:, ::8, ::8].reshape(len(images), -1).astype(np.float32)

    images = synthetic_images(8, 16, 3)
    session: Any = Runtime()
    with pytest.raises(ExportError, match=f"does not reproduce torch at batch size {wrong_at}: relative error"):
        check(session, "fp32", Expected(images, of(images), None))

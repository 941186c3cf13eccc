"""Where a backbone's weights come from, and that only fitting tensors are ever loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.models import maxxvit
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import jepakit
from jepakit.backbones import backbone as backbone_module
from jepakit.backbones.backbone import build, round_size, size_multiple, start_backbone, stock_preprocess
from jepakit.backbones.embedder import Embedder, pool, pool_all, poolings_of
from jepakit.bundles.manifest import EmbeddingSpec
from jepakit.errors import BackboneError


def write(folder: Path, state: dict[str, Any], name: str = "weights.safetensors") -> str:
    file = folder / name
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return str(file)


def same_weights(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value.float(), state[key].float()) for key, value in module.state_dict().items())


def same_shapes(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(value.shape == state[key].shape for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [("safetensors", "plain"), ("safetensors", "module."), ("pth", "plain"), ("pth", "module."),
     ("pth", "state_dict"), ("pth", "model")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_weights_file_round_trips(
    weights_file: Callable[[str], Path], tmp_path: Path, name: str, suffix: str, wrap: str
) -> None:
    state = load_file(weights_file(name))
    written: dict[str, Any] = {f"module.{key}": value for key, value in state.items()} if wrap == "module." else state
    if wrap in ("state_dict", "model"):
        written = {wrap: state, "epoch": 3}
    module, described = start_backbone(name, write(tmp_path, written, f"mine.{suffix}"), None)
    assert same_weights(module, state)
    assert not module.training
    assert (described.name, described.start.source) == (name, f"file mine.{suffix}")


def test_half_precision_weights_become_float32(weights_file: Callable[[str], Path], tmp_path: Path) -> None:
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(weights_file("test_vit")).items()
    }
    module, _ = start_backbone("test_vit", write(tmp_path, state), None)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert same_weights(module, state)


def test_the_licence_is_read_from_the_files_header_else_unknown(
    weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    file = weights_file("test_vit")
    assert start_backbone("test_vit", str(file), None)[1].start.license == "cc0-1.0"
    assert start_backbone("test_vit", write(tmp_path, load_file(file)), None)[1].start.license == "unknown"
    assert start_backbone("test_vit", write(tmp_path, load_file(file), "a.pth"), None)[1].start.license == "unknown"


def test_a_classifier_in_the_file_is_dropped(tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    module, _ = start_backbone("test_resnet", write(tmp_path, whole.state_dict()), None)
    assert same_weights(module, whole.state_dict())


def test_missing_left_over_and_misshapen_tensors_are_all_listed(
    weights_file: Callable[[str], Path], tmp_path: Path
) -> None:
    state = load_file(weights_file("test_vit"))
    del state["norm.bias"]
    state["decoder.weight"] = torch.zeros(2)
    state["norm.weight"] = torch.zeros(5)
    file = write(tmp_path, state)
    with pytest.raises(BackboneError) as raised:
        start_backbone("test_vit", file, None)
    message = str(raised.value)
    assert file in message
    assert "missing: norm.bias" in message
    assert "left over: decoder.weight" in message
    assert "norm.weight [5] instead of [64]" in message


def test_a_long_list_is_cut_with_the_count(weights_file: Callable[[str], Path]) -> None:
    with pytest.raises(
        BackboneError, match=r"does not fit test_resnet: missing: .* and \d+ more; left over: .* and \d+ more"
    ):
        start_backbone("test_resnet", str(weights_file("test_vit")), None)


def test_batch_norm_counters_may_be_missing(weights_file: Callable[[str], Path], tmp_path: Path) -> None:
    state = {key: value for key, value in load_file(weights_file("test_resnet")).items() if "num_batches" not in key}
    module, _ = start_backbone("test_resnet", write(tmp_path, state), None)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


class Bomb:
    """Unpickling this runs a shell command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_pickle_bomb_does_not_go_off(weights_file: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    mark = tmp_path / "exploded"
    bomb = Bomb(mark)
    state = load_file(weights_file("test_vit"))
    torch.save(bomb if place == "whole" else {**state, "extra": bomb}, tmp_path / "bomb.pth")
    with pytest.raises(BackboneError, match="no weights that can be read safely"):
        start_backbone("test_vit", str(tmp_path / "bomb.pth"), None)
    assert not mark.exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert mark.exists(), "the bomb was a dud: this test proves nothing"


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x00" * 64])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_rubbish_is_refused_by_name(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(BackboneError, match=str(file)):
        start_backbone("test_vit", str(file), None)


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"epoch": 3}, torch.zeros(3)], ids=["list", "number", "tensor"])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(BackboneError, match="does not hold a plain state dict"):
        start_backbone("test_vit", str(tmp_path / "odd.pth"), None)


def test_a_folder_without_a_manifest_is_said_to_be_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"is a folder, but not a bundle: it has no manifest\.json; give a"):
        start_backbone("test_vit", str(tmp_path), None)


def test_without_the_hub_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(backbone_module, "_hub_in_reach", lambda repository: False)
    with pytest.raises(
        BackboneError,
        match=r"test_vit\.r160_in1k .* from https://huggingface.co/timm/test_vit.r160_in1k: on another machine run `jepakit weights fetch test_vit.r160_in1k --out FILE`, or .*, and give weights=FILE",
    ):
        start_backbone("test_vit.r160_in1k", "pretrained", 64)
    with pytest.raises(BackboneError, match="give weights=FILE"):
        jepakit.adapt(image_folder(), out=tmp_path / "run", backbone="test_vit")


def test_a_backbone_without_pretrained_weights_says_so() -> None:
    with pytest.raises(BackboneError, match=r"no pretrained weights for efficientnet_blur_b0: give weights"):
        start_backbone("efficientnet_blur_b0", "pretrained", 64)


def test_random_weights_need_no_licence_and_are_only_random_when_asked(tmp_path: Path) -> None:
    _, described = start_backbone("test_resnet", "random", 64)
    assert (described.start.source, described.start.license) == ("random", "none needed")


def test_a_vits_position_embedding_is_resampled_as_timm_does(weights_file: Callable[[str], Path]) -> None:
    file = weights_file("test_vit")
    ours, described = start_backbone("test_vit", str(file), 64)
    assert described.arguments["img_size"] == 64
    theirs = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    theirs.load_state_dict(checkpoint_filter_fn(load_file(file), theirs))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    assert ours.state_dict()["pos_embed"].shape != load_file(file)["pos_embed"].shape


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of how timm resizes
def test_relative_positions_are_resampled_as_timm_does(weights_file: Callable[[str], Path]) -> None:
    file = weights_file("test_maxvit")
    ours, _ = start_backbone("test_maxvit", str(file), 96)
    theirs = timm.create_model("test_maxvit", num_classes=0, img_size=96).eval()
    theirs.load_state_dict(maxxvit.checkpoint_filter_fn(load_file(file), theirs))
    assert same_weights(ours, theirs.state_dict())
    assert not same_shapes(ours, load_file(file))


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("convit_tiny", 256, r"pos_embed \[1, 196, 192\] instead of \[1, 256, 192\]; name .* image size where it cannot take another"),
        ("hiera_tiny_224", 256, r"pos_embed .* instead of"),
    ],
)  # fmt: skip
def test_a_backbone_that_timm_cannot_resize_says_so(tmp_path: Path, name: str, size: int, said: str) -> None:
    file = write(tmp_path, timm.create_model(name, num_classes=0).state_dict())
    with pytest.raises(BackboneError, match=rf"does not fit {name}: of another shape: {said}"):
        start_backbone(name, file, size)


def test_weights_of_another_patch_size_are_not_resampled(tmp_path: Path, weights_file: Callable[[str], Path]) -> None:
    state = load_file(weights_file("test_vit"))
    patches = state["patch_embed.proj.weight"]
    file = write(tmp_path, state | {"patch_embed.proj.weight": patches[..., ::2, ::2].contiguous()})
    with pytest.raises(BackboneError, match=r"does not fit test_vit: of another shape: patch_embed\.proj\.weight"):
        start_backbone("test_vit", file, None)


def test_what_timm_makes_of_a_file_that_it_cannot_convert_is_one_line(
    tmp_path: Path, weights_file: Callable[[str], Path]
) -> None:
    file = write(tmp_path, load_file(weights_file("test_vit")) | {"patch_embed.proj.weight": torch.zeros(3, 7)})
    with pytest.raises(BackboneError, match="does not fit test_vit, or not at this image size: RuntimeError: shape"):
        start_backbone("test_vit", file, None)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_pooling_head_is_timms_own_output_on_timms_own_normalisation(
    weights_file: Callable[[str], Path], name: str
) -> None:
    module, _ = start_backbone(name, str(weights_file(name)), None)
    spec = stock_preprocess(module, None)
    data: dict[str, Any] = resolve_data_config({}, model=module)
    assert (spec.size, spec.interpolation) == (data["input_size"][-1], data["interpolation"])
    images = torch.randint(0, 256, (3, spec.size, spec.size, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    embedder = Embedder(module, spec, EmbeddingSpec(dim=module.num_features, pooling="head", standardize="none")).eval()
    with torch.inference_mode():
        expected = module(x)
        torch.testing.assert_close(embedder(images), expected, rtol=1e-4, atol=1e-5)
        center, scale = torch.linspace(-1, 1, expected.shape[1]), torch.linspace(0.5, 2, expected.shape[1])
        shifted = EmbeddingSpec(
            dim=module.num_features, pooling="head", standardize="scale", normalize=True,
            center=tuple(center.tolist()), scale=tuple(scale.tolist()),
        )  # fmt: skip
        vectors = Embedder(module, spec, shifted).eval()(images)
    torch.testing.assert_close(vectors, nn.functional.normalize((expected - center) / scale), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_head_and_stages_of_one_pass_are_those_of_two(weights_file: Callable[[str], Path], name: str) -> None:
    module, _ = start_backbone(name, str(weights_file(name)), 64)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        both = pool_all(module, x, ("head", "stages"))
        assert all(torch.equal(vectors, pool(module, x, pooling)) for pooling, vectors in both.items())


def test_pooling_stages_is_the_mean_of_each_of_the_last_four_levels(weights_file: Callable[[str], Path]) -> None:
    module: Any = start_backbone("test_resnet", str(weights_file("test_resnet")), 64)[0]
    assert "stages" in poolings_of(module)
    seen: list[Tensor] = []
    for level in module.feature_info[-4:]:
        module.get_submodule(level["module"]).register_forward_hook(
            lambda _, __, out: seen.append(out.mean(dim=(2, 3)))
        )
    spec = stock_preprocess(module, 64)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        got = Embedder(module, spec, EmbeddingSpec(dim=1, pooling="stages", standardize="none")).eval()(images)
    torch.testing.assert_close(got, torch.cat(seen, dim=1))


def test_sizes_are_rounded_to_the_patch_or_stride() -> None:
    assert size_multiple(build("test_vit", {})) == 16
    assert size_multiple(build("test_resnet", {})) == 32
    assert [round_size(size, 14) for size in (224, 96, 100, 3)] == [224, 98, 98, 14]


def test_image_statistics_are_never_assumed() -> None:
    module = build("test_resnet", {})
    del module.pretrained_cfg["mean"]
    with pytest.raises(BackboneError, match=r"does not say how images are prepared for test_resnet \(mean missing\)"):
        stock_preprocess(module, 64)


def test_the_examples_weights_fit(mobilenet_weights: Path) -> None:
    module, described = start_backbone("mobilenetv2_100", str(mobilenet_weights), 224)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert described.start.license not in ("", "unknown")

"""The benchmark behind docs/architectures.md: what makes a row, that the page reports it faithfully, what it found."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import architectures
from architectures import BANDS, FAMILIES, Results, Row, as_json, isolated, load_results, measure, page, train, versions
from jepakit._timm_names import check_name
from jepakit.backbones.backbone import start_backbone, tensors_of
from jepakit.backbones.embedder import patch_tokens, poolings_of
from jepakit.errors import BackboneError

LISTED = [name for names in FAMILIES.values() for name in names]


def die(name: str, bands: int) -> Row:
    os._exit(7)


def hang(name: str, bands: int) -> Row:
    time.sleep(60)
    return Row(name, bands)


def answer(name: str, bands: int) -> Row:
    return Row(name, bands, relative_error=1e-7, file_mb=1.5, cpu_s=3.0, poolings=("head",), size=64)


def test_the_list_names_at_least_64_architectures_of_timm_each_once() -> None:
    assert len(LISTED) == len(set(LISTED)) >= 64
    assert set(architectures.QUICK) <= set(LISTED)
    for name in LISTED:
        check_name(name)


def test_a_backbone_that_works_is_a_row_without_a_problem() -> None:
    row = measure("test_resnet", 5)
    assert row.problem is None
    assert row.relative_error is not None
    assert row.relative_error < 1e-4
    assert (row.size, row.poolings) == (64, ("head", "stages", "mean"))


def test_agreement_of_vectors_that_hardly_differ_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "LEAST_SPREAD", 2.0)
    row = measure("test_resnet", 3)
    assert row.problem is not None
    assert row.problem.startswith("nothing is proven")


def test_what_the_product_refuses_is_told_in_its_own_words() -> None:
    assert measure("resnet_of_nowhere", 3).problem == "timm has no backbone 'resnet_of_nowhere'"


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_perturbed_weights_leave_nothing_at_one_value(name: str) -> None:
    backbone, _, spec, _ = architectures.smallest(name, 3)
    architectures.perturb(backbone, spec)
    values = backbone.state_dict()
    assert [key for key, value in values.items() if value.numel() > 1 and value.std() == 0] == []
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("broken", "problem"), [(die, "its process died, exit code 7"), (hang, "no answer within 1 s")]
)
def test_a_crash_and_no_answer_in_time_are_rows_too(broken: architectures.Measure, problem: str) -> None:
    assert isolated("test_vit", 3, measure=broken, timeout_s=30 if broken is die else 1) == Row(
        "test_vit", 3, problem=problem
    )


def test_a_row_comes_back_from_its_process() -> None:
    assert isolated("test_vit", 5, measure=answer) == answer("test_vit", 5)


def test_the_page_counts_what_works_and_says_why_the_rest_does_not() -> None:
    rows = {(name, bands): answer(name, bands) for name in ("test_vit", "vgg11", "resnet18") for bands in BANDS}
    rows["vgg11", 5] = Row("vgg11", 5, problem="it is too old")
    del rows["resnet18", 5]
    text = page(Results(versions(), rows), "python here.py")
    assert "**1 of 2 timm architectures export" in text
    assert "- `vgg11`, 5 bands: it is too old" in text
    assert "| VGG | `vgg11` | 64 | 1.0e-07 | **no** | 1.5 | 3.0 |  | head |" in text
    assert "    python here.py\n" in text
    assert "resnet18" not in text


def test_the_page_says_what_trains() -> None:
    told = {
        "test_vit": "yes",
        "resnet18": "yes, all but 1 of 60 weights moved",
        "vgg11": "RuntimeError: " + 30 * "long ",
    }
    rows = {(name, bands): answer(name, bands) for name in (*told, "vgg11_bn") for bands in BANDS}
    for name, training in told.items():
        rows[name, 3] = rows[name, 3]._replace(training=training)
    text = page(Results(versions(), rows), "python here.py")
    assert "**2 of 3 train.**" in text
    assert "| 3.0 | yes | head |" in text
    assert "| 3.0 | yes, all but 1 of 60 weights moved | head |" in text
    assert "| 3.0 | **no**: RuntimeError: long long" in text
    assert f"- `vgg11`, training: {told['vgg11']}\n" in text
    assert "| `vgg11_bn` | 64 | 1.0e-07 | 1.0e-07 | 1.5 | 3.0 |  | head |" in text


def test_two_steps_move_every_weight_and_batch_norm() -> None:
    assert isolated("test_resnet", 3, measure=train, timeout_s=240) == Row("test_resnet", 3, training="yes")


def test_what_training_refuses_is_told_in_the_product_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "TRAIN_IMAGES", 4)
    problem = train("test_resnet", 3).problem
    assert problem is not None
    assert problem.startswith("4 images are too few")


def test_stored_rows_are_added_to_unless_other_versions_measured_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    results = Results(versions(), {("vgg11", 3): answer("vgg11", 3)})
    file.write_text(as_json(results))
    assert load_results(file) == results
    file.write_text(as_json(results._replace(versions={"timm": "0.1"})))
    assert load_results(file).rows == {}


def test_a_class_that_hands_its_arguments_on_is_built_for_the_size_asked_for() -> None:
    _, described = start_backbone("deit_tiny_distilled_patch16_224", "random", 64)
    assert described.arguments == {"img_size": 64, "dynamic_img_size": True}


def test_a_layer_under_two_names_is_written_under_both() -> None:
    module = start_backbone("coat_lite_tiny", "random", 64)[0]
    written = load(save(tensors_of(module)))
    assert written.keys() == module.state_dict().keys()
    assert torch.equal(written["cpe1.proj.weight"], written["serial_blocks1.1.cpe.proj.weight"])


def test_a_backbone_that_ends_in_maps_of_several_scales_has_no_mean_pooling_and_no_tokens() -> None:
    module: Any = start_backbone("efficientvim_m1", "random", 64)[0]
    assert poolings_of(module) == ("head", "stages")
    with torch.inference_mode(), pytest.raises(BackboneError, match="EfficientViM ends in 4 maps of several scales"):
        patch_tokens(module, module.forward_features(torch.zeros(1, 3, 64, 64)))

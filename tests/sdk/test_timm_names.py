"""The recorded list of timm's names, and the message for a misspelt one."""

from __future__ import annotations

from importlib import resources

import pytest
import timm

from jepakit._timm_names import check_name, known_names, render_names
from jepakit.config import AdaptConfig
from jepakit.errors import BackboneError

RECORDED = resources.files("jepakit").joinpath("timm_names.txt").read_text()


def test_the_recorded_names_are_those_of_the_installed_timm() -> None:
    version = RECORDED.splitlines()[0].removeprefix("# timm ").split(":")[0]
    assert version == timm.__version__, "another timm is installed than was recorded: run `make timm-names`"
    assert render_names() == RECORDED, "the recorded names are out of date: run `make timm-names`"


def test_known_names_are_architectures_with_their_tags() -> None:
    names = known_names()
    assert set(names) == set(timm.list_models())
    assert "lvd142m" in names["vit_small_patch14_reg4_dinov2"]
    assert not any("." in name or name.startswith("#") for name in names)


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", AdaptConfig.model_fields["backbone"].default])
def test_names_with_and_without_a_tag_are_known(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("resnet5", "resnet50"), ("vit_smal_patch16_224", "vit_small_patch16_224"), ("Resnet18", "resnet18")],
)
def test_a_misspelt_architecture_suggests_near_ones(typo: str, meant: str) -> None:
    with pytest.raises(BackboneError, match=rf"timm has no backbone '{typo}'; did you mean .*\b{meant}\b.*\?"):
        check_name(typo)


def test_an_architecture_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(BackboneError, match=r"timm has no backbone 'qqqq'$"):
        check_name("qqqq")
    with pytest.raises(BackboneError):
        check_name("")


def test_a_wrong_tag_lists_the_right_ones() -> None:
    with pytest.raises(BackboneError, match=r"resnet18 has no weights 'in1k'; its pretrained tags: a1_in1k, a2_in1k"):
        check_name("resnet18.in1k")

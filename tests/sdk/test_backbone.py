"""The backbone that a bundle describes: built from what we write into bundles, whoever made the bundle."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from jepakit.backbones import backbone
from jepakit.backbones.backbone import _hub_in_reach, restore, start_backbone, tensors_of
from jepakit.bundles.manifest import Backbone, StartWeights
from jepakit.errors import BackboneError

RANDOM = StartWeights(source="random", license="none needed")


def described(name: str, **arguments: Any) -> Backbone:
    return Backbone(name=name, arguments=arguments, start=RANDOM)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (described("hf-hub:someone/x"), "timm has no backbone 'hf-hub:someone/x'"),
        (described("local-dir:/tmp/x"), "timm has no backbone 'local-dir:/tmp/x'"),
        (
            described("test_vit", checkpoint_path="/tmp/x.pth"),
            "with 'checkpoint_path', which jepakit never writes into a bundle",
        ),
        (described("test_vit", pretrained_cfg="x"), "with 'pretrained_cfg', which jepakit never writes into a bundle"),
    ],
)
def test_what_a_strangers_bundle_may_not_ask_of_timm_is_refused_before_timm_sees_it(
    backbone: Backbone, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(BackboneError, match=re.escape(message)):
        restore(backbone, {})


@pytest.mark.parametrize(
    "backbone",
    [described("test_resnet", img_size=64), described("test_vit", img_size=-1), described("test_vit", in_chans="3")],
)
def test_what_timm_cannot_build_is_told_with_its_reason(backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match=rf"timm cannot build {backbone.name} as the bundle says, with .*: .+; get"):
        restore(backbone, {})


@pytest.mark.parametrize(("name", "bands"), [("test_vit", 3), ("test_vit", 4), ("test_resnet", 1)])
def test_what_we_build_is_built_again_from_its_description(name: str, bands: int) -> None:
    module, backbone = start_backbone(name, "random", 64, bands)
    before = torch.random.get_rng_state()
    again = restore(backbone, tensors_of(module))
    assert torch.equal(torch.random.get_rng_state(), before), "a caller's seed is for the caller"
    assert all((value == again.state_dict()[key]).all() for key, value in module.state_dict().items())


def test_a_download_tells_nothing_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave the hub's own bars and log switched off."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    logger, seen = logging.getLogger("huggingface_hub"), list[str]()

    def build(*_: Any, **settings: Any) -> SimpleNamespace:
        if settings.get("pretrained"):
            seen.append(build_hf_headers()["user-agent"])
            assert (logger.level, are_progress_bars_disabled()) == (logging.ERROR, True)
        return SimpleNamespace(pretrained_cfg={"hf_hub_id": "nobody/nothing"})

    monkeypatch.setattr(backbone, "build", build)
    monkeypatch.setattr(timm, "create_model", build)
    monkeypatch.setattr(backbone, "_hub_in_reach", lambda _: True)
    before = logger.level, are_progress_bars_disabled(), constants.HF_HUB_DISABLE_TELEMETRY
    assert "torch/" in build_hf_headers()["user-agent"]
    backbone._build_pretrained("resnet18", {})
    assert len(seen) == 1
    assert "torch/" not in seen[0]
    assert (logger.level, are_progress_bars_disabled(), constants.HF_HUB_DISABLE_TELEMETRY) == before


def test_a_machine_that_is_to_be_offline_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("the hub is asked"))
    assert not _hub_in_reach("nobody/nothing")

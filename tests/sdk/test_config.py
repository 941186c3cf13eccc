"""Settings: wherever they come from, a wrong one gives one clear line before anything heavy is imported."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from jepakit._explain import parse
from jepakit._frontdoor import export
from jepakit._messages import did_you_mean
from jepakit.config import (
    DEFAULT_STEPS,
    LAMBDA_PER_VIEW,
    LAYER_DECAY,
    LOCAL_SHARE,
    LR_CONVNET,
    LR_SCRATCH,
    LR_VIT,
    PRESETS,
    RAMP_STEPS,
    AdaptConfig,
    Domain,
    ExportConfig,
    ViewsConfig,
)
from jepakit.errors import BackboneError, ConfigError


def _power(rate: float) -> str:
    """5e-4, as the settings write it."""
    return f"{rate:.0e}".replace("e-0", "e-")


def adapt(**settings: Any) -> AdaptConfig:
    return parse(AdaptConfig, {"images": "scans", **settings})


def complaint(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        adapt(**settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("table.csv", "manifest.json"):
        (tmp_path / name).touch()
    config = adapt(weights="~", labels="~/table.csv", group=Path("~/table.csv"), cache="~/cache")
    assert config.weights == str(tmp_path)
    assert config.labels == config.group == str(tmp_path / "table.csv")
    assert config.cache == str(tmp_path / "cache")
    with pytest.raises(BackboneError, match=f"^{tmp_path}/weights.pth does not exist"):
        export("test_vit:~/weights.pth", "~/bundle")


def test_only_images_are_needed() -> None:
    config = adapt()
    assert config.images == "scans"
    assert config.backbone == "vit_small_patch14_reg4_dinov2.lvd142m"
    assert config.weights == "pretrained"
    assert config.image_size == 224
    with pytest.raises(ConfigError, match="setting 'images' is missing"):
        parse(AdaptConfig, {})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("stpes", "steps"),
        ("batchsize", "batch_size"),
        ("learning_rate", None),
        ("domian", "domain"),
        ("backbon", "backbone"),
    ],
)
def test_a_misspelt_setting_suggests_the_right_one(typo: str, meant: str | None) -> None:
    message = complaint(**{typo: 1})
    assert f"unknown setting '{typo}'" in message
    if meant:
        assert f"did you mean {meant}" in message


def test_a_setting_in_another_group_than_its_own_is_told_where_it_belongs() -> None:
    assert "unknown setting 'n_local'; did you mean views.n_local?" in complaint(n_local=6)
    assert "unknown setting 'views.steps': steps is no part of views; in a TOML file, write it above" in complaint(
        views={"steps": 6}
    )


@pytest.mark.parametrize(
    ("typo", "meant"), [("brightnes", "brightness"), ("n_locl", "n_local"), ("vertical_flips", "vertical_flip")]
)
def test_a_misspelt_setting_of_the_views_suggests_one_of_the_views(typo: str, meant: str) -> None:
    message = complaint(views={typo: 0.1})
    assert f"unknown setting 'views.{typo}'" in message
    assert f"did you mean views.{meant}" in message
    assert "did you mean" not in complaint(views={"mirror": 0.1}), "nothing is like it but for the group"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"domain": "histolgy"}, ["domain = 'histolgy'", "did you mean histology?", "'general', 'natural'"]),
        ({"backbone": "resnet5"}, ["timm has no backbone 'resnet5'", "did you mean resnet50"]),
        ({"backbone": "vit_small_patch14_reg4_dinov2.lvd"}, ["has no weights 'lvd'", "lvd142m"]),
        ({"weights": "nowhere.pth"}, ["weights = 'nowhere.pth'", "no such file"]),
        ({"pooling": "haed"}, ["pooling = 'haed'", "'auto' or 'head', 'stages'", "did you mean head?"]),
        ({"labels": "yes"}, ["labels = 'yes'", "no such file", "folder"]),
        ({"lr": 0}, ["lr = 0", "greater than 0"]),
        ({"lr": float("nan")}, ["lr = nan"]),
        ({"lamb": 1}, ["lamb = 1", "less than 1"]),
        ({"batch_size": 1}, ["batch_size = 1", "greater than or equal to 2"]),
        ({"image_size": 8}, ["image_size = 8"]),
        ({"steps": 2.5}, ["steps = 2.5: input should be a whole number"]),
        (
            {"unfreeze": "last2"},
            ["unfreeze = 'last2': input should be 'auto', 'none' or 'all' or a whole number or 'lora'"],
        ),
        (
            {"unfreeze": {"a": 1}},
            ["unfreeze = {'a': 1}: input should be 'auto', 'none' or 'all' or a whole number or 'lora'"],
        ),
        ({"compile": "maybe"}, ["compile = 'maybe': input should be true or false"]),
        ({"projector": "1024,64"}, ["projector = '1024,64': input should be a list"]),
        ({"views": 6}, ["views = 6: input should be a group of settings, each set by its own name"]),
        ({"views": {"global_area": [0.3]}}, ["views.global_area = [0.3]: input should be a list like the default"]),
        ({"steps": "many"}, ["steps = 'many'"]),
        ({"held_out": 1}, ["held_out = 1"]),
        ({"views": {"blur": 2}}, ["views.blur = 2", "less than or equal to 1"]),
        ({"views": 3}, ["views = 3"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_its_setting_and_what_is_wanted(
    settings: dict[str, Any], expected: list[str]
) -> None:
    message = complaint(**settings)
    for part in expected:
        assert part in message


def test_files_are_named_by_text_or_paths(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "table.csv").touch()
    config = adapt(weights=tmp_path / "w.safetensors", labels=tmp_path / "table.csv", group=tmp_path / "table.csv")
    assert (config.weights, config.labels) == (str(tmp_path / "w.safetensors"), str(tmp_path / "table.csv"))
    assert parse(ExportConfig, {"source": "x:random", "out": "y", "verify_images": tmp_path}).verify_images == str(
        tmp_path
    )


def test_steps_and_epochs_are_not_given_both() -> None:
    assert complaint(steps=10, epochs=1) == "give steps or epochs, not both"
    for name, value in (("average", "ema"), ("mix", 0.5), ("anchor", 1.0)):
        wanted = f"{name} = {value} for a backbone that unfreeze = none"
        assert complaint(**{name: value, "unfreeze": "none"}).startswith(wanted)
    assert adapt(steps=10).steps == 10
    assert adapt(epochs=2).epochs == 2


@pytest.mark.parametrize(
    ("settings", "start"),
    [({"unfreeze": "al"}, "unfreeze = 'al':"), ({"unfreeze": 0}, "unfreeze = 0:"), ({"images": 5}, "images = 5:")],
)
def test_a_setting_of_several_types_is_named_as_the_user_knows_it(settings: dict[str, Any], start: str) -> None:
    message = complaint(**settings)
    assert message.startswith(start)
    assert "constrained" not in message
    assert "literal[" not in message
    assert "tuple[" not in message


def test_every_complaint_is_told_at_once() -> None:
    message = complaint(lr=-1, surprise=3, steps=0)
    for part in ("lr = -1", "'surprise'", "steps = 0"):
        assert part in message


def test_a_long_value_does_not_drown_the_message() -> None:
    assert len(complaint(images=[*(f"scans/{i:05}.png" for i in range(5000)), 3])) < 1000


@pytest.mark.parametrize(
    "settings",
    [
        {"views": {"global_area": [0.9, 0.3]}},
        {"views": {"local_area": [0.0, 0.0]}},
        {"projector": [0, -1, 64]},
        {"seed": -1},
        *({name: float("inf")} for name in ("lr", "anchor", "weight_decay", "clip_norm", "cache_gb", "save_every_s")),
        {"value_range": [0, float("nan")]},
        {"images": ""},
    ],
    ids=str,
)
def test_values_that_training_could_not_use_are_refused_here(settings: dict[str, Any]) -> None:
    (name,) = settings
    assert complaint(**settings).startswith(name)


def test_a_setting_that_is_wrong_fails_before_torch_or_timm_is_imported() -> None:
    program = """
import sys
import jepakit
try:
    jepakit.adapt("nowhere", backbone="resnet5")
except jepakit.JepakitError as error:
    assert error.exit_code == 2
    assert "did you mean" in str(error)
assert not {"torch", "timm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_values_come_as_toml_gives_them(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    config = parse(
        AdaptConfig,
        tomllib.loads(f"""
            images = ["a.png", "b.png"]
            weights = "{tmp_path / "weights.safetensors"}"
            backbone = "resnet18"
            domain = "satellite"
            unfreeze = 2
            lr = 1
            save_every_s = 60
            projector = [64, 64, 16]
            [views]
            n_local = 0
            global_area = [0.4, 1]
            quarter_turns = false
        """),
    )
    assert config.images == ("a.png", "b.png")
    assert config.projector == (64, 64, 16)
    assert config.views.global_area == (0.4, 1.0)
    assert (config.unfreeze, config.lr, config.save_every_s) == (2, 1.0, 60.0)
    assert config.resolved_views().quarter_turns is False


def test_values_come_as_a_command_line_gives_them() -> None:
    config = adapt(steps="10", lr="1e-4", unfreeze="3", views={"quarter_turns": "true"})
    assert (config.steps, config.lr, config.unfreeze, config.views.quarter_turns) == (10, 1e-4, 3, True)
    assert adapt(trackers="tensorboard").trackers == ("tensorboard",)


def test_a_config_survives_its_own_dump() -> None:
    config = adapt(domain="histology", steps=5, views={"blur": 0.1})
    assert parse(AdaptConfig, config.model_dump()) == config
    assert AdaptConfig.model_validate_json(config.model_dump_json()) == config


def test_configs_are_frozen() -> None:
    config = adapt()
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.views.blur = 0.5  # type: ignore[misc]


def test_every_domain_has_a_preset_of_settings_that_exist() -> None:
    assert set(PRESETS) == set(get_args(Domain))
    for preset in PRESETS.values():
        ViewsConfig(**preset)


@pytest.mark.parametrize("domain", get_args(Domain))
def test_a_domain_fills_in_the_views(domain: Domain) -> None:
    resolved = adapt(domain=domain).resolved_views()
    for name, value in PRESETS[domain].items():
        assert getattr(resolved, name) == value
    assert resolved.n_local == ViewsConfig().n_local


def test_what_the_user_sets_wins_over_the_domain_even_at_the_default_value() -> None:
    assert ViewsConfig().brightness == 0.3
    resolved = adapt(domain="natural", views={"brightness": 0.3, "n_local": 2}).resolved_views()
    assert (resolved.brightness, resolved.contrast, resolved.n_local) == (0.3, 0.4, 2)


@pytest.mark.parametrize("views", [{}, {"brightness": 0.3, "vertical_flip": 0.0, "local_size": 48}], ids=str)
@pytest.mark.parametrize("domain", get_args(Domain))
def test_resolved_settings_read_back_are_the_same_views(domain: Domain, views: dict[str, Any]) -> None:
    config = adapt(domain=domain, views=views)
    again = parse(AdaptConfig, config.resolved().model_dump(exclude_none=True))
    assert again.resolved_views() == config.resolved_views() == config.resolved().views
    assert again == config.resolved() == config.resolved().resolved()


def test_presets_keep_what_a_domains_signal_is() -> None:
    assert adapt(domain="radiology").resolved_views().horizontal_flip == 0, "the heart lies on the left"
    for domain in set(get_args(Domain)) - {"natural"}:
        assert adapt(domain=domain).resolved_views().hue == 0, "a stain's colour means something"


@pytest.mark.parametrize("settings", [{"wich": "last"}, {"which": "first"}, {"opset": 3}, {"pooling": "max"}], ids=str)
def test_export_settings_are_checked_the_same_way(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse(ExportConfig, {"source": "runs/x", "out": "bundles/x", **settings})


@pytest.mark.parametrize("name", ["a b", "../x", "", ".hidden"])
def test_a_bundle_name_that_no_manifest_takes_is_refused_before_the_export(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse(ExportConfig, {"source": "runs/x", "out": "bundles/x", "name": name})


def test_did_you_mean_is_silent_when_nothing_is_near() -> None:
    assert did_you_mean("zzz", ["steps", "epochs"]) == ""
    assert did_you_mean("epoch", ["steps", "epochs"]) == "; did you mean epochs?"


@pytest.mark.parametrize("setting", ["labels", "group"])
def test_a_file_that_is_no_table_is_refused_with_the_other_settings(tmp_path: Path, setting: str) -> None:
    for name in ("labels.txt", "labels.csv"):
        (tmp_path / name).write_text("path,label\n")
    assert "no table; give a CSV" in complaint(**{setting: str(tmp_path / "labels.txt")})
    assert getattr(adapt(**{setting: str(tmp_path / "labels.csv")}), setting) == str(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        (AdaptConfig, "steps", f"{DEFAULT_STEPS} or one epoch"),
        (AdaptConfig, "lamb", f"{LAMBDA_PER_VIEW} times the number of views"),
        (AdaptConfig, "layer_decay", f"None: {LAYER_DECAY} where"),
        (AdaptConfig, "lr", f"{_power(LR_SCRATCH)} from random weights, else {_power(LR_CONVNET)} for a ConvNet"),
        (AdaptConfig, "lr", f"{_power(LR_VIT)} for a ViT"),
        (AdaptConfig, "lr", f"Up over {RAMP_STEPS} steps"),
        (ViewsConfig, "local_size", f"{LOCAL_SHARE * 224:g}/224 of the image size"),
    ],
)
def test_a_setting_says_what_its_default_of_none_stands_for(settings: Any, name: str, words: str) -> None:
    assert words in settings.model_fields[name].description


@pytest.mark.parametrize("given", [["a", "b"], {"0.png": "a"}, np.array(["a"])], ids=["list", "dict", "array"])
def test_labels_and_groups_that_are_given_themselves_are_told_where_they_go(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"labels of your own go with the images, list\(zip\(images, labels\)\), or into a CSV"
    ):
        adapt(labels=given)
    with pytest.raises(ConfigError, match=r"groups of your own go into a CSV of path \(0, 1, … .*\) and group"):
        adapt(group=given)


def settings_of_the_page() -> dict[str, str]:
    """The rows of the table in docs/training.md: each setting and its documented default."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    found: dict[str, str] = {}
    for row in re.findall(r"^\| (`.+) \| (.+) \| .+ \|$", page.partition("## Every setting")[2], re.MULTILINE):
        names = row[0].split(", ")
        defaults = row[1].split("; ") if len(names) > 1 else [row[1]]
        found |= zip(names, defaults * (len(names) // len(defaults)), strict=True)
    return {name.strip("`"): default for name, default in found.items()}


def test_the_page_on_training_has_every_setting_with_its_default() -> None:
    said = settings_of_the_page()
    fields = {name: field.default for name, field in AdaptConfig.model_fields.items() if name != "views"}
    fields |= {f"views.{name}": field.default for name, field in ViewsConfig.model_fields.items()}
    assert set(said) == set(fields)
    for name, default in fields.items():
        if default is not None and default != () and name != "images":
            value = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert said[name] == f"`{value.lower() if isinstance(default, bool) else value}`", name


@pytest.mark.parametrize("kind", [AdaptConfig, ViewsConfig, ExportConfig])
def test_help_explains_every_setting(kind: type[BaseModel]) -> None:
    told = inspect.getdoc(kind) or ""
    for name, field in kind.model_fields.items():
        described = " ".join((field.description or "").split())
        assert re.search(rf"{name}  \((required|default: .+)\)\n +{re.escape(described)}(\n|$)", told), name
    assert kind is not AdaptConfig or "image_size  (default: 224)" in told


def test_true_is_no_number() -> None:
    for name in ("steps", "unfreeze", "lr"):
        with pytest.raises(
            ConfigError, match=f"{name} = True: true and false are only for settings that are on or off"
        ):
            parse(AdaptConfig, {"images": "x", name: True})
    with pytest.raises(
        ConfigError, match=r"views\.n_local = True: true and false are only for settings that are on or off"
    ):
        parse(AdaptConfig, {"images": "x", "views": {"n_local": True}})


def test_a_folder_of_weights_is_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run': a folder, but not a bundle \(it has no manifest\.json\)$"):
        parse(AdaptConfig, {"images": "x", "weights": str(tmp_path / "run")})
    (tmp_path / "run" / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a bundle .*: do you mean .*run/bundle\?$"):
        parse(AdaptConfig, {"images": "x", "weights": str(tmp_path / "run")})

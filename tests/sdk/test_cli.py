"""The command line: any file or class name can be shown, and what needs no extra asks for none."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import jepakit
from jepakit import Embeddings
from jepakit._extras import NEEDS
from jepakit._files import making_folder
from jepakit.cli import app, main
from jepakit.cli.settings import settings_of
from jepakit.cli.vectors import _comparable
from jepakit.config import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_STEPS,
    LAMBDA_PER_VIEW,
    LR_CONVNET,
    LR_SCRATCH,
    LR_VIT,
    AdaptConfig,
    ExportConfig,
)
from jepakit.errors import ConfigError, DataError
from jepakit.sources import gather
from jepakit_service.settings import ServeSettings

NOT_UTF_8 = os.fsdecode(b"gr\xf6\xdfe.png")
# As where none of the service's packages is installed.
WITHOUT_SERVE = f"""
import sys
sys.modules.update(dict.fromkeys({NEEDS["serve"]}))
from jepakit.cli import main
sys.argv[0] = "jepakit"
main()
"""


# Defaults that are None, or that a command has for itself.
DEFAULTS_IN_WORDS = {
    "adapt": {
        "out": "runs/<folder>-<date>",
        "steps": f"{DEFAULT_STEPS}, or one epoch if that is more",
        "processes": "one per GPU, else 1",
        "lamb": f"{LAMBDA_PER_VIEW} times the number of views, more for batches below {DEFAULT_BATCH_SIZE}",
        "lr": f"{LR_VIT:.0e} for a ViT, {LR_CONVNET:.0e} for a ConvNet or Swin; {LR_SCRATCH:.0e} from random weights".replace(
            "e-0", "e-"
        ),
        "workers": "cores minus one, at most 8, with a GPU at most 16",
    },
    "inspect": {"domain": "the suggested one"},
    "export": {
        "name": "the folder's",
        "pooling": "head",
        "standardize": "a run's or bundle's own",
        "verify_images": "golden inputs",
    },
    "serve": {"proxy": "haproxy on Linux"},
}


def run(*arguments: str | Path) -> str:
    """What `jepakit …` prints; it must succeed."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, f"{done.stderr}\n{done.exception}"
    return done.stdout


OF_THE_COMMAND = {"config", "set_", "dry_run", "as_json", "vary", "sheet", "print_config", "new_key", "no_ray"}
"""Options that are no settings of what a command calls; --no-ray is one by another name."""


@pytest.mark.parametrize("name", ["adapt", "sweep", "inspect", "export", "serve"])
def test_every_option_reaches_what_the_command_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Called(Exception):  # noqa: N818 (no error)
        pass

    def called(*given: Any, **settings: Any) -> None:
        raise Called(settings | (given[0] if name == "serve" else dict(zip(("source", "out"), given, strict=False))))

    monkeypatch.setattr(f"jepakit._frontdoor.{name}", called)
    types = get_type_hints(
        next(call for one in app.registered_commands if (call := one.callback) and call.__name__ == name)
    )
    words, expected = ["--vary", "lamb=1,2"] if name == "sweep" else [], dict[str, Any]()
    for option in typer.main.get_command(app).commands[name].params:  # type: ignore[attr-defined]
        if option.name not in types.keys() - OF_THE_COMMAND or not option.opts[0].startswith("--"):
            continue
        kind, number = types[option.name], len(expected) + 1
        if bool in (kind, *get_args(kind)):
            words, expected[option.name] = [*words, option.opts[0]], True
        else:
            value = next((of(number) for of in (int, float) if of in (kind, *get_args(kind))), f"a-{option.name}")
            words += [option.opts[0], str(value)]
            expected[option.name] = (value,) if option.multiple else value
    with pytest.raises(Called) as caught:
        CliRunner().invoke(app, [name, "images", *words], catch_exceptions=False)
    (settings,) = caught.value.args
    assert {key: settings.get(key) for key in expected} == expected


def run_alone(
    *arguments: str | Path, program: str = "from jepakit.cli import main; main()", encoding: str = "utf-8"
) -> str:
    """The same in a process of its own, on a terminal with that encoding; its exit code must be 0."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(encoding)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it as it is in `--out=~/probe.safetensors`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    vectors = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    Embeddings(vectors, "0" * 16, tuple(map(str, range(20))), ("cat",) * 10 + ("dog",) * 10).save("~/e.npz")
    run("probe", "fit", "~/e.npz", "--kind=knn", "--out=~/probes/p.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npz", "probes"]
    assert (tmp_path / "probes/p.safetensors").is_file()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_encoding_shows_any_name_once_the_work_is_done(tmp_path: Path, encoding: str) -> None:
    vectors = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    ids = (NOT_UTF_8, *map(str, range(19)))
    Embeddings(vectors, "0" * 16, ids, ("猫",) * 10 + ("dog",) * 10).save(tmp_path / "e.npz")
    probe = tmp_path / os.fsdecode(b"\xf6.safetensors")
    assert r"\udcf6.safetensors: knn probe, 2 classes, fitted on 20 images" in run_alone(
        "probe", "fit", tmp_path / "e.npz", "--kind", "knn", "--out", probe, encoding=encoding
    )
    told = run_alone("probe", "predict", probe, tmp_path / "e.npz", encoding=encoding).splitlines()
    assert len(told) == 20
    cat = "猫" if encoding == "utf-8" else r"\u732b"
    assert told[0] == rf"gr\udcf6\udcdfe.png	{cat}	1.0000"


def test_classes_of_a_probe_can_count_alike_and_all_probabilities_be_printed(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    labels = ("good",) * 50 + ("crack",) * 10
    Embeddings(vectors, "0" * 16, tuple(map(str, range(60))), labels).save(tmp_path / "e.npz")
    run("probe", "fit", tmp_path / "e.npz", "--class-weight", "balanced", "--out", tmp_path / "p.safetensors")
    probe = jepakit.load_probe(tmp_path / "p.safetensors")
    assert probe.get_params()["class_weight"] == "balanced"
    head, *rows = run("probe", "predict", tmp_path / "p.safetensors", tmp_path / "e.npz", "--all").splitlines()
    assert head == "id\tcrack\tgood"
    table = np.array([row.split("\t") for row in rows], float)
    np.testing.assert_allclose(table[:, 1:], probe.predict_proba(vectors), atol=1e-4)
    run(
        "probe", "fit", tmp_path / "e.npz", "--kind=knn", "--class-weight=balanced", "--out", tmp_path / "b.safetensors"
    )
    assert jepakit.load_probe(tmp_path / "b.safetensors").get_params()["class_weight"] == "balanced"
    with pytest.raises(AssertionError, match=r"--group g\.csv is for linear probes, but this one is knn"):
        run("probe", "fit", tmp_path / "e.npz", "--kind=knn", "--group=g.csv", "--out", tmp_path / "k")
    with pytest.raises(AssertionError, match="-k 3 is for knn probes, but this one is linear"):
        run("probe", "fit", tmp_path / "e.npz", "-k", "3", "--out", tmp_path / "k")
    with pytest.raises(AssertionError, match="class_weight = 'even': give 'balanced' or None"):
        run("probe", "fit", tmp_path / "e.npz", "--class-weight=even", "--out", tmp_path / "k")


def test_a_probe_judged_by_what_it_was_fitted_on_says_so(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    vectors[:10] += 3
    Embeddings(vectors, "0" * 16, tuple(map(str, range(20))), ("cat",) * 10 + ("dog",) * 10).save(tmp_path / "e.npz")
    told = run("probe", "fit", tmp_path / "e.npz", "--out", tmp_path / "p.safetensors")
    assert "linear probe, 2 classes, fitted on 20 images; balanced accuracy in cross-validation" in told
    judged = ("probe", "evaluate", tmp_path / "p.safetensors", tmp_path / "e.npz")
    assert "fitted on the vectors of 20 of these 20 images" in run(*judged)
    as_json = json.loads(run(*judged, "--json"))
    assert (as_json["n"], as_json["n_fitted_on"], as_json["n_per_class"]) == (20, 20, {"cat": 10, "dog": 10})


def test_ctrl_c_ends_a_command_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jepakit.doctor.examine", interrupted)
    monkeypatch.setattr(sys, "argv", ["jepakit", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_probe_in_the_shell_has_the_settings_of_one_in_python(tmp_path: Path) -> None:
    vectors = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    Embeddings(vectors, "0" * 16, tuple(map(str, range(20))), ("cat",) * 10 + ("dog",) * 10).save(tmp_path / "e.npz")
    run("probe", "fit", tmp_path / "e.npz", "--kind=knn", "-k", "3", "--out", tmp_path / "k.safetensors")
    run("probe", "fit", tmp_path / "e.npz", "-C", "0.5", "--seed", "2", "--out", tmp_path / "l.safetensors")
    assert jepakit.load_probe(tmp_path / "k.safetensors").get_params() == {"k": 3, "class_weight": None}
    assert jepakit.load_probe(tmp_path / "l.safetensors").get_params() == {"C": 0.5, "seed": 2, "class_weight": None}


def test_a_probe_replaces_a_probe_and_no_other_file(tmp_path: Path) -> None:
    Embeddings(np.eye(20, 3), "m", map(str, range(20)), ["a", "b"] * 10).save(tmp_path / "e.npz")
    out = tmp_path / "p.safetensors"
    for _ in range(2):
        run("probe", "fit", tmp_path / "e.npz", "--kind=knn", "--out", out)
    save_file({"conv_stem.weight": np.ones(3)}, out)
    with pytest.raises(AssertionError, match="is no probe, but may be a model's weights: name another file"):
        run("probe", "fit", tmp_path / "e.npz", "--kind=knn", "--out", out)
    assert load_file(out).keys() == {"conv_stem.weight"}


def test_rows_stay_rows_whatever_names_hold(tmp_path: Path) -> None:
    ids = ("x\ny.png", "p\tq.png", 'say "a".png')
    Embeddings(np.eye(3, dtype=np.float32), "0" * 16, ids, ("cat", "dog", "a\tb")).save(tmp_path / "e.npz")
    run("probe", "fit", tmp_path / "e.npz", "--kind=knn", "--out", tmp_path / "p.safetensors")
    for command, length in (
        (("nearest", tmp_path / "e.npz", tmp_path / "e.npz", "-k", "1"), 4),
        (("probe", "predict", tmp_path / "p.safetensors", tmp_path / "e.npz"), 3),
        (("probe", "predict", tmp_path / "p.safetensors", tmp_path / "e.npz", "--all"), 4),
    ):
        rows = list(csv.reader(io.StringIO(run(*command), newline=""), delimiter="\t"))
        assert [row[0] for row in rows if row[0] != "id"] == list(ids)
        assert {len(row) for row in rows} == {length}


def test_a_runtime_is_chosen_for_a_bundle_alone(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match="--threads is for a bundle in this process; a service has its own setting"
    ):
        run("embed", tmp_path, "--url", "http://127.0.0.1:1", "--threads", "1", "--out", tmp_path / "e.npz")
    with pytest.raises(AssertionError, match="is not a bundle"):
        run("embed", tmp_path, "--bundle", tmp_path, "--provider", "cpu", "--out", tmp_path / "e.npz")


def test_a_probe_in_the_shell_keeps_the_tiles_of_a_slide_on_one_side_of_every_fold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    slides = [f"s#{number}.svs" for number in range(12)]
    ids = tuple(f"{slide}#{left},0,32,32" for slide in slides for left in range(0, 160, 32))
    own = np.repeat(
        random.standard_normal((12, 8)), 5, axis=0
    )  # a slide's tiles are alike, and say nothing of the class
    vectors = (own + 0.1 * random.standard_normal((60, 8))).astype(np.float32)
    Embeddings(vectors, "0" * 16, ids, tuple("ab"[number % 2] for number in range(12) for _ in range(5))).save(
        tmp_path / "e.npz"
    )
    rows = [f"{slide},patient{number // 2}" for number, slide in enumerate(slides)]
    (tmp_path / "g.csv").write_text("\n".join(["path,patient", *rows]))
    run("probe", "fit", tmp_path / "e.npz", "--group", tmp_path / "g.csv", "--out", tmp_path / "p.safetensors")
    groups = [number // 2 for number in range(12) for _ in range(5)]
    expected = jepakit.LinearProbe().fit(Embeddings.load(tmp_path / "e.npz"), groups=groups)
    probe = jepakit.load_probe(tmp_path / "p.safetensors")
    assert isinstance(probe, jepakit.LinearProbe)
    saved = Embeddings.load(tmp_path / "e.npz")
    by_slide = jepakit.LinearProbe().fit(saved, groups=[number for number in range(12) for _ in range(5)])
    assert jepakit.LinearProbe().fit(saved).C_ == by_slide.C_, "tiles of a slide are one group by themselves"
    assert probe.C_ == expected.C_ != jepakit.LinearProbe().fit(saved.vectors, saved.labels).C_
    (tmp_path / "few.csv").write_text("\n".join(["path,patient", *rows[1:]]))
    with pytest.raises(AssertionError, match=r"s#0\.svs is not in .*few\.csv \(5 of 60 images are not\)"):
        run("probe", "fit", tmp_path / "e.npz", "--group", tmp_path / "few.csv", "--out", tmp_path / "k")
    with pytest.raises(AssertionError, match="embeddings carry no groups: give a CSV, TSV or Parquet file"):
        run("probe", "fit", tmp_path / "e.npz", "--group", "auto", "--out", tmp_path / "k.safetensors")


def test_labels_that_come_later_need_no_new_embedding(tmp_path: Path) -> None:
    random, names = np.random.default_rng(0), [f"{number}.png" for number in range(40)]
    vectors = (random.standard_normal((40, 8)) + 3 * (np.arange(40) % 2)[:, None]).astype(np.float32)
    Embeddings(vectors, "0" * 16, tuple(names), tuple(f"P{number % 4}" for number in range(40))).save(
        tmp_path / "e.npz"
    )
    rows = [f"{name},{'ab'[number % 2]}" for number, name in enumerate(names[:30])]
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *rows]))
    later = ("--labels", tmp_path / "l.csv")
    done = run("probe", "fit", tmp_path / "e.npz", *later, "--out", tmp_path / "p.safetensors")
    assert "2 classes, fitted on 30 images" in done
    probe = jepakit.load_probe(tmp_path / "p.safetensors")
    expected = jepakit.LinearProbe().fit(vectors[:30], ["ab"[number % 2] for number in range(30)])
    np.testing.assert_allclose(probe.predict_proba(vectors), expected.predict_proba(vectors), atol=1e-6)
    report = json.loads(run("probe", "evaluate", tmp_path / "p.safetensors", tmp_path / "e.npz", *later, "--json"))
    assert set(report["per_class"]) == {"a", "b"}
    for wrong in ("auto", "nothere.csv"):
        with pytest.raises(AssertionError, match=f"labels = '{wrong}': give a CSV, TSV or Parquet file"):
            run("probe", "fit", tmp_path / "e.npz", "--labels", wrong, "--out", tmp_path / "k.safetensors")


def test_keys_are_made_without_the_services_packages(tmp_path: Path) -> None:
    told = run_alone("serve", "--new-key", "lab", "--api-key-file", tmp_path / "keys", program=WITHOUT_SERVE)
    assert told.startswith("key for clients")
    assert (tmp_path / "keys").read_text().startswith("lab:")
    run_alone("serve", "--new-key", "office", "--api-key-file", tmp_path / "keys", program=WITHOUT_SERVE)
    assert "older" not in told
    again = run_alone("serve", "--new-key", "lab", "--api-key-file", tmp_path / "keys", program=WITHOUT_SERVE)
    assert again.splitlines()[-1].startswith("older keys named 'lab'")
    assert again.splitlines()[-1].endswith(": 1")


def test_a_bundle_is_deployed_without_the_services_packages(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"error: {tmp_path} is not a bundle"):
        run_alone("deploy", tmp_path, tmp_path, program=WITHOUT_SERVE)


def test_a_model_is_chosen_of_a_service_alone_and_a_file_is_what_its_name_says(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--model x chooses among a service's models"):
        run("embed", tmp_path, "--bundle", tmp_path, "--model", "x", "--out", tmp_path / "e.npz")
    with pytest.raises(AssertionError, match=r"e.csv: the output is a .npz file"):
        run("embed", tmp_path, "--bundle", tmp_path, "--out", tmp_path / "e.csv")
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    with pytest.raises(AssertionError, match=r"images\.npz exists and holds no embeddings"):
        run("embed", tmp_path, "--bundle", tmp_path, "--out", tmp_path / "images.npz")


def test_a_glob_that_the_shell_has_resolved_is_a_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.png", "b.png", "c.png")
    for name in names:
        Image.effect_noise((40, 40), 50).save(tmp_path / name)
    given: list[Any] = []
    monkeypatch.setattr("jepakit._frontdoor.inspect", lambda images, **_: given.extend(images))
    run("inspect", *sorted(tmp_path.glob("?.png")))
    assert given == [str(tmp_path / name) for name in names]
    with pytest.raises(
        AssertionError, match=r"is a folder: give its images, or the folder by itself \(1 of 2 files are missing\)"
    ):
        run("embed", tmp_path / "a.png", tmp_path, "--url", "http://127.0.0.1:1", "--out", tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("command", "settings"),
    [("adapt", AdaptConfig), ("inspect", AdaptConfig), ("export", ExportConfig), ("serve", ServeSettings)],
)
def test_a_default_that_the_help_names_is_the_settings_own(command: str, settings: Any) -> None:
    commands: Any = typer.main.get_command(app)
    named = {
        option.name: found[1]
        for option in commands.commands[command].params
        if (found := re.search(r"\[([^\[]+)\]$", option.help or ""))
    }
    in_words = DEFAULTS_IN_WORDS[command]
    assert named == {name: str(settings.model_fields[name].default) for name in named} | in_words


def test_every_option_of_adapt_export_and_serve_has_a_help() -> None:
    commands: Any = typer.main.get_command(app)
    options = [option for name in ("adapt", "inspect", "export", "serve") for option in commands.commands[name].params]
    assert [option.name for option in options if not re.match(r"[^\[]", option.help or "")] == []


def test_set_wins_over_an_option_and_an_option_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("steps = 1\nseed = 1\nlr = 1\n[views]\nn_local = 1\n")
    made = settings_of(["steps=3", "views.blur=0.5"], tmp_path / "settings.toml", steps=2, seed=2, out=None)
    assert made == {"steps": 3, "seed": 2, "lr": 1, "views": {"n_local": 1, "blur": 0.5}}


@pytest.mark.parametrize(
    ("command", "option", "advice"),
    [
        ("inspect", "--min-valid", "--min-valid is a setting without an option of its own: give --set min_valid=VALUE"),
        ("adapt", "--micro-batch", "--micro-batch is a setting without an option of its own: give --set micro_batch="),
        ("adapt", "--n_local", "give --set views.n_local=VALUE"),
        ("sweep", "--lr", "give --set lr=VALUE"),
        ("serve", "--num-gpus", "give --set num_gpus=VALUE"),
        ("adapt", "tile=448", "tile=448 is a setting: give --set tile=448"),
        ("inspect", "labels=t.csv", "labels=t.csv is a setting: give --set labels=t.csv"),
    ],
)
def test_a_setting_without_an_option_is_told_to_set(command: str, option: str, advice: str) -> None:
    with pytest.raises(AssertionError, match=advice):
        run(command, "x", option, "3")


def test_what_two_bundles_are_compared_on_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 40), 50).save(tmp_path / name)
    Path("labels.csv").write_text("path,label\na.png,a\nb.png,b\n", "utf-8")
    Path("groups.csv").write_text("path,group\na.png,a\n", "utf-8")
    with pytest.raises(DataError, match=r"no labels were found for \..*: name them with --labels"):
        _comparable(".", "none", "auto")
    with pytest.raises(DataError, match=r"b\.png is not in groups\.csv"):
        _comparable(".", "labels.csv", "groups.csv")


def choices(annotation: Any) -> set[str]:
    """The words that a setting may be."""
    if get_origin(annotation) is Literal:
        return {choice for choice in get_args(annotation) if isinstance(choice, str)}
    return set[str]().union(*map(choices, get_args(annotation)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adapt", AdaptConfig),
        ("sweep", AdaptConfig),
        ("inspect", AdaptConfig),
        ("export", ExportConfig),
        ("serve", ServeSettings),
    ],
)
def test_the_help_names_every_choice_and_so_do_the_pages(name: str, settings: Any) -> None:
    for option in typer.main.get_command(app).commands[name].params:  # type: ignore[attr-defined]
        if option.name in settings.model_fields:
            missing = choices(settings.model_fields[option.name].annotation) - set(
                re.findall(r"[\w+-]+", option.help or "")
            )
            assert not missing, option.name
    docs = Path(__file__).parents[2] / "docs"
    told = "".join((docs / f"{page}.md").read_text().lower() for page in ("training", "export", "operate", "images"))
    for field in settings.model_fields.values():
        for choice in choices(field.annotation):
            assert re.search(rf"(?<![\w-]){re.escape(choice)}(?![\w-])", told), choice


@pytest.mark.parametrize("command", ["adapt", "inspect"])
def test_images_are_named_first_and_by_no_setting(tmp_path: Path, command: str) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path), "--set", "images=other"])
    assert isinstance(done.exception, ConfigError)
    assert "images cannot be set with --set" in str(done.exception)


# A title, a colour, and a line of the stranger's own.
FORGED = "\x1b]0;owned\x07\x1b[31m\nerror: all is well\x9b.png"


def test_a_strangers_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    Image.effect_noise((40, 40), 50).save(tmp_path / "scans" / "whole.png")
    (tmp_path / "scans" / FORGED).write_text("damaged")
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "scans"), "--sheet", str(tmp_path / "sheet.png")])
    assert r"\x1b]0;owned\x07\x1b[31m\x0aerror: all is well\x9b.png" in told.stdout
    assert not set("\x1b\x07\x9b") & set(told.stdout + told.stderr)
    with pytest.raises(jepakit.errors.DataError, match=r"owned\\x07\\x1b\[31m\\x0aerror"):
        Embeddings.load(tmp_path / FORGED)


def test_a_strangers_folders_cannot_write_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("\x1b]0;owned\x07", "b"):
        (tmp_path / name).mkdir()
        Image.effect_noise((40, 40), 50).save(tmp_path / name / "a.png")
    listed = gather(tmp_path, progress=True)
    assert r"2 folders are classes (\x1b]0;owned\x07, b)" in capsys.readouterr().err
    assert listed.labels == ("\x1b]0;owned\x07", "b"), "a name stays what it is"


def test_rows_are_escaped_on_a_terminal_alone(tmp_path: Path) -> None:
    Embeddings(np.eye(2, dtype=np.float32), "0" * 16, (FORGED, "b")).save(tmp_path / "e.npz")
    master, terminal = os.openpty()
    program = [
        sys.executable,
        "-c",
        "from jepakit.cli import main; main()",
        "nearest",
        str(tmp_path / "e.npz"),
        "-k",
        "1",
    ]
    subprocess.run(program, stdout=terminal, check=True)
    os.close(terminal)
    shown = os.read(master, 4096)
    os.close(master)
    assert rb"\x1b]0;owned" in shown
    assert b"\x1b" not in shown


def test_the_command_is_there_as_a_module_too() -> None:
    told = subprocess.run([sys.executable, "-m", "jepakit", "probe"], capture_output=True, text=True, check=False)
    assert "Usage: python -m jepakit probe" in told.stderr + told.stdout


@pytest.mark.parametrize(
    ("does", "command"),
    [
        ("jepakit._frontdoor.export", "export test_vit:random --out {}"),
        ("jepakit._frontdoor.fetch_weights", "weights fetch test_vit --out {}"),
        ("jepakit.inference.session.load", "embed images --bundle scans --out {}"),
    ],
)
def test_a_command_that_is_told_to_stop_removes_what_it_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, command: str
) -> None:
    removed = []

    def work(*_: object, **__: object) -> None:
        try:
            with making_folder(tmp_path / "new") as folder:
                (folder / "weights").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            removed.append(list(tmp_path.iterdir()) == [])

    monkeypatch.setattr(does, work)
    stopped = CliRunner().invoke(app, command.format(tmp_path / "new").split())
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert removed == [True]

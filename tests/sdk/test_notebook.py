"""What a notebook makes of jepakit: short errors, settings that complete, results as a cell's last value, memory that is free."""

from __future__ import annotations

import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest

import jepakit
import jepakit_training
from jepakit import _frontdoor
from jepakit._signatures import AdaptSettings, ExportSettings
from jepakit.config import AdaptConfig, ExportConfig
from jepakit.errors import BundleError, ConfigError, JepakitError, TrainingError


def test_an_error_shows_the_callers_lines_and_the_message() -> None:
    def cell() -> None:
        jepakit.adapt("nowhere", stesp=3)  # type: ignore[call-arg]

    with pytest.raises(ConfigError) as caught:
        cell()
    *lines, last = caught.value._render_traceback_()
    assert last.startswith("ConfigError: unknown setting")
    assert last.endswith(str(caught.value))
    assert [line.splitlines()[1].strip() for line in lines] == [
        "cell()",
        'jepakit.adapt("nowhere", stesp=3)  # type: ignore[call-arg]',
    ]


@pytest.mark.parametrize(
    ("call", "names", "config"),
    [
        *((getattr(jepakit, name), AdaptSettings, AdaptConfig) for name in ("adapt", "dry_run", "sweep", "dry_sweep", "inspect")),
        *((call, ExportSettings, ExportConfig) for call in (jepakit.export, jepakit.Run.export, jepakit.Sweep.export)),
    ],
)  # fmt: skip
def test_a_signature_names_every_setting_and_its_default(call: Any, names: Any, config: Any) -> None:
    parameters = inspect.signature(call).parameters
    assert set(names.__annotations__) < set(parameters)
    assert inspect.Parameter.VAR_KEYWORD not in {each.kind for each in parameters.values()}
    given = {name: parameters[name].default for name in names.__annotations__}
    required = {"images": "x"} if config is AdaptConfig else {"source": "x", "out": "y"}
    assert config(**required, **given) == config(**required)


class Held:
    """What a run holds, such as a model."""


@pytest.mark.parametrize("kind", [TrainingError, KeyboardInterrupt, SystemExit])
def test_an_error_or_interrupt_that_is_kept_keeps_nothing_of_the_run(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    held: list[weakref.ref[Held]] = []

    def adapt(*_: Any) -> None:
        model = Held()
        held.append(weakref.ref(model))
        try:
            raise ValueError("out of memory")
        except ValueError as error:
            raise kind("stopped after step 3") from error

    monkeypatch.setattr(jepakit_training, "adapt", adapt)
    with pytest.raises(kind) as caught:
        _frontdoor._train(AdaptConfig(images="x"), None, Path("x"))  # type: ignore[arg-type]
    assert str(caught.value) == "stopped after step 3"
    assert held[0]() is None


def test_what_the_caller_was_handling_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapt(*_: Any) -> None:
        raise TrainingError("training cannot go on")

    held: list[weakref.ref[Held]] = []

    def failing() -> None:
        own = Held()
        held.append(weakref.ref(own))
        raise LookupError

    monkeypatch.setattr(jepakit_training, "adapt", adapt)
    try:
        failing()
    except LookupError:
        with pytest.raises(TrainingError):
            _frontdoor._train(AdaptConfig(images="x"), None, Path("x"))  # type: ignore[arg-type]
        assert held[0]() is not None


@pytest.mark.parametrize(("message", "told"), [((), True), (("",), True), (("stopped after step 3; run …",), False)])
def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: tuple[str, ...], told: bool
) -> None:
    def adapt(*_: Any) -> None:
        raise KeyboardInterrupt(*message)

    monkeypatch.setattr(jepakit_training, "adapt", adapt)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped.*; run"):
        _frontdoor._train(AdaptConfig(images="x"), None, Path("x"))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ("stopped; run the same command again to resume\n" if told else "")


def test_a_run_says_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    run = jepakit.Run("run")
    assert str(run) == "run, not finished"
    with pytest.raises(BundleError, match="run has not finished"):
        run.check_finished()
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(BundleError, match=r"^run does not exist: open the run again by its whole path"):
        run.check_finished()
    with pytest.raises(BundleError, match="gone does not exist: it was moved or removed"):
        jepakit.Run(tmp_path / "gone").check_finished()


def test_all_errors_are_shown_so() -> None:
    assert JepakitError("what to do")._render_traceback_() == ["JepakitError: what to do"]

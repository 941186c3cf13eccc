"""Importing jepakit is light, quiet, and exposes exactly the public API."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import typing
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import jepakit
from jepakit import _extras
from jepakit._signatures import AdaptSettings, ExportSettings
from jepakit.config import AdaptConfig, ExportConfig
from jepakit.errors import MissingExtraError

HEAVY = ("torch", "torchvision", "PIL", "ray", "timm", "sklearn", "onnxruntime", "onnx", "pandas", "scipy")


def in_a_fresh_process(program: str) -> Any:
    """Run the program and return the JSON on its last line."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TOUCH = "import jepakit; jepakit.Client; jepakit.LinearProbe; jepakit.Embeddings"


@pytest.mark.parametrize(
    "program", ["import jepakit", TOUCH, "import jepakit; dir(jepakit); jepakit.adapt; jepakit.open_bundle"]
)
def test_importing_loads_nothing_heavy(program: str) -> None:
    loaded = in_a_fresh_process(f"import json, sys; {program}; print(json.dumps([name for name in sys.modules]))")
    assert [name for name in HEAVY if name in loaded] == []


def test_the_types_of_the_public_api_can_be_looked_up_at_run_time() -> None:
    public = [getattr(jepakit, name) for name in jepakit.__all__ if name[0] != "_"]
    methods = [
        value for kind in public if isinstance(kind, type) for name, value in vars(kind).items()
        if name[0] != "_" and inspect.isfunction(value)
    ]  # fmt: skip
    for function in [*filter(inspect.isfunction, public), *methods]:
        typing.get_type_hints(function)


@pytest.mark.parametrize(
    ("library", "first", "users"),
    [
        ("onnxruntime", "import_ort()", {"ort.py", "quantize.py"}),
        ("openvino", "import_openvino()", {"ov.py", "runtime.py"}),
    ],
)
def test_a_runtime_is_imported_with_its_telemetry_off(library: str, first: str, users: set[str]) -> None:
    """Whoever imports it calls the function that does so first."""
    root = Path(jepakit.__file__).parents[2]
    importing = {
        path.name: text
        for package in ("sdk", "service", "training", "export")
        for path in (root / package).rglob("*.py")
        if re.search(rf"^ *(import|from) {library}\b", text := path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing.keys() == users
    (other,) = users - {"ort.py", "ov.py"}
    lines = [line.strip() for line in importing[other].splitlines()]
    begins = [place for place, line in enumerate(lines) if line.startswith(f"from {library}")]
    assert lines[min(begins) - 1] == first
    assert begins == list(range(min(begins), max(begins) + 1)), "in one place"


def test_touching_the_client_loads_no_package_but_what_it_is_built_on() -> None:
    def packages(program: str) -> set[str]:
        roots = "[name.partition('.')[0] for name in sys.modules]"
        loaded = set(in_a_fresh_process(f"import json, sys; {program}; print(json.dumps({roots}))"))
        return {name for name in loaded if not name.startswith("_")} - sys.stdlib_module_names

    built_on = packages("import numpy, httpx, pydantic") | {"annotated_types"}  # pydantic's, on its first model
    assert packages(TOUCH) - built_on == {"jepakit"}


def test_a_bundle_is_read_without_what_measures() -> None:
    loaded = in_a_fresh_process("import json, sys; import jepakit.bundles.bundle; print(json.dumps(list(sys.modules)))")
    assert {"jepakit.evaluation.evaluate", "jepakit.probes"}.isdisjoint(loaded)


def test_all_is_what_is_visible() -> None:
    """Judged in a fresh process: submodules that other tests imported are not what a user sees first."""
    visible = in_a_fresh_process("import json, jepakit; print(json.dumps(dir(jepakit)))")
    public = {name for name in visible if not name.startswith("_")}
    assert public == set(jepakit.__all__) - {"__version__"}


def test_every_exported_name_is_there_and_has_a_docstring() -> None:
    assert len(set(jepakit.__all__)) == len(jepakit.__all__)
    for name in jepakit.__all__:
        value = getattr(jepakit, name)
        assert name == "__version__" or value.__doc__, name


def test_errors_and_settings_are_reached_from_the_package_itself() -> None:
    assert in_a_fresh_process(
        "import json, jepakit; jepakit.config; print(json.dumps(jepakit.errors.ImageError.__name__))"
    )


def test_editors_see_every_setting() -> None:
    assert AdaptSettings.__annotations__.keys() == AdaptConfig.model_fields.keys() - {"images", "out"}
    assert ExportSettings.__annotations__.keys() == ExportConfig.model_fields.keys() - {"source", "out"}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'jepakit' has no attribute 'Clinet'"):
        _ = jepakit.Clinet  # type: ignore[attr-defined]


def test_star_import_brings_exactly_all() -> None:
    names: dict[str, Any] = {}
    exec("from jepakit import *", names)
    assert set(names) - {"__builtins__"} == set(jepakit.__all__)


def test_importing_changes_no_environment_variable_and_no_logging() -> None:
    program = f"""
import json, logging, os, sys
def state():
    root = logging.getLogger()
    return [dict(os.environ), root.level, len(root.handlers), logging.root.manager.disable,
            os.getcwd(), str(sys.excepthook), str(sys.stdout)]
before = state()
{TOUCH}
print(json.dumps(before == state()))
"""
    assert in_a_fresh_process(program) is True


@pytest.mark.parametrize(("extra", "refused"), [("train", True), ("serve", True), ("export", False)])
def test_windows_is_told_where_training_and_service_run(
    monkeypatch: pytest.MonkeyPatch, extra: str, refused: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(_extras, "missing", lambda _: [])
        with pytest.raises(MissingExtraError, match="WSL 2") if refused else nullcontext():
            _extras.require(extra)

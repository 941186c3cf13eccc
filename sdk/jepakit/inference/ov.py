"""OpenVINO with its telemetry off. Everything that needs it imports it from here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> ModuleType:
    """The module `openvino`. Raises ImportError if it is not installed.

    By default its wheels (2026.4) write a client id and a count below ~/intel and report each import to Google Analytics,
    asking nobody. Without the package that does so, OpenVINO takes a stub: the package is hidden during the import.
    """
    with _hidden(_TELEMETRY):
        import openvino

    module: ModuleType = openvino
    return module


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Within the block, importing the package raises ImportError."""
    modules: dict[str, Any] = sys.modules
    found = {name: modules[name] for name in [*modules] if name.partition(".")[0] == package}
    modules.update(dict.fromkeys([*found, package]))
    try:
        yield
    finally:
        modules.pop(package)
        modules.update(found)

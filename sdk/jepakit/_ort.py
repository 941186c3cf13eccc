"""ONNX Runtime, with its telemetry off. Everything that imports it does so through here."""

from __future__ import annotations

import os
from types import ModuleType


def import_ort() -> ModuleType:
    """The module `onnxruntime`. Raises ImportError where it is not installed.

    Its Linux wheels (1.31) write a device id below ~/.cache/Microsoft and report to Microsoft from the moment of the
    import, by default; `disable_telemetry_events()` comes too late for that. Processes that this one starts inherit it.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    module: ModuleType = onnxruntime
    return module

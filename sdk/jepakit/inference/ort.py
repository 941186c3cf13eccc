"""ONNX Runtime with its telemetry off. Everything that needs it imports it from here."""

from __future__ import annotations

import os
from types import ModuleType


def import_ort() -> ModuleType:
    """The module `onnxruntime`. Raises ImportError if it is not installed.

    By default its Linux wheels (1.31) write a device id below ~/.cache/Microsoft and report to Microsoft as soon as
    they are imported; `disable_telemetry_events()` comes too late. Child processes inherit the setting made here.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    module: ModuleType = onnxruntime
    return module

"""Turns a run, a bundle or any timm backbone into a bundle with a verified model.onnx."""

from jepakit_export.exporter import export

__all__ = ["export"]

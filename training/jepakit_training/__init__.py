"""Adapts a timm backbone to a user's own images with LeJEPA, and says whether it helped."""

from jepakit_training.launch import adapt

__all__ = ["adapt"]

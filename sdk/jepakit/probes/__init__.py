"""Probes on frozen embeddings: linear and k-NN, fitted, judged and saved without torch or scikit-learn."""

from jepakit.probes.knn import KNNProbe
from jepakit.probes.linear import LinearProbe
from jepakit.probes.report import ProbeReport
from jepakit.probes.saved import is_probe, load_probe

__all__ = ["KNNProbe", "LinearProbe", "ProbeReport", "is_probe", "load_probe"]

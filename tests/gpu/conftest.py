"""Tests that need an NVIDIA GPU: `make test-slow` runs them on a machine that has one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")

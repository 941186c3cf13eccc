"""What accelerate's own settings, often another project's, must not change about a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from tests.training.runs import TINY

import jepakit
from jepakit.errors import ConfigError
from jepakit_training.setup import _check_accelerate


def test_accelerates_accumulation_of_gradients_is_refused(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings: dict[str, Any] = {"backbone": "test_vit", "weights": "random", **TINY}
    with pytest.raises(
        ConfigError, match=r"accumulate the gradients of 4 steps, .*: unset ACCELERATE_GRADIENT_ACC.*micro_batch=N"
    ):
        jepakit.adapt(image_folder(), out=tmp_path / "run", **settings)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_model_in_shards_is_refused(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind, gradient_accumulation_steps=1)
    with pytest.raises(
        ConfigError, match=f"accelerate is configured for {kind.value}, but jepakit trains whole copies"
    ):
        _check_accelerate(accelerator)

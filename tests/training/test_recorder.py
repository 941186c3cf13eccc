"""What a run says while it trains."""

from __future__ import annotations

from jepakit_training.recorder import describe

VALUES = {
    "loss": 0.4321,
    "prediction": 0.1,
    "sigreg": 4.25,
    "images_per_s": 81.4,
    "data_wait": 0.083,
    "memory_gb": 3.21,
}


def test_values_in_the_words_of_the_docs() -> None:
    assert describe(VALUES) == (
        "loss 0.4321  prediction 0.1000  sigreg 4.25 (floor 1.05)  81 images/s  data wait 8%  peak memory 3.2 GB"
    )

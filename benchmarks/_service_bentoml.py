"""BentoML with its adaptive batching. It only batches lists, so even a single image comes as a JSON list.
One worker whose inference uses all cores: faster here than one worker per core with the requests split between them.

bentoml serve _service_bentoml:Embeddings, with MODEL and CORES in the environment
"""

# mypy: disable-error-code="import-not-found,untyped-decorator"
from __future__ import annotations

import os

import bentoml

from _service_peer import PATIENCE_S, Model, from_data_uri


@bentoml.service(workers=1, traffic={"timeout": PATIENCE_S}, logging={"access": {"enabled": False}})
class Embeddings:
    """Data URIs in, vectors out."""

    def __init__(self) -> None:
        self._model = Model(os.environ["MODEL"], threads=int(os.environ["CORES"]))

    # A batch may be held open for so long: no longer than 32 clients' 32 images take.
    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=90_000, route="/json")
    def embed(self, input: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.run(
            [self._model.decode(from_data_uri(text)) for text in input]
        ).tolist()
        return vectors

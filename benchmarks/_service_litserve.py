"""LitServe with its batching, one path for raw bodies and one for JSON. `_service_litserve.py PORT MODEL CORES`

A worker decodes and infers in one thread, so there is one worker per core: with 32 clients faster than one worker whose
inference uses all cores. Annotations are not postponed here: LitServe passes them to FastAPI as they are.
"""

# mypy: disable-error-code="import-not-found,misc"
import os
import sys
from typing import Annotated, Any

import litserve
from fastapi import Body, Request, Response
from fastapi.responses import JSONResponse

from _service_peer import PATIENCE_S, Model, from_data_uri, openai_answer

BATCH, WAIT_S = 32, 0.002


class RawApi(litserve.LitAPI):
    """One image as the body, float32 as the answer."""

    def setup(self, device: str) -> None:
        self._model = Model(os.environ["MODEL"], threads=1)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> Any:
        return [self._model.decode(request)]

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, asked: list[list[Any]]) -> list[Any]:
        vectors = self._model.run([image for images in asked for image in images])
        starts = [sum(map(len, asked[:place])) for place in range(len(asked))]
        return [vectors[start : start + len(images)] for start, images in zip(starts, asked, strict=True)]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


class JsonApi(RawApi):
    """OpenAI's JSON."""

    def decode_request(self, request: Request) -> Any:  # type: ignore[override]
        return [self._model.decode(from_data_uri(text)) for text in request["input"]]

    def encode_response(self, output: Any) -> Response:
        return JSONResponse(openai_answer(output))


if __name__ == "__main__":
    os.environ["MODEL"] = sys.argv[2]  # the workers read it
    apis = [
        RawApi(max_batch_size=BATCH, batch_timeout=WAIT_S, api_path="/raw"),
        JsonApi(max_batch_size=BATCH, batch_timeout=WAIT_S, api_path="/json"),
    ]
    workers = int(sys.argv[3])
    server = litserve.LitServer(
        apis, accelerator="cpu", workers_per_device=workers, fast_queue=True, timeout=PATIENCE_S
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False)

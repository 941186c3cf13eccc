"""FastAPI and ONNX Runtime without batching, one process. `_service_fastapi.py PORT MODEL CORES`

Every request is decoded and run on a thread of Starlette's pool, with one thread per inference: with 32 clients this is
faster than running one inference after another on all cores.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from _service_peer import Model, from_data_uri, openai_answer

app = FastAPI()
model = Model(sys.argv[2], threads=1)


def embed(files: list[bytes]) -> Any:
    return model.run([model.decode(file) for file in files])


@app.post("/raw")
async def raw(request: Request) -> Response:
    vectors = await run_in_threadpool(embed, [await request.body()])
    return Response(vectors.tobytes(), media_type="application/octet-stream")


@app.post("/json")
async def openai(request: Request) -> Response:
    asked = (await request.json())["input"]
    return JSONResponse(openai_answer(await run_in_threadpool(embed, [from_data_uri(text) for text in asked])))


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False)

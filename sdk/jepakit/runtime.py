"""Opens a graph's bytes on a provider: ONNX Runtime's CPU, CUDA and TensorRT, or OpenVINO.

What was asked for is what runs, or an error: ONNX Runtime falls back to the CPU with no more than a log line.
The graph is opened from bytes and may name no external file: OpenVINO would read it from the working directory.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from jepakit.errors import BundleError, MissingExtraError, ServeError
from jepakit.images import Pixels

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "openvino"]
Chosen = Literal["cpu", "cuda", "tensorrt", "openvino"]
Arithmetic = Literal["model", "bf16"]

_ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# TensorRT builds an engine for each shape it meets: batches are filled up to one of these.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
# How a protobuf spells the key "location" of an external tensor: tag, length, word; both numbers may be padded.
_EXTERNAL_KEY = re.compile(rb"(\x0a|\x8a\x80*\x00)(\x08|\x88\x80*\x00)\Z", re.DOTALL)


class Runtime(Protocol):
    """A graph, ready to run."""

    provider: Chosen
    buckets: tuple[int, ...] | None
    """Batch sizes that a provider of fixed shapes should see; None: any."""

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        """The graph's outputs, in their order, for images [B, H, W, C]. Safe to call from several threads."""
        ...


def open_runtime(graph: bytes, provider: Provider, threads: int, arithmetic: Arithmetic = "model") -> Runtime:
    """Open `graph` on `provider`; `auto` takes CUDA where it works, else the CPU.

    arithmetic  `bf16`: OpenVINO computes in bfloat16, faster where the CPU has instructions for it

    Raises ServeError when the provider cannot be used here, BundleError when the graph cannot be opened.
    """
    if arithmetic == "bf16" and provider != "openvino":
        raise ServeError(f"arithmetic bf16 is OpenVINO's: ask for --provider openvino (now {provider})")
    _refuse_external(graph)
    if provider == "openvino":
        return _OpenVino(graph, threads, arithmetic)
    wanted: tuple[Chosen, ...] = ("cuda", "cpu") if provider == "auto" else (provider,)
    reasons = []
    for choice in wanted:
        reason = _missing(choice)
        if reason is None:
            session = _ort_session(graph, choice, threads)
            if session.get_providers()[0] == _ORT_PROVIDERS[choice]:
                return _OnnxRuntime(session, choice)
            reason = "ONNX Runtime lists it but cannot load it"
        reasons.append(reason)
    raise ServeError(
        f"provider {provider} was asked for and cannot be used here: {reasons[-1]}; check nvidia-smi and "
        "pip install 'jepakit[gpu]', or ask for --provider cpu"
    )


class _OnnxRuntime:
    def __init__(self, session: Any, provider: Chosen) -> None:
        self._session, self.provider = session, provider
        self.buckets: tuple[int, ...] | None = _BUCKETS if provider == "tensorrt" else None

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        outputs: list[NDArray[np.float32]] = self._session.run(None, {"images": images})
        return outputs


class _OpenVino:
    provider: Chosen = "openvino"
    buckets: tuple[int, ...] | None = None

    def __init__(self, graph: bytes, threads: int, arithmetic: Arithmetic) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise MissingExtraError("provider openvino needs OpenVINO: pip install 'jepakit[openvino]'")
        import openvino

        # Left to itself it computes in bfloat16 where the CPU can, with errors of half a percent.
        hint = {"model": "f32", "bf16": "bf16"}[arithmetic]
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        try:
            self._model = core.compile_model(core.read_model(graph, b""), "CPU", settings)
        except Exception as error:  # pybind exceptions have no common base worth naming
            raise BundleError(f"OpenVINO cannot open the graph: {str(error).strip().splitlines()[-1]}") from None
        self._local = threading.local()

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._model.create_infer_request()
        results = request.infer({"images": images})
        return [np.array(results[output]) for output in self._model.outputs]


def _ort_session(graph: bytes, choice: Chosen, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A thread that waits by spinning takes the core from decoders, other sessions and neighbours (docs/engine.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # fp32 means fp32: CUDA would round products to TF32 unless told not to.
    configured = [(_ORT_PROVIDERS[choice], {"use_tf32": 0} if choice == "cuda" else {})]
    if choice == "tensorrt":
        configured.append((_ORT_PROVIDERS["cuda"], {"use_tf32": 0}))
    try:
        return ort.InferenceSession(graph, options, providers=configured)
    except Exception as error:  # pybind exceptions have no common base worth naming
        raise BundleError(f"ONNX Runtime cannot open the graph: {str(error).splitlines()[0]}") from None


def _refuse_external(graph: bytes) -> None:
    """BundleError for a graph whose tensors lie in other files, which nothing has verified."""
    for word in re.finditer(b"location", graph):
        if _EXTERNAL_KEY.search(graph[max(0, word.start() - 32) : word.start()]):
            raise BundleError(
                "the graph keeps tensors in another file: a bundle's graph holds all of them, export it anew"
            )


def _missing(choice: Chosen) -> str | None:
    """Why a provider cannot be used here; None when it may well."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingExtraError("running a model needs ONNX Runtime: pip install 'jepakit[serve]'") from None
    if choice == "cpu":
        return None
    if _ORT_PROVIDERS[choice] not in ort.get_available_providers():
        return "this ONNX Runtime was built without it"
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA driver is loaded"
    ort.preload_dlls()
    return None

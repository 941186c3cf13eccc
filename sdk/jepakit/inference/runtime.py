"""Opens a graph's bytes on a provider: ONNX Runtime's CPU, CUDA and TensorRT, or OpenVINO.

The requested provider runs, or there is an error: by default, ONNX Runtime falls back to the CPU with only a log line.
The graph is opened from bytes. Tensors outside it may only be in the bundle's model.safetensors, whose bytes are passed
too; any other external file is refused, as OpenVINO would read it from the working directory.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from jepakit._messages import did_you_mean, lines_of
from jepakit.bundles.bundle import DATA
from jepakit.bundles.external import as_inputs, check_external
from jepakit.bundles.manifest import INPUT
from jepakit.errors import BundleError, ConfigError, InferenceError, MissingExtraError
from jepakit.images import Pixels
from jepakit.inference.ort import import_ort
from jepakit.inference.ov import import_openvino

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "openvino"]
Chosen = Literal["cpu", "cuda", "tensorrt", "openvino"]
Arithmetic = Literal["model", "bf16"]

_ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
ON_GPU: tuple[Chosen, ...] = ("cuda", "tensorrt")
# TensorRT builds an engine for each shape it sees, so batches are padded to one of these sizes.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
# This operator quantises a whole batch by one range: an image's vector would depend on the others in its batch.
_OF_THE_BATCH = b"DynamicQuantizeLinear"
_ITS_OPERATORS = "its int8 operators are the CPU's alone"

# Devices that show a driver: NVIDIA's on Linux; in WSL 2, where Windows has the driver, that of any GPU.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")

_LOG = logging.getLogger("jepakit")

# What ONNX Runtime and CUDA's libraries say when memory runs out.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")


class Runtime(Protocol):
    """A graph, ready to run."""

    provider: Chosen
    buckets: tuple[int, ...] | None
    """Batch sizes to run the graph with on this provider; None: any."""

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        """The graph's outputs, in order, for images [B, H, W, C]. Safe to call from several threads.

        Raises InferenceError when there is not enough memory for the batch.
        """
        ...


def open_runtime(
    graph: bytes, provider: Provider, threads: int, arithmetic: Arithmetic = "model", data: bytes | None = None
) -> Runtime:
    """Open `graph` on `provider`; `auto` uses CUDA if it works, else the CPU, with a warning if there is a driver.

    data        the bytes of model.safetensors, where a large model's graph keeps its tensors; not needed once it is open
    arithmetic  `bf16`: OpenVINO computes in bfloat16, which is faster if the CPU has instructions for it

    Raises the errors of `check_provider`, and BundleError when the graph cannot be opened, or keeps tensors anywhere
    but in itself and `data`.
    """
    check_provider(provider, arithmetic)
    check_external(graph, data)
    alone = (1,) if _OF_THE_BATCH in graph else None
    if provider == "openvino":
        return _OpenVino(graph, threads, arithmetic, data, alone)
    if provider == "auto":
        return _on_gpu_or_cpu(graph, threads, data, alone)
    if provider in ON_GPU and alone is not None:  # ONNX Runtime would run those operators on the CPU, without a word
        raise InferenceError(
            f"provider {provider} cannot compute this int8 graph, {_ITS_OPERATORS}: use provider cpu, or export fp16"
        )
    session = _ort_session(graph, provider, threads, data)
    return _OnnxRuntime(session, provider, alone or (_BUCKETS if provider == "tensorrt" else None))


def _on_gpu_or_cpu(graph: bytes, threads: int, data: bytes | None, alone: tuple[int, ...] | None) -> Runtime:
    """The graph on CUDA, else on the CPU; a warning says why a GPU is not used where there is a driver for one.

    Graphs that quantise each batch are for CPUs: CUDA has no kernels for that.
    """
    reason = _missing("cuda") if alone is None else _ITS_OPERATORS
    if reason is None:
        try:
            return _OnnxRuntime(_ort_session(graph, "cuda", threads, data), "cuda", None)
        except (BundleError, InferenceError) as error:
            reason = str(error)
    session = _ort_session(graph, "cpu", threads, data)
    if has_nvidia_driver():
        _LOG.warning("the model runs on the CPU, not on the GPU: %s", reason)
    return _OnnxRuntime(session, "cpu", alone)


def check_provider(provider: Provider, arithmetic: Arithmetic = "model") -> None:
    """Check, as far as possible without a graph, that `open_runtime` can use a provider here.

    Raises ConfigError for an unknown provider, or one without that arithmetic; InferenceError when it cannot be used on
    this machine; MissingExtraError when its library is not installed.
    """
    if provider not in get_args(Provider):
        raise ConfigError(
            f"provider = {provider!r}: one of {', '.join(get_args(Provider))}"
            f"{did_you_mean(str(provider), get_args(Provider))}"
        )
    if arithmetic == "bf16" and provider != "openvino":
        raise ConfigError(f"arithmetic = bf16 is OpenVINO's alone: use provider openvino (now {provider})")
    if provider == "openvino":
        if importlib.util.find_spec("openvino") is None:
            raise MissingExtraError("provider openvino needs OpenVINO: pip install 'jepakit[openvino]'")
    elif provider != "auto" and (reason := _missing(provider)) is not None:
        raise _unusable(provider, reason)


def _unusable(provider: Provider, reason: str) -> InferenceError:
    return InferenceError(
        f"provider {provider} was asked for and cannot be used here: {reason}; check nvidia-smi and "
        "pip install 'jepakit[gpu]', or use provider cpu"
    )


class _OnnxRuntime:
    def __init__(self, session: Any, provider: Chosen, buckets: tuple[int, ...] | None) -> None:
        self._session, self.provider, self.buckets = session, provider, buckets

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        with _naming_lack_of_memory(self.provider, len(images)):
            outputs: list[NDArray[np.float32]] = self._session.run(None, {INPUT: images})
        return outputs


@contextmanager
def _naming_lack_of_memory(provider: Chosen, count: int) -> Iterator[None]:
    """Turn a runtime's error that memory ran out into an InferenceError."""
    try:
        yield
    except Exception as error:  # pybind exceptions have no common base worth naming
        if any(words in str(error) for words in _NO_MEMORY):
            where = "on the GPU" if provider in ON_GPU else "in main memory"
            raise InferenceError(
                f"no room {where} for a batch of {count} images: free some memory, or run fewer at a time"
            ) from None
        raise


class _OpenVino:
    provider: Chosen = "openvino"

    def __init__(
        self, graph: bytes, threads: int, arithmetic: Arithmetic, data: bytes | None, buckets: tuple[int, ...] | None
    ) -> None:
        self.buckets = buckets
        # By default it computes in bfloat16 if the CPU can, with errors of half a percent.
        hint = {"model": "f32", "bf16": "bf16"}[arithmetic]
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        core = import_openvino().Core()
        try:
            self._model = core.compile_model(_openvino_model(core, graph, data), "CPU", settings)
        except Exception as error:  # pybind exceptions have no common base worth naming
            raise BundleError(f"OpenVINO cannot open the graph: {lines_of(error)[-1]}") from None
        self._local = threading.local()

    def run(self, images: Pixels) -> list[NDArray[np.float32]]:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._model.create_infer_request()
        with _naming_lack_of_memory(self.provider, len(images)):
            results = request.infer({INPUT: images})
        return [np.array(results[output]) for output in self._model.outputs]


def _openvino_model(core: Any, graph: bytes, data: bytes | None) -> Any:
    """The graph as an OpenVINO model. Its reader takes no tensors from memory, so inputs are replaced by constants."""
    if data is None:
        return core.read_model(graph, b"")
    import_openvino()
    from openvino import op

    bare, arrays = as_inputs(graph, data)
    model = core.read_model(bare, b"")
    for parameter in model.get_parameters():
        if parameter.get_friendly_name() in arrays:
            array = arrays[parameter.get_friendly_name()]
            parameter.output(0).replace(op.Constant(array).output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _ort_session(graph: bytes, choice: Chosen, threads: int, data: bytes | None) -> Any:
    ort = import_ort()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads take cores from decoders, other sessions and other programs (docs/engine.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ORT's own format, otherwise detected from the bytes, can name other files, which are not checked here.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if data is not None:
        # Copied while the session is created. With this table no name is looked up on disk, not even a missing one.
        options.add_external_initializers_from_files_in_memory([DATA], [data], [len(data)])
    # fp32 means fp32: CUDA would round products to TF32 unless told not to.
    configured = [(_ORT_PROVIDERS[choice], {"use_tf32": 0} if choice == "cuda" else {})]
    if choice == "tensorrt":
        configured.append((_ORT_PROVIDERS["cuda"], {"use_tf32": 0}))
    try:
        # With its fallback, a provider that fails, now or while running, would be replaced by the CPU.
        session = ort.InferenceSession(graph, options, providers=configured, enable_fallback=0)
    except Exception as error:  # pybind exceptions have no common base worth naming
        raise BundleError(f"ONNX Runtime cannot open the graph on {choice}: {lines_of(error)[0]}") from None
    if session.get_providers()[0] != _ORT_PROVIDERS[choice]:
        raise _unusable(choice, "ONNX Runtime lists it but cannot load it")
    session._model_bytes = None  # kept only for the fallback
    return session


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded."""
    return any(Path(device).exists() for device in _DRIVERS)


def _missing(choice: Chosen) -> str | None:
    """Why a provider cannot be used here; None if nothing is in the way."""
    try:
        ort = import_ort()
    except ImportError:
        raise MissingExtraError("running a model needs ONNX Runtime: pip install 'jepakit[serve]'") from None
    if choice == "cpu":
        return None
    if _ORT_PROVIDERS[choice] not in ort.get_available_providers():
        return "this ONNX Runtime was built without it"
    if not has_nvidia_driver():
        return "no NVIDIA driver is loaded"
    with redirect_stdout(io.StringIO()):  # it prints what it does not find, and ONNX Runtime then logs it
        ort.preload_dlls()
    return None

"""Which provider a graph runs on: the requested one or an error; never silently the CPU, never outside files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime
import pytest

import jepakit
import jepakit.inference.runtime
from jepakit._messages import lines_of
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, GRAPH, Bundle, open_bundle
from jepakit.errors import BundleError, ConfigError, InferenceError, MissingExtraError
from jepakit.inference.runtime import Provider, check_provider, open_runtime
from jepakit.inference.session import Session

SIZE = 64
HERE: tuple[Provider, ...] = ("cpu", "openvino")
needs_no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")


@pytest.fixture(scope="session")
def bundle(exported: Callable[..., Path]) -> Bundle:
    return open_bundle(exported(image_size=SIZE))


@pytest.fixture(params=HERE)
def provider(request: pytest.FixtureRequest) -> Provider:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    asked: Provider = request.param
    return asked


def agreement_of(session: Session, bundle: Bundle) -> golden.Agreement:
    return session.check_golden(golden.unpack(bundle.read(GOLDEN)))


@pytest.mark.parametrize("used", [*HERE, "doctor"])
def test_runtimes_report_nothing(bundle: Bundle, tmp_path: Path, used: str) -> None:
    """By default, their wheels write an id at home and send events: all that shows before they are sent."""
    pytest.importorskip("openvino")
    load = f"import jepakit; jepakit.load({str(bundle.path)!r}, provider={used!r})"
    program = ["-m", "jepakit", "doctor"] if used == "doctor" else ["-c", load]
    silenced = ("ORT_DISABLE_TELEMETRY", "CI", "TF_BUILD", "JENKINS_URL", "DO_NOT_TRACK")
    environment = {key: value for key, value in os.environ.items() if key not in silenced}
    subprocess.run(
        [sys.executable, *program], check=True, stdout=subprocess.DEVNULL,
        env={**environment, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert list(tmp_path.rglob("*")) == []


@needs_no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu(bundle: Bundle) -> None:
    assert Session.open(bundle).provider == "cpu"


@needs_no_gpu
@pytest.mark.parametrize("asked", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_cpu(bundle: Bundle, asked: Provider) -> None:
    with pytest.raises(
        InferenceError, match=rf"provider {asked} .* cannot be used here: .*nvidia-smi.*use provider cpu"
    ):
        Session.open(bundle, provider=asked)


@pytest.mark.parametrize("device", ["/dev/nvidiactl", "/dev/dxg"])
def test_a_driver_is_found_on_linux_and_in_wsl(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == device)
    check_provider("cuda")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(InferenceError, match="no NVIDIA driver is loaded"):
        check_provider("cuda")


def test_a_runtime_that_was_built_without_the_provider_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InferenceError, match=r"this ONNX Runtime was built without it.*jepakit\[gpu\]"):
        Session.open(bundle, provider="cuda")
    assert Session.open(bundle, provider="auto").provider == "cpu"


def test_a_provider_that_quietly_became_the_cpu_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is there but does not work: ONNX Runtime then opens the CPU and only logs it."""
    monkeypatch.setattr(jepakit.inference.runtime, "_missing", lambda _choice: None)
    opened = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda graph, options, providers, **_: opened(graph, options, ["CPUExecutionProvider"]),
    )
    with pytest.raises(InferenceError, match="lists it but cannot load it"):
        Session.open(bundle, provider="cuda")


def test_a_gpu_that_fails_is_an_error_or_with_auto_the_cpu_and_a_warning(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own way is to print the reason to standard output, and to open the CPU."""

    class Broken(onnxruntime.InferenceSession):  # type: ignore[misc]
        def _create_inference_session(self, providers: list[Any], *others: Any) -> None:
            if any("CUDA" in str(provider) for provider in providers):
                raise RuntimeError("CUDA failure 2: out of memory")
            super()._create_inference_session(providers, *others)

    monkeypatch.setattr(jepakit.inference.runtime, "_missing", lambda _choice: None)
    monkeypatch.setattr(jepakit.inference.runtime, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with pytest.raises(BundleError, match="cannot open the graph on cuda: CUDA failure 2: out of memory"):
        Session.open(bundle, provider="cuda")
    assert Session.open(bundle, provider="auto").provider == "cpu"
    assert "runs on the CPU, not on the GPU: ONNX Runtime cannot open the graph on cuda: CUDA failure 2" in caplog.text
    assert capfd.readouterr().out == ""


def test_auto_takes_the_cpu_for_graphs_that_quantise_each_batch(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jepakit.inference.runtime, "_missing", lambda _choice: None)
    monkeypatch.setattr(jepakit.inference.runtime, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(jepakit.inference.runtime, "_OF_THE_BATCH", b"")  # found in every graph
    assert open_runtime(bundle.read(GRAPH), "auto", 1).provider == "cpu"
    assert "not on the GPU: its int8 operators are the CPU's alone" in caplog.text
    for gpu in ("cuda", "tensorrt"):
        with pytest.raises(InferenceError, match=f"provider {gpu} cannot compute this int8 graph, .* use provider cpu"):
            open_runtime(bundle.read(GRAPH), gpu, 1)


def test_a_provider_that_fails_while_running_is_not_replaced_by_the_cpu(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own way is to open the graph again on the CPU, print so, and go on."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    runtime: Any = open_runtime(bundle.read(GRAPH), "cpu", 1)
    failing = MagicMock(wraps=runtime._session._sess)
    failing.run.side_effect = EPFail("CUDA error 700")
    monkeypatch.setattr(runtime._session, "_sess", failing)
    with pytest.raises(EPFail, match="700"):
        runtime.run(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed_names_its_extra(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    asked, extra = {"onnxruntime": ("cpu", "serve"), "openvino": ("openvino", "openvino")}[missing]
    with pytest.raises(MissingExtraError, match=rf"pip install 'jepakit\[{extra}\]'"):
        open_runtime(bundle.read(GRAPH), asked, 1)  # type: ignore[arg-type]


def test_fp32_is_fp32_on_every_provider(bundle: Bundle, provider: Provider) -> None:
    session = Session.open(bundle, provider=provider)
    assert (session.provider, session.precision) == (provider, "fp32")
    assert agreement_of(session, bundle).relative_error < 1e-5


def test_bf16_says_so_and_keeps_to_its_own_tolerance(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    session = Session.open(bundle, provider="openvino", arithmetic="bf16")
    assert session.precision == "bf16"
    assert agreement_of(session, bundle).centred_cosine > 0.99


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda", "tensorrt"])
def test_bf16_on_another_provider_is_refused(bundle: Bundle, asked: Provider) -> None:
    with pytest.raises(ConfigError, match=f"use provider openvino .now {asked}"):
        Session.open(bundle, provider=asked, arithmetic="bf16")


def test_an_unknown_provider_is_named_with_the_one_that_was_meant(bundle: Bundle) -> None:
    for provider in ("cud", "gpu"):
        with pytest.raises(ConfigError, match=rf"provider = .{provider}.: one of auto, cpu, .*did you mean cuda"):
            jepakit.load(bundle.path, provider=provider)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut short"])
def test_bytes_that_are_no_graph_are_refused(bundle: Bundle, provider: Provider, damage: str) -> None:
    graph = {"empty": b"", "garbage": b"garbage" * 100, "cut short": bundle.read(GRAPH)[:5000]}[damage]
    with pytest.raises(BundleError, match=r"cannot open the graph( on cpu)?: .*[a-z]{4}") as caught:
        open_runtime(graph, provider, 1)
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_a_graph_with_tensors_in_another_file_is_refused_even_where_that_file_lies(
    bundle: Bundle, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load(bundle.path / GRAPH), file, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    monkeypatch.chdir(tmp_path)
    assert Path("weights.bin").is_file()
    with pytest.raises(BundleError, match=r"keeps tensor '.+' in another file, 'weights.bin'"):
        open_runtime(file.read_bytes(), provider, 1)


def test_a_model_named_location_is_no_external_tensor(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, provider: Provider
) -> None:
    graph = onnx.load(bundle.path / GRAPH)
    entry: Any = graph.metadata_props.add()
    entry.key, entry.value = "jepakit.name", "location"
    graph.doc_string = "the location of things"
    runtime = open_runtime(graph.SerializeToString(), provider, 1)
    assert runtime.run(np.zeros((1, SIZE, SIZE, 3), np.uint8))[0].shape == (1, bundle.manifest.embedding.dim)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_the_one_asked_for(bundle: Bundle, provider: Provider, threads: int) -> None:
    runtime: Any = open_runtime(bundle.read(GRAPH), provider, threads)
    if provider == "openvino":
        assert runtime._model.get_property("INFERENCE_NUM_THREADS") == threads
    else:
        assert runtime._session.get_session_options().intra_op_num_threads == threads


def test_no_room_for_a_batch_is_an_error_that_passes(bundle: Bundle) -> None:
    """In a process that may take little more than it has: many images are refused, and a few go on as before."""
    work = f"""
import resource, numpy as np
from jepakit.errors import InferenceError
from jepakit.inference.session import Session

session = Session.open({str(bundle.path)!r}, provider="cpu", threads=1)
few = np.zeros((2, {SIZE}, {SIZE}, 3), np.uint8)
many, before = np.repeat(few, 2000, axis=0), session.run(few)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
try:
    session.run(many)
except InferenceError as error:
    print(error)
assert np.array_equal(session.run(few), before)
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no room in main memory for a batch of 4000 images" in done.stdout


def test_openvino_too_tells_a_lack_of_memory_from_faults(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    runtime: Any = open_runtime(bundle.read(GRAPH), "openvino", 1)
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    runtime._local.request = MagicMock()
    runtime._local.request.infer.side_effect = RuntimeError("Exception from src/core.cpp:\nstd::bad_alloc")
    with pytest.raises(InferenceError, match="no room in main memory for a batch of 2 images"):
        runtime.run(images)
    runtime._local.request.infer.side_effect = RuntimeError("a fault")
    with pytest.raises(RuntimeError, match="a fault"):
        runtime.run(images)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (RuntimeError(" unsupported operator\nand more "), ["unsupported operator", "and more"]),
        (AssertionError(), ["AssertionError"]),
        (ValueError("\n"), ["ValueError"]),
    ],
)
def test_an_error_without_words_is_told_by_its_name(error: Exception, lines: list[str]) -> None:
    assert lines_of(error) == lines

"""The whole workflow, through the command line and real HTTP: adapt → export → serve → embed → probe."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import jepakit
from jepakit.cli import main
from jepakit_service.http.keys import new_key
from jepakit_service.listeners import free_port

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "examples" / "weights" / "mobilenetv2_100.safetensors"
PROGRAM = Path(sys.executable).with_name("jepakit")


def jepakit_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=280, cwd=cwd
    )


@contextmanager
def serving(bundle: Path, *options: str, program: Path = PROGRAM, said: list[str] | None = None) -> Iterator[str]:
    """Run `jepakit serve` until SIGTERM; it must then exit by itself with code 0 and leave no process.

    said  gets the lines that it prints until it is ready
    """
    port = free_port()
    command = [str(program), "serve", str(bundle), "--port", str(port), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines = [] if said is None else said
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready:"):
                break
        else:
            pytest.fail("".join(lines))
        family = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "the service left processes behind"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for child in family:  # Ray's may be in groups of their own
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two textures that a network tells apart: 40 images each."""
    root = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(0)
    for place in range(40):
        for name, cell in (("fine", 4), ("coarse", 16)):
            pixels = random.integers(0, 256, (96 // cell, 96 // cell, 3), np.uint8)
            path = root / name / f"{place:02d}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST).save(path, quality=95)
    return root


def test_the_whole_road_with_real_weights_ray_serve_and_real_http(images: Path, tmp_path: Path) -> None:
    adapted = jepakit_cli(
        "adapt", images, "--out", tmp_path / "my run", "--backbone", "mobilenetv2_100", "--weights", WEIGHTS,
        "--domain", "microscopy", "--image-size", 64, "--steps", 3, "--batch-size", 16,
    )  # fmt: skip
    assert adapted.returncode == 0, adapted.stderr
    assert "linear probe" in adapted.stdout
    *_, advice = adapted.stdout.splitlines()
    told = shlex.split(advice.removeprefix("next: jepakit "))
    assert (told[:2], told[-2:]) == (["export", str(tmp_path / "my run")], ["--out", "bundles/my run"])
    run = jepakit.open_run(tmp_path / "my run")
    assert str(run.verdict) in adapted.stdout

    exported = jepakit_cli("export", tmp_path / "my run", "--out", tmp_path / "bundles" / "scans")
    assert exported.returncode == 0, exported.stderr
    bundle = jepakit.open_bundle(tmp_path / "bundles" / "scans")
    assert bundle.digest in exported.stdout
    assert bundle.manifest.backbone.start.license == "apache-2.0"

    with serving(tmp_path / "bundles", "--expect", bundle.digest) as url:
        embedded = jepakit_cli("embed", images, "--url", url, "--out", tmp_path / "vectors.npz")
        assert embedded.returncode == 0, embedded.stderr
        with jepakit.Client(url) as client:
            assert client.verify(bundle.path) < 1e-4
    remote = jepakit.Embeddings.load(tmp_path / "vectors.npz")
    local = jepakit.load(bundle.path).embed(images, progress=False)
    np.testing.assert_allclose(remote.vectors, local.vectors, rtol=0, atol=1e-5 * np.abs(local.vectors).max())

    fitted = jepakit_cli("probe", "fit", tmp_path / "vectors.npz", "--out", tmp_path / "probe.safetensors")
    assert fitted.returncode == 0, fitted.stderr
    judged = jepakit_cli("probe", "evaluate", tmp_path / "probe.safetensors", tmp_path / "vectors.npz")
    assert "accuracy 100.0%" in judged.stdout
    predicted = jepakit_cli("probe", "predict", tmp_path / "probe.safetensors", tmp_path / "vectors.npz")
    assert len(predicted.stdout.splitlines()) == 80


def test_without_ray_one_process_serves_the_same(exported: Callable[..., Path]) -> None:
    bundle = exported(image_size=32)
    said: list[str] = []
    with serving(bundle, "--no-ray", said=said) as url, jepakit.Client(url) as client:
        assert client.verify(bundle) < 1e-5
    assert "no API key file: any user of this machine can embed\n" in said
    assert not any("other machines" in line for line in said)


def test_one_process_on_all_interfaces_has_one_listener_and_says_what_guards_it(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"{new_key('alice')[1]}\n")
    said: list[str] = []
    options = ("--no-ray", "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys"))
    with serving(exported(image_size=32), *options, said=said) as url:
        port = int(url.rpartition(":")[2])
        (process,) = (one for one in psutil.Process().children() if str(port) in one.cmdline())
        family = [process, *process.children(recursive=True)]
        listening = [
            connection.laddr
            for one in family
            for connection in one.net_connections("inet")
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
        ]
    assert listening == [("0.0.0.0", port)]
    place = said.index("ports that other machines could reach:\n")
    assert said[place + 1 : -1] == [f"  0.0.0.0:{port}  jepakit: API keys\n"]
    assert not any("any user" in line for line in said)


def damaged_copy(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder / "broken")
    graph = folder / "broken" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    return folder / "broken"


def test_every_mistake_is_one_line_with_exit_code_2(
    images: Path,
    exported: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of each command in a process of its own; the others, which fail before any work, in this one."""

    def in_this_process(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["jepakit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    def as_a_program(*arguments: object) -> tuple[Any, str]:
        done = jepakit_cli(*arguments, cwd=tmp_path)
        return done.returncode, done.stderr

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    corrupt = tmp_path / "corrupt" / "a"
    corrupt.mkdir(parents=True)
    for place, path in enumerate(sorted(images.rglob("*.jpg"))[:30]):
        (corrupt / f"{place}.jpg").write_bytes(path.read_bytes()[: 200 if place == 7 else None])
    start = ("--backbone", "mobilenetv2_100", "--weights", WEIGHTS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bundle = exported(image_size=32)
        programs = [
            (("adapt", corrupt.parent, *start, "--out", tmp_path / "r1", "--image-size", 64, "--workers", 0), "7.jpg"),
            (("export", f"resnet18:{WEIGHTS}", "--out", tmp_path / "x"), "does not fit resnet18"),
            (("serve", damaged_copy(bundle, tmp_path)), "model.onnx is damaged"),
            (("embed", images, "--bundle", bundle / "nope", "--out", tmp_path / "v.npz"), "is not a bundle"),
        ]
        cases = [
            (("adapt", tmp_path / "nowhere"), "does not exist"),
            (("adapt", tmp_path / "empty"), "holds no images"),
            (("adapt", images, "--backbone", "resnet51"), "did you mean"),
            (("adapt", images, "--domain", "histologie"), "did you mean histology"),
            (("adapt", images, "--set", "views.nlocal=2"), "did you mean views.n_local"),
            (("adapt", images, "--set", "batchsize=2"), "did you mean batch_size"),
            (("adapt", images, "--steps", 0), "steps = 0"),
            (("adapt", images, "--weights", "nowhere.pth"), "no such file"),
            (("export", "resnet51:random", "--out", tmp_path / "x"), "did you mean"),
            (("export", tmp_path / "empty", "--out", tmp_path / "x"), "neither a run nor a bundle"),
            (("export", "test_vit:random", "--out", bundle), "already exists"),
            (("serve", tmp_path / "nowhere"), "is not a bundle"),
            (("serve", tmp_path / "empty"), "holds no bundle"),
            (("serve", bundle, bundle.parent / "." / bundle.name), "is named twice"),
            (("serve", bundle, "--port", taken.getsockname()[1]), "cannot listen"),
            (("serve", bundle, "--host", "0.0.0.0"), "--api-key-file"),
            (("serve", bundle, "--expect", "0" * 64), "not the expected one"),
            (("embed", images, "--out", tmp_path / "v.npz"), "--url"),
            (("probe", "fit", tmp_path / "nope.npz", "--out", tmp_path / "p"), "does not exist"),
        ]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda case: as_a_program(*case[0]), programs))
        results += [in_this_process(*arguments) for arguments, _ in cases]
        for (arguments, words), (code, said) in zip(programs + cases, results, strict=True):
            told = f"{arguments}: {code} {said}"
            assert code == 2, told
            assert words in said, told
            errors = [line for line in said.splitlines() if line.startswith("error:")]
            assert len(errors) == 1, told
            assert "Traceback" not in said, told


def test_a_mistake_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Whatever can be known of the images, the place of the result and the source of an export."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    cases = [
        ("adapt('.', backbone='resnet51')", "did you mean"),
        ("adapt('.', weights='pretraind')", "did you mean pretrained?"),
        ("adapt('.', value_range='ct-bones')", "did you mean ct-bone"),
        ("adapt('image.png', out=5)", "out = 5: give a path"),
        ("adapt('image.png', out='full')", "full is not empty and is not a run (it holds notes.txt)"),
        ("adapt('image.png', out='image.png')", "image.png is a file, and a run is a folder"),
        ("adapt([])", "images is empty"),
        ("inspect('image.png', sheet='image.png')", "would lie among the images"),
        ("inspect('image.png', sheet='sheet.jpg')", "ends in .png"),
        ("export('full', 'new')", "full is neither a run nor a bundle"),
        ("export('runs/none', 'new')", "runs/none does not exist"),
        ("export('resnet18:randm', 'new')", "did you mean random?"),
        ("export('resnet18:random', 'full')", "full is a folder, but not a bundle"),
        ("export('resnet18:random', 'image.png/new')", "image.png/new cannot be written"),
        ("export('resnet18:random', 'new', name='a b')", "letters, digits, dots"),
        ("export(5, 'new')", "source = 5: give a path"),
        ("load(3)", "path = 3: give a path"),
        ("open_run(None)", "path = None: give a path"),
    ]
    code = (
        "import sys, jepakit\n"
        f"for call in {[call for call, _ in cases]!r}:\n"
        "    try:\n        eval(f'jepakit.{call}')\n"
        "    except jepakit.JepakitError as error:\n        print(error.exit_code, error)\n"
        "print(sorted({'torch', 'timm', 'ray', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path
    )
    *told, imported = result.stdout.splitlines()
    for (call, words), line in zip(cases, told, strict=True):
        assert line.startswith("2 "), (call, line)
        assert words in line, (call, line)
    assert imported == "[]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "image.png"]


def test_an_unreachable_service_is_told_with_exit_code_1(images: Path, tmp_path: Path) -> None:
    code = (
        "from jepakit import Client; from jepakit.errors import ConnectionFailedError\n"
        f"try:\n    Client('http://127.0.0.1:{free_port()}', deadline_s=0.3).embed({str(images)!r})\n"
        "except ConnectionFailedError as error:\n    print(error.exit_code, error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.startswith("1 http://127.0.0.1")


@pytest.mark.slow
def test_the_demo_prints_its_table_draws_its_map_and_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "JEPAKIT_DEMO_STEPS": "10"}
    demo = ROOT / "examples" / "demo.py"
    process = subprocess.run(
        [sys.executable, demo], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert process.returncode == 0, process.stderr
    rows = {line[:30].strip(): line[30:].split() for line in process.stdout.splitlines() if line.count("%") == 2}
    raw, before = rows["raw 16 × 16 pixels"], rows["embeddings before adaptation"]
    assert float(raw[0].rstrip("%")) < 80 < float(before[0].rstrip("%"))
    assert (tmp_path / "demo-out" / "map.png").stat().st_size > 100_000
    assert "jepakit serve  bundles/mine" in process.stdout
    assert not [
        child for child in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(child.info["cmdline"] or [])
    ]


@pytest.mark.slow
def test_ctrl_c_in_the_demo_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "JEPAKIT_DEMO_STEPS": "2"}
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while "4/6" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(8)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) != 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert "Traceback" not in (tmp_path / "log").read_text()

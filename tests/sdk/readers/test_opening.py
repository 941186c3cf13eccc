"""The single entry point: formats are recognised by their first bytes, refusals name the format and the remedy."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.files import encoded

from jepakit.errors import ImageError
from jepakit.readers import Limits, Window, open_raster, tiffguard
from jepakit.readers.quiet import quiet
from jepakit.readers.room import AT_ONCE_BYTES, room_for

Refused = Callable[..., str]


def png(width: int = 30, height: int = 20) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"GIF89a", "GIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (gzip.compress(b"x"), "gzip"),
        (b"%PDF-1.7", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b'\n<?xml version="1.0"?><plist/>', "XML"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!-- drawn -->\n<!DOCTYPE svg>\n<svg/>", "SVG"),
        (b"\x80\x04\x95", "pickle"),
        (bytes(344) + b"n+1\0" + bytes(100), "NIfTI"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_formats_that_are_not_read_are_named(data: bytes, word: str, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "scan.png"
    file.write_bytes(data + b"\1" * 200)
    for source in (file, data + b"\1" * 200):
        assert word in refused(source, "unsupported_format")


def test_an_empty_file_is_called_that(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "scan.png").write_bytes(b"")
    for source in (tmp_path / "scan.png", b""):
        assert "an empty file: copy it again" in refused(source, "unsupported_format")


@pytest.mark.parametrize(("name", "word"), [("brain.nii.gz", "NIfTI"), ("brain.nii", "NIfTI"), ("old.DCM", "DICOM")])
def test_formats_that_no_first_byte_tells_are_named_by_their_suffix(
    name: str, word: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(bytes(1000)) if name.endswith("gz") else b"\x08\0\x05\0" + bytes(1000))
    assert word in refused(file, "unsupported_format")


@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 500, b"hello", b"BM", b"II*\0", b"RIFF1234WEBP", b"\x93NUMPY"])
def test_everything_else_is_an_image_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "thing.jpg"
    file.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_raster(file)
    assert caught.value.code in ("unsupported_format", "unreadable")
    assert str(file) in str(caught.value)


def test_the_suffix_decides_nothing(tmp_path: Path) -> None:
    for suffix in (".jpg", ".tif", ".dcm", ".npy", ""):
        file = tmp_path / f"a{suffix}"
        file.write_bytes(png())
        with open_raster(file) as raster:
            assert raster.header.format == "PNG"


def test_files_that_cannot_be_opened_are_named(tmp_path: Path, refused: Refused) -> None:
    assert "No such file" in refused(tmp_path / "none.png", "unreadable")
    assert "directory" in refused(tmp_path, "unreadable")
    refused("a\0b", "unreadable")
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refused(tmp_path / "pipe", "unreadable")


def test_the_name_is_what_messages_call_it(refused: Refused) -> None:
    assert refused(b"hello", "unsupported_format", name="scan 7 of upload").startswith("scan 7 of upload: ")
    assert refused(b"hello", "unsupported_format").startswith("image: ")
    assert refused(np.zeros(3), "wrong_shape").startswith("array of float64 [3]: ")


@pytest.mark.parametrize("source", [42, None, [[1, 2]], object()], ids=lambda source: type(source).__name__)
def test_what_cannot_be_an_image_at_all_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match="not "):
        open_raster(source)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_every_kind_are_read(kind: type) -> None:
    with open_raster(kind(png())) as raster:
        assert raster.read().shape == (20, 30, 3)


@pytest.mark.parametrize(
    "window", [(-1, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 31, 9), (25, 0, 9, 9), (0, 15, 9, 9)]
)
def test_windows_outside_the_image_are_refused(window: tuple[int, int, int, int]) -> None:
    for source in (png(), np.zeros((20, 30), np.uint16)):
        with open_raster(source) as raster, pytest.raises(ImageError, match="not inside its 30 × 20") as caught:
            raster.read(Window(*window))
        assert caught.value.code == "wrong_shape"


@pytest.mark.parametrize("frame", [-1, 1])
def test_frames_that_are_not_there_are_refused(frame: int) -> None:
    with open_raster(png()) as raster, pytest.raises(ImageError, match="no frame"):
        raster.read(frame=frame)


def test_the_file_is_let_go_of(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0  # noqa: PTH208
    for _ in range(5):
        open_raster(file).close()
        with pytest.raises(ImageError):
            open_raster(file, limits=Limits(max_pixels=10))
    if before:
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_reading_after_closing_is_an_image_error(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    raster = open_raster(file)
    raster.close()
    with pytest.raises(ImageError):
        raster.read()


def test_importing_the_readers_loads_no_image_library() -> None:
    program = "import json, sys, jepakit.readers; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert [name for name in ("PIL", "tifffile", "imagecodecs", "pydicom", "torch") if name in loaded] == []


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether `work` is true in a forked process; one that hangs is killed after ten seconds."""
    child = os.fork()
    if child == 0:  # whatever happens, the tests go on in the parent alone
        code = 1
        try:
            signal.alarm(10)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_a_process_forked_while_a_thread_reads_is_as_quiet_as_before() -> None:
    filters, inside, leave = list(warnings.filters), threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait(10)

    def as_before() -> bool:
        begun = list(warnings.filters) == filters
        with quiet():
            within = list(warnings.filters) != filters
        return begun and within and list(warnings.filters) == filters

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert in_a_child(as_before)
    assert list(warnings.filters) != filters
    leave.set()
    thread.join()
    assert list(warnings.filters) == filters
    with ExitStack() as block:
        block.enter_context(quiet())

        def as_before_once_left() -> bool:
            block.close()
            return as_before()

        assert in_a_child(as_before_once_left)


def test_a_process_forked_while_a_thread_holds_a_lock_does_not_wait_for_it() -> None:
    held, leave = threading.Event(), threading.Event()

    def other() -> None:
        with tiffguard._one_at_a_time, room_for(AT_ONCE_BYTES):
            held.set()
            leave.wait(10)

    def both() -> bool:
        with tiffguard._one_at_a_time, room_for(1):
            return True

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(10)
    assert in_a_child(both)
    leave.set()
    thread.join()


def test_a_process_forked_at_any_moment_can_read(tmp_path: Path) -> None:
    stop = threading.Event()

    def enter_and_leave() -> None:
        while not stop.is_set():
            with quiet():
                pass

    def enters() -> bool:
        with quiet():
            return True

    thread = threading.Thread(target=enter_and_leave)
    thread.start()
    try:
        assert all(in_a_child(enters) for _ in range(20))
    finally:
        stop.set()
        thread.join()


def test_libraries_are_quiet_inside_and_as_they_were_afterwards() -> None:
    import pydicom  # noqa: F401

    filters, level = list(warnings.filters), logging.getLogger("pydicom").level
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait(10)

    with quiet():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    # The other thread is still inside: the filters must outlive the first one out.
    warnings.warn_explicit("noise", UserWarning, "a.py", 1, module="pydicom.values")
    assert not logging.getLogger("pydicom.pixels").isEnabledFor(logging.ERROR)
    leave.set()
    thread.join()
    assert list(warnings.filters) == filters
    assert logging.getLogger("pydicom").level == level
    with pytest.raises(UserWarning):
        warnings.warn_explicit("noise", UserWarning, "a.py", 1, module="pydicom.values")


def test_room_is_given_back_after_an_error() -> None:
    with pytest.raises(OSError, match="damaged"), room_for(AT_ONCE_BYTES):
        raise OSError("damaged")
    entered = threading.Event()

    def enter() -> None:
        with room_for(AT_ONCE_BYTES):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)

"""`embed(resume=…)`: what was done before an interruption is not done again, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jepakit
from jepakit import Embeddings
from jepakit.cli import app
from jepakit.client import job as _job
from jepakit.embedding.results import Results
from jepakit.errors import ConfigError, ImageError, SpaceError, WriteError
from jepakit.images import preprocess
from jepakit.inference import session
from jepakit_service.settings import ServeSettings

from .conftest import copied as copied_bundle
from .conftest import embedding_everywhere, picture, running

COUNT, BAD = 80, 70
Embed = Callable[..., Embeddings]


@pytest.fixture(params=["in process", "client", "async client"])
def embed(request: pytest.FixtureRequest, service: str, bundle: Path) -> Embed:
    ways = dict(zip(("in process", "client", "async client"), embedding_everywhere(service, bundle), strict=True))
    return ways[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place in range(COUNT):
        file = tmp_path / "images" / ("cats" if place >= COUNT // 2 else "dogs") / f"{place:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(place))
    return tmp_path / "images"


def image(folder: Path, place: int) -> Path:
    """An image by its place in the order in which they are embedded: cats first."""
    files = sorted(folder.rglob("*.png"))
    return files[place]


def interrupted(embed: Embed, folder: Path, part: Path, **options: Any) -> None:
    """Embed until a damaged image ends it; then repair the image."""
    file = image(folder, BAD)
    good = file.read_bytes()
    file.write_bytes(b"no image")
    with pytest.raises(ImageError, match=file.name):
        embed(folder, resume=part, **options)
    file.write_bytes(good)


@contextmanager
def read_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ids of all images that are read within the block."""
    names: list[str] = []

    def noting(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(ref: Any, *rest: Any) -> Any:
            names.append(ref.name)
            return read(ref, *rest)

        return noted

    with monkeypatch.context() as patch:
        patch.setattr(_job, "_encode", noting(_job._encode))
        patch.setattr(session, "preprocess", noting(preprocess))
        yield names


def assert_same(found: Embeddings, expected: Embeddings) -> None:
    assert (found.ids, found.labels, found.model_id) == (expected.ids, expected.labels, expected.model_id)
    limit = 1e-5 * np.abs(expected.vectors).max()
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=0, atol=limit)


def test_the_same_call_continues_where_it_was_interrupted(
    embed: Embed, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = embed(folder, progress=False), tmp_path / "vectors.part"
    interrupted(embed, folder, part)
    assert f"{part} keeps what is done, 6" in capsys.readouterr().err
    with read_images(monkeypatch) as read:
        assert_same(embed(folder, resume=part), whole)
    assert set(read) <= set(whole.ids[64:])
    assert f"of {COUNT} images: continuing from there" in capsys.readouterr().err
    with read_images(monkeypatch) as read:
        again = embed(folder, resume=part, progress=False)
    assert not read
    assert_same(again, whole)
    assert capsys.readouterr().err == ""


def test_images_that_have_changed_are_embedded_again(
    embed: Embed, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "vectors.part"
    interrupted(embed, folder, part, progress=False)
    image(folder, 40).write_bytes(picture(1000))
    (folder / "cats" / "zzz.png").write_bytes(picture(1001))
    assert_same(embed(folder, resume=part), embed(folder, progress=False))
    assert "are damaged, or of other images than these: not used" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 5, 27, 28, 100, 500, 2000, 0.5, 0.99, -40, -1])
def test_a_file_that_was_not_written_to_its_end_is_used_as_far_as_it_is_whole(
    bundle: Path, folder: Path, tmp_path: Path, kept: float
) -> None:
    embed, part = jepakit.load(bundle).embed, tmp_path / "vectors.part"
    whole = embed(folder, resume=part, progress=False)
    data = part.read_bytes()
    part.write_bytes(data[: round(kept * len(data)) if isinstance(kept, float) else int(kept)])
    assert_same(embed(folder, resume=part, progress=False), whole)
    assert part.read_bytes() == data


def test_a_damaged_byte_anywhere_is_noticed(bundle: Path, folder: Path, tmp_path: Path) -> None:
    embed, part = jepakit.load(bundle).embed, tmp_path / "vectors.part"
    whole = embed(folder, resume=part, progress=False)
    data = part.read_bytes()
    for place in np.random.default_rng(0).integers(40, len(data), 40).tolist():
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        part.write_bytes(damaged)
        assert_same(embed(folder, resume=part, progress=False), whole)


def test_what_was_left_out_is_remembered_with_its_reason(embed: Embed, folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "vectors.part"
    for place in (0, 3, 31, 40, 79):
        image(folder, place).write_bytes(b"no image")
    told: list[tuple[str, str]] = []
    whole = embed(folder, most_skipped=0.2, on_skipped=lambda *row: told.append(row), progress=False)
    assert len(whole) == COUNT - len(told) == COUNT - 5
    too_many = {file: file.read_bytes() for file in map(partial(image, folder), range(65, 78))}
    for file in too_many:
        file.write_bytes(b"no image")
    with pytest.raises(ImageError, match="may be left out"):
        embed(folder, most_skipped=0.1, resume=part, progress=False)
    for file, data in too_many.items():
        file.write_bytes(data)
    again: list[tuple[str, str]] = []
    found = embed(folder, most_skipped=0.2, resume=part, on_skipped=lambda *row: again.append(row), progress=False)
    assert_same(found, whole)
    assert again == told
    with pytest.raises(ImageError, match=image(folder, 0).name):
        embed(folder, resume=part, progress=False)


def test_vectors_of_another_model_are_never_continued(embed: Embed, bundle: Path, folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "vectors.part"
    other = copied_bundle(bundle, tmp_path / "other", model_id="0123456789abcdef")
    before = jepakit.load(other).embed(folder, resume=part, progress=False)
    data = part.read_bytes()
    with pytest.raises(SpaceError, match=f"keeps vectors of model {before.model_id}, and these would be of"):
        embed(folder, resume=part, progress=False)
    assert part.read_bytes() == data


def test_a_pinned_model_is_held_to_the_file_too(bundle: Path, folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "vectors.part"
    with running(ServeSettings(bundles=(str(bundle),), port=1)) as url, jepakit.Client(url) as client:
        [served] = client.models()
        client.embed(folder, resume=part, model=f"tiny@{served.model_id}", progress=False)
        with pytest.raises(SpaceError, match="would be of 0123456789abcdef"):
            client.embed(folder, resume=part, model="tiny@0123456789abcdef", progress=False)


def test_a_file_of_another_kind_is_left_as_it_is(embed: Embed, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="no `embed` has made it to resume from"):
        embed(folder, resume=file, progress=False)
    assert file.read_text() == "mine"


def test_a_file_of_another_version_is_left_as_it_is(bundle: Path, folder: Path, tmp_path: Path) -> None:
    embed, part = jepakit.load(bundle).embed, tmp_path / "vectors.part"
    embed(folder, resume=part, progress=False)
    data = part.read_bytes()
    first, line, *_ = data.split(b"\n")
    told = json.loads(line)
    line = json.dumps({**told, "tokens": 4}).encode() + b"\n"
    vectors = data[len(first) + 1 :].partition(b"\n")[2][: 4 * told["dim"] * told["done"]]
    more = first + b"\n" + line + vectors + hashlib.sha256(line + vectors).digest()
    for other in (more, data.replace(b", 1\n", b", 2\n", 1)):
        part.write_bytes(other)
        with pytest.raises(ConfigError, match="begun by another version of jepakit"):
            embed(folder, resume=part, progress=False)
        assert part.read_bytes() == other


def test_a_place_that_cannot_be_written_is_named(embed: Embed, folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path, image(folder, 0) / "part"):
        with pytest.raises(ConfigError, match="cannot be written"):
            embed(folder, resume=place, progress=False)
    with pytest.raises(ConfigError, match="resume = 7"):
        embed(folder, resume=7, progress=False)


def test_images_in_memory_cannot_be_resumed(embed: Embed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs images in files"):
        embed([picture(0)] * 2, resume=tmp_path / "part", progress=False)
    assert not (tmp_path / "part").exists()


def test_a_full_disk_is_told_and_costs_nothing_that_is_done(embed: Embed, folder: Path, tmp_path: Path) -> None:
    part, (soft, hard) = tmp_path / "vectors.part", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = embed(folder, resume=tmp_path / "other.part", progress=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "other.part").stat().st_size * 2 // 3, hard))
    try:
        with pytest.raises(WriteError, match="make room"):
            embed(folder, resume=part, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(embed(folder, resume=part, progress=False), whole)


def test_a_second_at_the_same_time_is_refused_and_the_first_goes_on(
    embed: Embed, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, refused = tmp_path / "vectors.part", list[Exception]()
    whole = embed(folder, progress=False)

    def with_another(self: Results, *rest: Any) -> None:
        with pytest.raises(ConfigError, match=f"{part} is in use by another `embed`") as caught:
            jepakit.load(bundle).embed(folder, resume=part, progress=False)
        refused.append(caught.value)
        add(self, *rest)

    add = Results.add
    monkeypatch.setattr(Results, "add", with_another)
    assert_same(embed(folder, resume=part, progress=False), whole)
    assert refused


def test_vectors_of_other_images_are_not_lost_to_a_mistake(embed: Embed, folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "vectors.part"
    whole = embed(folder, resume=part, progress=False)
    data = part.read_bytes()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "0.png").write_bytes(picture(1))
    with pytest.raises(ConfigError, match=f"{part} keeps vectors of other images than these"):
        embed(tmp_path / "others", resume=part, progress=False)
    assert part.read_bytes() == data
    (folder / "dogs" / "zzz.png").write_bytes(b"no image")
    (image(folder, 79)).unlink()
    with pytest.raises(ImageError):
        embed(folder, resume=part, progress=False)
    assert part.read_bytes() == data, "what does not fit is there until there is something to put in its place"
    assert_same(embed(folder, resume=part, most_skipped=0.1, progress=False), whole[: COUNT - 1])


def test_an_image_that_is_replaced_while_it_is_embedded_is_embedded_again(
    embed: Embed, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "vectors.part"

    def replaced_before(self: Results, *rest: Any) -> None:
        (tmp_path / "new").write_bytes(picture(1000))
        (tmp_path / "new").replace(image(folder, 70))
        add(self, *rest)

    add = Results.add
    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", replaced_before)
        patch.setattr(_job, "AT_ONCE", COUNT)
        embed(folder, resume=part, progress=False)
    assert_same(embed(folder, resume=part, progress=False), embed(folder, progress=False))


def test_thousands_left_out_before_the_first_vector_are_remembered(bundle: Path, tmp_path: Path) -> None:
    embed, part = jepakit.load(bundle).embed, tmp_path / "vectors.part"
    (tmp_path / "good.png").write_bytes(picture(0))
    images = [*(tmp_path / f"{'gone' * 40}{place}.png" for place in range(5000)), tmp_path / "good.png"]
    whole = embed(images, resume=part, most_skipped=1, progress=False)
    assert part.stat().st_size > 1 << 20
    data = part.read_bytes()
    assert_same(embed(images, resume=part, most_skipped=1, progress=False), whole)
    assert part.read_bytes() == data


def test_a_name_that_no_file_can_have_is_left_out(embed: Embed, folder: Path, tmp_path: Path) -> None:
    images = [image(folder, 0), "no\0file.png", image(folder, 1)]
    found = embed(images, resume=tmp_path / "part", most_skipped=0.5, progress=False)
    assert found.ids == (str(images[0]), str(images[2]))


def test_the_command_keeps_what_is_done_and_clears_it_away_in_the_end(
    service: str, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    whole = jepakit.load(bundle).embed(folder, progress=False)
    out, part = tmp_path / "e.npz", tmp_path / "e.npz.part"
    for where in (["--url", service], ["--bundle", str(bundle)]):
        command = ["embed", str(folder), *where, "--out", str(out)]
        file = image(folder, BAD)
        good = file.read_bytes()
        file.write_bytes(b"no image")
        failed = CliRunner().invoke(app, command)
        assert isinstance(failed.exception, ImageError)
        assert f"{part} keeps what is done, 6" in failed.stderr
        assert not out.exists()
        file.write_bytes(good)
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, part.exists()) == (0, False)
        assert "continuing from there" in done.stderr
        assert_same(Embeddings.load(out), whole)
        out.unlink()


def test_the_command_keeps_what_is_done_until_all_is_written(bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    (tmp_path / "e.npz.skipped.csv").mkdir()
    command = ["embed", str(folder), "--bundle", str(bundle), "--out", str(out), "--most-skipped", "0.5"]
    assert isinstance(CliRunner().invoke(app, command).exception, WriteError)
    (tmp_path / "e.npz.skipped.csv").rmdir()
    done = CliRunner().invoke(app, command)
    assert f"keeps what is done, {COUNT} of {COUNT} images" in done.stderr
    assert not (tmp_path / "e.npz.part").exists()


def test_a_killed_command_continues(bundle: Path, folder: Path, tmp_path: Path) -> None:
    for copy in range(40):
        shutil.copytree(folder / "cats", folder / f"more{copy}", copy_function=os.link)
    out, part = tmp_path / "e.npz", tmp_path / "e.npz.part"
    command = [
        sys.executable,
        "-m",
        "jepakit",
        "embed",
        str(folder),
        "--labels",
        "none",
        "--bundle",
        str(bundle),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 20_000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing from there" in again.stderr
    whole = jepakit.load(bundle).embed(folder, labels="none", progress=False)
    assert_same(Embeddings.load(out), whole)
    assert not part.exists()

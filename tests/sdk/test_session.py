"""`Session` and `load`: the right vector for each image, whatever else is in its batch, on any number of threads."""

from __future__ import annotations

import io
import pickle
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import jepakit
import jepakit.inference.session
from jepakit._machine import usable_cpus
from jepakit.bundles import golden
from jepakit.bundles.bundle import GOLDEN, GRAPH, Bundle, open_bundle, write_bundle
from jepakit.errors import BundleError, ConfigError, DataError, ImageError, InferenceError
from jepakit.images import Pixels, preprocess
from jepakit.inference.runtime import Arithmetic, Provider
from jepakit.inference.session import Model, Session, _by_buckets

SIZE = 64
KINDS: dict[str, tuple[Provider, Arithmetic]] = {
    "cpu": ("cpu", "model"),
    "openvino": ("openvino", "model"),
    "openvino bf16": ("openvino", "bf16"),
}


@pytest.fixture(scope="session")
def bundle(exported: Callable[..., Path]) -> Bundle:
    return open_bundle(exported(name="vit", image_size=SIZE, tokens=True))


@pytest.fixture(scope="session")
def images() -> NDArray[np.uint8]:
    return golden.synthetic_images(40, SIZE, 3, seed=3)


def session_of(bundle: Bundle, kind: str) -> Session:
    if kind != "cpu":
        pytest.importorskip("openvino")
    provider, arithmetic = KINDS[kind]
    return Session.open(bundle, provider=provider, arithmetic=arithmetic, threads=2)


@pytest.fixture(scope="module", params=["cpu", "openvino"])
def session(request: pytest.FixtureRequest, bundle: Bundle) -> Session:
    return session_of(bundle, request.param)


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Model:
    return jepakit.load(bundle.path, provider="cpu")


def one_by_one(session: Session, images: Pixels) -> NDArray[np.float32]:
    return np.concatenate([session.run(images[place : place + 1]) for place in range(len(images))])


@pytest.mark.parametrize("batch", [2, 3, 8, 40])
def test_an_image_has_the_same_vector_in_any_batch_and_any_order(
    session: Session, images: NDArray[np.uint8], batch: int
) -> None:
    alone = one_by_one(session, images)
    assert np.abs(alone[1:] - alone[:-1]).max() > 0.01 * np.abs(alone).max()
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(images))
        together = np.concatenate([session.run(images[order[start : start + batch]]) for start in range(0, 40, batch)])
        assert golden.relative_error(together, alone[order]) <= 1e-5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 23])
def test_buckets_give_the_same_vectors_and_the_runtime_only_sizes_it_knows(
    session: Session, images: NDArray[np.uint8], count: int
) -> None:
    seen = []

    def run(batch: Pixels) -> list[NDArray[np.float32]]:
        seen.append(len(batch))
        return session.run_all(batch)

    vectors, tokens = _by_buckets(run, images[:count], (1, 2, 4, 8))
    assert set(seen) <= {1, 2, 4, 8}
    assert seen[:-1] == [8] * (len(seen) - 1)
    assert len(vectors) == len(tokens) == count
    if count:
        assert golden.relative_error(vectors, session.run(images[:count])) <= 1e-5


def test_no_images_give_no_vectors(session: Session, bundle: Bundle) -> None:
    assert session.run(np.empty((0, SIZE, SIZE, 3), np.uint8)).shape == (0, bundle.manifest.embedding.dim)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_at_once_get_their_own_rows(bundle: Bundle, images: NDArray[np.uint8], kind: str) -> None:
    session = session_of(bundle, kind)
    expected = one_by_one(session, images)
    start = threading.Barrier(8)

    def work(seed: int) -> float:
        random = np.random.default_rng(seed)
        start.wait()
        worst = 0.0
        for _ in range(12):
            rows = random.integers(len(images), size=random.integers(1, 5))
            worst = max(worst, float(np.abs(session.run(images[rows]) - expected[rows]).max()))
        return worst

    with ThreadPoolExecutor(8) as pool:
        worst = max(pool.map(work, range(8)))
    # Rows of different images are some 1 apart; bfloat16 may round differently in another batch.
    assert worst <= (0.05 if "bf16" in kind else 1e-5) * np.abs(expected).max()


def test_a_result_is_the_callers_to_keep(session: Session, images: NDArray[np.uint8]) -> None:
    first = session.run(images[:2])
    kept = first.copy()
    session.run(images[2:4])
    np.testing.assert_array_equal(first, kept)


def test_tokens_are_the_second_output(session: Session, bundle: Bundle, images: NDArray[np.uint8]) -> None:
    assert bundle.manifest.graph is not None
    vectors, tokens = session.run_all(images[:5])
    np.testing.assert_allclose(vectors, session.run(images[:5]), atol=1e-5)
    assert tokens.shape == (5, *(bundle.manifest.graph.tokens or ()))
    _, alone = session.run_all(images[3:4])
    assert golden.relative_error(alone[0], tokens[3]) <= 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 32, SIZE, 3), np.uint8), np.zeros((1, SIZE, SIZE, 4), np.uint8), np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, SIZE, SIZE, 3), np.float32), np.zeros((1, 3, SIZE, SIZE), np.uint8),
    ],
    ids=lambda wrong: f"{wrong.dtype} {wrong.shape}",
)  # fmt: skip
def test_what_the_graph_does_not_take_is_refused_by_name(session: Session, wrong: Pixels) -> None:
    with pytest.raises(ImageError, match=r"vit takes uint8 \[B, 64, 64, 3\], not (uint8|float32) \[") as caught:
        session.run(wrong)
    assert caught.value.code == "wrong_shape"


@pytest.mark.parametrize(("height", "width"), [(65, 64), (64, 79), (47, 17)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_by_name(bundle: Bundle, height: int, width: int) -> None:
    facts = bundle.manifest.graph
    assert facts is not None
    dynamic = facts.model_copy(update={"dynamic_size": True, "size_multiple": 16})
    session = Session(bundle.read(GRAPH), bundle.manifest.model_copy(update={"graph": dynamic}), provider="cpu")
    told = rf"vit takes images whose height and width are multiples of 16 px, not {height} × {width}: crop or resize"
    with pytest.raises(ImageError, match=told) as caught:
        session.run(np.zeros((1, height, width, 3), np.uint8))
    assert caught.value.code == "wrong_shape"


def test_a_size_too_small_for_the_graph_is_refused_by_name(exported: Callable[..., Path]) -> None:
    session = Session.open(exported("test_convnext:random", image_size=SIZE, dynamic_size=True), provider="cpu")
    with pytest.raises(
        ImageError, match=r"cannot compute images of 8 × 96 px, which may be too small for it \(.+\): take"
    ):
        session.run(np.zeros((1, 8, 96, 3), np.uint8))


def test_no_memory_is_no_fault_of_an_image_or_a_bundle(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exported("test_convnext:random", image_size=SIZE, dynamic_size=True))
    session = Session.open(bundle, provider="cpu")
    monkeypatch.setattr(session._runtime, "run", MagicMock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        session.run(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(MemoryError):
        session.check_golden(golden.unpack(bundle.read(GOLDEN)))


def test_the_models_own_size_is_taken_whatever_others_must_be_multiples_of(
    bundle: Bundle, images: NDArray[np.uint8]
) -> None:
    facts = bundle.manifest.graph
    assert facts is not None
    dynamic = facts.model_copy(update={"dynamic_size": True, "size_multiple": 14})
    session = Session(bundle.read(GRAPH), bundle.manifest.model_copy(update={"graph": dynamic}), provider="cpu")
    assert session.run(images[:2]).shape == (2, bundle.manifest.embedding.dim)


def test_a_runtime_that_computes_other_vectors_is_refused(session: Session, images: NDArray[np.uint8]) -> None:
    expected = golden.Golden(images[:8], session.run(images[:8]) + np.float32(0.01))
    with pytest.raises(BundleError, match="computes other vectors here than torch did at export: relative error"):
        session.check_golden(expected)


@pytest.mark.parametrize(
    ("precision", "provider", "told"),
    [
        ("fp32", "cpu", "on cpu; export the bundle again on this machine"),
        (
            "int8",
            "cpu",
            "on cpu; int8 needs a CPU with VNNI instructions: serve it on one, or export it again with precision=fp32",
        ),
        ("fp16", "cuda", "on cuda; use provider cpu, or export it again with precision=fp32"),
        ("fp32", "cuda", "on cuda; use provider cpu"),
    ],
)
def test_the_remedy_for_other_vectors_is_one_that_helps(
    bundle: Bundle, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, precision: str, provider: str, told: str
) -> None:
    """An export is verified on the CPU: another one gives the same graph, and a GPU the same vectors."""
    session = Session.open(bundle, provider="cpu")
    expected = golden.Golden(images[:8], session.run(images[:8])[:, ::-1])
    monkeypatch.setattr(Session, "precision", precision)
    monkeypatch.setattr(session, "provider", provider)
    with pytest.raises(BundleError, match=f"{told}$"):
        session.check_golden(expected)


def test_a_bundle_is_held_to_the_dimension_in_its_manifest(bundle: Bundle, tmp_path: Path) -> None:
    """Else the one number a graph gives would be taken for every number of the vector."""
    said = bundle.manifest.embedding.model_copy(update={"dim": bundle.manifest.embedding.dim + 1})
    with pytest.raises(
        BundleError, match=rf"golden\.npz holds vectors of float32 \[8, {said.dim - 1}\], .* \[8, {said.dim}\]"
    ):
        Session.open(copied(bundle, tmp_path / "b", set(bundle.manifest.files), embedding=said), provider="cpu")


@pytest.mark.parametrize("kind", ["cpu", "openvino"])
def test_a_graph_that_does_not_take_what_its_manifest_says_is_refused(
    bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    fed = bundle.manifest.preprocess.model_copy(update={"size": SIZE - 16})
    remedy = {"cpu": "do not use this bundle, jepakit did not make it", "openvino": "use provider cpu"}[kind]
    with pytest.raises(BundleError, match=rf"^vit cannot compute its own golden inputs on {kind} \(.+\): {remedy}$"):
        session_of(open_bundle(copied(bundle, tmp_path / "b", set(bundle.manifest.files), preprocess=fed)), kind)


@pytest.mark.parametrize("missing", [{"golden.npz"}, {"model.onnx"}, {"model.onnx", "golden.npz"}], ids=len)
def test_a_bundle_without_what_proves_or_computes_it_is_refused(
    bundle: Bundle, tmp_path: Path, missing: set[str]
) -> None:
    with pytest.raises(
        BundleError, match=f"has no {max(missing)}"
    ):  # the graph first: without it, nothing was exported
        Session.open(copied(bundle, tmp_path / "b", set(bundle.manifest.files) - missing), provider="cpu")


def copied(bundle: Bundle, out: Path, names: set[str], **changes: Any) -> Path:
    """A copy of the bundle with only these files, and a matching manifest."""

    def write_files(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(bundle.read(name))

    write_bundle(out, bundle.manifest.model_copy(update=changes), write_files)
    return out


@pytest.mark.parametrize("count", [1, 3, 4, 5, 12, 13, 31])
def test_embedding_keeps_the_order_of_the_images(model: Model, image_folder: Callable[..., Path], count: int) -> None:
    files = sorted(image_folder(classes=0, per_class=count).glob("*.png"))[::-1]
    embedded = model.embed(files, progress=False)
    assert [Path(name).name for name in embedded.ids] == [file.name for file in files]
    pixels = np.stack([preprocess(file, model.manifest.preprocess) for file in files])
    assert golden.relative_error(embedded.vectors, one_by_one(model._session, pixels)) <= 1e-5


def test_a_batch_for_which_there_is_no_room_is_embedded_in_parts(
    model: Model, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, most = model._session.run, 2

    def cramped(images: Pixels) -> NDArray[np.float32]:
        if len(images) > most:
            raise InferenceError(f"no room on the GPU for a batch of {len(images)} images")
        return run(images)

    folder = image_folder(classes=0, per_class=7)
    expected = model.embed(folder, progress=False)
    monkeypatch.setattr(model._session, "run", cramped)
    found = model.embed(folder, progress=False)
    assert found.ids == expected.ids
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=1e-5, atol=1e-5)
    most = 0
    with pytest.raises(InferenceError, match="for a batch of 1 images"):
        model.embed(folder, progress=False)


def test_a_model_tells_what_it_is_and_that_no_other_process_can_have_it(model: Model, bundle: Bundle) -> None:
    assert (model.name, model.model_id, model.digest) == (bundle.name, bundle.model_id, bundle.digest)
    assert (model.dim, model.precision, model.provider) == (bundle.manifest.embedding.dim, "fp32", "cpu")
    assert repr(model) == f"<Model 'vit': vectors of {model.dim} numbers, model_id={model.model_id!r}, on cpu>"
    with pytest.raises(TypeError, match=r"a Model cannot be copied or sent .*: load the bundle there"):
        pickle.dumps(model)


def test_nothing_to_embed_is_said(model: Model) -> None:
    with pytest.raises(DataError):
        model.embed([], progress=False)


class Watched:
    """A session that notes how many images had been requested when each batch ran, and waits for some more."""

    def __init__(self, session: Session, wait_for: int) -> None:
        self.manifest, self.batch = session.manifest, session.batch
        self._session, self._wait_for = session, wait_for
        self._asked = threading.Condition()
        self.asked = 0
        self.seen: list[int] = []

    def preprocess(self, *arguments: Any) -> Pixels:
        with self._asked:
            self.asked += 1
            self._asked.notify_all()
        return preprocess(*arguments)

    def run(self, images: Pixels) -> NDArray[np.float32]:
        with self._asked:
            self._asked.wait_for(lambda: self.asked >= self._wait_for, timeout=5)
            self.seen.append(self.asked)
        return self._session.run(images)


def test_an_image_whose_vector_is_not_finite_is_left_out_or_named(model: Model, images: NDArray[np.uint8]) -> None:
    class Overflowing(Watched):
        done = 0

        def run(self, images: Pixels) -> NDArray[np.float32]:
            vectors = self._session.run(images).copy()
            vectors[np.arange(self.done, self.done + len(images)) == 5, 0] = np.inf
            self.done += len(images)
            return vectors

    def embed(**options: Any) -> jepakit.Embeddings:
        return Model(Overflowing(model._session, 0)).embed(list(images[:9]), progress=False, **options)  # type: ignore[arg-type]

    skipped: list[tuple[str, str]] = []
    kept = embed(most_skipped=0.2, on_skipped=lambda *one: skipped.append(one))
    whole = model.embed(list(images[:9]), progress=False)
    np.testing.assert_array_equal(kept.vectors, np.delete(whole.vectors, 5, axis=0))
    assert kept.ids == (*whole.ids[:5], *whole.ids[6:])
    assert [name for name, _ in skipped] == [whole.ids[5]]
    with pytest.raises(ImageError, match="vector for this image is not finite") as caught:
        embed()
    assert caught.value.code == "not_finite"


def test_images_are_decoded_while_others_are_embedded_and_never_far_ahead(
    model: Model, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(model._session, wait_for=8)
    monkeypatch.setattr(jepakit.inference.session, "preprocess", watched.preprocess)
    Model(watched).embed(list(images), progress=False)  # type: ignore[arg-type]
    assert watched.asked == len(images)
    assert watched.seen[0] >= 8  # the second batch was read while the first was embedded
    assert all(asked <= 4 * (number + 3) for number, asked in enumerate(watched.seen))


def test_a_dataset_is_read_in_the_caller_s_own_thread(model: Model, images: NDArray[np.uint8], tmp_path: Path) -> None:
    """It may hold a database's connection, which only the thread that opened it may use."""

    class Bound:
        def __init__(self) -> None:
            self.rows = sqlite3.connect(tmp_path / "images.db")
            self.rows.execute("create table image (place, pixels)")
            self.rows.executemany("insert into image values (?, ?)", enumerate(map(bytes, images[:6])))

        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: int) -> NDArray[np.uint8]:
            ((pixels,),) = self.rows.execute("select pixels from image where place = ?", (place,))
            return np.frombuffer(pixels, np.uint8).reshape(images[0].shape)

    embedded = model.embed(Bound(), progress=False)
    np.testing.assert_array_equal(embedded.vectors, model.embed(list(images[:6]), progress=False).vectors)


def test_the_first_bad_image_is_named_though_a_later_one_fails_sooner(
    model: Model, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(image_folder(classes=0, per_class=12).glob("*.png"))
    for place in (5, 6):
        files[place].write_bytes(b"no image")
    later_failed = threading.Event()

    def slow_at_5(ref: Any, *rest: Any) -> Pixels:
        if str(ref.name).endswith("005.png"):
            later_failed.wait(5 if usable_cpus() > 1 else 0)
        try:
            return preprocess(ref, *rest)
        except ImageError:
            later_failed.set()
            raise

    monkeypatch.setattr(jepakit.inference.session, "preprocess", slow_at_5)
    with pytest.raises(ImageError, match=r"005\.png"):
        model.embed(files, progress=False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_images_that_cannot_be_embedded_are_left_out_up_to_a_share(
    model: Model, image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(classes=2, per_class=10)
    files = sorted(folder.rglob("*.png"))
    whole = model.embed(folder, progress=False)
    for place in (3, 4, 19):
        files[place].write_bytes(b"no image")
    told: list[tuple[str, str]] = []
    found = model.embed(folder, most_skipped=0.15, on_skipped=lambda *row: told.append(row))
    kept = [place for place in range(20) if place not in (3, 4, 19)]
    assert found.ids == whole[kept].ids
    assert found.labels == whole[kept].labels
    assert golden.relative_error(found.vectors, whole[kept].vectors) <= 1e-5
    assert [name for name, _ in told] == [whole.ids[place] for place in (3, 4, 19)]
    assert all(name in reason for name, reason in told)
    first, reason = told[0]
    names = f"{first}, {whole.ids[4]}, {whole.ids[19]}"
    assert f"3 images left out, as they cannot be embedded: {names}; the first: {reason}" in capsys.readouterr().err
    with pytest.raises(
        ImageError, match=rf"{first}: .*; 3 of 20 images cannot be embedded so far, and at most a share of 0.1"
    ) as too_many:
        model.embed(folder, most_skipped=0.1, progress=False)
    with pytest.raises(
        ImageError, match=rf"^{first}: .*; to leave such images out, allow a share of them \(most_skipped\)"
    ) as none_allowed:
        model.embed(folder, progress=False)
    assert all(raised.value.__suppress_context__ for raised in (too_many, none_allowed)), "one traceback, not two"


def test_some_image_must_be_left(model: Model, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"a\.png: .*; 2 of 2 images cannot be embedded") as caught:
        model.embed(tmp_path, most_skipped=1.0, progress=False)
    assert caught.value.code == "unsupported_format"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.1", None])
def test_what_is_no_share_of_the_images_is_refused(model: Model, images: NDArray[np.uint8], share: Any) -> None:
    with pytest.raises(ConfigError, match=r"most_skipped = .*: give a share of the images, 0 to 1"):
        model.embed(images, most_skipped=share, progress=False)


def test_a_dataset_is_never_asked_by_two_threads_at_once(model: Model, images: NDArray[np.uint8]) -> None:
    class Dataset:
        """Not thread-safe."""

        def __init__(self) -> None:
            self._busy = threading.Lock()

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, place: int) -> tuple[NDArray[np.uint8], int]:
            assert self._busy.acquire(blocking=False), "two threads at once"
            threading.Event().wait(0.001)
            self._busy.release()
            return images[place], place % 2

    assert len(model.embed(Dataset(), progress=False)) == len(images)


def test_bytes_files_and_arrays_embed_alike(model: Model, images: NDArray[np.uint8], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    vectors = [model.embed(one, progress=False).vectors for one in (tmp_path / "a.png", buffer.getvalue(), images[0])]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])


def test_a_batch_is_filled_up_to_the_next_bucket_and_no_further(images: NDArray[np.uint8]) -> None:
    seen = []

    def run(batch: Pixels) -> list[NDArray[np.float32]]:
        seen.append(len(batch))
        return [np.zeros((len(batch), 2), np.float32)]

    for count in (1, 3, 8, 9):
        _by_buckets(run, images[:count], (1, 2, 4, 8))
    assert seen == [1, 4, 8, 8, 1]


async def in_vain(name: str, reason: str) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    "wrong", [[].append, [], lambda: None, in_vain], ids=["one argument", "a list", "none", "a coroutine"]
)
def test_a_function_for_skipped_images_that_cannot_take_them_is_refused_before_the_work(
    model: Model, images: NDArray[np.uint8], wrong: Any
) -> None:
    with pytest.raises(
        ConfigError, match=r"on_skipped = .*: give a function of two arguments, an image's id and the reason"
    ):
        model.embed(list(images), on_skipped=wrong)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_a_number_of_threads_that_is_none_is_refused(bundle: Bundle, threads: Any) -> None:
    with pytest.raises(ConfigError, match=r"threads = .*: give a whole number"):
        jepakit.load(bundle, threads=threads)

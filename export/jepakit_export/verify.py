"""Checks what the exporter promises: the runtime reproduces torch's vectors at any batch size."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from jepakit._checks import exceeds
from jepakit._messages import lines_of
from jepakit._say import say
from jepakit.backbones.backbone import round_size, size_multiple
from jepakit.backbones.embedder import Embedder
from jepakit.bundles import golden
from jepakit.bundles.manifest import Precision, Preprocess
from jepakit.errors import DataError, ExportError, ImageError
from jepakit.images import Pixels, preprocess
from jepakit.inference.session import Session
from jepakit.sources import evenly_spread, gather
from jepakit_export.convert import use_plain_attention

BATCH_SIZES = (1, 2, 7, 33)
MOST_IMAGES, FEWEST_IMAGES, MOST_SKIPPED = 256, 16, 0.01
_BATCH = 16
# In half precision torch takes 2 to 10 times as long on a CPU.
_MOST_HALVED = 32
# Within one graph at one batch size: each image goes through the very same operations, in the same order.
_SAME = 1e-5
_WITHOUT_VNNI = (
    "; this CPU has no VNNI instructions, without which sums of 8-bit products overflow: export on a machine like the one "
    "that will serve, or use precision=fp32"
)


class Expected(NamedTuple):
    """Preprocessed images [N, H, W, C] and what torch makes of them: embeddings [N, D], patch tokens [N, T, E] or None."""

    images: Pixels
    vectors: golden.Vectors
    tokens: NDArray[np.float32] | None


def read_users_images(source: str, spec: Preprocess) -> Pixels:
    """Up to 256 images spread over the user's source, preprocessed; unreadable ones are reported and left out.

    Each frame of a multi-frame file is an image, unless the model was made for one of them. Raises DataError if fewer
    than 16 images can be read, or more than 1 % cannot.
    """
    frame: int | Literal["each"] = "each" if spec.frame is None else spec.frame
    listed = gather(
        source,
        "none",
        tile=spec.tile,
        frame=frame,
        chosen_range=spec.chosen_range,
        progress=True,
        most_skipped=MOST_SKIPPED,
        most_cut=MOST_IMAGES,
    )
    places = evenly_spread(len(listed), MOST_IMAGES).tolist()
    pixels, skipped = [], list[ImageError]()
    for place in places:
        try:
            pixels.append(preprocess(listed[place], spec))
        except ImageError as error:
            skipped.append(error)
    unread = f"{len(skipped)} of {len(places)} images cannot be read, the first: {skipped[0]}" if skipped else ""
    if len(pixels) < FEWEST_IMAGES:
        raise DataError(
            f"{source}: {len(pixels)} images can be read, {FEWEST_IMAGES} are the fewest to verify on"
            f"{'; ' if unread else ''}{unread}"
        )
    if exceeds(len(skipped), len(places), MOST_SKIPPED):
        raise DataError(f"{source}: {unread}; {MOST_SKIPPED:.0%} may be left out: repair or remove them")
    if skipped:
        say(f"{source}: {unread}: left out of what is verified on")
    return np.stack(pixels)


def calibration_and_check(precision: Precision, inputs: Pixels, users: Pixels | None) -> tuple[Pixels, Pixels | None]:
    """The images to calibrate on, and those to verify on in addition to the golden inputs.

    Of the user's images, int8 is calibrated on one half and verified on the other. Without them it is calibrated and
    verified on the golden inputs alone, with a note to the user.
    """
    if precision != "int8":
        return inputs, users
    if users is not None:
        return users[::2], users[1::2]
    say(
        "int8 is calibrated and verified on synthetic images only, and real ones may do worse: give some with verify_images=DIR"
    )
    return inputs, None


def expect(embedder: Embedder, images: Pixels) -> Expected:
    """What torch computes, a few images at a time; ExportError if it is not finite."""
    vectors, tokens = _computed(embedder, images)
    if not np.isfinite(vectors).all():
        raise ExportError("the backbone's own vectors are not finite: its weights are damaged")
    return Expected(images, vectors, tokens)


def _computed(embedder: Embedder, images: Pixels) -> tuple[golden.Vectors, NDArray[np.float32] | None]:
    vectors, tokens = [], []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            answer = embedder(torch.from_numpy(images[start : start + _BATCH]))
            vectors.append((answer[0] if embedder.tokens else answer).numpy())
            if embedder.tokens:
                tokens.append(answer[1].numpy())
    return np.concatenate(vectors), np.concatenate(tokens) if tokens else None


def halved(embedder: Embedder) -> Embedder:
    """A copy whose backbone has half-precision weights and computes in half precision."""
    half = copy.deepcopy(embedder)
    half.backbone.half()
    return half


def check_half(half: Embedder, spec: Preprocess, sets: Sequence[Pixels]) -> None:
    """Raise ExportError if the embedder in half precision overflows on these sets, or on images of the greatest contrast.

    On a CPU, ONNX Runtime computes an fp16 graph in single precision: only torch shows here what would overflow on a GPU.
    Fused attention is made plain in `half`, as in the graph.
    """
    use_plain_attention(half)
    for images in (*sets, _stark_images(spec)):
        _check_finite(half, images[evenly_spread(len(images), _MOST_HALVED)])


def _check_finite(half: Embedder, images: Pixels) -> None:
    vectors, tokens = _computed(half, images)
    finite = np.isfinite(vectors).all(axis=1)
    if tokens is not None:
        finite &= np.isfinite(tokens).all(axis=(1, 2))
    if bad := int((~finite).sum()):
        raise ExportError(
            f"in half precision the vectors of {bad} of {len(images)} images are not finite: numbers in the backbone "
            f"exceed {torch.finfo(torch.float16).max:.0f}, the largest that fp16 holds; use precision=fp32"
        )


def _stark_images(spec: Preprocess) -> Pixels:
    """Black, white, stripes of several widths, and black and white noise, over the full range of the values."""
    shape = (spec.size, spec.size, spec.bands)
    columns = np.indices(shape)[1]
    stripes = [columns // width % 2 for width in (2, 4, 8, 16)]
    noise = np.random.default_rng(0).integers(0, 2, shape)
    shares = np.stack([np.zeros(shape), np.ones(shape), *stripes, noise])
    return (255 * shares).astype(np.uint8) if spec.scaling is None else spec.scaling.from_unit(shares)


def check(session: Session, precision: Precision, expected: Expected) -> golden.Agreement:
    """The worst agreement with torch over several batch sizes (1, 2, 7 and 33), optimised as for serving.

    Raises ExportError if it misses the tolerance table's limit for `precision`, if the graph has a fixed batch size, or
    if an image's vector depends on which others are in its batch.
    """
    found = [_compare(session, precision, expected, size) for size in BATCH_SIZES]
    _check_mates(session, expected.images)
    return golden.Agreement(
        max(one.relative_error for one in found),
        min(one.centred_cosine for one in found),
        min(one.same_neighbour for one in found),
        max(one.length_error for one in found),
    )


def least_multiple(embedder: Embedder, spec: Preprocess) -> int:
    """The number of pixels of which torch requires image sides to be a multiple: the patch of a ViT, 1 for most ConvNets."""
    most = size_multiple(embedder.backbone)
    divisors = (step for step in range(1, most) if most % step == 0)
    return next((step for step in divisors if _takes(embedder, spec, (spec.size // step + 1) * step)), most)


def _takes(embedder: Embedder, spec: Preprocess, side: int) -> bool:
    """Whether torch computes an image of `side` × `side` pixels."""
    try:
        _computed(embedder, np.zeros((1, side, side, spec.bands), spec.dtype))
    except Exception:  # each architecture raises its own
        return False
    return True


def check_sizes(session: Session, precision: Precision, embedder: Embedder, images: Pixels) -> None:
    """Raise ExportError if a graph of dynamic size does not reproduce torch at a smaller and at a non-square size.

    The height of the latter differs from the model's own by `size_multiple`, the least that the graph should take.
    """
    assert session.manifest.graph is not None
    size, step = images.shape[1], session.manifest.graph.size_multiple
    small = round_size(size // 2, size_multiple(embedder.backbone))
    wide = np.concatenate([images, images], axis=2)
    for height, width in ((small, small), (size - step or size, size + small)):
        try:
            _compare(session, precision, expect(embedder, wide[:, :height, :width]), len(images))
        except Exception as error:  # torch's and ONNX Runtime's exceptions have no common base worth naming
            raise ExportError(f"at {height} × {width} px: {lines_of(error)[0]}; export without dynamic_size") from error


def _check_mates(session: Session, images: Pixels) -> None:
    """Raise ExportError if images give other outputs in a batch with extremes than in one with similar images."""
    few = images[: len(images) // 2][:4]
    alike = images[len(few) :][:3]
    low, high = images.min(), images.max()
    noise = np.random.default_rng(0).uniform(low, high, few[0].shape)
    extremes = np.stack([np.full_like(few[0], low), np.full_like(few[0], high), noise.astype(few.dtype)])
    beside_alike, beside_extremes = (session.run_all(np.concatenate([few, mates])) for mates in (alike, extremes))
    for got, expected in zip(beside_extremes, beside_alike, strict=True):
        error = golden.relative_error(got[: len(few)], expected[: len(few)])
        if not error <= _SAME:
            raise ExportError(
                f"an image's vector depends on which others are in its batch (relative error {error:.2g} beside black, white "
                f"and noise, at most {_SAME:g} is allowed): the backbone mixes the images of a batch; take another one"
            )


def int8_is_exact_here() -> bool:
    """Whether 8-bit products are summed without overflow: x86 CPUs without VNNI sum pairs of them in 16 bits."""
    return platform.machine() != "x86_64" or torch.cpu._is_vnni_supported()


def _compare(session: Session, precision: Precision, expected: Expected, size: int) -> golden.Agreement:
    """Compare every image with torch, in batches of exactly `size`; the last one is filled up from the front."""
    limit = golden.TOLERANCES[precision, "cpu"]
    n_images = len(expected.images)
    rows = np.arange(-(-n_images // size) * size) % n_images
    outputs = []
    for start in range(0, len(rows), size):
        try:
            outputs.append(session.run_all(expected.images[rows[start : start + size]]))
        except Exception as error:  # ONNX Runtime's exceptions have no common base worth naming
            raise ExportError(f"the exported graph fails at batch size {size}: {lines_of(error)[0]}") from None
    found = golden.agreement(np.concatenate([output[0] for output in outputs])[:n_images], expected.vectors)
    missed = found.misses(limit)
    if missed is None and expected.tokens is not None:
        tokens = np.concatenate([output[1] for output in outputs])[:n_images]
        flat = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
        missed = golden.agreement(tokens.reshape(flat), expected.tokens.reshape(flat), neighbours=False).misses(limit)
        missed = missed and f"patch tokens: {missed}"
    if missed is not None:
        hint = _WITHOUT_VNNI if precision == "int8" and not int8_is_exact_here() else ""
        raise ExportError(f"the exported graph does not reproduce torch at batch size {size}: {missed}{hint}")
    return found

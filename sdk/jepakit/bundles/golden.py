"""Golden inputs: synthetic images with torch's vectors, to prove that a runtime computes the same model.

Checked at export, at service start and remotely (`client.verify(bundle)`), against one table of tolerances.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit._vectors import unit_length
from jepakit.errors import BundleError
from jepakit.images import Pixels, center_crop

if TYPE_CHECKING:
    from jepakit.bundles.manifest import Preprocess


Vectors = NDArray[np.float32]

N_GOLDEN = 8
# Limits for untrusted files. Golden images are mostly noise, which never compresses to less than half.
_MOST_GOLDEN, _MOST_INFLATED = 64, 10


class Tolerance(NamedTuple):
    """The worst agreement with torch that is still accepted; None for a measure that does not count."""

    relative: float | None = None
    cosine: float | None = None
    neighbour: float | None = None
    length: float | None = None


# By the precision actually computed in, and the provider. fp32 means fp32: TF32 on CUDA and bf16 in OpenVINO are off.
# A raw cosine would hide errors, since embeddings share a large mean: the cosine here is centred. The TensorRT entries
# are untested on hardware.
# No vector's length was off by more than 0.2 % in fp16 (MobileNetV2, ResNet-18, ViT-Ti), nor by more than 0.6 % in an int8
# graph that passes the cosine (ResNet-18, ViT-Ti); with the mean vector subtracted, 0.4 % and 2 %.
_HALF, _QUANTISED = Tolerance(cosine=0.999, length=0.02), Tolerance(cosine=0.99, neighbour=0.95, length=0.05)
TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("fp32", "cpu"): Tolerance(relative=1e-4),
    ("fp32", "openvino"): Tolerance(relative=1e-4),
    ("fp32", "cuda"): Tolerance(relative=1e-3),
    ("fp32", "tensorrt"): Tolerance(relative=1e-3),
    **{("fp16", provider): _HALF for provider in ("cpu", "openvino", "cuda", "tensorrt")},
    ("bf16", "openvino"): Tolerance(cosine=0.99, length=0.05),
    **{("int8", provider): _QUANTISED for provider in ("cpu", "openvino", "cuda", "tensorrt")},
}


class Agreement(NamedTuple):
    """How close vectors are to torch's: largest difference over largest value, smallest centred cosine, the share of
    images whose nearest other image is the same, and how far the median ratio of their lengths is from 1."""

    relative_error: float
    centred_cosine: float
    same_neighbour: float
    length_error: float

    def misses(self, limit: Tolerance) -> str | None:
        """The first measure that fails `limit`, in words; None if none does."""
        if limit.relative is not None and not self.relative_error <= limit.relative:
            return f"relative error {self.relative_error:.2g}, at most {limit.relative:g} is allowed"
        if limit.cosine is not None and not self.centred_cosine >= limit.cosine:
            return f"centred cosine {self.centred_cosine:.4f}, at least {limit.cosine:g} is required"
        if limit.neighbour is not None and not self.same_neighbour >= limit.neighbour:
            return f"the same nearest neighbour for {self.same_neighbour:.1%} of the images, at least {limit.neighbour:.0%} is required"
        if limit.length is not None and not self.length_error <= limit.length:
            return f"vectors longer or shorter by {self.length_error:.1%}, at most {limit.length:.0%} is allowed"
        return None


class Golden(NamedTuple):
    """images [N, S, S, C] as the graph takes them, vectors float32 [N, D].

    S is `preprocess.resize_to`: a service only crops them, so that another version of Pillow cannot change the result.
    `inputs` returns what reaches the graph.
    """

    images: Pixels
    vectors: Vectors

    def inputs(self, spec: Preprocess) -> Pixels:
        """The images cropped as the graph takes them, [N, size, size, C]."""
        return center_crop(self.images, spec.size)

    def check(self, spec: Preprocess, dim: int) -> None:
        """Raise BundleError unless these fit a model with preprocess `spec` and embeddings of `dim` dimensions."""
        wanted = f"{spec.dtype} {[len(self.images), spec.resize_to, spec.resize_to, spec.bands]}"
        for name, array, kind in (
            ("images", self.images, wanted),
            ("vectors", self.vectors, f"float32 {[len(self.images), dim]}"),
        ):
            if (found := _kind(array)) != kind:
                raise BundleError(
                    f"golden.npz holds {name} of {found}, but the manifest says {kind}: do not use this bundle, jepakit did not make it"
                )


def make_images(spec: Preprocess) -> Pixels:
    """The golden images of a model, [N, S, S, C]: uint8, or float32 over the full range of its value scaling."""
    if spec.scaling is None:
        return synthetic_images(N_GOLDEN, spec.resize_to, spec.bands)
    return spec.scaling.from_unit(_synthetic(N_GOLDEN, spec.resize_to, spec.bands, seed=0) / 255)


def synthetic_images(count: int, size: int, bands: int, seed: int = 0) -> NDArray[np.uint8]:
    """Seeded images with the spectrum of photographs (1/f noise per band) and hard-edged shapes.

    uint8 [count, size, size, bands]. They exercise a model like real images, without containing anyone's data.
    """
    return _synthetic(count, size, bands, seed).astype(np.uint8)


def _synthetic(count: int, size: int, bands: int, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1.0
    noise = np.fft.rfft2(random.standard_normal((count, bands, size, size))) / frequency
    images = np.fft.irfft2(noise, s=(size, size))
    images -= images.mean(axis=(2, 3), keepdims=True)
    images /= images.std(axis=(2, 3), keepdims=True)
    images = 127 + 48 * images

    rows, columns = np.mgrid[:size, :size]
    for image in images:
        y, x = random.uniform(0.2, 0.8, 2) * size
        radius = random.uniform(0.1, 0.3) * size
        inside = np.hypot(rows - y, columns - x) < radius
        image[:, inside] = random.uniform(0, 255, (bands, 1))
    return np.ascontiguousarray(images.clip(0, 255).transpose(0, 2, 3, 1))


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; infinite for a wrong shape or non-finite numbers."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


def agreement(got: NDArray[Any], expected: NDArray[Any], *, neighbours: bool = True) -> Agreement:
    """Compare vectors [N, D] with torch's; the worst values for a wrong shape or non-finite numbers.

    neighbours  find each vector's nearest neighbour, which takes 8 · N² bytes; otherwise all count as the same
    """
    if got.shape != expected.shape or not np.isfinite(got).all():
        return Agreement(float("inf"), -1.0, 0.0, float("inf"))
    mean = expected.mean(axis=0, dtype=np.float64)
    a, b = unit_length(got - mean), unit_length(expected - mean)
    cosine = float((a * b).sum(axis=1).min()) if len(got) > 1 else 1.0
    same = float((_nearest(a) == _nearest(b)).mean()) if neighbours else 1.0
    return Agreement(relative_error(got, expected), cosine, same, _length_error(got, expected))


def _length_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """The median of the vectors' lengths over the expected ones, as its distance from 1."""
    lengths, wanted = (np.linalg.norm(vectors.astype(np.float64), axis=1) for vectors in (got, expected))
    ratios = lengths[wanted > 0] / wanted[wanted > 0]
    return abs(float(np.median(ratios)) - 1) if len(ratios) else 0.0


def _nearest(unit: NDArray[np.float64]) -> NDArray[np.intp]:
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: NDArray[np.intp] = similarity.argmax(axis=1)
    return nearest


def pack(golden: Golden) -> bytes:
    """`golden.npz`'s bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=golden.images, vectors=golden.vectors)
    return buffer.getvalue()


def unpack(data: bytes) -> Golden:
    """Read an untrusted `golden.npz`: pickles are never loaded, nor more inflated than golden inputs may take.

    Raises BundleError if it cannot be read, or holds anything but 1 to 64 images and a float32 vector for each.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_INFLATED * len(data):
            raise ValueError(f"{len(data):,} bytes would inflate to {size:,}, over {_MOST_INFLATED} times as many")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            images, vectors = arrays["images"], arrays["vectors"]
    except Exception as error:  # a damaged archive can raise anything
        raise BundleError(f"golden.npz cannot be read: {error}") from None
    fits = images.ndim == 4 and vectors.ndim == 2 and vectors.dtype == np.float32 and len(images) == len(vectors)
    if not fits or not 1 <= len(images) <= _MOST_GOLDEN:
        raise BundleError(
            f"golden.npz holds images of {_kind(images)} and vectors of {_kind(vectors)}, and must hold 1 to {_MOST_GOLDEN} "
            "images [N, S, S, bands] and vectors float32 [N, dim]: do not use this bundle, jepakit did not make it"
        )
    return Golden(images, vectors)


def _kind(array: NDArray[Any]) -> str:
    return f"{str(array.dtype)[:60]} {list(array.shape)}"

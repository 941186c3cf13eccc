"""Golden inputs: synthetic images with torch's vectors, to prove that a runtime computes the same model.

Checked at export, at service start, and from afar (`client.verify(bundle)`), by one table of tolerances.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jepakit.errors import BundleError
from jepakit.images import Pixels, centre_crop

if TYPE_CHECKING:
    from jepakit.bundle import Preprocess


Vectors = NDArray[np.float32]

N_GOLDEN = 8

# (precision, provider) → largest allowed |difference| / largest |value|. fp32 means fp32: TF32 on CUDA and
# bf16 in OpenVINO are switched off for it. CUDA's tolerance is untested on hardware.
RELATIVE_TOLERANCE = {("fp32", "cpu"): 1e-4, ("fp32", "cuda"): 1e-3}


class Golden(NamedTuple):
    """images [N, S, S, C] as the graph takes them, vectors float32 [N, D].

    S is `preprocess.resize_to`: sent to a service as they are, the preprocess only crops them, so that a
    Pillow of another version cannot move the result. `inputs` is what reaches the graph.
    """

    images: Pixels
    vectors: Vectors

    def inputs(self, spec: Preprocess) -> Pixels:
        """The images cropped as the graph takes them, [N, size, size, C]."""
        return centre_crop(self.images, spec.size)


def make_images(spec: Preprocess) -> Pixels:
    """The golden images of a model, [N, S, S, C]: uint8, or float32 that fill its value scaling."""
    if spec.scaling is None:
        return synthetic_images(N_GOLDEN, spec.resize_to, spec.bands)
    low, high = np.asarray(spec.scaling.low), np.asarray(spec.scaling.high)
    shares = _synthetic(N_GOLDEN, spec.resize_to, spec.bands, seed=0) / 255
    values: NDArray[np.float32] = (low + shares * (high - low)).astype(np.float32)
    return values


def synthetic_images(count: int, size: int, bands: int, seed: int = 0) -> NDArray[np.uint8]:
    """Seeded images with the spectrum of photographs (1/f noise per band) and hard-edged shapes.

    uint8 [count, size, size, bands]. Made of plain arithmetic and one FFT, so that they stress a model as
    real images do and hold nothing of anybody's data.
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


def pack(golden: Golden) -> bytes:
    """`golden.npz`'s bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=golden.images, vectors=golden.vectors)
    return buffer.getvalue()


def unpack(data: bytes) -> Golden:
    """Read `golden.npz` (no pickle is ever loaded)."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Golden(arrays["images"], arrays["vectors"])
    except Exception as error:  # a damaged archive can raise anything
        raise BundleError(f"golden.npz cannot be read: {error}") from None

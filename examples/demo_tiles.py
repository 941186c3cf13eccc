"""Labelled image tiles for the demo, cut from photographs inside scikit-image.

Nothing is downloaded: every source file ships in the scikit-image wheel. Tiles
are mostly drained of colour, turned by a random angle, blurred, re-exposed and
made noisy, so colour, brightness or layout alone do not give the class away.

Train and test tiles of a class come from separate regions of its source image,
so no source pixel is ever seen on both sides.
"""

import zlib
from dataclasses import dataclass
from math import cos, radians, sin, sqrt
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageEnhance, ImageFilter

# Left, top, right, bottom in source pixels; right and bottom are exclusive.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Source:
    """Where one class is cut from.

    `sides` is the range of a tile's side in source pixels, before it is resized
    to `TILE_PX`. It differs per class because the files differ in resolution.
    """

    file: str
    credit: str
    train: tuple[Box, ...]
    test: tuple[Box, ...]
    sides: tuple[int, int]


# Credits are those of the docstrings in skimage/data/_fetchers.py (0.26).
SOURCES: dict[str, Source] = {
    "brick": Source(
        "brick.png",
        "CC0 (CC0Textures, Bricks25)",
        train=((0, 0, 340, 512),),
        test=((352, 0, 512, 512),),
        sides=(48, 100),
    ),
    "coins": Source(
        "coins.png",
        "no known copyright restrictions (Brooklyn Museum, Greek coins from Pompeii)",
        train=((0, 0, 255, 303),),
        test=((265, 0, 384, 303),),
        sides=(36, 64),
    ),
    "fur": Source(
        "chelsea.png",
        "CC0 (Stefan van der Walt)",
        train=((40, 20, 205, 240),),
        test=((215, 0, 345, 190),),
        sides=(36, 80),
    ),
    "galaxies": Source(
        "hubble_deep_field.jpg",
        "public domain (NASA, Hubble eXtreme Deep Field)",
        train=((0, 0, 680, 872),),
        test=((700, 0, 1000, 872),),
        sides=(60, 120),
    ),
    "gland": Source(
        "ihc.png",
        "no known copyright restrictions (CMMI, immunohistochemistry of colon)",
        train=((10, 15, 255, 190), (50, 330, 152, 512)),
        test=((310, 0, 445, 215), (265, 320, 375, 485)),
        sides=(36, 66),
    ),
    "grass": Source(
        "grass.png",
        "CC0 (DeviantArt, linolafett)",
        train=((0, 0, 340, 512),),
        test=((352, 0, 512, 512),),
        sides=(48, 100),
    ),
    "gravel": Source(
        "gravel.png",
        "CC0 (CC0Textures, Gravel04)",
        train=((0, 0, 340, 512),),
        test=((352, 0, 512, 512),),
        sides=(48, 100),
    ),
    "moon": Source(
        "moon.png",
        "shipped with scikit-image, no restriction stated (surface of the moon)",
        train=((0, 0, 340, 512),),
        test=((352, 0, 512, 512),),
        sides=(48, 100),
    ),
    "retina": Source(
        "retina.jpg",
        "CC0 (Mikael Häggström, WikiJournal of Medicine 2014)",
        train=((120, 250, 900, 1150),),
        test=((920, 250, 1300, 1150),),
        sides=(100, 220),
    ),
    "stroma": Source(
        "ihc.png",
        "no known copyright restrictions (CMMI, immunohistochemistry of colon)",
        train=((165, 265, 255, 512),),
        test=((385, 310, 512, 420),),
        sides=(36, 60),
    ),
}

TILE_PX = 96
TRAIN_PER_CLASS = 110
TEST_PER_CLASS = 32
SEED = 20240
# What each tile draws from to be made harder. Full colour would let raw pixels
# tell half the classes apart; 0 is grey, 1 the colour of the source.
COLOUR_RANGE = (0.0, 0.3)
# Radius of the Gaussian, in tile pixels.
BLUR_RANGE_PX = (0.0, 1.5)
# A factor on the tile's own contrast.
CONTRAST_RANGE = (0.6, 1.3)
# Added to all pixels of a tile, in grey levels (0-255).
BRIGHTNESS_RANGE = (-20.0, 20.0)
# Standard deviation per pixel and channel, in grey levels (0-255).
NOISE_RANGE = (0.0, 20.0)
# Bicubic resampling reads this many source pixels beyond the point it samples.
RESAMPLE_MARGIN_PX = 2.0


def write_tiles(out: Path) -> dict[str, int]:
    """Write `out/{train,test}/<class>/<class>_NNN.png`, RGB, TILE_PX square.

    The tiles are the same on every call. Returns the number of tiles per split
    and the number of classes, as `{"train": N, "test": M, "classes": C}`.
    """
    counts = {"train": 0, "test": 0, "classes": len(SOURCES)}
    for name, source in SOURCES.items():
        picture = _open_rgb(source.file)
        splits = (
            ("train", source.train, TRAIN_PER_CLASS),
            ("test", source.test, TEST_PER_CLASS),
        )
        for split, boxes, count in splits:
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            rng = _rng_for(name, split)
            for index in range(count):
                # Taking the boxes in turn gives each region an equal share.
                tile = _cut(picture, boxes[index % len(boxes)], source.sides, rng)
                path = folder / f"{name}_{index:03d}.png"
                # Noise hardly compresses, so more effort would only cost time.
                _degrade(tile, rng).save(path, compress_level=1)
            counts[split] += count
    return counts


def _open_rgb(file: str) -> Image.Image:
    """Open a picture of the installed scikit-image as 8-bit RGB."""
    folder = Path(skimage.__file__).parent / "data"
    with Image.open(folder / file) as picture:
        return picture.convert("RGB")


def _rng_for(name: str, split: str) -> np.random.Generator:
    """A separate generator per class and split, so editing one leaves the rest unchanged."""
    return np.random.default_rng([SEED, zlib.crc32(f"{split}/{name}".encode())])


def _cut(
    picture: Image.Image,
    box: Box,
    sides: tuple[int, int],
    rng: np.random.Generator,
) -> Image.Image:
    """Cut one rotated square that lies wholly inside `box`, TILE_PX square.

    `box` and `sides` are in source pixels.
    """
    side = rng.uniform(*sides)
    # Half the diagonal: the furthest a corner gets from the centre at any angle.
    reach = side / sqrt(2) + RESAMPLE_MARGIN_PX
    left, top, right, bottom = box
    centre_x = rng.uniform(left + reach, right - reach)
    centre_y = rng.uniform(top + reach, bottom - reach)
    angle = radians(rng.uniform(0, 360))
    mirror = rng.choice((-1.0, 1.0))
    # PIL wants the map from tile to source: x' = a x + b y + c, y' = d x + e y + f.
    step = side / TILE_PX
    a, b = mirror * step * cos(angle), -step * sin(angle)
    d, e = mirror * step * sin(angle), step * cos(angle)
    half = TILE_PX / 2
    coefficients = (
        *(a, b, centre_x - (a + b) * half),
        *(d, e, centre_y - (d + e) * half),
    )
    return picture.transform(
        (TILE_PX, TILE_PX),
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BICUBIC,
    )


def _degrade(tile: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Give a tile a random colourfulness, sharpness, exposure and sensor noise."""
    faded = ImageEnhance.Color(tile).enhance(rng.uniform(*COLOUR_RANGE))
    blurred = faded.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_RANGE_PX)))
    levels = np.asarray(blurred, dtype=np.float64)
    mean = levels.mean(axis=(0, 1))
    contrasted = mean + (levels - mean) * rng.uniform(*CONTRAST_RANGE)
    noise = rng.normal(rng.uniform(*BRIGHTNESS_RANGE), rng.uniform(*NOISE_RANGE), levels.shape)
    return Image.fromarray((contrasted + noise).round().clip(0, 255).astype(np.uint8))

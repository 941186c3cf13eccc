"""The manifest of a bundle: what a reader must know of the backbone, how it is fed, and how its vector is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from jepakit._explain import explain
from jepakit._files import sha256
from jepakit._frozen import Frozen
from jepakit._vectors import float32_tuple
from jepakit.bundles.comparison import Comparison
from jepakit.errors import BundleError

_ROUNDING = 1e-6
"""Share of the largest value; a dimension that varies by less is constant in float32."""
_HARDLY = 0.01
"""A dimension hardly varies if its spread is below this share of the median spread. On real images, the stages of a MobileNetV2,
which differ in magnitude, go down to 0.04."""

INPUT, OUTPUT, TOKENS = "images", "embeddings", "tokens"
"""The graph's input, its output, and its second output if there is one."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StartWeights(Frozen):
    """Where the weights before adaptation came from, and under which licence."""

    source: str
    license: str


class Backbone(Frozen):
    """A timm architecture: `timm.create_model(name, num_classes=0, **arguments)`."""

    name: str
    arguments: dict[str, bool | int | float | str]
    start: StartWeights


class Scaling(Frozen):
    """Maps values of data other than 8-bit to 0 … 1, per band: x → (x - low) / (high - low), clipped.

    `measured` scalings come from the domain's images, and refuse an image if they would clip over 1 % of one of its bands;
    a window chosen by the user clips on purpose.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    low: tuple[float, ...]
    high: tuple[float, ...]
    measured: bool

    def to_unit(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Values [..., C] in the files' own units as float64 from 0 to 1."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        shares: np.ndarray[Any, Any] = (values - low) / (high - low)
        return shares.clip(0, 1)

    def from_unit(self, shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The inverse: `shares` [..., C] of the range in the files' own units, float32."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        values: np.ndarray[Any, Any] = low + shares * (high - low)
        return values.astype(np.float32)


Resize = Literal["shorter", "squash"]


class Preprocess(Frozen):
    """How an image file becomes the graph's input, and the constants of the graph's first layers.

    Resize so that the shorter side is `resize_to` (rule "shorter") or both sides are (rule "squash"), crop
    the middle `size` × `size`; then, inside the graph, x / 255 (uint8) or `scaling` (float32), minus mean,
    over std, per band.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    size: Annotated[int, Field(ge=8, le=4096, description="pixels a side that the graph takes")]
    resize_to: Annotated[int, Field(ge=8, le=8192)]
    resize: Resize
    interpolation: Literal["bicubic", "bilinear"]
    bands: Annotated[int, Field(ge=1, le=64)]
    dtype: Literal["uint8", "float32"]
    """What the graph takes: uint8 for 8-bit data, float32 for everything else."""
    stored_as: str = "uint8"
    """numpy's name of the files' dtype; files of another dtype are refused."""
    scaling: Scaling | None = None
    """None for uint8."""
    voi: bool = False
    """DICOM: each file's own window (VOI LUT) is applied before `scaling`."""
    frame: Annotated[int, Field(ge=0)] | None = None
    """Which frame of a file to use (an array already is that frame); None: multi-frame files are refused."""
    tile: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels of the tiles that scenes were cut into; None: whole images."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def unit(self) -> int:
        """The value that 1.0 of `mean` and `std` stands for: 255 for uint8, else 1."""
        return 255 if self.dtype == "uint8" else 1

    @property
    def chosen_range(self) -> tuple[float, float] | None:
        """The range of values chosen by the user, the same for every band; None if measured, and for uint8."""
        return None if self.scaling is None or self.scaling.measured else (self.scaling.low[0], self.scaling.high[0])

    def resized_by(self, rule: Resize) -> Preprocess:
        """This preprocess with the rule that the user has chosen. `squash` is chosen to see all of an image, so nothing is cropped then."""
        return self.model_copy(update={"resize": rule, "resize_to": self.size if rule == "squash" else self.resize_to})

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.resize_to < self.size:
            raise ValueError(f"resize_to {self.resize_to} is smaller than size {self.size}: nothing could be cropped")
        if len(self.mean) != self.bands or len(self.std) != self.bands or min(self.std) <= 0:
            raise ValueError(f"mean and std need {self.bands} numbers each, std above 0")
        if (self.dtype == "uint8") != (self.scaling is None) or (self.dtype == "uint8") != (self.stored_as == "uint8"):
            raise ValueError("uint8 data has no scaling, and everything else needs one")
        if self.scaling is not None and not (
            len(self.scaling.low) == len(self.scaling.high) == self.bands
            and all(low < high for low, high in zip(self.scaling.low, self.scaling.high, strict=True))
        ):
            raise ValueError(f"scaling needs {self.bands} numbers low and high, low below high")
        return self


Pooling = Literal["head", "stages", "cls", "mean", "cls+mean", "last2"]
Precision = Literal["fp32", "fp16", "int8"]
Standardize = Literal["none", "center", "scale"]


class EmbeddingSpec(Frozen):
    """How the vector is made: its pooling, how it is shifted and scaled, and whether it is normalised to length 1.

    `center` and `scale` are one number per dimension, measured on the domain's images; None where unused.
    """

    dim: Annotated[int, Field(ge=1)]
    pooling: Pooling
    standardize: Standardize
    center: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    normalize: bool = False

    def standardized_by(self, vectors: np.ndarray[Any, Any], how: Standardize) -> EmbeddingSpec:
        """The same spec with centre and scale, as `how` says, measured on raw pooled outputs `vectors` [N, dim]."""
        center = vectors.mean(axis=0, dtype=np.float64) if how != "none" else None
        scale = _spread(vectors) if how == "scale" else None
        return self.model_copy(
            update={
                "standardize": how,
                "center": None if center is None else float32_tuple(center),
                "scale": None if scale is None else float32_tuple(scale),
            }
        )

    def standardized(self, vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Raw pooled outputs [N, dim] shifted and scaled, as the graph does it."""
        center = np.float32(0) if self.center is None else np.array(self.center, np.float32)
        scale = np.float32(1) if self.scale is None else np.array(self.scale, np.float32)
        return (vectors - center) / scale


def _spread(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The standard deviation of each dimension of `vectors` [N, dim]; for one that hardly varies, the median of all.

    Divided by its own deviation, a dimension that is 0 except in one image in thousands would outweigh all others in
    the next such image.
    """
    std = vectors.std(axis=0, dtype=np.float64)
    moving = std[std > _ROUNDING * np.abs(vectors).max()]
    typical = np.median(moving) if moving.size else 1.0
    return np.where(std < _HARDLY * typical, typical, std)


class Graph(Frozen):
    """Facts about `model.onnx`, and its worst agreement with torch on `verified_on`, over all batch sizes checked."""

    precision: Precision
    opset: int
    relative_error: float
    """Largest difference from torch over the largest value."""
    batch_sizes: tuple[int, ...]
    centred_cosine: float
    """Smallest cosine to torch's vector once the mean vector is subtracted from both: the cost of lower precision."""
    same_neighbour: float
    """Share of the images whose nearest other image is the same as with torch's vectors."""
    verified_on: Literal["golden inputs", "the user's images"]
    tokens: tuple[int, int] | None = None
    """[N, D] of the second output `tokens`, if there is one; N is for the model's own image size."""
    dynamic_size: bool = False
    """Whether the graph takes image sizes other than the preprocess's."""
    size_multiple: Annotated[int, Field(ge=1)] = 1
    """What each side of such other sizes must be a multiple of, in pixels: the patch of a ViT."""


class Provenance(Frozen):
    """How the weights came to be."""

    config: dict[str, Any]
    steps: int
    images_seen: int
    data_digest: str | None
    versions: dict[str, str]
    start: Provenance | None = None
    """How the weights that training began with came to be, if those were a bundle's."""


class Manifest(Frozen):
    """Everything a reader of the bundle needs to know. `files` maps each file to its SHA-256."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    model_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    backbone: Backbone
    preprocess: Preprocess
    embedding: EmbeddingSpec
    provenance: Provenance
    comparison: Comparison | None = None
    graph: Graph | None = None
    files: dict[str, Digest] = Field(default_factory=dict)
    digest: str = ""
    """SHA-256 of the canonical JSON of the file's other fields."""


class Described:
    """Base class of what has a `manifest`: its name, model_id and digest."""

    manifest: Manifest

    @property
    def name(self) -> str:
        """What a service calls the model."""
        return self.manifest.name

    @property
    def model_id(self) -> str:
        """Id of the vector space (16 hex digits)."""
        return self.manifest.model_id

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest (64 hex digits): what `jepakit serve --expect` pins."""
        return self.manifest.digest


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def compute_model_id(
    backbone: Backbone,
    preprocess: Preprocess,
    embedding: EmbeddingSpec,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    precision_class: Literal["float", "int8"] = "float",
) -> str:
    """The id of the vector space, 16 hex digits.

    SHA-256 over the canonical JSON of architecture, preprocess, embedding and precision class, then over each
    tensor's name, dtype, shape and little-endian bytes, sorted by name. File bytes are not hashed: fp32 and fp16
    graphs of the same weights share one space. Each int8 graph has its own: `tensors` then include the graph's.
    """
    spec = {
        "backbone": {"name": backbone.name, "arguments": backbone.arguments},
        # Without defaults, so that a field added by a later version does not rename existing spaces.
        "preprocess": preprocess.model_dump(mode="json", exclude_defaults=True),
        "embedding": embedding.model_dump(mode="json", exclude_defaults=True),
        "precision": precision_class,
    }
    digest = hashlib.sha256(canonical_json(spec))
    for name in sorted(tensors):
        tensor = np.asarray(tensors[name])
        digest.update(canonical_json([name, tensor.dtype.str.lstrip("<>|="), list(tensor.shape)]))
        digest.update(np.ascontiguousarray(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)).tobytes())
    return digest.hexdigest()[:16]


def render_manifest(manifest: Manifest) -> str:
    """The text of a manifest's file, with the digest of its other fields."""
    values = manifest.model_dump(mode="json")
    return _render({**values, "digest": _digest_of(values)})


def parse_manifest(text: str, file: Path) -> Manifest:
    """The manifest, with every character checked: the values by the digest, the rest by rendering them again.

    Both checks use the file's own values, so that a manifest from before a field was added stays valid. Raises
    BundleError naming the `file`.
    """
    again = "copy the bundle again or export it again"
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        version = values.get("schema_version")
        whole = values.get("digest") == _digest_of(values)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is damaged ({str(error)[:300]}): {again}") from None
    if version != 1:
        raise BundleError(f"{file} has schema version {version!r}, this jepakit reads version 1: upgrade jepakit")
    if not whole:
        raise BundleError(f"{file} is damaged, it does not match its own digest: {again}")
    if text != _render(values):
        raise BundleError(f"{file} has the right digest, but other spaces or numbers than this jepakit writes: {again}")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(
            f"{file} is intact, but not as this jepakit writes it ({explain(error, Manifest, {})[:300]}): upgrade jepakit, "
            "or export the bundle again"
        ) from None


def _digest_of(values: Mapping[str, Any]) -> str:
    """The digest that a manifest with these values must have."""
    return sha256(canonical_json({name: value for name, value in values.items() if name != "digest"}))


def _render(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

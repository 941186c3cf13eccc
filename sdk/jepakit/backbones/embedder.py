"""`Embedder`, the model that defines the vector. Imports torch.

Training and export both use it, so the vector that training measures is the vector that export writes.

Shapes: B images, H × W pixels, C bands, D dimensions of the embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_origin

import torch
from torch import Tensor, nn

from jepakit.bundles.manifest import EmbeddingSpec, Pooling, Preprocess
from jepakit.errors import BackboneError, ConfigError

_STAGES_LAST = 4


class Embedder(nn.Module):
    """Images to embeddings: the definition of the vector, used by training's evaluation and by export.

    forward(images [B, H, W, C], uint8 or raw float32) → float32 [B, D]: value scaling, mean, std, backbone,
    pooling, centring or scaling, L2 norm. Pooling `head` is timm's own pooled output; `stages` is the spatial mean of
    each of the last four feature levels (a ViT's last four blocks), concatenated; `cls` the class token and
    `mean` the mean patch token of the last layer; `last2` the class tokens of the last two layers, each after the final norm
    (as in LeJEPA's own probe). With `tokens` it returns (embeddings, patch tokens float32 [B, N, E]).
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    pixel_low: Tensor | None
    pixel_high: Tensor | None
    center: Tensor | None
    scale: Tensor | None

    def __init__(
        self, backbone: nn.Module, preprocess: Preprocess, embedding: EmbeddingSpec, *, tokens: bool = False
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.backbone: Any = backbone
        self.pooling = embedding.pooling
        self.normalize = embedding.normalize
        scaling, unit = preprocess.scaling, preprocess.unit
        self.register_buffer("pixel_mean", unit * torch.tensor(preprocess.mean), persistent=False)
        self.register_buffer("pixel_std", unit * torch.tensor(preprocess.std), persistent=False)
        self.register_buffer("pixel_low", _as_tensor(None if scaling is None else scaling.low), persistent=False)
        self.register_buffer("pixel_high", _as_tensor(None if scaling is None else scaling.high), persistent=False)
        self.register_buffer("center", _as_tensor(embedding.center), persistent=False)
        self.register_buffer("scale", _as_tensor(embedding.scale), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # Half-precision weights need half-precision pixels; everything before and after stays float32.
        x = self.to_network_input(images_BHWC).to(next(self.backbone.parameters()).dtype)
        features, pooled = _features_and_pooled(self.backbone, x, self.pooling)
        vectors = pooled.float()
        if self.center is not None:
            vectors = vectors - self.center
        if self.scale is not None:
            vectors = vectors / self.scale
        if self.normalize:
            vectors = nn.functional.normalize(vectors, dim=1)
        return (vectors, patch_tokens(self.backbone, features).float()) if self.tokens else vectors

    def to_network_input(self, images_BHWC: Tensor) -> Tensor:
        """uint8 or raw float32 [B, H, W, C] to what the backbone takes, float32 [B, C, H, W]."""
        values = images_BHWC.float()
        if self.pixel_low is not None and self.pixel_high is not None:
            values = ((values - self.pixel_low) / (self.pixel_high - self.pixel_low)).clamp(0, 1)
        return ((values - self.pixel_mean) / self.pixel_std).permute(0, 3, 1, 2)


def pool(backbone: Any, x_BCHW: Tensor, pooling: Pooling) -> Tensor:
    """The backbone's pooled output [B, D], before centring."""
    return _features_and_pooled(backbone, x_BCHW, pooling)[1]


def pool_all(backbone: Any, x_BCHW: Tensor, poolings: Sequence[Pooling]) -> dict[Pooling, Tensor]:
    """As `pool`, for several poolings; `head` and `stages` come from one pass."""
    if set(poolings) != {"head", "stages"}:
        return {pooling: pool(backbone, x_BCHW, pooling) for pooling in poolings}
    features, stages = _features_and_pooled(backbone, x_BCHW, "stages")
    return {"head": backbone.forward_head(features), "stages": stages}


def _features_and_pooled(backbone: Any, x_BCHW: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """The backbone's last features in timm's own layout, and the pooled output [B, D], from one pass."""
    if pooling == "stages":
        count = min(_STAGES_LAST, len(backbone.feature_info))
        features, levels = backbone.forward_intermediates(x_BCHW, indices=count, output_fmt="NCHW")
        return features, torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1)
    if pooling == "last2":
        features, levels = backbone.forward_intermediates(
            x_BCHW, indices=2, norm=True, output_fmt="NLC", return_prefix_tokens=True
        )
        return features, torch.cat([prefix[:, 0] for _, prefix in levels], dim=1)
    features = backbone.forward_features(x_BCHW)
    if pooling == "head":
        return features, backbone.forward_head(features)
    parts: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: features[:, 0],
        "mean": lambda: patch_tokens(backbone, features).mean(dim=1),
    }
    return features, torch.cat([parts[name]() for name in pooling.split("+")], dim=1)


def patch_tokens(backbone: Any, features: Tensor) -> Tensor:
    """Last features in timm's own layout to [B, N, D], without class and register tokens.

    Raises BackboneError if the last features are not a single map.
    """
    if not isinstance(features, Tensor):
        raise BackboneError(
            f"{type(backbone).__name__} ends in {len(features)} maps of several scales: it has no patch tokens"
        )
    if features.ndim == 3:
        return features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    # Swin keeps its channels last: flattened as NCHW, its tokens would silently be wrong.
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


def poolings_of(backbone: Any) -> tuple[Pooling, ...]:
    """The poolings that this backbone supports: `stages` if timm exposes its intermediate features, `mean` if the last
    features are one map (CrossViT and EfficientViM end in several), `cls` if it has a class token.
    """
    found: list[Pooling] = ["head"]
    intermediates = getattr(backbone, "forward_intermediates", None)
    if intermediates is not None:
        found.append("stages")
    if get_origin(inspect.signature(backbone.forward_features).return_annotation) is not list:
        found.append("mean")
    if getattr(backbone, "cls_token", None) is not None and getattr(backbone, "num_prefix_tokens", 0) > 0:
        found += ["cls", "cls+mean"]
        if intermediates is not None and "return_prefix_tokens" in inspect.signature(intermediates).parameters:
            found.append("last2")
    return tuple(found)


def check_pooling(backbone: Any, name: str, pooling: Pooling) -> None:
    """Raise ConfigError when the backbone does not support the pooling."""
    if pooling not in (known := poolings_of(backbone)):
        raise ConfigError(f"pooling = {pooling!r}: {name} has {', '.join(known)}")


def _as_tensor(values: tuple[float, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32)

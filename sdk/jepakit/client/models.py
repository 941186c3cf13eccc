"""What a service reports about its models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jepakit.errors import ConfigError, ProtocolError

if TYPE_CHECKING:
    import httpx

    from jepakit.bundles.manifest import Preprocess


@dataclass(frozen=True)
class ModelInfo:
    """What the service reports about one model.

    name       what requests call it (`id` over HTTP)
    model_id   id of its vector space (16 hex digits)
    digest     SHA-256 of its bundle's manifest (64 hex digits)
    dim        numbers in a vector
    precision  computed in: fp32, fp16, int8 or bf16
    provider   computed by: cpu, cuda, tensorrt or openvino
    raw        the whole answer (docs/http.md)
    """

    name: str
    model_id: str
    digest: str
    dim: int
    precision: str
    provider: str
    raw: dict[str, Any] = field(repr=False)


def check_asked(model: str | None) -> None:
    """Raise ConfigError unless it is None, NAME or NAME@MODEL_ID: an empty string or `NAME@` would match any model."""
    if model is not None and (not isinstance(model, str) or not model or model.endswith("@")):
        raise ConfigError(f"model = {model!r}: give NAME or NAME@MODEL_ID")


def path_of(name: str) -> str:
    """The service's path for one model, with its name quoted. Raises ConfigError for an empty name."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name = {name!r}: give a model's name")
    return f"/v1/models/{quote(name, safe='')}"


def read_models(response: httpx.Response) -> list[ModelInfo]:
    try:
        return [_model_info(row) for row in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise ProtocolError("the answer to /v1/models is not a list of models: is this a jepakit service?") from None


def read_model(response: httpx.Response) -> ModelInfo:
    try:
        return _model_info(response.json())
    except (ValueError, KeyError, TypeError):
        raise ProtocolError("the answer to /v1/models/… is not a model: is this a jepakit service?") from None


def _model_info(row: dict[str, Any]) -> ModelInfo:
    return ModelInfo(row["id"], row["model_id"], row["digest"], row["dim"], row["precision"], row["provider"], row)


def named(models: list[ModelInfo], asked: str | None) -> list[ModelInfo]:
    """The models that NAME or NAME@MODEL_ID may mean; all of them if `asked` is None."""
    return [one for one in models if asked is None or one.name == asked.partition("@")[0]]


def check_clear(models: list[ModelInfo], asked: str | None) -> list[ModelInfo]:
    """Return the models; ConfigError, before any image is sent, if none is asked for and there are several."""
    if asked is None and len(models) > 1:
        _meant(models, asked)
    return models


def id_of(models: list[ModelInfo], asked: str | None) -> str:
    """The model_id of the requested model: the one that `asked` pins, or else the service's."""
    return (asked or "").partition("@")[2] or _meant(models, asked).model_id


def spec_of(models: list[ModelInfo], asked: str | None, tile: int | None) -> Preprocess:
    """How the requested model wants its images, from the service's description; `tile` must match the model's."""
    from pydantic import ValidationError

    from jepakit.bundles.manifest import Preprocess
    from jepakit.images import check_tile

    meant = _meant(models, asked)
    try:
        spec = Preprocess.model_validate(meant.raw.get("preprocess"))
    except ValidationError:
        raise ProtocolError(
            f"the service describes how {meant.name} wants its images in a way that this jepakit does not know: install "
            "the service's version here"
        ) from None
    check_tile(tile, spec)
    return spec


def _meant(models: list[ModelInfo], asked: str | None) -> ModelInfo:
    """The one model that `asked` matches; ConfigError if it matches none, or several."""
    if len(meant := named(models, asked)) == 1:
        return meant[0]
    if not models:
        raise ConfigError("the service has no model yet: try again when its /readyz says ready")
    known = ", ".join(one.name for one in models)
    given = "" if asked is None else f" {asked!r} is none of them;"
    raise ConfigError(f"the service's models are {known}:{given} name one of them as model")

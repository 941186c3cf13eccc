"""Settings of the service, from the command line, the environment and a YAML file, in this order of precedence."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from jepakit._explain import parse
from jepakit._files import reason_of, with_home
from jepakit._frozen import StrictBools
from jepakit._loopback import is_loopback
from jepakit._machine import usable_cpus
from jepakit._messages import did_you_mean
from jepakit.errors import ConfigError
from jepakit.inference.runtime import Arithmetic, Provider
from jepakit.readers import DEFAULT_LIMITS

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
UserPath = Annotated[str, AfterValidator(with_home)]
AccessLog = Literal["all", "errors", "none"]
_PREFIX = "JEPAKIT_SERVE_"
# Variables that Kubernetes sets for a service whose name begins like ours, such as KubeRay's `jepakit-serve-svc`.
_OF_KUBERNETES = re.compile(r"_service_(host|port.*)$|_port_\d+_.*$")
_LINK = re.compile(r"(tcp|udp|sctp)://")
"""How Kubernetes' values begin, as in `JEPAKIT_SERVE_PORT` for a service `jepakit-serve`."""
SERVICE = "X-Jepakit-Service"
"""The header in which a ready service states its `ServeSettings.service`."""
_HAPROXY_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Replicas listen on the service's own host, and Ray's HAProxy asks for all of them at 127.0.0.1."""


class ServeSettings(StrictBools, BaseSettings):
    """Settings of `jepakit serve`. Only `bundles` is required."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        env_prefix=_PREFIX,
        env_ignore_empty=True,
    )

    bundles: Annotated[tuple[UserPath, ...], NoDecode, Field(min_length=1)]
    """Folders of exported bundles, or folders that contain such folders and are watched for new ones."""
    host: str = "127.0.0.1"
    """Address to listen on; any address other than loopback needs an API key file. Behind HAProxy (`proxy`) it is `127.0.0.1`,
    `localhost` or, for all IPv4 addresses, `0.0.0.0`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    api_key_file: UserPath | None = None
    """File of lines `name:sha256`, as `jepakit serve --new-key NAME` makes them; reread when it changes. null: no key is needed."""
    provider: Provider = "auto"
    """What runs the models: `cpu`, `cuda`, `tensorrt` or `openvino`; `auto`: CUDA where ONNX Runtime can use it, else the CPU."""
    arithmetic: Arithmetic = "model"
    """`model`: as the bundle says; `bf16`: OpenVINO computes in bfloat16, which is twice as fast on CPUs with bfloat16 instructions,
    at the cost of some error (docs/engine.md)."""
    expect: Annotated[tuple[str, ...], NoDecode] = ()
    """Digests of the bundles to accept; a bundle with any other digest is refused. Empty: all are accepted."""
    ray: bool = True
    """Whether to use Ray Serve; false serves the same application in a single process."""
    proxy: Literal["python", "haproxy"] = "haproxy" if sys.platform == "linux" else "python"
    """The proxy that accepts connections in front of Ray's replicas: `haproxy` or `python`. HAProxy answers more than twice as many small
    requests (docs/serving-speed.md); it comes with Ray on Linux."""
    replicas: Positive = 1
    """Processes that each hold all models (Ray Serve only)."""
    max_replicas: Positive | None = None
    """If set, Ray scales between `replicas` and this number; null: no scaling."""
    target_ongoing_requests: Positive = 16
    """Number of requests in progress in each replica that scaling aims at."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds of higher load after which scaling adds replicas."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds of lower load after which scaling removes replicas."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves for each replica: 1 gives each a GPU of its own, 0.49 lets two share one. With 0, all replicas
    compute on the first GPU."""
    threads: Positive = Field(default_factory=usable_cpus)
    """Threads for decoding and inference in each replica; if left out, one per core."""
    max_batch: Positive | None = None
    """Largest batch of one inference; null: chosen by measuring at start."""
    max_body_mb: Positive = 64
    """Maximum size of a request's body, in MB (2^20 bytes, as in all settings)."""
    max_bodies_mb: Positive = 512
    """Maximum total size, in MB, of the bodies that a replica holds at a time; requests beyond it get 429, but for one that is
    alone."""
    max_images: Positive = 256
    """Maximum number of images in one request."""
    max_pixels: Positive = DEFAULT_LIMITS.max_pixels
    """Maximum number of pixels in an image, according to its header; decoded, all bands together,
    it may take at most 8 times that many bytes."""
    max_waiting: Positive = 1024
    """Maximum number of images waiting or running in a replica; requests beyond it get 429, as do those beyond what the model can
    answer in half of `request_timeout_s`, by the speed measured at start and what decoding has taken lately. A request that is alone is let in."""
    max_memory_mb: Positive | None = None
    """Resident memory, in MB, above which a replica counts as unhealthy: Ray replaces it, and /readyz reports it (that alone
    without Ray). null: no limit."""
    body_timeout_s: Seconds = 30.0
    """Seconds within which a request's body must arrive."""
    request_timeout_s: Seconds = 60.0
    """Maximum number of seconds from the request, once its body has arrived and been parsed, to the vectors."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that requests in flight have to finish when the service is told to stop."""
    watch_s: Seconds = 1.0
    """Seconds between checks for new bundles."""
    log_format: Literal["text", "json"] = "text"
    """How log lines are written: `text` or `json`."""
    access_log: AccessLog = "errors"
    """Which requests are logged: `all`, `errors` (those refused or failed) or `none`; requests to routes that need no key are
    logged only when they fail. A line has the id, route, status, size and time, never a file name or any content."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Settings made in Python are only what was given; `load` adds the other sources."""
        return (init_settings,)

    @field_validator("bundles", "expect", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """In the environment, several values are separated by commas."""
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @property
    def service(self) -> str:
        """An id of the service: the same in all of its processes, and unlike that of other services of this machine, whose ports differ."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.ray and self.proxy == "haproxy" and self.host not in _HAPROXY_HOSTS:
            raise ValueError(
                f"host {self.host} is not one of {', '.join(_HAPROXY_HOSTS)}, and HAProxy reaches its replicas at 127.0.0.1 only: "
                "choose 0.0.0.0 and a firewall, --proxy python, or --no-ray"
            )
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines, which needs --api-key-file FILE "
                "(make a key with `jepakit serve --new-key NAME`)"
            )
        # Unlike Path.is_file, this raises nothing where a folder may not be entered.
        if self.api_key_file is not None and not os.path.isfile(self.api_key_file):  # noqa: PTH113
            raise ValueError(
                f"the API key file {self.api_key_file} does not exist, or this user may not enter its folder: "
                "make one with `jepakit serve --new-key NAME`"
            )
        of_ray = {name: getattr(self, name) for name in ("replicas", "max_replicas", "num_gpus")}
        for name, value in of_ray.items() if not self.ray else ():
            if value != ServeSettings.model_fields[name].default:
                raise ValueError(
                    f"{name} = {value} is for Ray Serve: leave it out, or leave out --no-ray (ray = false)"
                )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than replicas = {self.replicas}")
        return self


def load(given: dict[str, Any], file: Path | None = None, *, to_print: bool = False) -> ServeSettings:
    """Settings as given, else from JEPAKIT_SERVE_* variables, else from a YAML file; ConfigError names what is wrong.

    to_print  whether the settings are only to be printed, for which no bundles need be named
    """
    values, variables = {} if file is None else _read_yaml(file), _variables()
    merged = {name: _value(name, value) for name, value in {**values, **variables, **given}.items()}
    names_some = bool(merged.get("bundles"))
    if not names_some and not to_print:
        raise ConfigError("name a bundle to serve, or a folder of bundles: jepakit serve bundles/NAME")
    origins = dict.fromkeys(values, str(file)) | {name: f"{_PREFIX}{name.upper()}" for name in variables}
    settings = parse(
        ServeSettings,
        merged if names_some else {**merged, "bundles": ("any",)},
        {name: origin for name, origin in origins.items() if name not in given},
    )
    return settings if names_some else settings.model_copy(update={"bundles": ()})


def _value(name: str, value: Any) -> Any:
    """The value, or None for the word `null` where that is one: flags and variables have no other way to write it."""
    field = ServeSettings.model_fields.get(name)
    return None if value == "null" and field is not None and field.default is None else value


def _variables() -> dict[str, Any]:
    """The settings from JEPAKIT_SERVE_* variables; ConfigError for one that is not a setting."""
    _check_variables()
    found = EnvSettingsSource(ServeSettings)()
    if _LINK.match(str(found.get("port"))):
        del found["port"]
    return found


def _check_variables() -> None:
    """Refuse a variable that is not a setting, which would otherwise be ignored silently."""
    for variable, value in os.environ.items():
        prefix, name = variable[: len(_PREFIX)].upper(), variable[len(_PREFIX) :].lower()
        if not value or prefix != _PREFIX or name in ServeSettings.model_fields or _OF_KUBERNETES.search(f"_{name}"):
            continue
        if name.endswith("port") and _LINK.match(value):
            continue
        raise ConfigError(f"{variable}: unknown setting {name!r}{did_you_mean(name, ServeSettings.model_fields)}")


def as_yaml(settings: ServeSettings) -> str:
    """All settings as a YAML file that `load` reads, each with its description."""
    lines, values = [], settings.model_dump(mode="json")
    for name, field in ServeSettings.model_fields.items():
        if field.description:
            lines += [f"# {line}" for line in field.description.splitlines()]
        lines.append(yaml.safe_dump({name: values[name]}, default_flow_style=False).strip())
    return "\n".join(lines) + "\n"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        root, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {reason_of(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file} holds no settings: write lines `name: value`, as `jepakit serve --print-config` prints"
        )
    names = [name.value for name, _ in root.value]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{file} sets {name!r} {names.count(name)} times: keep one line")
    return {str(name): value for name, value in values.items()}

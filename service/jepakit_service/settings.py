"""Settings of the service: the command line, the Dockerfile and tests all end here."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jepakit._cpus import usable_cpus
from jepakit.readers import DEFAULT_LIMITS
from jepakit.runtime import Arithmetic, Provider

Positive = Annotated[int, Field(ge=1)]


class ServeSettings(BaseModel):
    """Settings of `jepakit serve`. Only `bundles` is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    bundles: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders of exported bundles, or folders that hold such folders."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs an API key file."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_key_file: str | None = None
    """Lines `name:sha256`, made by `jepakit serve --new-key NAME`; reread when it changes."""
    provider: Provider = "auto"
    arithmetic: Arithmetic = "model"
    """`bf16`: OpenVINO computes in bfloat16, twice as fast on CPUs with bfloat16 instructions, at a stated error."""
    expect: tuple[str, ...] = ()
    """Digests of bundles; a bundle of another digest is refused."""
    ray: bool = True
    """Ray Serve; false serves the same application in this one process."""
    replicas: Positive = 1
    """Processes that each hold all models (Ray Serve only)."""
    threads: Positive = Field(default_factory=usable_cpus)
    """Threads of one inference, and of decoding, in each replica."""
    max_batch: Positive | None = None
    """Largest batch of one inference; None: measured at start."""
    max_body_mb: Positive = 64
    max_images: Positive = 256
    """Images in one request."""
    max_pixels: Positive = DEFAULT_LIMITS.max_pixels
    """Pixels in one image, judged by its header."""
    max_waiting: Positive = 1024
    """Images waiting or running in a replica; more are answered 429."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds for a request's body to arrive."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds from a complete body to the answer."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that requests in flight are given to finish when the service is told to stop."""

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Self:
        if self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines, which needs --api-key-file FILE "
                "(make a key with `jepakit serve --new-key NAME`)"
            )
        if self.api_key_file is not None and not Path(self.api_key_file).is_file():
            raise ValueError(
                f"the API key file {self.api_key_file} does not exist: make one with `jepakit serve --new-key NAME`"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

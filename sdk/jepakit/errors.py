"""Everything jepakit raises on purpose, as one tree.

    JepakitError                      catch this to catch them all
    ├── InputError (ValueError)       the caller's input is wrong; command-line exit code 2
    │   ├── ConfigError               a setting has a wrong name or value
    │   ├── DataError                 images, vectors or labels cannot be used
    │   ├── ImageError                one image cannot be read rightly
    │   ├── BackboneError             unknown timm name, weights that do not fit, hub out of reach
    │   ├── BundleError               not a bundle, damaged, or replaced
    │   ├── SpaceError                vectors of another space than the probe was fitted on
    │   └── MissingExtraError         an optional part of jepakit is not installed
    ├── WorkError (RuntimeError)      the input was right, the work failed; exit code 1
    │   ├── TrainingError             training cannot go on
    │   │   └── CheckpointError       a checkpoint could not be written, most often for want of room, or not be read
    │   ├── ExportError               the exported graph does not reproduce torch
    │   └── ServeError                the service cannot start or stay up, or a model has no room to run
    └── ClientError (RuntimeError)    what a client meets on the wire; exit code 1
        ├── ConnectionFailedError     no answer from the service within the deadline, or no way to one
        ├── ProtocolError             an answer that is not the protocol's
        ├── ModelChangedError         another model answered in the middle of a job
        └── ResponseError             the service refused: `.status`, `.code`, `.param`, `.request_id`
            ├── AuthenticationError   401
            ├── NotFoundError         404
            └── OverloadedError       429 or 503 until the deadline

Every message says what happened, with which value, and what to do next.
"""

from __future__ import annotations


class JepakitError(Exception):
    """Base class of everything jepakit raises on purpose."""

    exit_code = 1


class InputError(JepakitError, ValueError):
    """The caller's input is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting has a wrong name or value."""


class DataError(InputError):
    """A folder, glob or list of images, vectors or labels cannot be used."""


class ImageError(InputError):
    """One image cannot be read rightly.

    `code` is a stable word for programs: `unreadable`, `unsupported_format`, `unsupported_mode`,
    `too_large`, `too_small`, `wrong_shape`, `wrong_scale`, `constant`, `saturated`, `not_finite`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class BackboneError(InputError):
    """Unknown timm name, weights that do not fit, or a hub out of reach."""


class BundleError(InputError):
    """Not a bundle, a damaged one, or one that was replaced."""


class SpaceError(InputError):
    """Vectors of another vector space than the probe was fitted on."""


class MissingExtraError(InputError):
    """An optional part of jepakit is not installed."""


class WorkError(JepakitError, RuntimeError):
    """The input was right, the work failed."""


class TrainingError(WorkError):
    """Training cannot go on."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written, most often for want of room, or not be read; what was there is as it was."""


class ExportError(WorkError):
    """The exported graph does not reproduce torch."""


class ServeError(WorkError):
    """The service cannot start or stay up, or a model has no room to run."""


class ClientError(JepakitError, RuntimeError):
    """What a client meets on the wire."""


class ConnectionFailedError(ClientError):
    """No answer from the service within the deadline, or no way to one: its certificate is not trusted, say."""


class ProtocolError(ClientError):
    """An answer that is not the protocol's."""


class ModelChangedError(ClientError):
    """Another model answered in the middle of a job; vectors of two spaces are never mixed."""


class ResponseError(ClientError):
    """The service refused the request."""

    def __init__(
        self, message: str, *, status: int, code: str | None, param: str | None, request_id: str | None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id


class AuthenticationError(ResponseError):
    """401: the service wants an API key, or another one."""


class NotFoundError(ResponseError):
    """404: no such model or route."""


class OverloadedError(ResponseError):
    """429 or 503 until the deadline."""

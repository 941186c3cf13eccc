"""Everything jepakit raises on purpose, as one tree.

    JepakitError                      catch this to catch them all
    ├── InputError (ValueError)       the caller's input is wrong; command-line exit code 2
    │   ├── ConfigError               a setting has a wrong name or value, or does not go with another
    │   ├── DataError                 images, vectors or labels cannot be used
    │   ├── ImageError                one image cannot be read correctly
    │   ├── BackboneError             unknown timm name, weights that do not fit, hub unreachable
    │   ├── BundleError               not a bundle, damaged, or replaced
    │   ├── SpaceError                vectors from another space than the probe's
    │   └── MissingExtraError         an optional part of jepakit is not installed
    ├── WorkError (RuntimeError)      the input was right, the work failed; exit code 1
    │   ├── TrainingError             training cannot go on
    │   │   └── CheckpointError       a checkpoint could not be written (usually a full disk) or read
    │   ├── ExportError               the exported graph cannot be made, or does not reproduce torch
    │   ├── InferenceError            a model cannot run here: unusable provider, or not enough memory
    │   ├── NoMemoryError (MemoryError)  there is not enough memory to read an image
    │   ├── ServeError                the service cannot start or stay up
    │   └── WriteError                a file could not be written (usually a full disk)
    └── ClientError (RuntimeError)    something went wrong between client and service; exit code 1
        ├── ConnectionFailedError     the service cannot be reached, or did not answer within the deadline
        ├── ProtocolError             an answer that does not follow the protocol
        ├── ModelChangedError         another model answered in the middle of a job
        └── ResponseError             the service refused: `.status`, `.code`, `.param`, `.request_id`
            ├── AuthenticationError   401 or 403
            ├── NotFoundError         404
            └── OverloadedError       still 429 or 503 at the deadline

Every message says what happened, with which value, and what to do next.
"""

from __future__ import annotations

import traceback
from typing import Any

from jepakit._one_line import one_line

_OURS = ("jepakit", "jepakit_training", "jepakit_export", "jepakit_service")


DECODER_MISSING = "decoder_missing"
"""The code of an image that a service cannot read, as the package for its format is not installed there."""


class JepakitError(Exception):
    """Base class of everything jepakit raises on purpose. Its text is one line: control characters are escaped."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """For copying and pickling (between processes): by default, keyword-only arguments would be missing on unpickling."""
        return _again, (type(self), self.args), self.__dict__

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show: the caller's own lines, and the message, which says what to do.

        jepakit's frames, and the error that this one came from, are still in `__traceback__` and `__cause__`.
        """
        own = []
        for frame, line in traceback.walk_tb(self.__traceback__):
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
            if package in _OURS:
                break
            if package != "IPython":
                own.append((frame, line))
        lines = traceback.StackSummary.extract(own).format()
        return [*(line.rstrip("\n") for line in lines), f"{type(self).__name__}: {self}"]


def _again(kind: type[JepakitError], args: tuple[Any, ...]) -> JepakitError:
    return kind.__new__(kind, *args)


class InputError(JepakitError, ValueError):
    """The caller's input is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting has a wrong name or value, or does not go with another."""


class DataError(InputError):
    """A folder, glob or list of images, vectors or labels cannot be used."""


class ImageError(InputError):
    """One image cannot be read correctly.

    `code` is a stable word for programs: `unreadable`, `unsupported_format`, `unsupported_mode`,
    `too_large`, `too_small`, `wrong_shape`, `wrong_scale`, `constant`, `saturated`, `not_finite`; from a service also
    `decoder_missing`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class BackboneError(InputError):
    """An unknown timm name, weights that do not fit, or an unreachable hub."""


class BundleError(InputError):
    """Not a bundle, a damaged or replaced one, one that computes other vectors than it promises, or a place that is taken."""


class SpaceError(InputError):
    """Vectors of different vector spaces: of another model than the probe was fitted on, or than those to be searched."""


class MissingExtraError(InputError):
    """An optional part of jepakit is not installed."""


class WorkError(JepakitError, RuntimeError):
    """The input was right, the work failed."""


class TrainingError(WorkError):
    """Training cannot go on."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written (usually a full disk) or read; existing files are left unchanged."""


class ExportError(WorkError):
    """The exported graph cannot be made, or does not reproduce torch."""


class InferenceError(WorkError):
    """A model cannot run here: its provider cannot be used, or there is not enough memory."""


class NoMemoryError(WorkError, MemoryError):
    """There is not enough memory to read an image. It is not the image's fault, so it is never left out for that."""


class ServeError(WorkError):
    """The service cannot start or stay up, or a new version did not get into service."""


class WriteError(WorkError):
    """A file could not be written (usually a full disk).

    An unwritable location found before the work begins is a ConfigError instead.
    """


class ClientError(JepakitError, RuntimeError):
    """Something went wrong between client and service."""


class ConnectionFailedError(ClientError):
    """The service cannot be reached, e.g. its certificate is not trusted, or did not answer within the deadline."""


class ProtocolError(ClientError):
    """An answer that does not follow the protocol."""


class ModelChangedError(ClientError):
    """Another model answered in the middle of a job; vectors from two spaces are never mixed."""


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
    """401 or 403: the service, or a gateway in front of it, wants an API key, or a different one."""


class NotFoundError(ResponseError):
    """404: no such model or route."""


class OverloadedError(ResponseError):
    """Still 429 or 503 at the deadline."""

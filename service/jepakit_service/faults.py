"""Answers other than 200, as exceptions."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jepakit.errors import DECODER_MISSING, ImageError

_STATUS_OF_IMAGE_ERROR = {"too_large": 413, "unsupported_format": 415, DECODER_MISSING: 415}


class ApiError(Exception):
    """An answer other than 200: status, stable code, message, and the parameter at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self, request_id: str, repeated_as: str | None = None) -> bytes:
        """The error in OpenAI's shape, with the request id; its message also at the top, if `repeated_as` names a field."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        error = {
            "message": self.message,
            "type": kind,
            "code": self.code,
            "param": self.param,
            "request_id": request_id,
        }
        return json.dumps({"error": error, **({repeated_as: self.message} if repeated_as else {})}).encode()


def unavailable(code: str, message: str, status: int = 503) -> ApiError:
    """An error that passes by itself, with Retry-After: the same request may succeed in a second."""
    return ApiError(status, code, message, headers={"Retry-After": "1"})


def fault(error: Exception) -> ApiError:
    """A fault of the service. The error's text is left out: it may contain what was sent."""
    return ApiError(500, "internal_error", f"the service failed ({type(error).__name__}); the fault is ours")


def bad_image(error: ImageError, where: str) -> ApiError:
    """Refusal of a whole request because one image cannot be read correctly."""
    status = _STATUS_OF_IMAGE_ERROR.get(error.code, 422)
    return ApiError(status, error.code, f"{where}: {error}", param=where)

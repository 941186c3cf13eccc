"""Multipart forms, read in memory: a stock parser would spool large parts to the disk."""

from __future__ import annotations

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from jepakit_service.faults import ApiError
from jepakit_service.http.media import is_image, media_type
from jepakit_service.models.batcher import ImageData

_FIELDS_BESIDE_FILES = 8


def read_form(body: bytes, boundary: bytes, max_images: int) -> tuple[list[ImageData], str | None]:
    """The files of a form, and its field `model` if there is one.

    Raises ApiError 400 for any other field or a damaged body, 413 for more parts than `max_images` can need.
    """
    if not boundary:
        raise ApiError(
            400,
            "invalid_multipart",
            "Content-Type names no boundary: let the HTTP library set the Content-Type of a form",
        )
    form = _Form(max_images)
    try:
        form.read(body, boundary)
    except FormParserError:
        raise ApiError(400, "invalid_multipart", "the multipart body is damaged or its boundary is missing") from None
    if not form.is_whole:
        raise ApiError(400, "invalid_multipart", "the multipart body ends before its last boundary: send all of it")
    images: list[ImageData] = []
    model = None
    for headers, data in form.parts:
        _, options = parse_options_header(headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"")
        # A file name is optional (RFC 7578, 4.2).
        if b"filename" in options or (name != b"model" and is_image(media_type(headers.get(b"content-type", b""))[0])):
            images.append(bytes(data))
        elif name == b"model":
            if model is not None:
                raise ApiError(400, "invalid_request", "the form has two fields `model`: send one", param="model")
            model = data.decode("utf-8", "replace")
        else:
            raise ApiError(
                400,
                "invalid_request",
                f"the form's field {name[:40].decode('utf-8', 'replace')!r} is not a file: it has neither a filename nor the "
                "Content-Type of an image; `model` is the only other field",
            )
    return images, model


class _Form:
    """The parts of a multipart body, each as headers (names in lower case) and data. Nothing is written to disk.

    The methods named `on_…` are the parser's callbacks.
    """

    def __init__(self, max_images: int) -> None:
        self.parts: list[tuple[dict[bytes, bytes], bytearray]] = []
        self.is_whole = False
        self._max_images = max_images
        self._name, self._value = bytearray(), bytearray()

    def read(self, body: bytes, boundary: bytes) -> None:
        """Parse the body. Raises FormParserError if it is damaged, ApiError 413 if it has too many parts."""
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self.on_part_begin,
                "on_part_data": self.on_part_data,
                "on_header_field": self.on_header_field,
                "on_header_value": self.on_header_value,
                "on_header_end": self.on_header_end,
                "on_end": self.on_end,
            },
        )
        parser.write(body)

    def on_part_begin(self) -> None:
        if len(self.parts) == self._max_images + _FIELDS_BESIDE_FILES:
            raise ApiError(
                413, "too_many_images", f"more than {self._max_images} images in one request: send several requests"
            )
        self.parts.append(({}, bytearray()))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(data[start:end])

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name.extend(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value.extend(data[start:end])

    def on_header_end(self) -> None:
        self.parts[-1][0][bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def on_end(self) -> None:
        self.is_whole = True

"""Media types: those that are read and written here, and what a Content-Type says."""

from __future__ import annotations

from python_multipart.multipart import parse_options_header

JSON, OCTETS, NPY = "application/json", "application/octet-stream", "application/x-npy"


def media_type(content_type: str | bytes) -> tuple[str, dict[bytes, bytes]]:
    """`type/subtype` in lower case, and its options."""
    kind, options = parse_options_header(content_type)
    return kind.decode("latin-1").lower(), options


def is_image(media: str) -> bool:
    """Whether a media type says, or admits, that these are the bytes of an image file."""
    return media.startswith("image/") or media in (OCTETS, "application/dicom")

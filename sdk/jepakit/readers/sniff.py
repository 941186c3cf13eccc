"""The format of a file, by its first bytes; known formats that this version cannot read are refused by name."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from jepakit.errors import ImageError

Family = Literal["pillow", "tiff", "dicom", "npy", "zip"]

FORMATS = "JPEG, PNG, WebP, BMP, TIFF, DICOM, NumPy"

_READ: tuple[tuple[bytes, Family], ...] = (
    (b"\xff\xd8\xff", "pillow"),
    (b"\x89PNG\r\n\x1a\n", "pillow"),
    (b"BM", "pillow"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\x93NUMPY", "npy"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
)

DICOM_HEAD = 132
"""Bytes of a DICOM file's preamble, which may hold anything, and of the letters DICM after it."""

_AS_TIFF = "save it as TIFF or PNG"
_PICKLE = ("a pickle, which could run any code and is never loaded", "save the array with numpy.save")
_REFUSED: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (b"GIF8", ("a GIF file", "save the frame you mean as PNG")),
    (b"\0\0\0\x0cjP  \r\n\x87\n", ("a JPEG 2000 file", _AS_TIFF)),
    (b"\xff\x4f\xff\x51", ("a JPEG 2000 file", _AS_TIFF)),
    (b"\0\0\0\x0cJXL \r\n\x87\n", ("a JPEG XL file", _AS_TIFF)),
    (b"\xff\x0a", ("a JPEG XL file", _AS_TIFF)),
    (b"\x89HDF\r\n\x1a\n", ("an HDF5 file", "save each image as TIFF or .npy")),
    (b"\x1f\x8b", ("a gzip file", "unpack it")),
    (b"%PDF", ("a PDF file", "render it to PNG")),
    (b"version https://git-lfs", ("a pointer to the image, which Git LFS keeps", "fetch it: git lfs pull")),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
)
_NIFTI = ("a NIfTI file", "save the slices you mean as TIFF or .npy")


def sniff(head: bytes, name: str) -> Family:
    """The family of readers for a file with these first bytes; ImageError names a format that cannot be read.

    `name` is for messages, and for the two formats that first bytes do not show: DICOM without a preamble and zipped
    NIfTI.
    """
    if begins_as_dicom(head):
        return "dicom"
    for magic, family in _READ:
        if head.startswith(magic):
            return family
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "pillow"
    if not head:
        raise ImageError(f"{name}: an empty file: copy it again, or leave it out", code="unsupported_format")
    known = _known(head, PurePath(name).name.lower())
    if known is not None:
        kind, remedy = known
        raise unsupported(name, kind, remedy)
    raise not_an_image(name)


def begins_as_dicom(head: bytes) -> bool:
    """Whether the first `DICOM_HEAD` bytes of a file, or more, are those of a DICOM file (PS3.10, 7.1)."""
    return head[DICOM_HEAD - 4 : DICOM_HEAD] == b"DICM"


def unsupported(name: str, kind: str, remedy: str) -> ImageError:
    """The error for a known format that this version cannot read."""
    return ImageError(f"{name}: {kind}; this version reads {FORMATS}: {remedy}", code="unsupported_format")


def not_an_image(name: str) -> ImageError:
    """The error for a format that no reader knows."""
    return ImageError(
        f"{name}: not an image this version reads ({FORMATS}), or its header is damaged: save it as one of these, or leave "
        "it out",
        code="unsupported_format",
    )


def _known(head: bytes, filename: str) -> tuple[str, str] | None:
    if head[344:348] in (b"n+1\0", b"ni1\0") or filename.endswith((".nii", ".nii.gz")):
        return _NIFTI
    for magic, refusal in _REFUSED:
        if head.startswith(magic):
            return refusal
    if head[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file", "save it as JPEG or PNG"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the image itself"
    if head.lstrip()[:5] == b"<?xml" or b"<svg" in head[:1024]:
        return "an SVG or XML file", "render it to PNG"
    if filename.endswith((".dcm", ".dicom", ".ima")):
        return (
            "perhaps a DICOM file, but without its preamble",
            "rewrite it (pydicom: dcmread(file, force=True).save_as(file, enforce_file_format=True))",
        )
    return None

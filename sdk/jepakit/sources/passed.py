"""Files that are skipped although they may be images, and what would make them readable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jepakit._messages import counted, joined
from jepakit.sources.files import has_no_suffix, suffix

_AS_JPEG = "HEIC and AVIF are not read, save them as JPEG or PNG"
_AS_TIFF = "JPEG 2000 and JPEG XL are not read, save them as TIFF or PNG"
_NIFTI = "NIfTI is not read, save its slices as TIFF or .npy"
_REMEDIES = {
    ".heic": _AS_JPEG, ".heif": _AS_JPEG, ".avif": _AS_JPEG,
    ".jp2": _AS_TIFF, ".j2k": _AS_TIFF, ".jpx": _AS_TIFF, ".jxl": _AS_TIFF,
    ".gif": "GIF is not read, save the frame you mean as PNG",
    ".nii": _NIFTI, ".nii.gz": _NIFTI,
    "": "of such files DICOM alone is read",
}  # fmt: skip


def passed_over(names: Iterable[str]) -> str:
    """A note on files that are not listed, by their names; empty if none of them looks like an image."""
    counts = Counter(_kind(name) for name in names)
    return "; ".join(
        f"{counted(counts[kind], f'{kind} file'.strip())}{'' if kind else ' without a suffix'} passed over: {remedy}"
        for kind, remedy in _REMEDIES.items()
        if counts[kind]
    )


def links_passed_over(repeats: int, lost: Sequence[str]) -> str:
    """A note on links to what is listed under another name, and on broken links; empty if there are none."""
    again = f"{counted(repeats, 'link')} passed over: what they lead to is listed already" if repeats else ""
    nowhere = f"{counted(len(lost), 'link')} to nowhere passed over ({lost[0]} first)" if lost else ""
    return joined(again, nowhere)


def _kind(name: str) -> str:
    if name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    return "" if has_no_suffix(name) else suffix(name)

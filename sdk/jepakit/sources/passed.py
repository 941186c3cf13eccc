"""Files that are skipped although they may be images, and what would make them readable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jepakit._messages import counted, first_few, joined
from jepakit.sources.files import SUFFIXES, has_no_suffix, suffix

_AS_JPEG = "HEIC and AVIF are not read, save them as JPEG or PNG"
_AS_TIFF = "JPEG 2000 and JPEG XL are not read, save them as TIFF or PNG"
_NIFTI = "NIfTI is not read, save its slices as TIFF or .npy"
_REMEDIES = {
    ".heic": _AS_JPEG, ".heif": _AS_JPEG, ".avif": _AS_JPEG,
    ".jp2": _AS_TIFF, ".j2k": _AS_TIFF, ".jpx": _AS_TIFF, ".jxl": _AS_TIFF,
    ".gif": "GIF is not read, save the frame you mean as PNG",
    ".nii": _NIFTI, ".nii.gz": _NIFTI,
    "": "of such files only DICOM is read",
}  # fmt: skip
_IN_TARS = "in a .tar only files with the suffix of an image are read"
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".rar", ".7z")
_NO_IMAGES = frozenset({
    ".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".doc", ".docx", ".tex", ".bib", ".log", ".lock", ".license", ".caption",
    ".csv", ".tsv", ".parquet", ".xls", ".xlsx", ".ods", ".json", ".jsonl", ".geojson", ".xml", ".yaml", ".yml", ".toml", ".ini",
    ".cfg", ".conf", ".cls", ".md5", ".sha1", ".sha256", ".py", ".pyc", ".ipynb", ".sh", ".bat", ".m", ".r", ".js", ".css",
    ".db", ".ds_store", ".lnk", ".url", ".xmp", ".aae", ".thm", ".wld", ".tfw", ".jgw", ".pgw", ".prj",
    ".shp", ".shx", ".dbf", ".cpg", ".qgz", ".qgs", ".pt", ".pth", ".ckpt", ".onnx", ".safetensors", ".pkl", ".pickle", ".dvc",
})  # fmt: skip
"""Suffixes of what usually lies beside images: text, tables, metadata, programs and models."""
_NAMED = 5


def passed_over(names: Iterable[str], *, bare_dicom: bool = True) -> str:
    """A note on files that are not listed, by their names; empty if each is of a kind that is known to be no image.

    bare_dicom  whether DICOM files without a suffix would have been listed
    """
    counts = Counter(_kind(name) for name in names)
    remedies = _REMEDIES if bare_dicom else _REMEDIES | {"": _IN_TARS}
    known = [
        f"{counted(counts[kind], f'{kind} file'.strip())}{'' if kind else ' without a suffix'} passed over: {remedy}"
        for kind, remedy in remedies.items()
        if counts[kind]
    ]
    rest = Counter({kind: count for kind, count in counts.items() if kind not in remedies and _may_hold_images(kind)})
    packed = Counter({kind: rest.pop(kind) for kind in list(rest) if kind.endswith(_PACKED)})
    return joined(
        *known,
        _others(packed, "unpack what holds images"),
        _others(rest, "not read, convert what holds images to TIFF, PNG or .npy"),
    )


def _others(counts: Counter[str], remedy: str) -> str:
    kinds = [f"{-count:,} {kind}" for count, kind in sorted((-count, kind) for kind, count in counts.items())]
    return f"{counted(counts.total(), 'file')} passed over ({first_few(kinds, _NAMED)}): {remedy}" if kinds else ""


def _may_hold_images(kind: str) -> bool:
    return kind not in SUFFIXES and kind.removesuffix(".gz") not in _NO_IMAGES


def links_passed_over(repeats: int, lost: Sequence[str]) -> str:
    """A note on links to what is listed under another name, and on broken links; empty if there are none."""
    again = f"{counted(repeats, 'link')} passed over: what they lead to is listed already" if repeats else ""
    nowhere = f"{counted(len(lost), 'link')} to nowhere passed over ({lost[0]} first)" if lost else ""
    return joined(again, nowhere)


def _kind(name: str) -> str:
    """The suffix in lower case, with the one before `.gz`; empty if there is none."""
    if suffix(name) == ".gz":
        return f"{suffix(name[:-3])}.gz"
    return "" if has_no_suffix(name) else suffix(name)

"""Image files of every domain, each format read by a well-maintained library, behind one small interface.

`open_raster` looks at a file's first bytes, not at its name, and returns a `Raster`: its `header` is known
before a pixel is decoded, so that budgets are checked first; `read` returns the pixels as the file means them
(upright, palettes and CMYK as RGB, alpha on white, DICOM through its modality LUT), never reduced to 8 bits.
Scaling of values is decided later, by `jepakit.images`.
"""

from jepakit.readers.dicom import dicom_group
from jepakit.readers.encoded import EncodedSource
from jepakit.readers.header import DEFAULT_LIMITS, SCENE_LIMITS, Header, ImageRef, ImageSource, Limits, Window
from jepakit.readers.opening import open_raster
from jepakit.readers.raster import Raster
from jepakit.readers.scenes import Scenes
from jepakit.readers.sniff import DICOM_HEAD, begins_as_dicom

__all__ = [
    "DEFAULT_LIMITS",
    "DICOM_HEAD",
    "SCENE_LIMITS",
    "EncodedSource",
    "Header",
    "ImageRef",
    "ImageSource",
    "Limits",
    "Raster",
    "Scenes",
    "Window",
    "begins_as_dicom",
    "dicom_group",
    "open_raster",
]

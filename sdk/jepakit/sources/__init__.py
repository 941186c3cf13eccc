"""Which images, with which names, labels and groups: every kind of source becomes one `ImageList`.

A source is a folder, a glob, a file, a list of paths, a manifest (.csv, .tsv, .parquet), WebDataset shards
(.tar), a ZIP, or a sequence or map-style dataset of images in memory. Listing decodes nothing; only `tile`,
`frame="each"` and patients' groups look into the files' headers.
"""

from jepakit.sources.imagelist import ImageList
from jepakit.sources.listing import gather, list_images
from jepakit.sources.spread import evenly_spread

__all__ = [
    "ImageList",
    "evenly_spread",
    "gather",
    "list_images",
]

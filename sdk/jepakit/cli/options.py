"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DOMAINS = "general, natural, satellite, histology, radiology, microscopy, multispectral"
TILE = "side length, in pixels, of the tiles that large images are cut into"
OVERLAP = "overlap of neighbouring tiles, in pixels"
FRAME = "for multi-frame files: the number of the frame, from 0, or each"
VALUE_RANGE = "for images that are not 8-bit: auto, file (DICOM's own window), ct-brain, ct-soft-tissue, ct-lung, ct-bone, or LOW:HIGH [auto]"

Images = Annotated[
    list[str],
    typer.Argument(help="a folder, glob or list of image files; a CSV, TSV or Parquet manifest; .tar shards; a ZIP"),
]
Backbone = Annotated[str | None, typer.Option(help="timm model name [vit_small_patch14_reg4_dinov2.lvd142m]")]
Weights = Annotated[str | None, typer.Option(help="pretrained, random, a file, or a bundle [pretrained]")]
Domain = Annotated[str | None, typer.Option(help=f"preset for the views: {DOMAINS} [general]")]
ImageSize = Annotated[int | None, typer.Option(help="side length of the images the model takes, in pixels [224]")]
Resize = Annotated[
    str | None,
    typer.Option(
        help="how an image becomes a square: shorter (its middle), squash (all of it, distorted), or auto, as the weights were made for [auto]"
    ),
]
StepCount = Annotated[int | None, typer.Option(help="optimizer steps [300, or one epoch if that is more]")]
Tile = Annotated[int | None, typer.Option(help=TILE)]
Overlap = Annotated[int | None, typer.Option(help=f"{OVERLAP} [0]")]
Frame = Annotated[str | None, typer.Option(help=FRAME)]
ValueRange = Annotated[str | None, typer.Option(help=VALUE_RANGE)]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings; options on the command line override it")]
Labels = Annotated[
    str | None,
    typer.Option(
        help="classes, used only to measure: auto, folder (first-level ones), none, or a CSV, TSV or Parquet file, which may name only "
        "some images [auto]"
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        help="which images are held out together: auto (a manifest's column, DICOM's PatientID, the tiles of an image), folder, "
        "none, or a CSV, TSV or Parquet file [auto]"
    ),
]
LabelTable = Annotated[
    Path | None, typer.Option(help="CSV, TSV or Parquet table of path and label, instead of the embeddings' own labels")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def source(images: list[str]) -> str | list[str]:
    """One argument may be any source; several, as from a glob that the shell expanded, are a list of files."""
    return images[0] if len(images) == 1 else images

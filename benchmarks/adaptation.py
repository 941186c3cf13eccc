"""What adaptation does to the embeddings of real images: probes before and after, on test images that no run saw.

    python benchmarks/adaptation.py FOLDER=DOMAIN... [--steps N] [--image-size N] [--resize RULE] [--backbone NAME] [--weights FILE]
                                    [--seed N] [--out DIR] [--quick]

Each FOLDER holds `train/CLASS/` and `test/CLASS/`. A run adapts to `train`, without its labels except to measure, and
`test` is embedded with its start and with its result, both exported to ONNX. The probes are fitted on `train`. Each gain
has a 95 % interval, bootstrapped over the test images; the run's own verdict, on images held out from `train`, stands
beside it. Runs stay in DIR, and the same command resumes them. --quick adapts the tiles of `make demo`, for five steps.

Prints Markdown tables, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import jepakit

EXAMPLES = Path(__file__).parents[1] / "examples"
WEIGHTS = EXAMPLES / "weights" / "mobilenetv2_100.safetensors"
BACKBONE = "mobilenetv2_100"
PROBES = {"linear": jepakit.LinearProbe, "k-NN": jepakit.KNNProbe}
_RESAMPLES = 4000


class Judged(NamedTuple):
    """A probe on the test images: which of them it is right about, and the mean over classes."""

    right: NDArray[np.bool_]
    balanced_accuracy: float

    @property
    def accuracy(self) -> float:
        """The share of the images that it is right about."""
        return float(self.right.mean())


class Gain(NamedTuple):
    """Accuracy gained on the test images, in points, and its 95 % interval."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def judged(bundle: jepakit.Bundle, folder: Path) -> dict[str, Judged]:
    """Both probes with the bundle's embeddings, fitted on `train`, scored on `test`."""
    model = jepakit.load(bundle)
    train, test = (model.embed(folder / side) for side in ("train", "test"))
    found = {}
    for name, kind in PROBES.items():
        probe = kind().fit(train)
        right = probe.predict(test) == np.array(test.labels)
        found[name] = Judged(right, probe.evaluate(test).balanced_accuracy)
    return found


def gain(before: Judged, after: Judged) -> Gain:
    """What the probe gained, image by image."""
    change = 100 * (after.right.astype(float) - before.right)
    drawn = np.random.default_rng(0).integers(len(change), size=(_RESAMPLES, len(change)))
    low, high = np.quantile(change[drawn].mean(axis=1), [0.025, 0.975])
    return Gain(float(change.mean()), float(low), float(high))


def adapted(folder: Path, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt to one set, judge the start and the result; returns the figures."""
    run = jepakit.adapt(folder / "train", out=out, **settings)
    with tempfile.TemporaryDirectory() as exports:
        bundles = run.export(Path(exports) / "start", which="start"), run.export(Path(exports) / "last", which="last")
        before, after = (judged(bundle, folder) for bundle in bundles)
    return {
        "set": folder.name,
        "domain": settings["domain"],
        "n_test": len(before["linear"].right),
        "verdict": run.verdict.model_dump(),
        "probes": {
            name: {
                "before": before[name].accuracy,
                "after": after[name].accuracy,
                "balanced_before": before[name].balanced_accuracy,
                "balanced_after": after[name].balanced_accuracy,
                "gain": gain(before[name], after[name])._asdict(),
            }
            for name in PROBES
        },
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table for all sets."""
    print(
        "| set | domain | probe | before | after | gain, points | balanced, before and after | the run's own verdict |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name, found in row["probes"].items():
            verdict = row["verdict"]
            print(
                f"| {row['set']}, {row['n_test']} test images | {row['domain']} | {name} | {found['before']:.1%} | {found['after']:.1%} "
                f"| {Gain(**found['gain'])} | {found['balanced_before']:.1%}, {found['balanced_after']:.1%} | {told(verdict)} |"
            )


def told(verdict: Mapping[str, Any]) -> str:
    """A verdict's word and interval."""
    if verdict["difference"] is None:
        return str(verdict["word"])
    return f"{verdict['word']}, {Gain(*(100 * verdict[name] for name in ('difference', 'low', 'high')))}"


def tiles(folder: Path) -> Path:
    """The tiles of `make demo`, as one more set."""
    sys.path.append(str(EXAMPLES))
    from demo_tiles import write_tiles

    write_tiles(folder)
    return folder


def one_set(words: str) -> tuple[Path, str]:
    """The folder and the domain in FOLDER=DOMAIN."""
    folder, _, domain = words.rpartition("=")
    if not all((Path(folder) / side).is_dir() for side in ("train", "test")):
        raise argparse.ArgumentTypeError(f"{words}: give FOLDER=DOMAIN, where FOLDER holds train/ and test/")
    return Path(folder).resolve(), domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", type=one_set, metavar="FOLDER=DOMAIN", help="images, and their preset")
    parser.add_argument("--steps", type=int, help="optimizer steps (adapt's default; 5 with --quick)")
    parser.add_argument("--image-size", type=int, help="in pixels [128; 64 with --quick]")
    parser.add_argument("--resize", default="auto", help="auto, shorter or squash, as `adapt` takes it [auto]")
    parser.add_argument("--backbone", default=BACKBONE, help=f"a timm name [{BACKBONE}]")
    parser.add_argument("--weights", default=str(WEIGHTS), help="its weights, as `adapt` takes them [examples/weights]")
    parser.add_argument("--seed", type=int, default=0, help="of the run [0]")
    parser.add_argument("--out", type=Path, help="where the runs stay, to be resumed later [nowhere]")
    parser.add_argument("--quick", action="store_true", help="the demo's tiles, five steps")
    options = parser.parse_args()
    if not (options.sets or options.quick):
        parser.error("give FOLDER=DOMAIN at least once, or --quick")
    if len({images.name for images, _ in options.sets}) < len(options.sets):
        parser.error("two folders have the same name, by which their runs are called")
    settings = {
        "backbone": options.backbone,
        "weights": options.weights,
        "image_size": options.image_size or (64 if options.quick else 128),
        "resize": options.resize,
        "seed": options.seed,
        "steps": options.steps or (5 if options.quick else None),
    }
    with tempfile.TemporaryDirectory() as folder:
        sets = [*options.sets, *([(tiles(Path(folder) / "tiles"), "microscopy")] if options.quick else [])]
        out = options.out or Path(folder) / "runs"
        rows = [adapted(images, out / images.name, {**settings, "domain": domain}) for images, domain in sets]
    show(rows)
    print(json.dumps({"settings": settings, "sets": rows}))


if __name__ == "__main__":
    try:
        main()
    except jepakit.JepakitError as error:
        sys.exit(f"error: {error}")

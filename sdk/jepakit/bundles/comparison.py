"""Records of the results before and after adaptation: made by `jepakit.evaluation.evaluate`, kept in a bundle's manifest."""

from __future__ import annotations

from typing import Literal

from jepakit._frozen import Frozen, Printed
from jepakit._messages import counted
from jepakit._one_line import one_line

Word = Literal["better", "same", "worse", "cannot tell"]
SCORES = {
    "linear": "linear probe",
    "knn": "k-NN",
    "linear_balanced": "linear, balanced",
    "knn_balanced": "k-NN, balanced",
}


_OF_A_RUN = ("before", "after")


class Scores(Frozen):
    """Accuracy, 0 to 1, of probes fitted on training images, with equal weight for all classes, and judged on held-out ones:
    the share of the images, and (`balanced`) the mean of the classes' shares."""

    linear: float
    linear_balanced: float
    knn: float
    knn_balanced: float


class Verdict(Frozen, Printed):
    """Which embeddings to keep.

    word        "better", "same", "worse" or "cannot tell"
    reason      the numbers behind it, and what to do, in words
    difference  after minus before, in balanced accuracy (mean of linear probe and k-NN), -1 to 1
    low, high   its 95 % interval, by paired bootstrap over the N held-out images, or over whole groups if given;
                at least 3 / N to either side, more if classes differ in size. If the probes were fitted on fewer images
                than were held out, over all or of a class, it is widened by how much other images to fit on would change
                (jackknife). None, as is the difference, where nothing could be measured
    n_groups    groups that the interval is over, of the class with the fewest; None if it is over images

    Harm to a group that happens not to be held out goes unseen. By the rule of three, up to 3/G of all groups may be
    harmed with none of them among the G held out. The verdict is "same" only if that could shift the result by no more
    than 1 point: from 90 groups of equal size, assuming that a harmed group loses 0.3. "better" and "worse" rest on
    the interval alone.
    """

    word: Word
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    n_groups: int | None = None

    def __str__(self) -> str:
        return one_line(f"{self.word}: {self.reason}")


class Comparison(Frozen, Printed):
    """Two models on the same images: a backbone before and after adaptation, on images never trained on, or the two given
    to `compare`. Scores are None without labels. Print it for a table.

    n_train     images that the probes were fitted on; with five folds, all of them in turn
    n_held_out  images that the scores and the verdict are based on, without the classes that the verdict leaves out
    names       what the two are called
    """

    before: Scores | None
    after: Scores | None
    verdict: Verdict
    n_train: int
    n_held_out: int
    names: tuple[str, str] = _OF_A_RUN

    def noting(self, note: str) -> Comparison:
        """The same comparison, with a note before the verdict's reason."""
        verdict = self.verdict.model_copy(update={"reason": f"{note}; {self.verdict.reason}"})
        return self.model_copy(update={"verdict": verdict})

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return str(self.verdict)
        first, second = map(one_line, self.names)
        widths = [max(6, len(name)) for name in (first, second)]
        rows = [
            f"{words:<16} {getattr(self.before, score):>{widths[0]}.1%}  {getattr(self.after, score):>{widths[1]}.1%}"
            for score, words in SCORES.items()
        ]
        names = f"{'':<16} {first:>{widths[0]}}  {second:>{widths[1]}}"
        on = counted(self.n_held_out, "held-out image" if self.names == _OF_A_RUN else "image")
        return "\n".join([f"{names}   (on {on})", *rows, str(self.verdict)])

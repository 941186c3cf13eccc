"""How well a probe does, and how that is printed."""

from __future__ import annotations

from dataclasses import dataclass, field

from jepakit._frozen import Printed
from jepakit._messages import first_few
from jepakit._one_line import one_line


@dataclass(frozen=True)
class ProbeReport(Printed):
    """How well a probe does. Accuracies are shares, 0 to 1; `balanced_accuracy` is the mean over classes.

    per_class    each class's accuracy, by its name
    n            vectors it was evaluated on
    n_fitted_on  how many of them equal a vector it was fitted on: results there say nothing about new images
    n_per_class  how many of them are of each class
    unknown      classes of the images that the probe does not know, so that it cannot be right about them
    """

    accuracy: float
    balanced_accuracy: float
    per_class: dict[str, float]
    n: int
    n_fitted_on: int = 0
    n_per_class: dict[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        whole, balanced = _percent(self.accuracy), _percent(self.balanced_accuracy)
        lines = [f"accuracy {whole}   balanced {balanced}   on {self.n} images"]
        if self.n_fitted_on:
            lines.append(
                f"warning: the probe was fitted on the vectors of {self.n_fitted_on} of these {self.n} images, so new ones will do "
                "worse: evaluate on others"
            )
        if self.unknown:
            n_unknown = sum(self.n_per_class[name] for name in self.unknown)
            lines.append(
                f"warning: {n_unknown} of these {self.n} images are of classes that the probe does not know, and count as wrong: "
                f"{one_line(first_few(self.unknown, 3))}"
            )
        names = {name: one_line(name) for name in self.per_class}
        width = max(map(len, names.values()))
        lines += [
            f"  {names[name]:<{width}}  {_percent(value):>6}{self._of(name, value)}"
            for name, value in self.per_class.items()
        ]
        return "\n".join(lines)

    def _of(self, name: str, share: float) -> str:
        """How many vectors of a class are right, of how many."""
        n = self.n_per_class.get(name, 0)
        return f"  ({round(share * n)} of {n})" if n else ""


def _percent(share: float) -> str:
    """A share in per cent, which is 100.0 % only if nothing is wrong."""
    return f"{min(share, 0.999 if share < 1 else 1.0):.1%}"

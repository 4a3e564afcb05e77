"""One measured figure, and how figures are compared."""

from __future__ import annotations

import operator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
GUESTS = BUILD / "guest" / "bare"

NOT_COMPARED = "not compared"
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


class Row(NamedTuple):
    """A line of build/bench.json.

    name: dotted, by area. value: in `unit`. against: what it was compared with and that one's value, or "not
    compared". ratio: ours to theirs. goal: like "<= 1.2", of the ratio if there is one, else of the value.
    """

    name: str
    value: float
    unit: str
    against: str = NOT_COMPARED
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None


class Bench(NamedTuple):
    """What the areas need to know. reference: command and name of the other monitor, or None."""

    ours: Sequence[str]
    reference: Sequence[str] | None
    reference_name: str
    scratch: Path
    quick: bool

    def times(self, full: int) -> int:
        """How often to repeat what is worth `full` repetitions when there is time."""
        return max(3, full // 5) if self.quick else full

    @property
    def contestants(self) -> dict[str, Sequence[str]]:
        """Command of each monitor by the name "ours" or "reference"."""
        both = {"ours": self.ours, "reference": self.reference}
        return {name: command for name, command in both.items() if command is not None}


def holds(goal: str, figure: float) -> bool:
    """Whether the figure satisfies a goal like "<= 1.2"."""
    comparison, limit = goal.split()
    return COMPARISONS[comparison](figure, float(limit))


def absolute(name: str, value: float, unit: str, goal: str | None = None, against: str = "") -> Row:
    """A figure judged by itself."""
    return Row(name, value, unit, against, None, goal, None if goal is None else holds(goal, value))


def paired(
    name: str,
    unit: str,
    ours: Iterable[float],
    theirs: Iterable[float],
    against: str,
    goal: str | None = None,
) -> Row:
    """Pairs of measurements taken by turns. Without any of `theirs` the row says that it was not compared."""
    ours, theirs = list(ours), list(theirs)
    if not theirs:
        return Row(name, median(ours), unit, NOT_COMPARED, None, goal, None)
    ratio = median(mine / other for mine, other in zip(ours, theirs, strict=True))
    met = None if goal is None else holds(goal, ratio)
    return Row(name, median(ours), unit, f"{against}: {median(theirs):.4g}", ratio, goal, met)

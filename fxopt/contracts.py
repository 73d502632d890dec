"""What a pass promises about the numbers that come out of the graph.

EXACT       bit for bit the same outputs, NaN included, the sign of zero excepted.
ROUNDING    the same real-number function, evaluated in another order: the error against a float64 run of the graph is
            at most ``factor`` times the error that the graph itself had before the pass (see fxopt.numerics).
LOSSY       another function on purpose; on inputs that the user gave, a metric of the outputs stays on the right side
            of a floor, and on all others no NaN appears and no type or shape changes.
TRAINING    the training step changes, the result in evaluation does not: EXACT in eval mode.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

__all__ = ["METRICS", "Contract"]

Kind = Literal["EXACT", "ROUNDING", "LOSSY", "TRAINING"]
_ORDER: dict[Kind, int] = {"EXACT": 0, "TRAINING": 1, "ROUNDING": 2, "LOSSY": 3}

# Each metric, and whether more of it is better.
METRICS: dict[str, bool] = {
    "sqnr_db": True,
    "cosine": True,
    "top1_agreement": True,
    "max_abs": False,
    "max_rel": False,
}


@dataclasses.dataclass(frozen=True)
class Contract:
    """The numeric promise of a pass.

    Attributes:
        kind: One of EXACT, ROUNDING, LOSSY, TRAINING.
        factor: For ROUNDING, how many times the rounding error of the graph itself is allowed.
        floors: For LOSSY, the worst allowed value of each metric, ``(("sqnr_db", 30.0),)``.
    """

    kind: Kind
    factor: float = 8.0
    floors: tuple[tuple[str, float], ...] = ()

    EXACT: ClassVar[Contract]
    ROUNDING: ClassVar[Contract]
    TRAINING: ClassVar[Contract]

    def __post_init__(self) -> None:
        unknown = [name for name, _ in self.floors if name not in METRICS]
        if unknown:
            raise ValueError(f"metric {unknown[0]!r} is unknown; there are {', '.join(METRICS)}")
        if self.kind == "LOSSY" and not self.floors:
            raise ValueError("a LOSSY contract needs a metric and its floor")
        if not self.factor >= 1:
            raise ValueError(f"factor is {self.factor}; a ROUNDING contract allows at least the graph's own error, 1")

    @classmethod
    def lossy(cls, metric: str, floor: float) -> Contract:
        """Return the promise that ``metric`` of every floating-point output is no worse than ``floor``."""
        return cls("LOSSY", floors=((metric, floor),))

    @classmethod
    def parse(cls, text: str) -> Contract:
        """Return the contract that ``str`` made this text of; a factor is not in it.

        Raises:
            ValueError: the text is none.
        """
        for kind in (cls.EXACT, cls.ROUNDING, cls.TRAINING):
            if text == kind.kind:
                return kind
        listed = text.removeprefix("LOSSY(").removesuffix(")")
        try:
            floors = [(metric, float(floor)) for metric, _, floor in (each.split(" ") for each in listed.split(", "))]
        except ValueError:
            raise ValueError(f"{text!r} is no contract") from None
        return cls("LOSSY", floors=tuple(floors))

    def __str__(self) -> str:
        if self.kind == "LOSSY":
            return (
                "LOSSY(" + ", ".join(f"{m} {'>=' if METRICS[m] else '<='} {floor:g}" for m, floor in self.floors) + ")"
            )
        return self.kind

    def without_floors(self) -> Contract:
        """Return the LOSSY promise that is left where no floor holds: type and shape, and no new NaN."""
        worst = {metric: -math.inf if METRICS[metric] else math.inf for metric, _ in self.floors}
        return dataclasses.replace(self, floors=tuple(worst.items()))

    def then(self, other: Contract) -> Contract:
        """Return what holds after both: the weaker kind, the factors multiplied where both round, the floors joined.

        The floors of two LOSSY steps do not add up to a floor of the whole, so the lower one is kept for each metric;
        what the whole costs is measured against the original model, not derived.
        """
        kind = self.kind if _ORDER[self.kind] >= _ORDER[other.kind] else other.kind
        floors = dict(self.floors)
        for metric, floor in other.floors:
            worse = min if METRICS[metric] else max
            floors[metric] = worse(floors.get(metric, floor), floor)
        return Contract(kind, max(self.factor, other.factor), tuple(floors.items()))


Contract.EXACT = Contract("EXACT")
Contract.ROUNDING = Contract("ROUNDING")
Contract.TRAINING = Contract("TRAINING")

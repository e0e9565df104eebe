"""From probabilities to what is said: operating points, costs of mistakes, and when to say `unsure`. No torch.

    rule = decision.of(settings.evaluation.unsure, classes)
    rule.apply(probabilities)                     # ["melanoma", "unsure", ...]
    rule.save(run.model); decision.Decision.load(folder)     # decision.json beside the weights
    decision.operating_point(probabilities[:, 3], labels == 3, precision=0.95)

Probabilities are [N, C]; costs are [C, C], row the true class, column the one that is called. All rests on the
probabilities being right: look at the calibration first (vitdist/scores.py).
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitdist import config, rundir, scores

UNSURE = "unsure"
ASKED = (0.9, 0.95, 0.99)
"""Precisions and recalls for which every class gets an operating point."""
_POINTS = 100
"""Most points of a risk-coverage curve."""
_TABLED = 200
"""Classes up to which a summary has its confusion matrix: one of 1,000 is 6 MB of JSON, and there is one already."""
_ROWS = 4096
"""Samples whose costs are in memory at once: of 1,000 classes 33 MB."""


# ---- one class: a threshold --------------------------------------------------------------------


@dataclass(frozen=True)
class OperatingPoint:
    """What flagging all samples with at least `threshold` gives, measured on given samples."""

    threshold: float
    precision: float
    recall: float
    flagged: float
    """Share of all samples that are flagged."""
    reached: bool
    """Whether it is as asked; if not, this is the best that can be reached."""
    precision_interval: list[float]
    recall_interval: list[float]
    """95 percent (Wilson), for a threshold that was not chosen on these samples: wide where few are flagged."""


def operating_point(
    of_class: np.ndarray, positive: np.ndarray, precision: float | None = None, recall: float | None = None
) -> OperatingPoint:
    """The highest recall at `precision` or above, or the highest precision at `recall` or above; give one of them.

    `of_class` [N]: probabilities (or other scores) of one class; `positive` bool [N]. Equal scores are flagged
    together. Raises ValueError without positive samples.
    """
    if (precision is None) == (recall is None):
        raise ValueError("an operating point is asked for by a precision or by a recall")
    given, at = ("precision", precision) if precision is not None else ("recall", recall)
    assert at is not None
    return _pick(_curve(of_class, positive), given, at)


def operating_points(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of each class that occurs: an operating point for each of ASKED as precision and as recall, ready for JSON."""
    rows = []
    for i, name in enumerate(classes):
        if (positive := labels == i).any():
            curve = _curve(probabilities[:, i], positive)
            for at in ASKED:
                for given in ("precision", "recall"):
                    rows.append({"class": name, "given": given, "at": at, **asdict(_pick(curve, given, at))})
    return rows


class _Curve(NamedTuple):
    """Of every threshold, rising."""

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    flagged: np.ndarray
    """Samples with at least the threshold."""
    positives: int
    samples: int


def _curve(of_class: np.ndarray, positive: np.ndarray) -> _Curve:
    from sklearn.metrics import precision_recall_curve  # 1.3 s of import

    if not positive.any():
        raise ValueError("an operating point needs samples of its class")
    precision, recall, threshold = precision_recall_curve(positive, of_class)
    flagged = len(of_class) - np.searchsorted(np.sort(of_class), threshold)
    # The last point flags nothing.
    return _Curve(threshold, precision[:-1], recall[:-1], flagged, int(positive.sum()), len(of_class))


def _pick(curve: _Curve, given: str, at: float) -> OperatingPoint:
    had, sought = (curve.precision, curve.recall) if given == "precision" else (curve.recall, curve.precision)
    reached = bool((had >= at).any())
    enough = np.flatnonzero(had >= at if reached else had == had.max())
    # Of equals the one that gives more of what was asked for.
    best = enough[np.lexsort((had[enough], sought[enough]))[-1]]
    flagged, recall = int(curve.flagged[best]), float(curve.recall[best])
    hits = round(recall * curve.positives)
    return OperatingPoint(
        threshold=float(curve.threshold[best]),
        precision=float(curve.precision[best]),
        recall=recall,
        flagged=flagged / curve.samples,
        reached=reached,
        precision_interval=scores.wilson(hits, flagged).tolist(),
        recall_interval=scores.wilson(hits, curve.positives).tolist(),
    )


# ---- all classes: the least expected cost ------------------------------------------------------


def cost_matrix(costs: Mapping[str, Mapping[str, float]] | None, classes: Sequence[str]) -> np.ndarray:
    """[C, C] of the settings' {true class: {called class: cost}}; what is not named costs 1, being right 0.

    Raises ValueError for a class that the data does not have, and for a cost of being right.
    """
    place = {name: i for i, name in enumerate(classes)}
    matrix = 1.0 - np.eye(len(classes))
    for true, row in (costs or {}).items():
        for called, cost in row.items():
            for name in (true, called):
                if name not in place:
                    near = difflib.get_close_matches(name, classes, 1)
                    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(classes[:10])}"
                    raise ValueError(f"evaluation.unsure.costs: {name!r} is no class of the data; {hint}")
            if true == called and cost:
                raise ValueError(f"evaluation.unsure.costs: {true!r} called {true!r} is right and costs 0, not {cost}")
            matrix[place[true], place[called]] = cost
    return matrix


def decide(probabilities: np.ndarray, costs: np.ndarray, unsure: float | None) -> np.ndarray:
    """The class of least expected cost (Bayes) of each sample, int64 [N]; of equals the first.

    -1, unsure, where that is expected to cost more than `unsure` (Chow 1970); None decides always. With costs of 1,
    the class is the most probable one, and unsure wherever its probability is below 1 - `unsure`.
    """
    called, expected = _cheapest(probabilities, costs)
    return called if unsure is None else np.where(expected > unsure, -1, called)


def _cheapest(probabilities: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of least expected cost of each sample, and that cost."""
    called, expected = np.empty(len(probabilities), np.int64), np.empty(len(probabilities))
    # Mostly few costs are named: the others, 1, need no matrix, which for 50,000 x 1,000 takes 3 s.
    special = costs - (1 - np.eye(len(costs)))
    columns = np.flatnonzero(special.any(0))
    for first in range(0, len(probabilities), _ROWS):
        rows = slice(first, first + _ROWS)
        block = probabilities[rows].astype(np.float64)
        of_each = block.sum(1, keepdims=True) - block
        of_each[:, columns] += block @ special[:, columns]
        called[rows] = of_each.argmin(1)
        expected[rows] = of_each.min(1)
    return called, expected


@dataclass(frozen=True)
class Decision:
    """The rule that a model folder carries as decision.json."""

    classes: list[str]
    costs: list[list[float]]
    """[C][C]: row the true class, column the one that is called."""
    unsure: float | None
    """Cost of saying unsure; None: it is never said."""
    operating_points: list[dict[str, Any]] = field(default_factory=list)
    """Thresholds for flagging single classes, as `operating_points` gives them; `apply` does not use them."""

    def __post_init__(self) -> None:
        if UNSURE in self.classes and self.unsure is not None:
            raise ValueError(f"a class is called {UNSURE!r}, as is what the model says in doubt: rename the class")

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Class numbers, -1 for unsure, int64 [N]. Raises ValueError for another number of classes."""
        if probabilities.shape[-1] != len(self.classes):
            raise ValueError(
                f"decision.json is of {len(self.classes)} classes, the model has {probabilities.shape[-1]}"
            )
        return decide(probabilities, np.array(self.costs), self.unsure)

    def apply(self, probabilities: np.ndarray) -> list[str]:
        """A class name or "unsure" for each row of [N, C]."""
        return [UNSURE if i < 0 else self.classes[i] for i in self.decide(probabilities)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Decision":
        """Raises ValueError where a part is missing or does not fit the others."""
        try:
            classes, unsure = list(map(str, record["classes"])), record["unsure"]
            costs = np.array(record["costs"], float)
            if costs.shape != (len(classes),) * 2 or not np.isfinite(costs).all() or (costs < 0).any():
                raise ValueError(f"costs must be {len(classes)} x {len(classes)} numbers from 0")
            points = [dict(point) for point in record.get("operating_points", ())]
            return cls(classes, costs.tolist(), None if unsure is None else float(unsure), points)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a rule of decision: {type(error).__name__}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write decision.json, whole or not at all."""
        rundir.publish_json(folder / "decision.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> "Decision | None":
        """The rule of a model folder, None if it has none. Raises ValueError for one that cannot be read."""
        path = folder / "decision.json"
        try:
            record = rundir.read_json(path)
            return None if record is None else cls.from_json(record)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def of(settings: config.Unsure, classes: Sequence[str], points: Sequence[dict[str, Any]] = ()) -> Decision:
    """The rule that the settings say. Raises ValueError for classes that the data does not have."""
    return Decision(list(classes), cost_matrix(settings.costs, classes).tolist(), settings.cost, list(points))


# ---- what a rule is worth ----------------------------------------------------------------------


def summary(probabilities: np.ndarray, labels: np.ndarray, rule: Decision) -> dict[str, Any]:
    """What `rule` says of samples whose class is known, ready for JSON; None where there is nothing to divide by.

    mean_cost is over all samples, unsure ones at their own cost; mean_cost_decided_always is what the same costs
    come to without `unsure`. `confusion` is [C, C + 1], the last column unsure; None of many classes. In `per_class`,
    recall counts unsure as missed, recall_decided leaves it out.
    """
    costs = np.array(rule.costs)
    always, expected = _cheapest(probabilities, costs)
    said = always if rule.unsure is None else np.where(expected > rule.unsure, -1, always)
    decided, right = said >= 0, said == labels
    classes, samples = len(rule.classes), len(labels)
    matrix = np.bincount(labels * (classes + 1) + np.where(decided, said, classes), minlength=classes * (classes + 1))
    matrix = matrix.reshape(classes, classes + 1)
    support, hits, doubts = matrix.sum(1), matrix.diagonal(), matrix[:, classes]
    spent = costs[labels[decided], said[decided]].sum() + (rule.unsure or 0.0) * (~decided).sum()
    return {
        "unsure": rule.unsure,
        "costs": rule.costs if np.any(costs != 1 - np.eye(classes)) else None,
        "coverage": float(decided.mean()),
        "accuracy_decided": _share(right.sum(), decided.sum()),
        "accuracy_decided_always": float((always == labels).mean()),
        "mean_cost": float(spent / samples),
        "mean_cost_decided_always": float(costs[labels, always].mean()),
        "confusion": matrix.tolist() if classes <= _TABLED else None,
        "per_class": [
            {
                "name": name,
                "recall": _share(hits[i], support[i]),
                "recall_decided": _share(hits[i], support[i] - doubts[i]),
                "precision": _share(hits[i], matrix[:, i].sum()),
                "unsure": _share(doubts[i], support[i]),
            }
            for i, name in enumerate(rule.classes)
        ],
        "risk_coverage": risk_coverage(probabilities.max(1), probabilities.argmax(1) == labels),
    }


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """What deciding only from a threshold of the top probability on gives: share decided and share of it wrong.

    Thresholds fall from the surest sample to the last one, at most 100 points; equal ones belong together.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], np.cumsum(~right[order])
    ends = np.append(np.flatnonzero(np.diff(sure)), len(sure) - 1)
    kept = ends[np.unique(np.linspace(0, len(ends) - 1, _POINTS).round().astype(int))]
    return [
        {"threshold": float(sure[i]), "coverage": (int(i) + 1) / len(sure), "risk": float(wrong[i] / (i + 1))}
        for i in kept
    ]


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None

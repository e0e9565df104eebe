"""How good predictions are: figures, calibration, intervals, the spread over seeds. Pure NumPy, no torch.

    scores.figures(confusion)                             # top-1, macro-F1, balanced accuracy, from counts
    scores.auroc(labels, probabilities)                   # of each class against the rest
    scores.intervals(labels, predicted, losses, ...)      # 95 percent
    scores.spread([run["metrics"] for run in runs])       # n seeds: mean and deviation

Labels and predictions are class numbers in 0 ... C - 1. NaN stands where a figure has no meaning (the AUROC of a
class that does not occur), and is left out of means.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""
MOST_SAMPLES = 20_000
"""Above it nothing is resampled: the intervals of whole sets are then narrow, those of counts need no resampling."""
MOST_AUROC = 2_000_000_000
"""Samples x classes x resamples up to which AUROC is resampled: 4 ns each on one core, so 8 s."""
_AT_ONCE = 250
"""Resamples in memory at once: of 20,000 samples 20 MB."""
_Z = 1.959963984540054
"""Of the normal distribution's central 95 percent."""


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] counts: row the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where undefined (as scikit-learn's zero_division=0)."""
    hits = np.diag(confusion).astype(float)
    predicted, true = confusion.sum(0), confusion.sum(1)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    both = predicted + true
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return precision, recall, f1


def figures(confusion: np.ndarray) -> dict[str, float]:
    """top1, macro_f1 (classes that occur or are predicted) and balanced_accuracy (classes that occur)."""
    _, recall, f1 = class_scores(confusion)
    present = confusion.sum(1) > 0
    named = present | (confusion.sum(0) > 0)
    return {
        "top1": float(np.trace(confusion) / confusion.sum()),
        "macro_f1": float(f1[named].mean()),
        "balanced_accuracy": float(recall[present].mean()),
    }


def auroc(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, [C]; NaN for a class with no or all samples.

    The chance that a sample of the class has a higher probability than another one, ties counting half (Mann and
    Whitney 1947). Counted in integers by searching among the few samples of the class: 50,000 x 1,000 take 1.5 s, by
    scikit-learn's roc_auc_score, which gives the same, 17 s.
    """
    found = np.full(probabilities.shape[1], np.nan)
    for c in range(len(found)):
        own, column = labels == c, probabilities[:, c]
        inside, outside = np.sort(column[own]), column[~own]
        if len(inside) and len(outside):
            not_above = np.searchsorted(inside, outside, "left").sum() + np.searchsorted(inside, outside, "right").sum()
            found[c] = 1 - not_above / (2 * len(inside) * len(outside))
    return found


def mean_auroc(each: np.ndarray) -> float:
    """Mean over the classes that occur and are not alone; NaN where there is none."""
    return float(np.nanmean(each)) if np.isfinite(each).any() else math.nan


class Calibration(NamedTuple):
    """How often the model is right, by how sure it is; arrays over BINS bins of equal width, (0, 1/15] first."""

    samples: np.ndarray
    confidence: np.ndarray
    """Mean probability of the predicted class, 0 in empty bins."""
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two over all samples (Guo et al. 2017, eq. 3)."""
        return float((self.samples * np.abs(self.confidence - self.accuracy)).sum() / self.samples.sum())

    def bins(self) -> list[dict[str, float]]:
        """The bins that are not empty, as a plot needs them."""
        edges = np.linspace(0, 1, BINS + 1)
        return [
            {
                "from": float(edges[i]),
                "to": float(edges[i + 1]),
                "count": int(self.samples[i]),
                "confidence": float(self.confidence[i]),
                "accuracy": float(self.accuracy[i]),
            }
            for i in np.flatnonzero(self.samples)
        ]


def calibration(confidence: np.ndarray, right: np.ndarray) -> Calibration:
    """Of the probability given to the predicted class and whether that was right, both [N]."""
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    count, sure, hits = (np.bincount(place, of, BINS) for of in (None, confidence.astype(float), right.astype(float)))
    occupied = np.maximum(1, count)
    return Calibration(count, sure / occupied, hits / occupied)


# ---- intervals ---------------------------------------------------------------------------------


def wilson(hits: Any, of: Any) -> np.ndarray:
    """95 percent interval of a share, [..., 2]: Wilson 1927. NaN where `of` is 0.

    For counts it covers better than resampling, which says of 5 right out of 5 that it can be nothing but 1.
    """
    hits, of = np.asarray(hits, float), np.asarray(of, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, room = hits / of, _Z**2 / of
        half = np.sqrt(room * share * (1 - share) + room**2 / 4)
        ends = np.stack([share + room / 2 - half, share + room / 2 + half], axis=-1) / (1 + room)[..., None]
    return np.clip(ends, 0, 1)


def intervals(
    labels: np.ndarray,
    predicted: np.ndarray,
    losses: np.ndarray,
    probabilities: np.ndarray | None,
    classes: int,
    resamples: int,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 percent intervals of loss, balanced_accuracy, macro_f1 and auroc by the percentile bootstrap (Efron 1979).

    Samples are drawn anew within each class, so every class keeps its number, as a held-out part of each class
    has it, and a rare one cannot vanish. The same seed gives the same intervals. {} for more than MOST_SAMPLES;
    without auroc where that would take longer than MOST_AUROC says, or there are no `probabilities` [N, C].
    """
    if not resamples or len(labels) > MOST_SAMPLES:
        return {}
    generator, drawn = np.random.default_rng(seed), dict[str, list[np.ndarray]]()
    small = probabilities is not None and probabilities.size * resamples <= MOST_AUROC
    for first in range(0, resamples, _AT_ONCE):
        weights = _resampled(labels, min(_AT_ONCE, resamples - first), generator)
        found = _counted(labels, predicted, weights, classes)
        found["loss"] = losses @ weights / len(labels)
        if small and probabilities is not None:
            found |= _ranked(labels, probabilities, weights)
        for name, values in found.items():
            drawn.setdefault(name, []).append(values)
    return {n: [float(end) for end in np.percentile(np.concatenate(v), (2.5, 97.5))] for n, v in drawn.items()}


def _resampled(labels: np.ndarray, times: int, generator: np.random.Generator) -> np.ndarray:
    """How often each sample comes in each of `times` resamples, float32 [N, times]; whole numbers below 2^24."""
    weights = np.empty((len(labels), times), np.float32)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        draws = generator.integers(0, len(rows), (times, len(rows))) + len(rows) * np.arange(times)[:, None]
        weights[rows] = np.bincount(draws.ravel(), minlength=times * len(rows)).reshape(times, len(rows)).T
    return weights


def _counted(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """balanced_accuracy and macro_f1 of each resample: as `figures`, over the occupied cells of the confusion."""
    cell = labels * classes + predicted
    order = np.argsort(cell, kind="stable")
    occupied, starts = np.unique(cell[order], return_index=True)
    counts = np.add.reduceat(weights[order].astype(float), starts, axis=0)
    true, called = np.divmod(occupied, classes)
    hits, said = np.zeros((2, classes, weights.shape[1]))
    np.add.at(said, called, counts)
    hits[true[true == called]] = counts[true == called]
    support = np.bincount(labels, minlength=classes)[:, None]
    both = support + said
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    present = support[:, 0] > 0
    return {
        "balanced_accuracy": (hits[present] / support[present]).mean(0),
        "macro_f1": f1.sum(0) / (both > 0).sum(0),
    }


def _ranked(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """auroc of each resample, the mean over classes; {} where no class has samples in it and out of it."""
    each = []
    for c in np.unique(labels):
        own, column = labels == c, probabilities[:, c]
        rest = np.flatnonzero(~own)
        if not len(rest):
            continue
        rest = rest[np.argsort(column[rest], kind="stable")]
        # Weight of the others below each sample and up to it: where they differ is a tie, of which half counts.
        places = [np.searchsorted(column[rest], column[own], side) for side in ("left", "right")]
        edges = np.unique([0, *np.concatenate(places)])
        edges = edges[edges < len(rest)]
        below = np.zeros((len(edges) + 1, weights.shape[1]))
        np.cumsum(np.add.reduceat(weights[rest], edges, axis=0), axis=0, out=below[1:])
        under, upto = (below[np.searchsorted(edges, place)] for place in places)
        pairs = (weights[own] * (under + upto)).sum(0)
        each.append(pairs / (2.0 * own.sum() * len(rest)))
    return {"auroc": np.mean(each, axis=0)} if each else {}


# ---- several runs ------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Of one metric over n runs that differ in their seed."""

    mean: float
    deviation: float
    """Sample standard deviation (n - 1); NaN of a single run."""
    runs: int


def spread(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and deviation of every metric that all `runs` have. Raises ValueError for no runs."""
    if not runs:
        raise ValueError("no runs to average")
    names = [name for name in runs[0] if all(run.get(name) is not None for run in runs)]
    values = {name: np.array([run[name] for run in runs], float) for name in names}
    several = len(runs) > 1
    return {
        name: Spread(float(of.mean()), float(of.std(ddof=1)) if several else math.nan, len(runs))
        for name, of in values.items()
    }

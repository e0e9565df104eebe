"""Figures, calibration and intervals against scikit-learn and SciPy; the intervals' coverage by simulation."""

import math
import statistics
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from vitdist import scores


def drawn(classes: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities in tenths, so that many are equal."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    tenths = generator.multinomial(10, np.full(classes, 1 / classes), samples)
    return labels, (tenths / 10).astype(np.float32)


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 10**6))
def test_figures_equal_scikit_learn(classes: int, samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    true, predicted = generator.integers(0, classes, samples), generator.integers(0, classes, samples)
    confusion = scores.confusion(true, predicted, classes)
    assert (confusion == reference.confusion_matrix(true, predicted, labels=range(classes))).all()
    found = scores.figures(confusion)
    assert found["top1"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn warns of predicted classes that never occur
        assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(true, predicted))
    expected = reference.precision_recall_fscore_support(true, predicted, labels=range(classes), zero_division=0)
    for mine, theirs in zip(scores.class_scores(confusion), expected, strict=False):
        assert mine == pytest.approx(theirs)


@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 10**6))
def test_auroc_equals_scikit_learn_with_ties_and_absent_classes(classes: int, samples: int, seed: int) -> None:
    labels, probabilities = drawn(classes, samples, seed)
    each = scores.auroc(labels, probabilities)
    expected = [
        reference.roc_auc_score(labels == c, probabilities[:, c]) if 0 < (labels == c).sum() < samples else math.nan
        for c in range(classes)
    ]
    assert each == pytest.approx(expected, nan_ok=True, abs=1e-12)
    known = [value for value in expected if not math.isnan(value)]
    assert scores.mean_auroc(each) == pytest.approx(np.mean(known) if known else math.nan, nan_ok=True)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=80))
def test_calibration_equals_scikit_learn(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs])
    found = scores.calibration(confidence, right)
    accuracy, sure = calibration_curve(right, confidence, n_bins=15)
    occupied = found.samples > 0
    assert found.accuracy[occupied] == pytest.approx(accuracy)
    assert found.confidence[occupied] == pytest.approx(sure)
    # Guo et al. 2017, eq. 2 and 3, in words
    bins = [math.ceil(p * 15 - 1e-12) for p, _ in pairs]
    error = sum(
        abs(sum(r - p for (p, r), b in zip(pairs, bins, strict=True) if b == bin_number)) for bin_number in range(1, 16)
    ) / len(pairs)
    assert found.error == pytest.approx(error)
    assert sum(row["count"] for row in found.bins()) == len(pairs)
    for row in found.bins():
        assert row["count"] > 0
        assert row["from"] - 1e-9 <= row["confidence"] <= row["to"] + 1e-9


def test_a_bin_holds_its_upper_edge() -> None:
    assert np.flatnonzero(scores.calibration(np.array([0.2, 0.2001, 1.0]), np.ones(3, bool)).samples).tolist() == [
        2,
        3,
        14,
    ]


@given(st.integers(1, 500), st.data())
def test_wilson_equals_scipy(of: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, of))
    low, high = binomtest(hits, of).proportion_ci(method="wilson")
    assert scores.wilson(hits, of) == pytest.approx([low, high], abs=1e-12)


def test_wilson_takes_arrays_and_knows_nothing_of_nothing() -> None:
    ends = scores.wilson([5, 0, 0], [5, 5, 0])
    assert ends[0] == pytest.approx([0.5655, 1], abs=1e-4)
    assert ends[1] == pytest.approx([0, 0.4345], abs=1e-4)
    assert np.isnan(ends[2]).all()


@settings(max_examples=25, deadline=None)  # scikit-learn takes 30 ms an example
@given(st.integers(2, 4), st.integers(2, 40), st.integers(0, 10**6))
def test_resamples_keep_every_class_and_are_scored_as_scikit_learn_scores_weights(
    classes: int, samples: int, seed: int
) -> None:
    labels, probabilities = drawn(classes, samples, seed)
    predicted = probabilities.argmax(1)
    weights = scores._resampled(labels, 3, np.random.default_rng(seed))
    for c in range(classes):
        assert (weights[labels == c].sum(0) == (labels == c).sum()).all()
    counted = scores._counted(labels, predicted, weights, classes)
    ranked = scores._ranked(labels, probabilities, weights)
    for r in range(3):
        w = weights[:, r]
        seen = [c for c in range(classes) if w[(labels == c) | (predicted == c)].sum()]
        f1 = reference.f1_score(labels, predicted, labels=seen, average="macro", sample_weight=w, zero_division=0)
        assert counted["macro_f1"][r] == pytest.approx(f1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            recall = reference.balanced_accuracy_score(labels, predicted, sample_weight=w)
        assert counted["balanced_accuracy"][r] == pytest.approx(recall)
        areas = [
            reference.roc_auc_score(labels == c, probabilities[:, c], sample_weight=w)
            for c in range(classes)
            if 0 < (labels == c).sum() < samples
        ]
        if areas:
            assert ranked["auroc"][r] == pytest.approx(np.mean(areas))
    assert bool(ranked) == (len(np.unique(labels)) > 1)


def made(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of which the third is small; logits of the true one 1 higher."""
    generator = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [per_class, per_class, max(2, per_class // 3)])
    logits = generator.normal(size=(len(labels), 3))
    logits[np.arange(len(labels)), labels] += 1
    powers = np.exp(logits)
    return labels, powers / powers.sum(1, keepdims=True)


def found(labels: np.ndarray, probabilities: np.ndarray | None, resamples: int = 400, seed: int = 0) -> dict:
    known = made(len(labels) * 3 // 7, 0)[1] if probabilities is None else probabilities
    predicted, losses = known.argmax(1), -np.log(known[np.arange(len(labels)), labels])
    return scores.intervals(labels, predicted, losses, probabilities, 3, resamples, seed)


def test_intervals_are_the_same_for_the_same_seed_and_hold_the_figure() -> None:
    labels, probabilities = made(60, seed=1)
    first = found(labels, probabilities)
    assert set(first) == {"balanced_accuracy", "macro_f1", "loss", "auroc"}
    assert found(labels, probabilities) == first
    assert found(labels, probabilities, seed=1) != first
    figures = scores.figures(scores.confusion(labels, probabilities.argmax(1), 3))
    figures["auroc"] = scores.mean_auroc(scores.auroc(labels, probabilities))
    figures["loss"] = float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())
    for name, (low, high) in first.items():
        assert low < figures[name] < high, name
    wide, narrow = first["balanced_accuracy"], found(*made(2400, seed=1))["balanced_accuracy"]
    assert np.diff(wide) == pytest.approx(np.diff(narrow) * math.sqrt(40), rel=0.25)


def test_resamples_beyond_one_block_all_count() -> None:
    labels, probabilities = made(20, seed=2)
    generator, each = np.random.default_rng(0), []
    for times in (250, 250, 100):
        weights = scores._resampled(labels, times, generator)
        each.append(scores._counted(labels, probabilities.argmax(1), weights, 3)["macro_f1"])
    expected = np.percentile(np.concatenate(each), (2.5, 97.5))
    assert found(labels, probabilities, resamples=600)["macro_f1"] == pytest.approx(expected)


def test_what_would_take_too_long_is_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = made(60, seed=1)
    assert found(labels, probabilities, resamples=0) == {}
    assert set(found(labels, None)) == {"balanced_accuracy", "macro_f1", "loss"}
    monkeypatch.setattr(scores, "MOST_AUROC", probabilities.size * 400 - 1)
    assert set(found(labels, probabilities)) == {"balanced_accuracy", "macro_f1", "loss"}
    monkeypatch.setattr(scores, "MOST_SAMPLES", len(labels) - 1)
    assert found(labels, probabilities) == {}


@pytest.mark.full
def test_intervals_cover_as_often_as_they_say() -> None:
    """400 samples of a known population: two classes, one normal score each; 95 percent hold the truth, within 3.5."""
    gap, cut, counts, rounds = 1.2, 0.5, (80, 40), 400
    recalls = norm.cdf(cut), norm.cdf(gap - cut)
    share = counts[0] / sum(counts), counts[1] / sum(counts)
    called = [share[0] * recalls[0] + share[1] * (1 - recalls[1]), share[0] * (1 - recalls[0]) + share[1] * recalls[1]]
    truth = {
        "balanced_accuracy": np.mean(recalls),
        "macro_f1": np.mean([2 * share[i] * recalls[i] / (share[i] + called[i]) for i in (0, 1)]),
        "auroc": norm.cdf(gap / math.sqrt(2)),
    }
    held = dict.fromkeys([*truth, "recall"], 0)
    for seed in range(rounds):
        generator, labels = np.random.default_rng(seed), np.repeat([0, 1], counts)
        score = generator.normal(gap * labels)
        second = 1 / (1 + np.exp(cut - score))
        probabilities, predicted = np.stack([1 - second, second], 1), (score > cut).astype(int)
        losses = -np.log(probabilities[np.arange(len(labels)), labels])
        ends = scores.intervals(labels, predicted, losses, probabilities, 2, 1000, seed)
        for name, value in truth.items():
            held[name] += ends[name][0] <= value <= ends[name][1]
        low, high = scores.wilson((predicted[labels == 1] == 1).sum(), counts[1])
        held["recall"] += low <= recalls[1] <= high
    print({name: count / rounds for name, count in held.items()})
    for name, count in held.items():
        assert 0.915 <= count / rounds <= 0.985, (name, count / rounds)


def test_spread_over_seeds() -> None:
    runs = [{"top1": 0.9, "auroc": 0.8, "loss": 1}, {"top1": 0.8, "loss": 2}, {"top1": 0.95, "auroc": None, "loss": 4}]
    found = scores.spread(runs)
    values = [0.9, 0.8, 0.95]
    assert found["top1"] == pytest.approx((statistics.mean(values), statistics.stdev(values), 3))
    assert found["loss"].mean == pytest.approx(7 / 3)
    assert list(found) == ["top1", "loss"]
    mean, deviation, count = scores.spread(runs[:1])["top1"]
    assert (mean, count) == (0.9, 1)
    assert math.isnan(deviation)
    with pytest.raises(ValueError, match="no runs"):
        scores.spread([])

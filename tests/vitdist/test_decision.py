"""Thresholds, costs and `unsure` against trying every possibility."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdist import decision
from vitdist.config import Unsure
from vitdist.scores import wilson

FLAGS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25).filter(
    lambda pairs: any(p for _, p in pairs)
)


def points(scores: np.ndarray, positive: np.ndarray) -> dict[float, tuple[float, float]]:
    """Threshold -> (precision, recall), by counting."""
    found = {}
    for threshold in set(scores.tolist()):
        flagged = scores >= threshold
        found[threshold] = (positive[flagged].mean(), positive[flagged].sum() / positive.sum())
    return found


@settings(deadline=None)  # the first call imports scikit-learn
@given(FLAGS, st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]), st.booleans())
def test_an_operating_point_is_the_best_of_all_thresholds(
    pairs: list[tuple[int, bool]], at: float, by_precision: bool
) -> None:
    scores = np.array([s / 6 for s, _ in pairs], np.float32)
    positive = np.array([p for _, p in pairs])
    asked = {"precision": at} if by_precision else {"recall": at}
    found = decision.operating_point(scores, positive, **asked)
    every = points(scores, positive)
    given_at = {t: (p, r) if by_precision else (r, p) for t, (p, r) in every.items()}
    enough = {t: pair for t, pair in given_at.items() if pair[0] >= at}
    assert found.reached == bool(enough)
    if not enough:
        highest = max(pair[0] for pair in given_at.values())
        enough = {t: pair for t, pair in given_at.items() if pair[0] == highest}
    best = max((other, first) for first, other in enough.values())
    assert (found.precision, found.recall) == every[found.threshold]
    assert ((found.recall, found.precision) if by_precision else (found.precision, found.recall)) == best
    flagged = scores >= found.threshold
    hits = (flagged & positive).sum()
    assert found.flagged == flagged.mean()
    assert found.precision_interval == wilson(hits, flagged.sum()).tolist()
    assert found.recall_interval == wilson(hits, positive.sum()).tolist()


def test_what_cannot_be_asked_of_a_threshold() -> None:
    scores, positive = np.array([0.1, 0.9]), np.array([False, True])
    for asked in ({}, {"precision": 0.5, "recall": 0.5}):
        with pytest.raises(ValueError, match="by a precision or by a recall"):
            decision.operating_point(scores, positive, **asked)
    with pytest.raises(ValueError, match="needs samples of its class"):
        decision.operating_point(scores, ~positive & False, recall=0.5)


def test_where_a_precision_cannot_be_had_the_best_is_told() -> None:
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6, 0.1]), np.array([False, True, True, False, True])
    found = decision.operating_point(scores, positive, precision=0.9)
    assert (found.reached, found.threshold, found.precision, found.recall) == (False, 0.7, 2 / 3, 2 / 3)


def test_every_class_that_occurs_gets_its_points() -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    rows = decision.operating_points(probabilities, labels, ["a", "b", "never"])
    assert len(rows) == 2 * 2 * len(decision.ASKED)
    row = next(row for row in rows if (row["class"], row["given"], row["at"]) == ("b", "precision", 0.95))
    assert row == {
        "class": "b",
        "given": "precision",
        "at": 0.95,
        "threshold": 0.7,
        "precision": 1.0,
        "recall": 1.0,
        "flagged": 0.5,
        "reached": True,
        "precision_interval": pytest.approx([0.3424, 1], abs=1e-4),  # 2 of 2
        "recall_interval": pytest.approx([0.3424, 1], abs=1e-4),
    }
    json.dumps(rows, allow_nan=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Probabilities [N, C], labels, costs [C, C], cost of unsure; eighths, so that sums are exact."""
    classes, samples = draw(st.integers(2, 4)), draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    probabilities = generator.multinomial(8, np.full(classes, 1 / classes), samples) / 8
    costs = generator.integers(0, 5, (classes, classes)) * (1.0 - np.eye(classes))
    return probabilities, generator.integers(0, classes, samples), costs, draw(st.sampled_from([0.125, 0.5, 1.0, 9.0]))


@given(cases())
def test_the_least_expected_cost_is_chosen(case: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    probabilities, _, costs, unsure = case
    classes = len(costs)
    for row, said, always in zip(
        probabilities,
        decision.decide(probabilities, costs, unsure),
        decision.decide(probabilities, costs, None),
        strict=True,
    ):
        expected = [sum(row[true] * costs[true, called] for true in range(classes)) for called in range(classes)]
        assert always == expected.index(min(expected))
        assert said == (-1 if min(expected) > unsure else always)


def test_a_costly_miss_is_called_before_it_is_likely() -> None:
    costs = decision.cost_matrix({"melanoma": {"mole": 20.0}}, ["melanoma", "mole"])
    assert costs.tolist() == [[0, 20], [1, 0]]
    probabilities = np.array([[0.04, 0.96], [0.06, 0.94]])
    assert decision.decide(probabilities, costs, None).tolist() == [1, 0]
    assert decision.decide(probabilities, costs, 0.9).tolist() == [1, -1]


@given(st.floats(0.34, 1), st.floats(0.05, 0.6))
def test_with_costs_of_1_unsure_is_a_threshold(top: float, unsure: float) -> None:
    """Chow's rule: reject where the highest probability is below 1 - cost."""
    probabilities = np.array([[(1 - top) / 2, top, (1 - top) / 2]])
    if abs(top - (1 - unsure)) > 1e-9:
        assert decision.of(Unsure(cost=unsure), "abc").decide(probabilities)[0] == (1 if top > 1 - unsure else -1)


def test_names_in_costs_are_checked() -> None:
    classes = ["melanoma", "mole"]
    for costs in ({"melanom": {"mole": 2.0}}, {"mole": {"melanom": 2.0}}):
        with pytest.raises(
            ValueError, match=r"unsure\.costs: 'melanom' is no class of the data; did you mean 'melanom"
        ):
            decision.cost_matrix(costs, classes)
    with pytest.raises(ValueError, match="'xyz' is no class of the data; there are: melanoma, mole"):
        decision.cost_matrix({"xyz": {"mole": 2.0}}, classes)
    with pytest.raises(ValueError, match="'mole' called 'mole' is right and costs 0, not 2"):
        decision.cost_matrix({"mole": {"mole": 2.0}}, classes)
    with pytest.raises(ValueError, match="rename the class"):
        decision.of(Unsure(), ["sure", "unsure"])


@given(cases())
def test_a_summary_is_what_counting_gives(case: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    probabilities, labels, costs, unsure = case
    rule = decision.Decision([f"class {i}" for i in range(len(costs))], costs.tolist(), unsure)
    said, found = rule.decide(probabilities), decision.summary(probabilities, labels, rule)
    json.dumps(found, allow_nan=False)
    pairs = list(zip(labels.tolist(), said.tolist(), strict=True))
    decided = [(true, called) for true, called in pairs if called >= 0]
    assert found["coverage"] == pytest.approx(len(decided) / len(pairs))
    right = sum(true == called for true, called in decided)
    assert found["accuracy_decided"] == (pytest.approx(right / len(decided)) if decided else None)
    spent = sum(unsure if called < 0 else costs[true, called] for true, called in pairs)
    assert found["mean_cost"] == pytest.approx(spent / len(pairs))
    always = decision.decide(probabilities, costs, None)
    assert found["mean_cost_decided_always"] == pytest.approx(np.mean(costs[labels, always]))
    assert found["accuracy_decided_always"] == pytest.approx(np.mean(labels == always))
    for c, row in enumerate(found["per_class"]):
        mine = [called for true, called in pairs if true == c]
        doubts, hits, called_so = mine.count(-1), mine.count(c), [true for true, called in pairs if called == c]
        assert found["confusion"][c] == [mine.count(i) for i in range(len(costs))] + [doubts]
        assert row["recall"] == (pytest.approx(hits / len(mine)) if mine else None)
        assert row["recall_decided"] == (pytest.approx(hits / (len(mine) - doubts)) if len(mine) > doubts else None)
        assert row["unsure"] == (pytest.approx(doubts / len(mine)) if mine else None)
        assert row["precision"] == (pytest.approx(called_so.count(c) / len(called_so)) if called_so else None)


def test_a_summary_of_many_classes_has_no_matrix() -> None:
    probabilities = np.full((3, 201), 1 / 201)
    rule = decision.of(Unsure(), [str(i) for i in range(201)])
    found = decision.summary(probabilities, np.array([0, 1, 200]), rule)
    assert found["confusion"] is None
    assert (found["coverage"], found["mean_cost"], found["accuracy_decided"]) == (0, 0.5, None)


def test_samples_beyond_one_block_are_decided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    costs = decision.cost_matrix({"a": {"b": 3.0, "c": 0.5}}, "abcd")
    whole = decision.decide(probabilities, costs, 0.4)
    assert (whole == -1).any()
    monkeypatch.setattr(decision, "_ROWS", 7)
    assert (decision.decide(probabilities, costs, 0.4) == whole).all()


@given(FLAGS)
def test_the_curve_of_risk_and_coverage(pairs: list[tuple[int, bool]]) -> None:
    sure, right = np.array([s / 6 for s, _ in pairs]), np.array([r for _, r in pairs])
    curve = decision.risk_coverage(sure, right)
    assert [point["threshold"] for point in curve] == sorted(set(sure.tolist()), reverse=True)
    for point in curve:
        kept = sure >= point["threshold"]
        assert point["coverage"] == pytest.approx(kept.mean())
        assert point["risk"] == pytest.approx((~right[kept]).mean())


def test_a_long_curve_is_thinned_to_its_ends() -> None:
    sure = np.random.default_rng(0).random(5000)
    curve = decision.risk_coverage(sure, sure > 0.5)
    assert len(curve) == 100
    assert (curve[0]["coverage"], curve[-1]["coverage"]) == (1 / 5000, 1.0)


def test_a_model_folder_carries_its_rule(tmp_path: Path) -> None:
    assert decision.Decision.load(tmp_path) is None
    points = [{"class": "mole", "given": "recall", "at": 0.9, "threshold": 0.25}]
    rule = decision.of(Unsure(costs={"mole": {"Krebs ß": 4.0}}, cost=0.3), ["Krebs ß", "mole"], points)
    rule.save(tmp_path)
    loaded = decision.Decision.load(tmp_path)
    assert loaded == rule
    assert loaded.operating_points == points
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.05, 0.95]], np.float32)
    assert loaded.apply(probabilities) == ["unsure", "mole", "unsure", "mole"]
    assert decision.Decision(rule.classes, rule.costs, None).apply(probabilities)[2] == "mole"
    with pytest.raises(ValueError, match="of 2 classes, the model has 3"):
        loaded.apply(np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": [[0, 1]]}, "2 x 2"),
        ({"costs": [[0, -1], [1, 0]]}, "numbers from 0"),
        ({"costs": [[0, math.inf], [1, 0]]}, "numbers from 0"),
        ({"costs": [[0, "much"], [1, 0]]}, "much"),
        ({"classes": None}, "NoneType"),
        ({"schema": 99}, "newer vitdist"),
    ],
)
def test_a_damaged_rule_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    decision.of(Unsure(), ["a", "b"]).save(tmp_path)
    path = tmp_path / "decision.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"decision\.json: .*{message}"):
        decision.Decision.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"decision\.json: "):
        decision.Decision.load(tmp_path)

"""Every sample once and every figure right, over any split of the samples; what the run folder then holds."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from tests import ranks, workers
from vitdist import config, decision, dist, evaluate
from vitdist.data.reader import MicroBatch
from vitdist.rundir import RunDir

ALONE = dist.Processes(0, 1, 0, 0, 1, torch.device("cpu"), None)
CLASSES = [f"class {i}" for i in range(7)]
BROKEN = (0, 17)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> dist.Processes:
    """One rank without a process group."""
    monkeypatch.setattr(dist.Processes, "gather", lambda self, value: [value])
    monkeypatch.setattr(dist.Processes, "from_first", lambda self, value: value)
    return ALONE


def run(me: dist.Processes, logits: torch.Tensor, labels: torch.Tensor, **more: Any) -> evaluate.Evaluation:
    """Evaluate in one rank, shuffled and in batches of 16, a model whose pictures are its logits."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.tensor([-1]), shuffled])  # logits[-1] are there, and must not count
    batches = [MicroBatch(logits[rows][:, None, None], labels[rows], rows, rows >= 0, []) for rows in places.split(16)]
    return evaluate.evaluate(
        lambda images: images[:, 0, 0], batches, lambda batch: batch.images, logits.shape[1], len(labels), me, **more
    )


def reference_figures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    classes = list(range(probabilities.shape[1]))
    # Of equally probable classes the first is the more probable one.
    order = np.argsort(-probabilities, axis=1, kind="stable")
    predicted = order[:, 0]
    return {
        "loss": reference.log_loss(labels, probabilities, labels=classes),
        "top1": reference.accuracy_score(labels, predicted),
        "top5": float((order[:, :5] == labels[:, None]).any(1).mean()),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
        "macro_f1": reference.f1_score(labels, predicted, average="macro"),
        "auroc": reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
    }


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_figures_equal_scikit_learn(alone: dist.Processes, tta: str) -> None:
    logits, labels = workers.logits_and_labels(200, 7)
    found = run(alone, logits, labels, tta=tta)
    probabilities = logits.double().softmax(1)
    if tta == "flip":  # the mirror image of such a picture has the classes the other way round
        probabilities = (probabilities + probabilities.flip(1)) / 2
    assert found.probabilities == pytest.approx(probabilities.numpy(), abs=1e-6)
    expected = reference_figures(found.probabilities, labels.numpy())
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.processes
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_figures_do_not_depend_on_how_samples_are_spread(tta: str) -> None:
    logits, labels = workers.logits_and_labels(90, 7)
    kept = np.setdiff1d(np.arange(90), BROKEN)
    first: evaluate.Evaluation | None = None
    # 3 ranks of 40: two batches of one rank are full, others are padded or nothing but padding.
    for world, batch in ((1, 90), (2, 13), (3, 40), (3, 7)) if tta == "none" else ((1, 90), (2, 13)):
        results = ranks.run(workers.evaluation, world, 90, 7, batch, tta, BROKEN)
        result: evaluate.Evaluation = results[0]
        first = first or result
        assert all(each.metrics == first.metrics for each in results), (world, batch)
        assert all(each.probabilities is None for each in results[1:])
        assert (result.confusion == first.confusion).all()
        for name in ("ids", "labels", "predicted", "confidence", "losses", "above", "probabilities"):
            assert (getattr(result, name) == getattr(first, name)).all(), name
        assert [bad.id for bad in result.bad] == list(BROKEN)
    assert first
    assert (first.ids == kept).all()
    assert (first.labels == labels.numpy()[kept]).all()
    probabilities = logits.double().softmax(1)
    if tta == "flip":  # the mirror image of such a picture has the classes the other way round
        probabilities = (probabilities + probabilities.flip(1)) / 2
    assert first.probabilities == pytest.approx(probabilities.numpy()[kept], abs=1e-6)
    assert first.metrics["samples"] == 88
    assert first.metrics["unreadable"] == 2
    expected = reference_figures(probabilities.float().numpy()[kept], labels.numpy()[kept])
    if tta == "flip":  # rounding decides between classes that are equal in exact arithmetic
        expected = reference_figures(first.probabilities, labels.numpy()[kept])
    for name, value in expected.items():
        assert first.metrics[name] == pytest.approx(value, abs=1e-6), name
    assert first.confidence == pytest.approx(first.probabilities.max(1))


@pytest.mark.processes
def test_samples_that_come_twice_or_not_at_all_end_the_run() -> None:
    for text in ranks.run(workers.evaluation, 2, 20, 3, 6, "none", (), True):
        assert text.startswith("AssertionError: (20, 19) counted and different, 0 unreadable, of 20")
    for text in ranks.run(workers.evaluation, 2, 4, 3, 6, "none", (0, 1, 2, 3)):
        assert text == "ValueError: none of 4 validation samples can be read"


def test_large_sets_are_whole_only_where_asked(alone: dist.Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = workers.logits_and_labels(40, 7)
    monkeypatch.setattr(evaluate, "ALWAYS_WHOLE", 279)
    brief, thorough = run(alone, logits, labels), run(alone, logits, labels, thorough=True)
    assert brief.probabilities is None
    assert brief.class_auroc is None
    assert thorough.probabilities is not None
    assert set(thorough.metrics) - set(brief.metrics) == {"auroc"}
    assert {**thorough.metrics, "auroc": 0} == {**brief.metrics, "auroc": 0}
    monkeypatch.setattr(evaluate, "MOST_WHOLE", 279)
    assert run(alone, logits, labels, thorough=True).probabilities is None


def test_figures_without_a_meaning_are_left_out(alone: dist.Processes) -> None:
    logits, _ = workers.logits_and_labels(10, 3)
    one_class = run(alone, logits, torch.ones(10, dtype=torch.int64))
    assert "auroc" not in one_class.metrics
    assert all(math.isfinite(value) for value in one_class.metrics.values())
    logits[3, 1] = math.nan
    broken = run(alone, logits, torch.arange(10) % 3)
    assert math.isnan(broken.metrics["loss"])  # for the trainer to see
    assert all(math.isfinite(value) for name, value in broken.metrics.items() if name != "loss")


def test_the_device_works_on_a_batch_while_the_one_before_is_counted(
    alone: dist.Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, table = [], evaluate._table
    monkeypatch.setattr(evaluate, "_table", lambda *each: seen.append("counted") or table(*each))
    monkeypatch.setattr(evaluate, "_log_probabilities", lambda f, x, tta: seen.append("sent") or f(x).log_softmax(1))
    run(alone, *workers.logits_and_labels(47, 3))
    assert seen == ["sent", "sent", "counted", "sent", "counted", "counted"]


def test_probabilities_are_those_that_are_evaluated(alone: dist.Processes) -> None:
    logits, labels = workers.logits_and_labels(16, 5)
    for tta in ("none", "flip"):
        asked = evaluate.probabilities(lambda images: images[:, 0, 0], logits[:, None, None], tta)
        assert torch.equal(asked, torch.from_numpy(run(alone, logits, labels, tta=tta).probabilities))


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def read(run: RunDir) -> dict[str, Any]:
    return json.loads(run.evaluation.read_text(), parse_constant=no_constant)


def test_the_run_folder_holds_what_was_found(alone: dist.Processes, tmp_path: Path) -> None:
    logits, labels = workers.logits_and_labels(90, 7)
    labels[labels == 6] = 0  # a class that does not occur
    result, place = run(alone, logits, labels, tta="flip"), RunDir(tmp_path)
    settings = config.Evaluation(bootstrap=200, unsure=config.Unsure(costs={"class 0": {"class 1": 5.0}}, cost=0.4))
    rule = evaluate.publish(place, 12, result, CLASSES, settings, thorough=True)
    found = read(place)
    assert (found["step"], found["tta"], found["classes"]) == (12, "flip", CLASSES)
    assert found["metrics"] == result.metrics
    assert np.sum(found["confusion"]) == 90
    assert sum(row["count"] for row in found["calibration"]) == 90
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in found["calibration"]]
    assert sum(gaps) / 90 == pytest.approx(found["metrics"]["calibration_error"], abs=1e-6)
    assert set(found["intervals"]) == {"top1", "top5", "loss", "balanced_accuracy", "macro_f1", "auroc"}
    for name, (low, high) in found["intervals"].items():
        assert low < found["metrics"][name] < high, name
    absent, present = found["per_class"][6], found["per_class"][0]
    assert (absent["support"], absent["recall_interval"], absent["auroc"]) == (0, None, None)
    assert present["recall_interval"][0] < present["recall"] < present["recall_interval"][1]
    area = reference.roc_auc_score(labels == 0, result.probabilities[:, 0])
    assert present["auroc"] == pytest.approx(area)
    assert {point["class"] for point in found["operating_points"]} == set(CLASSES[:6])
    assert found["decision"] == decision.summary(result.probabilities, result.labels, rule)
    assert rule.operating_points == found["operating_points"]
    assert (rule.unsure, rule.costs[0][1], rule.costs[1][0]) == (0.4, 5.0, 1.0)
    with np.load(place.predictions) as kept:
        assert set(kept) == {"ids", "labels", "predicted", "confidence", "decided", "probabilities"}
        assert kept["probabilities"].dtype == np.float16
        assert kept["probabilities"] == pytest.approx(result.probabilities, abs=1e-3)
        assert (kept["decided"] == rule.decide(result.probabilities)).all()
        for name in ("ids", "labels", "predicted", "confidence"):
            assert (kept[name] == getattr(result, name)).all()


def test_an_evaluation_on_the_way_is_brief(
    alone: dist.Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = workers.logits_and_labels(90, 7)
    place = RunDir(tmp_path)
    monkeypatch.setattr(evaluate, "MOST_WRITTEN", 629)
    assert evaluate.publish(place, 3, run(alone, logits, labels), CLASSES) is None
    assert set(read(place)) == {
        "schema",
        "step",
        "metrics",
        "tta",
        "classes",
        "confusion",
        "per_class",
        "calibration",
    }
    with np.load(place.predictions) as kept:
        assert "probabilities" not in kept
    monkeypatch.setattr(evaluate, "MOST_POINTS", 629)
    result = run(alone, logits, labels)
    evaluate.publish(place, 3, result, CLASSES, config.Evaluation(bootstrap=0), thorough=True)
    found = read(place)
    assert set(found["intervals"]) == {"top1", "top5"}
    assert "operating_points" not in found
    # Without the probabilities of all samples there is a rule, but nothing to measure it by.
    monkeypatch.setattr(evaluate, "ALWAYS_WHOLE", 0)
    settings = config.Evaluation(unsure=config.Unsure())
    assert evaluate.publish(place, 3, run(alone, logits, labels), CLASSES, settings).unsure == 0.5
    assert "decision" not in read(place)

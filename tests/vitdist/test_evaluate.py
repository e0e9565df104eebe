"""Figures against scikit-learn, over any split of the samples."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from vitdist import evaluate


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 10**6))
def test_figures_equal_scikit_learn(classes: int, samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    true, predicted = generator.integers(0, classes, samples), generator.integers(0, classes, samples)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (true, predicted), 1)
    found = evaluate.figures(confusion, loss_sum=3.0, top5_hits=samples)
    assert found["top1"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn warns of predicted classes that never occur
        assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(true, predicted))
    precision, recall, f1 = evaluate.class_scores(confusion)
    expected = reference.precision_recall_fscore_support(true, predicted, labels=range(classes), zero_division=0)
    for mine, theirs in zip((precision, recall, f1), expected, strict=False):
        assert mine == pytest.approx(theirs)
    assert found["loss"] == pytest.approx(3.0 / samples)

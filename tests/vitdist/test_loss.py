"""Losses against torch, timm, torchvision and formulas in float64. python -m pytest tests/vitdist/test_loss.py"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vitdist import config
from vitdist.loss import Loss, adjustment, class_weights

CLASSES = ["a", "b", "c", "d", "e"]
COUNTS = [100.0, 40.0, 10.0, 3.0, 1.5]
KINDS = ["cross_entropy", "bce", "focal"]


def loss(counts: list[float] | None = COUNTS, **settings: Any) -> Loss:
    return Loss(config.Loss(**settings), counts, CLASSES)


def batch(n: int = 32, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, class numbers, shares."""
    generator = torch.Generator().manual_seed(n)
    logits = scale * torch.randn(n, len(CLASSES), generator=generator)
    shares = torch.rand(n, len(CLASSES), generator=generator) ** 4
    shares[shares < 0.05] = 0
    return logits, torch.arange(n) % len(CLASSES), shares / shares.sum(1, keepdim=True)


def plain(kind: str, logits: np.ndarray, soft: np.ndarray, gamma: float, weights: np.ndarray) -> np.ndarray:
    """The formulas, in float64. `soft`: [B, C], smoothed."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(weights * soft * (1 - np.exp(log_p)) ** (gamma if kind == "focal" else 0) * log_p).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "inverse", "effective", {"b": 3.0, "d": 0.0}])
@pytest.mark.parametrize("soft", [False, True])
def test_the_mean_is_torchs(smoothing: float, weights: Any, soft: bool) -> None:
    logits, numbers, shares = batch()
    ours = loss(class_weights=weights, label_smoothing=smoothing)
    target = shares if soft else numbers
    each, total = ours(logits, target), ours.weight(target).sum()
    per_class = None if weights == "none" else torch.tensor(class_weights(ours._settings, COUNTS, CLASSES)).float()
    expected = F.cross_entropy(logits, target, per_class, label_smoothing=smoothing)
    # torch divides by the number of samples where targets are shares, we by their weights: 1 each without any.
    total = total if per_class is None or not soft else torch.tensor(len(logits))
    torch.testing.assert_close(each.sum() / total, expected)
    assert each.shape == (len(logits),)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_shares_and_focus_are_the_formula(kind: str, gamma: float) -> None:
    logits, numbers, shares = batch()
    ours = loss(kind=kind, focal_gamma=gamma, class_weights="inverse", label_smoothing=0.1)
    weights = np.array(class_weights(ours._settings, COUNTS, CLASSES))
    for target in (numbers, shares):
        whole = (target if target.is_floating_point() else F.one_hot(target, 5)).double().numpy()
        expected = plain(kind, logits.double().numpy(), 0.9 * whole + 0.1 / 5, gamma, weights)
        np.testing.assert_allclose(ours(logits, target).numpy(), expected, rtol=2e-5)
        np.testing.assert_allclose(ours.weight(target).numpy(), whole @ weights, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_of_two_classes_is_torchvisions(gamma: float) -> None:
    from torchvision.ops import sigmoid_focal_loss

    x, target = 4 * torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    ours = Loss(config.Loss(kind="focal", focal_gamma=gamma, label_smoothing=0.0), None, ["no", "yes"])
    expected = sigmoid_focal_loss(x, target.float(), alpha=-1, gamma=gamma)
    torch.testing.assert_close(ours(torch.stack([torch.zeros(64), x], 1), target), expected)


def test_bce_is_timms() -> None:
    from timm.loss import BinaryCrossEntropy

    logits, numbers, shares = batch()
    for smoothing in (0.0, 0.1):
        ours = loss(kind="bce", label_smoothing=smoothing)
        expected = BinaryCrossEntropy(smoothing=smoothing)
        torch.testing.assert_close(ours(logits, numbers).mean(), expected(logits, numbers))
        # timm's Mixup smooths before it mixes, which is the same: targets are linear.
        torch.testing.assert_close(
            ours(logits, shares).mean(), expected(logits, shares * (1 - smoothing) + smoothing / 5)
        )
    weighted = loss(kind="bce", label_smoothing=0.1, class_weights={"c": 4.0})
    torch.testing.assert_close(weighted(logits, numbers), torch.where(numbers == 2, 4.0, 1.0) * ours(logits, numbers))


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_shares_are_class_numbers(kind: str) -> None:
    logits, numbers, _ = batch()
    ours = loss(kind=kind, class_weights="inverse", logit_adjustment=1.0)
    hot = F.one_hot(numbers, 5).float()
    torch.testing.assert_close(ours(logits, hot), ours(logits, numbers))
    torch.testing.assert_close(ours.weight(hot), ours.weight(numbers))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.1, 2.0])
@pytest.mark.parametrize("size", [20.0, 1e4, 65504.0])
def test_gradients_are_finite_at_extreme_logits(kind: str, gamma: float, size: float) -> None:
    logits = (size * torch.tensor([[1.0, -1, 0, 0, 0], [-1.0, 1, 0, 0, 0], [1.0, 1, 1, 1, 1]])).requires_grad_()
    for target in (torch.zeros(3, dtype=torch.int64), F.one_hot(torch.zeros(3, dtype=torch.int64), 5).float()):
        each = loss(kind=kind, focal_gamma=gamma, class_weights="effective", logit_adjustment=1.0)(logits, target)
        (gradient,) = torch.autograd.grad(each.sum(), logits)
        assert each.isfinite().all()
        assert gradient.isfinite().all()


def test_gradients_are_the_formulas() -> None:
    logits, _, shares = batch(6)
    for kind in KINDS:
        ours = loss(kind=kind, class_weights="inverse", logit_adjustment=1.0)
        assert torch.autograd.gradcheck(lambda x, f=ours: f(x, shares.double()), logits.double().requires_grad_())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20).filter(any), st.floats(1e-3, 1 - 1e-9))
def test_weights_follow_their_formulas(counts: list[int], beta: float) -> None:
    names = [str(i) for i in range(len(counts))]
    there = np.array(counts) > 0
    inverse = np.array(class_weights(config.Loss(class_weights="inverse"), counts, names))
    assert not inverse[~there].any()
    np.testing.assert_allclose(inverse[there] * np.array(counts)[there], sum(counts) / there.sum())
    settings = config.Loss(class_weights="effective", effective_beta=beta)
    effective = np.array(class_weights(settings, counts, names))
    assert not effective[~there].any()
    assert effective[there].mean() == pytest.approx(1)
    expected = np.array([1 / -math.expm1(n * math.log(beta)) for n in counts if n])
    np.testing.assert_allclose(effective[there], expected / expected.mean())
    shift = adjustment(1.0, counts)
    assert all(math.isfinite(value) for value in shift)
    assert np.exp(shift).sum() == pytest.approx(1)


def test_weights_are_scikit_learns_and_the_papers() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat(np.arange(3), [50, 7, 3])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(config.Loss(class_weights="inverse"), [50, 7, 3], ["x", "y", "z"]) == pytest.approx(expected)
    # Cui et al.'s class_balanced_loss.py
    effective = 1.0 - np.power(0.9, [50, 7, 3])
    weights = (1.0 - 0.9) / effective
    weights = weights / weights.sum() * 3
    settings = config.Loss(class_weights="effective", effective_beta=0.9)
    assert class_weights(settings, [50, 7, 3], ["x", "y", "z"]) == pytest.approx(weights)
    # Beta near 1 is near inverse, and its powers keep their digits, also of the fractions that class shares bring.
    settings = config.Loss(class_weights="effective", effective_beta=1 - 1e-13)
    expected = np.array([1 / 50, 1 / 7.3, 1 / 0.01]) * 3 / (1 / 50 + 1 / 7.3 + 1 / 0.01)
    assert class_weights(settings, [50, 7.3, 0.01], ["x", "y", "z"]) == pytest.approx(expected)
    assert class_weights(config.Loss(class_weights={"y": 2.0}), None, ["x", "y"]) == [1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_adjustment_adds_the_log_of_shares(kind: str) -> None:
    logits, numbers, _ = batch()
    shares = torch.tensor(COUNTS) / sum([100, 40, 10, 3, 1.5])
    adjusted = loss(kind=kind, logit_adjustment=1.5)(logits, numbers)
    torch.testing.assert_close(adjusted, loss(kind=kind)(logits + 1.5 * shares.log(), numbers))
    # A class that never comes is taken for one that comes once.
    assert adjustment(1.0, [3, 0]) == pytest.approx([math.log(0.75), math.log(0.25)])


def test_a_batch_in_parts_is_the_batch() -> None:
    """Of an uneven set: sums of losses and weights over parts, as ranks have them."""
    logits, numbers, _ = batch(30)
    ours = loss(class_weights="inverse")
    parts = list(zip(logits.split(7), numbers.split(7), strict=True))
    total = sum(ours.weight(target).double().sum() for _, target in parts)
    mean = sum(ours(some, target).sum() for some, target in parts) / total
    expected = F.cross_entropy(logits, numbers, torch.tensor(ours._weights), label_smoothing=0.1)
    torch.testing.assert_close(mean.float(), expected)
    assert float(ours.weight(numbers.split(7)[0]).mean()) != pytest.approx(float(total / 30))


def test_mixing_in_pairs_keeps_the_weight_of_a_batch() -> None:
    from vitdist.data import augment

    numbers = torch.arange(24) % 5
    settings = config.Data(train="-", val="-", mixup=0.8, cutmix=1.0)
    plan = augment.plan(settings, 0, 0, (0, 24), 24, 8)
    _, soft = augment.apply(plan, torch.zeros(24, 3, 8, 8), F.one_hot(numbers, 5).float())
    ours = loss(class_weights="inverse")
    assert not torch.allclose(ours.weight(soft), ours.weight(numbers))
    torch.testing.assert_close(ours.weight(soft).sum(), ours.weight(numbers).sum())


def test_what_is_weighted() -> None:
    assert not loss().weighted
    assert torch.equal(loss().weight(torch.arange(3)), torch.ones(3))
    assert loss(class_weights={"a": 2.0}).weighted
    assert loss(class_weights={"a": 2.0}).weight(torch.tensor([0, 1])).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("settings", "counts", "reason"),
    [
        ({"class_weights": {"x": 1.0}}, COUNTS, r"loss.class_weights: there is no class 'x'; there are: a, b, c, d, e"),
        ({"class_weights": dict.fromkeys(CLASSES, 0.0)}, COUNTS, "must have a weight above 0"),
        ({"class_weights": "inverse"}, None, "loss.class_weights=inverse needs the number of samples of each class"),
        ({"class_weights": "effective"}, None, "loss.class_weights=effective needs the number"),
        ({"logit_adjustment": 1.0}, None, "loss.logit_adjustment needs the number"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], counts: list[float] | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        loss(counts, **settings)

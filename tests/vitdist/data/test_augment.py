"""Mixup, cutmix, erasing: right, and the same for every number of ranks.

python -m pytest tests/vitdist/data/test_augment.py
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitdist.config import Data
from vitdist.data import augment

SIZE, TOTAL, CLASSES = 12, 24, 5


def settings(**values: Any) -> Data:
    return Data(train="-", val="-", **values)


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(TOTAL, 3, SIZE, SIZE, generator=generator)
    return images, F.one_hot(torch.randint(CLASSES, (TOTAL,), generator=generator), CLASSES).float()


ALL = settings(mixup=0.8, cutmix=1.0, mix_chance=0.8, erase=0.5)


@pytest.mark.parametrize("by", ["pair", "batch"])
@pytest.mark.parametrize("micro", [2, 4, 6, 12, 24])
def test_splitting_a_batch_changes_nothing(micro: int, by: str) -> None:
    images, targets = batch()
    start, how = 3 * TOTAL, ALL.model_copy(update={"mix_by": by, "mix_chance": 0.9})
    plan = augment.plan(how, 7, 3, (start, start + TOTAL), TOTAL, SIZE)
    whole = augment.apply(plan, images, targets)
    assert not torch.equal(whole[1], targets)
    for first in range(0, TOTAL, micro):
        slots = (start + first, start + first + micro)
        part = augment.plan(how, 7, 3, slots, TOTAL, SIZE)
        got = augment.apply(part, images[first : first + micro], targets[first : first + micro])
        for ours, expected in zip(got, whole, strict=True):
            assert torch.equal(ours, expected[first : first + micro])


def test_steps_and_seeds_differ() -> None:
    plans = [augment.plan(ALL, seed, step, (step * TOTAL, (step + 1) * TOTAL), TOTAL, SIZE) for seed, step in
             ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert not np.array_equal(plans[0].kept, plans[1].kept)
    assert not np.array_equal(plans[0].kept, plans[2].kept)
    assert not np.array_equal(plans[0].erased, plans[1].erased)


def test_nothing_is_planned_where_all_is_off() -> None:
    assert augment.plan(settings(), 0, 0, (0, 4), 4, SIZE) is None
    augment.check(settings(erase=1.0), 3)
    with pytest.raises(ValueError, match="a micro-batch of 3 must be even"):
        augment.check(settings(mixup=0.2), 3)


def test_mixup_is_the_formula() -> None:
    images, targets = batch()
    plan = augment.plan(settings(mixup=0.8), 0, 0, (0, TOTAL), TOTAL, SIZE)
    assert plan.blended.all()
    assert not plan.pasted.any()
    assert not plan.erased.any()
    mixed, soft = augment.apply(plan, images, targets)
    for i in range(TOTAL):
        kept = float(plan.kept[i])
        assert plan.kept[i] == plan.kept[i ^ 1]
        assert torch.allclose(mixed[i], kept * images[i] + (1 - kept) * images[i ^ 1], atol=1e-6)
        assert torch.allclose(soft[i], kept * targets[i] + (1 - kept) * targets[i ^ 1])


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels() -> None:
    images, targets = batch()
    plan = augment.plan(settings(cutmix=1.0), 0, 0, (0, TOTAL), TOTAL, SIZE)
    mixed, soft = augment.apply(plan, images, targets)
    sizes = set()
    for i in range(TOTAL):
        own = (mixed[i] == images[i]).all(0)
        assert torch.equal(mixed[i][:, ~own], images[i ^ 1][:, ~own])
        rows, columns = torch.nonzero(~own, as_tuple=True)
        if len(rows):  # a full rectangle
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        sizes.add(len(rows))
        assert float(plan.kept[i]) == pytest.approx(float(own.float().mean()), abs=1e-6)
        assert torch.allclose(soft[i], plan.kept[i] * targets[i] + (1 - plan.kept[i]) * targets[i ^ 1])
    assert len(sizes) > 4


def test_beta_and_chances_are_as_asked() -> None:
    """Over 20,000 pairs: the mean and variance of Beta(a, a), half mixup, the chance to be mixed and erased."""
    n = 40_000
    plan = augment.plan(ALL, 1, 0, (0, n), n, 224)
    pairs = plan.kept[::2]
    mixed = plan.blended[::2] | (plan.pasted[::2].any(1))
    assert mixed.mean() == pytest.approx(0.8, abs=0.02)  # a rectangle may round to nothing
    assert plan.blended[::2].mean() == pytest.approx(0.4, abs=0.02)
    blended = pairs[plan.blended[::2]]
    assert blended.mean() == pytest.approx(0.5, abs=0.02)
    assert blended.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)
    boxes = plan.erased[plan.erased.any(1)]
    assert len(boxes) / n == pytest.approx(0.5, abs=0.01)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area.min() > 0.015
    assert area.max() < 0.34
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_erasing_sets_the_mean_and_leaves_targets() -> None:
    images, targets = batch()
    plan = augment.plan(settings(erase=1.0), 0, 0, (0, TOTAL), TOTAL, SIZE)
    erased, same = augment.apply(plan, images, targets)
    assert torch.equal(same, targets)
    for i in range(TOTAL):
        gone = (erased[i] == 0).all(0)
        assert torch.equal(erased[i][:, ~gone], images[i][:, ~gone])
        top, left, bottom, right = (plan.erased[i] * SIZE).round().astype(int).tolist()
        assert gone.sum() == (bottom - top) * (right - left) > 0


def test_draws_of_pairs_are_what_they_were() -> None:
    """Runs of before go on alike: the plan of ALL as the first version made it."""
    plan = augment.plan(ALL, 7, 3, (3 * TOTAL, 3 * TOTAL + 8), TOTAL, SIZE)
    assert plan.kept[::2].tolist() == pytest.approx([1, 0.57968217, 1 - 8 * 7 / 144, 1 - 8 * 6 / 144])
    assert plan.blended.tolist() == [False, False, True, True, False, False, False, False]
    boxes = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 5, 8, 12], [4, 0, 12, 6]]
    assert (plan.pasted[::2] * SIZE).round().astype(int).tolist() == boxes


def test_a_batch_may_be_mixed_as_one() -> None:
    """One kind, share and box for all; over 300 steps the kinds and shares come as for pairs."""
    how, found = ALL.model_copy(update={"mix_by": "batch"}), []
    for step in range(300):
        slots = (step * TOTAL, (step + 1) * TOTAL)
        plan = augment.plan(how, 1, step, slots, TOTAL, 224)
        assert all(len(np.unique(values, axis=0)) == 1 for values in plan[:3])
        assert len(np.unique(plan.erased, axis=0)) > 1  # erasing stays each sample's own
        found.append((plan.kept[0], plan.blended[0], plan.pasted[0].any()))
    kept, blended, pasted = np.array(found).T
    assert (blended + pasted).mean() == pytest.approx(0.8, abs=0.08)
    assert blended.mean() == pytest.approx(0.4, abs=0.1)
    assert kept[blended == 1].mean() == pytest.approx(0.5, abs=0.1)
    odd = augment.plan(how.model_copy(update={"mixup": 0.0, "cutmix": 0.0}), 1, 0, (0, 5), 5, 224)
    assert odd.kept.tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_timms(kind: str) -> None:
    """timm's Mixup of one pair at a time, as it takes the batch backwards for partners, given our share and box."""
    from timm.data.mixup import Mixup

    images, targets = batch()
    ours = augment.plan(settings(**{kind: 1.0}), 0, 0, (0, TOTAL), TOTAL, SIZE)
    mixed, soft = augment.apply(ours, images, targets)
    for first in range(0, TOTAL, 2):
        theirs = Mixup(mixup_alpha=float(kind == "mixup"), cutmix_alpha=float(kind == "cutmix"), label_smoothing=0.0,
                       num_classes=CLASSES)  # fmt: skip
        top, left, bottom, right = (ours.pasted[first] * SIZE).round().astype(int).tolist()
        share = float(ours.kept[first])
        theirs._params_per_batch = lambda share=share: (share, kind == "cutmix")
        with pytest.MonkeyPatch.context() as patch:
            box = (top, bottom, left, right)
            patch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, box=box, share=share, **__: (box, share))
            pair = slice(first, first + 2)
            expected, expected_soft = theirs(images[pair].clone(), targets[pair].argmax(1))
        torch.testing.assert_close(mixed[pair], expected)
        torch.testing.assert_close(soft[pair], expected_soft)


def test_half_precision_stays_half() -> None:
    images, targets = batch()
    plan = augment.plan(ALL, 7, 3, (3 * TOTAL, 4 * TOTAL), TOTAL, SIZE)
    assert augment.apply(plan, images.half(), targets)[0].dtype == torch.float16

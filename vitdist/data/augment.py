"""Mixup, cutmix and random erasing on the device: plans by arithmetic, pixels by a few tensor operations.

    plan = augment.plan(config.data, seed, step, slots, global_batch)         # None if all are off
    images, targets = augment.apply(plan, images, one_hot)

What happens to a sample depends on (seed, step, its slot in the global batch) alone, and its partner is the other
of slots 2i and 2i + 1, which no rank splits while micro-batches are even. So losses are the same for every
number of ranks and after a resume. Mixup: Zhang et al. 2018; cutmix: Yun et al. 2019; erasing: Zhong et al. 2020.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from vitdist.config import Data
from vitdist.data import colour

_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)
"""Of an erased rectangle: share of the picture and height to width, as in the paper and torchvision."""


class Plan(NamedTuple):
    """Of the B samples of a micro-batch; sides are shares of the picture's."""

    kept: np.ndarray
    """float32 [B]: share of the sample itself in its target; the rest is its partner's."""
    blended: np.ndarray
    """bool [B]: by mixup, else by pasting `pasted` of the partner."""
    pasted: np.ndarray
    """float32 [B, 4]: top, left, bottom, right of the partner's part, of no area where nothing is pasted."""
    erased: np.ndarray
    """float32 [B, 4]: the same of what is erased."""


def check(settings: Data, micro_batch: int) -> None:
    """Raises ValueError if partners would be split; imports what auto-augmentation needs."""
    colour.load(settings)
    if (settings.mixup or settings.cutmix) and micro_batch % 2:
        raise ValueError(
            f"data.mixup and data.cutmix mix pairs: a micro-batch of {micro_batch} must be even; "
            "change train.global_batch, train.micro_batch or train.accumulation"
        )


def plan(settings: Data, seed: int, step: int, slots: tuple[int, int], global_batch: int, size: int) -> Plan | None:
    """What happens to slots [start, stop) of the stream, all of global batch `step`; None if nothing does.

    `size`: side of the pictures in pixels, to which rectangles are rounded.
    """
    if not (settings.mixup or settings.cutmix or settings.erase):
        return None
    # 2 and 3: not the seeds of the samples, see reader.py
    pairs, singles = np.random.default_rng([seed, step, 2]), np.random.default_rng([seed, step, 3])
    mine = slice(slots[0] - step * global_batch, slots[1] - step * global_batch)
    # For the whole global batch, so that a slot's draws do not depend on how it is split.
    draws, alike = (1, global_batch) if settings.mix_by == "batch" else ((global_batch + 1) // 2, 2)
    mixing = _pairs(settings, pairs, draws, size)
    kept, blended, pasted = (np.repeat(values, alike, axis=0)[mine] for values in mixing)
    return Plan(kept, blended, pasted, _erased(settings, singles, global_batch, size)[mine])


def _pairs(settings: Data, rng: np.random.Generator, n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mixed = rng.random(n) < settings.mix_chance
    mixup = rng.random(n) < 0.5 if settings.mixup and settings.cutmix else np.full(n, settings.mixup > 0)
    by_mixup = rng.beta(settings.mixup or 1, settings.mixup or 1, n)
    by_cutmix = rng.beta(settings.cutmix or 1, settings.cutmix or 1, n)
    side = np.sqrt(1 - by_cutmix)
    centre = rng.random((n, 2))
    edges = np.concatenate([centre - side[:, None] / 2, centre + side[:, None] / 2], axis=1)
    pasted = np.round(np.clip(edges, 0, 1) * size) / size
    pasted[~mixed | mixup] = 0
    if not (settings.mixup or settings.cutmix):
        mixed[:], pasted[:] = False, 0
    area = (pasted[:, 2] - pasted[:, 0]) * (pasted[:, 3] - pasted[:, 1])
    kept = np.where(mixed & mixup, by_mixup, 1 - area)  # cutmix: what is really left after clipping at the edge
    return kept.astype(np.float32), mixed & mixup, pasted.astype(np.float32)


def _erased(settings: Data, rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    area = rng.uniform(*_AREA, n)
    ratio = np.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), n))
    height, width = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    top, left = rng.random(n) * (1 - height), rng.random(n) * (1 - width)
    box = np.round(np.stack([top, left, top + height, left + width], axis=1) * size) / size
    box[rng.random(n) >= settings.erase] = 0
    return box.astype(np.float32)


def apply(plan: Plan, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed and erased images, normalised [B, C, H, W] (erased: 0, the mean), and their targets [B, classes]."""
    device, dtype = images.device, images.dtype
    kept, blended, pasted, erased = (torch.from_numpy(a).to(device, non_blocking=True) for a in plan)
    if (plan.kept < 1).any():
        own = torch.where(blended[:, None, None], kept[:, None, None], 1.0 - _inside(pasted, images).float())
        own = own[:, None].to(dtype)
        images = own * images + (1 - own) * _partners(images)
        targets = kept[:, None] * targets + (1 - kept[:, None]) * _partners(targets)
    if plan.erased.any():
        images = images.masked_fill(_inside(erased, images)[:, None], 0.0)
    return images, targets


def _partners(values: torch.Tensor) -> torch.Tensor:
    """Sample 2i + 1 for 2i, and the other way round."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)


def _inside(boxes: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """bool [B, H, W]: which pixels lie in the box of their sample."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=boxes.device).view(1, -1, 1) + 0.5
    columns = torch.arange(width, device=boxes.device).view(1, 1, -1) + 0.5
    top, left, bottom, right = (
        (boxes * torch.tensor([height, width] * 2, device=boxes.device)).view(-1, 4, 1, 1).unbind(1)
    )
    return (rows > top) & (rows < bottom) & (columns > left) & (columns < right)

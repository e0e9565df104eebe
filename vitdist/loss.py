"""The loss of each sample: cross-entropy, binary cross-entropy or focal, with class weights and logit adjustment.

    losses = loss.Loss(config.loss, training.class_counts, training.classes)
    each = losses(logits, targets)           # [B], each times the weight of its sample
    mean = each.sum() / total                # total: losses.weight(targets), summed over the whole global batch

Targets are class numbers, or shares of classes where pictures are mixed. Dividing by the weights of the *global* batch
makes the loss the same for every number of ranks and accumulation steps, and equal to torch's weighted mean of one
big batch. Pure: the same for the same arguments, with nothing learned.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from vitdist import config


class Loss:
    """Called with float32 logits [B, C] and targets, int64 [B] or float32 [B, C]: float32 [B].

    The class weight of a target is that of each of its classes: with cross-entropy as in torch, where the smoothed
    part of a target is weighed too. The binary one has no target class once smoothed, so the whole sample is weighed.
    """

    def __init__(self, settings: config.Loss, counts: Sequence[float] | None, classes: list[str]) -> None:
        """`counts`: samples of each class in an epoch, None if they are not known.

        Raises ValueError for weights or an adjustment that need them, and for a class that there is not.
        """
        self._settings = settings
        weights = class_weights(settings, counts, classes)
        self._weights = None if weights is None else tuple(weights)
        self._shift = tuple(adjustment(settings.logit_adjustment, counts)) if settings.logit_adjustment else None

    @property
    def weighted(self) -> bool:
        """Whether classes have weights; otherwise every sample's is 1."""
        return self._weights is not None

    def weight(self, targets: torch.Tensor) -> torch.Tensor:
        """float32 [B]: the weight of each sample, linear in its target, so that mixing in pairs keeps the sum."""
        if self._weights is None:
            return torch.ones(len(targets), device=targets.device)
        weights = _row(self._weights, targets.device)
        return targets @ weights.to(targets.dtype) if targets.is_floating_point() else weights[targets]

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._shift:
            logits = logits + _row(self._shift, logits.device)
        weights = None if self._weights is None else _row(self._weights, logits.device)
        smoothing = self._settings.label_smoothing
        if self._settings.kind == "cross_entropy":
            return F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
        if self._settings.kind == "focal":
            return focal(logits, smoothed(targets, logits.shape[1], smoothing), self._settings.focal_gamma, weights)
        soft = smoothed(targets, logits.shape[1], smoothing)
        return F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1) * self.weight(targets)


def smoothed(targets: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """float32 [B, C]: of class numbers or shares, a part `smoothing` of which is spread over all classes."""
    if not targets.is_floating_point():
        targets = F.one_hot(targets, classes).float()
    return targets * (1 - smoothing) + smoothing / classes


def focal(logits: torch.Tensor, targets: torch.Tensor, gamma: float, weights: torch.Tensor | None) -> torch.Tensor:
    """-sum_c w_c t_c (1 - p_c)^gamma log p_c of softmax's p (Lin et al. 2017): [B, C] twice to [B]."""
    log_p = logits.log_softmax(1)
    # Where p rounds to 1 the power's gradient would be infinite for gamma < 1, and infinite times 0 is no number.
    missed = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    each = -targets * missed**gamma * log_p
    return (each if weights is None else each * weights).sum(1)


def class_weights(settings: config.Loss, counts: Sequence[float] | None, classes: list[str]) -> list[float] | None:
    """The weight of each class, 0 for one without samples where it follows from their number; None if there are none.

    inverse: n / (C n_c), so that a sample has weight 1 on average; effective: (1 - beta) / (1 - beta^n_c), scaled to
    mean 1 over classes. C counts classes with samples. Raises ValueError as `Loss` does.
    """
    wanted = settings.class_weights
    if wanted == "none":
        return None
    if isinstance(wanted, dict):
        unknown = sorted(set(wanted) - set(classes))
        if unknown:
            raise ValueError(
                f"loss.class_weights: there is no class {unknown[0]!r}; there are: {', '.join(classes[:20])}"
            )
        given = [wanted.get(name, 1.0) for name in classes]
        if not any(given):
            raise ValueError("loss.class_weights: one of the classes must have a weight above 0")
        return given
    n = np.array(_known(counts, f"loss.class_weights={wanted}"))
    there = n > 0
    weights = np.zeros(len(n))
    if wanted == "inverse":
        weights[there] = n.sum() / (there.sum() * n[there])
    else:  # expm1: 1 - beta^n loses its digits where beta is near 1
        weights[there] = 1 / -np.expm1(n[there] * np.log(settings.effective_beta))
        weights *= there.sum() / weights.sum()
    return weights.tolist()


def adjustment(tau: float, counts: Sequence[float] | None) -> list[float]:
    """tau log(share) of each class (Menon et al. 2021); one without samples counts as if it had one.

    Raises ValueError if the counts are not known.
    """
    n = np.maximum(_known(counts, "loss.logit_adjustment"), 1)
    return (tau * np.log(n / n.sum())).tolist()


def _known(counts: Sequence[float] | None, setting: str) -> Sequence[float]:
    if counts is None:
        raise ValueError(
            f"{setting} needs the number of samples of each class, which a stream: does not tell; "
            "index its shards with `vitdist index`, or give loss.class_weights={class: weight}"
        )
    return counts


@functools.cache
def _row(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [C]. Cached: the copy of a new one would make the CPU wait for the GPU at every step."""
    return torch.tensor(values, device=device)

"""Exact evaluation: every validation sample counts once, whatever the number of ranks.

Ranks get equally many batches (ZeRO-3 gathers weights in step), padded and masked; all figures come
from one confusion matrix of integers, so they do not depend on how samples were spread.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from vitdist import rundir
from vitdist.dist import Processes
from vitdist.rundir import RunDir

if TYPE_CHECKING:
    from vitdist.data.reader import Bad, MicroBatch


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation over `samples` samples and C classes."""

    metrics: dict[str, float]
    """loss, top1, top5, macro_f1, balanced_accuracy, samples, unreadable."""
    confusion: np.ndarray
    """[C, C] counts: row the true class, column the predicted one."""
    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    """Of every sample in the order of ids: its class, the predicted one and the probability given to that."""
    bad: "list[Bad]"
    """Samples that could not be read, of all ranks; in none of the figures."""

    def per_class(self, classes: list[str]) -> list[dict[str, Any]]:
        precision, recall, f1 = class_scores(self.confusion)
        return [
            {
                "name": name,
                "support": int(self.confusion[i].sum()),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
            }
            for i, name in enumerate(classes)
        ]


def class_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where undefined (as scikit-learn's zero_division=0)."""
    hits = np.diag(confusion).astype(float)
    predicted, true = confusion.sum(0), confusion.sum(1)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    both = predicted + true
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return precision, recall, f1


def figures(confusion: np.ndarray, loss_sum: float, top5_hits: int) -> dict[str, float]:
    """The metrics of a confusion matrix; balanced accuracy is over the classes that occur."""
    samples = int(confusion.sum())
    _, recall, f1 = class_scores(confusion)
    present = confusion.sum(1) > 0
    named = present | (confusion.sum(0) > 0)
    return {
        "loss": loss_sum / samples,
        "top1": float(np.trace(confusion)) / samples,
        "top5": top5_hits / samples,
        "macro_f1": float(f1[named].mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "samples": samples,
    }


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: "Iterable[MicroBatch]",
    prepare: "Callable[[MicroBatch], torch.Tensor]",
    classes: int,
    samples: int,
    me: Processes,
) -> Evaluation:
    """Run `forward` (normalised images -> logits [B, classes]) over this rank's batches; all ranks call it.

    `prepare` takes a batch to the model's input [B, 3, S, S]. Samples that cannot be read are left out and
    counted as `unreadable`. Raises AssertionError unless all other of `samples` were counted exactly once.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)  # loss, hits among the best five
    seen: list[np.ndarray] = []
    unread: list[Bad] = []
    for batch in batches:
        logits = forward(prepare(batch)).float().cpu()
        kept = batch.mask
        unread += batch.bad
        logits, labels = logits[kept], batch.labels[kept]
        probabilities = logits.softmax(1)
        confidence, predicted = probabilities.max(1)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum").double()
        best = logits.topk(min(5, classes), dim=1).indices
        sums[1] += (best == labels[:, None]).any(1).sum()
        confusion += torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
        seen.append(
            np.stack(
                [batch.ids[kept].numpy().astype(np.float64), labels.numpy(), predicted.numpy(), confidence.numpy()]
            )
        )
    confusion, sums = me.sum(confusion), me.sum(sums)
    table = np.concatenate([part for rank in me.gather(seen) for part in rank], axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    ids = table[0].astype(np.int64)
    bad = sorted(sample for rank in me.gather(unread) for sample in rank)
    unreadable = len(bad)
    counts = (len(ids), len(np.unique(ids)))
    assert counts == (samples - unreadable,) * 2, (
        f"{counts} counted and different, {unreadable} unreadable, of {samples}"
    )
    if not len(ids):
        raise ValueError(f"none of {samples} validation samples can be read")
    matrix = confusion.numpy()
    return Evaluation(
        metrics={**figures(matrix, float(sums[0]), int(sums[1])), "unreadable": unreadable},
        confusion=matrix,
        ids=ids,
        labels=table[1].astype(np.int64),
        predicted=table[2].astype(np.int64),
        confidence=table[3].astype(np.float32),
        bad=bad,
    )


def publish(run: RunDir, step: int, result: Evaluation, classes: list[str]) -> None:
    """Write evaluation.json and predictions.npz of the run."""
    rundir.publish_json(
        run.evaluation,
        {
            "step": step,
            "metrics": result.metrics,
            "classes": classes,
            "confusion": result.confusion.tolist(),
            "per_class": result.per_class(classes),
        },
    )
    table = io.BytesIO()
    np.savez_compressed(
        table, ids=result.ids, labels=result.labels, predicted=result.predicted, confidence=result.confidence
    )
    rundir.publish(run.predictions, table.getvalue())

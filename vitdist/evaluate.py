"""Exact evaluation: every validation sample counts once, whatever the number of ranks.

    result = evaluate(engine.forward, batches, prepare, classes, samples, me, thorough=last)     # all ranks
    rule = publish(run, step, result, classes, settings.evaluation, thorough=last)               # rank 0

Ranks get equally many batches (ZeRO-3 gathers weights in step), padded and masked. Figures come from counts and from
sums in the order of samples, so they do not depend on how samples were spread. What needs the probabilities of all
samples is computed on rank 0, the only one that holds them.
"""

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed

from vitdist import config, decision, rundir, scores
from vitdist.dist import Processes
from vitdist.rundir import RunDir

if TYPE_CHECKING:
    from vitdist.data.reader import Bad, MicroBatch

# Samples x classes. Up to the first, rank 0 gets all probabilities at each evaluation (40 MB; their AUROC takes 0.3 s),
# up to the second at a thorough one (4 GB; 50,000 x 1,000 are 200 MB and 1.5 s). The others: what files and time bear.
ALWAYS_WHOLE, MOST_WHOLE = 10_000_000, 1_000_000_000
MOST_WRITTEN = 20_000_000
MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation over N = `samples` samples and C classes; arrays in the order of `ids`."""

    metrics: dict[str, float]
    """loss, top1, top5, macro_f1, balanced_accuracy, calibration_error, auroc (where it has a meaning and was
    computed), samples, unreadable. The same on all ranks."""
    confusion: np.ndarray
    """[C, C] counts: row the true class, column the predicted one."""
    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    """Probability of the predicted class."""
    losses: np.ndarray
    """float64, cross-entropy of each sample in nats."""
    above: np.ndarray
    """How many classes were held for more probable than the true one."""
    probabilities: np.ndarray | None
    """float32 [N, C] on rank 0; None elsewhere, and where N x C is too large."""
    class_auroc: np.ndarray | None
    """[C], NaN where a class does not occur; None without probabilities."""
    tta: str
    bad: "list[Bad]"
    """Samples that could not be read, of all ranks; in none of the figures."""

    def per_class(self, classes: list[str]) -> list[dict[str, Any]]:
        """Scores of each class for JSON; auroc and the interval of recall are None where they have no meaning."""
        precision, recall, f1 = scores.class_scores(self.confusion)
        support = self.confusion.sum(1)
        ends = scores.wilson(self.confusion.diagonal(), support)
        area = np.full(len(classes), np.nan) if self.class_auroc is None else self.class_auroc
        return [
            {
                "name": name,
                "support": int(support[i]),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "recall_interval": ends[i].tolist() if support[i] else None,
                "f1": float(f1[i]),
                "auroc": float(area[i]) if math.isfinite(area[i]) else None,
            }
            for i, name in enumerate(classes)
        ]

    def intervals(self, resamples: int) -> dict[str, list[float]]:
        """95 percent intervals: of counts in closed form (Wilson), of other metrics by `resamples` resamples."""
        n, best_five = len(self.ids), int((self.above < 5).sum())
        counted = {"top1": int(self.confusion.trace()), "top5": best_five}
        return {name: scores.wilson(hits, n).tolist() for name, hits in counted.items()} | scores.intervals(
            self.labels, self.predicted, self.losses, self.probabilities, len(self.confusion), resamples
        )


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: "Iterable[MicroBatch]",
    prepare: "Callable[[MicroBatch], torch.Tensor]",
    classes: int,
    samples: int,
    me: Processes,
    tta: Literal["none", "flip"] = "none",
    thorough: bool = False,
    go_on: Callable[[], bool] = lambda: True,
) -> Evaluation | None:
    """Run `forward` (normalised images -> logits [B, classes]) over this rank's batches; all ranks call it.

    `prepare` takes a batch to the model's input [B, 3, S, S]. `tta` flip: the mean of the probabilities of a picture
    and its mirror image; the loss is then that of the mean. `thorough`: probabilities and AUROC of large sets too, to
    be asked for when AUROC decides. Samples that cannot be read are left out and counted as `unreadable`. `go_on` is
    asked before each batch, on all ranks, and must answer alike: None is returned when it says no. Raises
    AssertionError unless all other of `samples` were counted exactly once.
    """
    whole = samples * classes <= (MOST_WHOLE if thorough else ALWAYS_WHOLE)
    tables: list[np.ndarray] = []
    kept: list[torch.Tensor] = []
    unread: list[Bad] = []

    def take(batch: "MicroBatch", logarithms: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        if copied:
            copied.synchronize()
        rows, labels = logarithms[batch.mask], batch.labels[batch.mask]
        of_classes = rows.exp()
        tables.append(_table(batch.ids[batch.mask], labels, rows, of_classes))
        unread.extend(batch.bad)
        if whole:
            kept.append(of_classes)

    waiting: tuple[MicroBatch, torch.Tensor, torch.cuda.Event | None] | None = None
    for batch in batches:
        if not go_on():
            return None
        # Into pinned memory (non_blocking does that), before the next batch, on which the device then works while this
        # one is counted.
        logarithms = _log_probabilities(forward, prepare(batch), tta).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if me.device.type == "cuda" else None
        if copied:
            copied.record()
        if waiting:
            take(*waiting)
        waiting = batch._replace(images=torch.empty(0), encoded=None), logarithms, copied
    if waiting:
        take(*waiting)

    of_ranks = me.gather((tables, unread))
    table = np.concatenate([np.empty((6, 0)), *(part for parts, _ in of_ranks for part in parts)], axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    ids, labels, predicted, above = (table[row].astype(np.int64) for row in (0, 1, 2, 5))
    bad = sorted(sample for _, unreadable in of_ranks for sample in unreadable)
    counts = (len(ids), len(np.unique(ids)))
    assert counts == (samples - len(bad),) * 2, f"{counts} counted and different, {len(bad)} unreadable, of {samples}"
    if not len(ids):
        raise ValueError(f"none of {samples} validation samples can be read")
    matrix = _on_first(kept, [parts for parts, _ in of_ranks], ids, classes, me) if whole else None

    confusion = scores.confusion(labels, predicted, classes)
    area = None if matrix is None else scores.auroc(labels, matrix)
    metrics = {
        "loss": float(table[4].sum() / len(ids)),
        "top5": float((above < 5).mean()),
        **scores.figures(confusion),
        "calibration_error": scores.calibration(table[3], labels == predicted).error,
        "auroc": math.nan if area is None else scores.mean_auroc(area),
    }
    # A loss that is not finite is for the caller to see; other figures without a meaning are left out.
    metrics = {name: value for name, value in metrics.items() if name == "loss" or math.isfinite(value)}
    return Evaluation(
        metrics=me.from_first({**metrics, "samples": len(ids), "unreadable": len(bad)}),
        confusion=confusion,
        ids=ids,
        labels=labels,
        predicted=predicted,
        confidence=table[3].astype(np.float32),
        losses=table[4],
        above=above,
        probabilities=matrix,
        class_auroc=area,
        tta=tta,
        bad=bad,
    )


def probabilities(forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, tta: str) -> torch.Tensor:
    """What the evaluation takes for the classes' probabilities of normalised images, float32 [B, C] on the device."""
    return _log_probabilities(forward, images, tta).exp()


def _log_probabilities(forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, tta: str) -> torch.Tensor:
    straight = forward(images).float().log_softmax(1)
    if tta == "none":
        return straight
    mirrored = forward(images.flip(-1)).float().log_softmax(1)
    # Not torch.logaddexp: on a CPU its last bit depends on the place in the batch.
    return torch.stack((straight, mirrored), -1).logsumexp(-1) - math.log(2)


def _table(ids: torch.Tensor, labels: torch.Tensor, logarithms: torch.Tensor, of_classes: torch.Tensor) -> np.ndarray:
    """float64 [6, B]: id, label, predicted class, its probability, loss, and how many classes stand above the label.

    Of equally probable classes the first counts as the more probable one, so ties hang on no sorting.
    """
    own = of_classes.gather(1, labels[:, None])
    earlier = torch.arange(of_classes.shape[1]) < labels[:, None]
    above = ((of_classes > own) | ((of_classes == own) & earlier)).sum(1)
    best, predicted = of_classes.max(1)
    losses = -logarithms.gather(1, labels[:, None])[:, 0]
    columns = (ids, labels, predicted, best, losses, above)
    return np.stack([column.numpy().astype(np.float64) for column in columns])


def _on_first(
    mine: list[torch.Tensor], parts: list[list[np.ndarray]], ids: np.ndarray, classes: int, me: Processes
) -> np.ndarray | None:
    """The rows of all ranks in the order of `ids`, [N, C] on rank 0; None on others. `parts`: tables of each rank.

    One batch at a time goes over the wire, so nothing of size is held twice; `mine` is used up.
    """
    whole = np.empty((len(ids), classes), np.float32) if me.first else None
    for rank, tables in enumerate(parts):
        for part in tables:
            rows = mine.pop(0) if rank == me.rank else torch.empty(part.shape[1], classes)
            if rank and rank == me.rank and len(rows):
                torch.distributed.send(rows, 0, group=me.control)
            elif whole is not None:
                if rank and len(rows):
                    torch.distributed.recv(rows, rank, group=me.control)
                whole[np.searchsorted(ids, part[0])] = rows.numpy()
    return whole


def record(
    result: Evaluation, classes: list[str], settings: config.Evaluation, thorough: bool = False
) -> tuple[dict[str, Any], decision.Decision | None]:
    """What an evaluation says, ready for JSON, and the rule of decision that `settings` ask for; on rank 0.

    `thorough` adds intervals and, of sets that are not large, operating points of each class. JSON has no NaN: what
    has no meaning is null or left out.
    """
    labels, probabilities = result.labels, result.probabilities
    found: dict[str, Any] = {
        "metrics": result.metrics,
        "tta": result.tta,
        "classes": classes,
        "confusion": result.confusion.tolist(),
        "per_class": result.per_class(classes),
        "calibration": scores.calibration(result.confidence, labels == result.predicted).bins(),
    }
    points: list[dict[str, Any]] = []
    if thorough:
        found["intervals"] = result.intervals(settings.bootstrap)
        if probabilities is not None and probabilities.size <= MOST_POINTS:
            found["operating_points"] = points = decision.operating_points(probabilities, labels, classes)
    rule = decision.of(settings.unsure, classes, points) if settings.unsure else None
    if rule and probabilities is not None:
        found["decision"] = decision.summary(probabilities, labels, rule)
    return found, rule


def publish(
    run: RunDir,
    step: int,
    result: Evaluation,
    classes: list[str],
    settings: config.Evaluation | None = None,
    thorough: bool = False,
    put: Callable[[Path, str | bytes], None] = rundir.publish,
) -> decision.Decision | None:
    """Write evaluation.json and predictions.npz of the run; returns the rule of decision, for the exported model.

    `put` (path, content) publishes a file; one that keeps the content for later, on a full disk, is fine.
    """
    found, rule = record(result, classes, settings or config.Evaluation(), thorough)
    text = json.dumps({"schema": rundir.SCHEMA, "step": step, **found}, indent=1, ensure_ascii=False)
    put(run.evaluation, text + "\n")
    arrays = {name: getattr(result, name) for name in ("ids", "labels", "predicted", "confidence")}
    if result.probabilities is not None:
        if rule:
            arrays["decided"] = rule.decide(result.probabilities)
        if result.probabilities.size <= MOST_WRITTEN:
            arrays["probabilities"] = result.probabilities.astype(np.float16)
    table = io.BytesIO()
    np.savez_compressed(table, **arrays)
    put(run.predictions, table.getvalue())
    return rule

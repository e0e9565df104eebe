"""Micro-batches in the order of `order.py`, read by `reader.py` in as many processes as pay.

    training = open_training(config, global_batch)
    for batch in training.batches(batch, rank, start_step, local_world): ...        # endless
    for batch in evaluation_batches(index, config, rank, world, batch): ...         # each sample once

Position t of the stream is step t whatever was prefetched, so a resume needs the step number only.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitdist import dist, stop
from vitdist.config import Batch, Config, Data
from vitdist.data import index as index_
from vitdist.data import order as order_
from vitdist.data.index import Index
from vitdist.data.order import Order, evaluation_ids, rank_slots
from vitdist.data.reader import MicroBatch, Samples
from vitdist.data.storage import Cache

Wanted = list[tuple[int, int]]
"""Epoch and index row of each slot of a micro-batch."""


def worker_count(config: Config, local_world: int) -> int:
    """Loader processes of one rank when `local_world` ranks share this node's cores."""
    if config.data.workers != "auto":
        return config.data.workers
    if not torch.cuda.is_available():
        return 0  # the cores do the training; a loader process would only take them away
    return min(8, max(1, len(os.sched_getaffinity(0)) // local_world))


@dataclass(frozen=True)
class Training:
    """What a run trains on, with or without an index."""

    samples: int
    """Of one epoch."""
    classes: list[str]
    class_counts: list[float] | None
    """Samples of each class that one epoch shows, by the shares of classes and sets; None where no index tells."""
    summary: dict[str, Any]
    """What logs and reports say of it."""
    parts: list[str]
    """Digest of each of its sets."""
    identity: str
    """Hexadecimal: of the data, the shares and the order's version. A checkpoint of another one is refused."""
    first_batch: str
    """Hash of the order's first global batch, for ranks to compare before they train."""
    batches: Callable[[Batch, int, int, int], Generator[MicroBatch]]
    """Of a batch's split, rank, first step and ranks on the node: this rank's micro-batches without end; close it."""
    samples_of: Callable[[], Samples] | None
    """Its samples as training reads them; None where there is no index."""


def cache(settings: Data) -> Cache | None:
    """The node's cache, if the settings name one. Raises ValueError if it cannot be made."""
    return Cache(dist.on_this_node(settings.cache), int(settings.cache_gb * 1e9)) if settings.cache else None


def open_training(config: Config, global_batch: int) -> Training:
    """Open the training sets. Raises ValueError for shards that are not as indexed and shares that cannot be kept."""
    settings, seed = config.data, config.train.seed
    kept = cache(settings)
    sets, set_shares = [Index.open(place, kept) for place in settings.train_sets], list(settings.train_sets.values())
    whole = index_.join(sets)
    shares = class_shares(settings.class_shares, whole.classes, whole.counts)
    order = order_.of_sets([each.labels for each in sets], set_shares, shares, seed, whole.digest, global_batch)
    about = json.dumps([order_.VERSION, whole.digest, set_shares, shares])
    chunk = order.stream.chunk if isinstance(order.stream, order_.Shuffled) and order.stream.chunk > 1 else None

    def samples() -> Samples:
        return Samples(whole, settings, config.model.image_size, seed, training=True, chunk=chunk)

    def batches(batch: Batch, rank: int, start_step: int, local_world: int) -> Generator[MicroBatch]:
        wanted = _wanted(order, batch, rank, start_step)
        return closing(_loader(samples(), wanted, worker_count(config, local_world)))

    return Training(
        samples=order.stream.n,
        classes=whole.classes,
        class_counts=class_counts([each.counts for each in sets], set_shares, shares, order.stream.n),
        summary=whole.summary() | ({} if shares is None else {"class_shares": shares}),
        parts=[each.digest for each in sets],
        identity=hashlib.sha256(about.encode()).hexdigest(),
        first_batch=order_.order_hash(order),
        batches=batches,
        samples_of=samples,
    )


def class_shares(wanted: str | dict[str, float], classes: list[str], counts: list[int]) -> list[float] | None:
    """The share of each class in relation to each other, None for the natural one.

    Raises ValueError for a class that there is not.
    """
    if wanted == "natural":
        return None
    if isinstance(wanted, str):
        if wanted == "balanced":
            return [float(n > 0) for n in counts]
        # Shares are kept exactly over a period of their sum, so the roots are rounded: to three digits, or as many
        # as keep the period in 31 bits.
        roots = [math.sqrt(n) for n in counts]
        digits = max(0, min(3, int(math.log10(2**31 / (sum(roots) + len(roots))))))
        return [round(root, digits) for root in roots]
    unknown = sorted(set(wanted) - set(classes))
    if unknown:
        raise ValueError(f"data.class_shares: there is no class {unknown[0]!r}; there are: {', '.join(classes[:20])}")
    return [wanted.get(name, 1.0) for name in classes]


def class_counts(
    counts: Sequence[Sequence[int]], set_shares: Sequence[float], shares: Sequence[float] | None, samples: int
) -> list[float]:
    """How many of `samples` in a row are of each class. `counts`: of each set; `shares`: of `class_shares`."""
    shown = np.zeros(len(counts[0]))
    for its_counts, its_share in zip(counts, set_shares, strict=True):
        if its_share:
            parts = np.array(its_counts if shares is None else shares, float)
            shown += samples * its_share * parts / (sum(set_shares) * parts.sum())
    return shown.tolist()


def closing(loader: Iterable[MicroBatch]) -> Generator[MicroBatch]:
    """The batches of a loader; closing this generator ends the loader's processes."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # Loader processes ignore SIGTERM (see stop.py), so leaving them to the interpreter's end would wait
        # for ever: a traceback keeps them alive.
        del batches


def _wanted(order: Order, batch: Batch, rank: int, start_step: int) -> Iterator[Wanted]:
    for step in itertools.count(start_step):
        for accumulation_index in range(batch.accumulation):
            epochs, ids = order.slots(*rank_slots(step, accumulation_index, rank, batch))
            yield list(zip(epochs.tolist(), ids.tolist(), strict=True))


def evaluation_batches(
    index: Index, config: Config, rank: int, world: int, batch: int, local_world: int = 1
) -> DataLoader[MicroBatch]:
    """`batch` samples at a time of this rank's share, as often as asked; every rank has the same `len()`.

    Over all ranks `mask` is True once for each sample, but for those in `bad`.
    """
    ids, _ = evaluation_ids(len(index), rank, world, batch)
    samples = Samples(index, config.data, config.model.image_size, config.train.seed, training=False)
    wanted = [[(0, row) for row in rows] for rows in ids.reshape(-1, batch).tolist()]
    return _loader(samples, wanted, worker_count(config, local_world))


def _loader(samples: Samples, wanted: Iterable[Wanted], workers: int) -> DataLoader[MicroBatch]:
    return in_processes(samples, workers, batch_sampler=wanted)


def in_processes(samples: Dataset, workers: int, **more: Any) -> DataLoader[MicroBatch]:
    """A DataLoader of whole micro-batches, with `workers` processes of its own."""
    return DataLoader(
        samples,
        collate_fn=_as_it_is,
        num_workers=workers,
        # Spawned processes would import torch again, 2.6 s of CPU each. The children never touch CUDA.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_in_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own a DataLoader draws from torch's global generator, and so changes dropout.
        generator=torch.Generator(),
        **more,
    )


def _as_it_is(batch: MicroBatch) -> MicroBatch:
    return batch


def _in_worker(number: int) -> None:
    stop.ignore_in_child()
    torch.set_num_threads(1)

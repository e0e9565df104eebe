"""Micro-batches in the order of `order.py`, read by `reader.py` in as many processes as pay.

    for batch in train_batches(index, config, batch, rank, start_step): ...      # endless
    for batch in evaluation_batches(index, config, rank, world, batch): ...      # each sample once

Position t of the stream is step t whatever was prefetched, so a resume needs the step number only.
"""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from vitdist import stop
from vitdist.config import Batch, Config
from vitdist.data.index import Index
from vitdist.data.order import Order, evaluation_ids, rank_slots
from vitdist.data.reader import MicroBatch, Samples

Wanted = list[tuple[int, int]]
"""Epoch and index row of each slot of a micro-batch."""


def worker_count(config: Config, local_world: int) -> int:
    """Loader processes of one rank when `local_world` ranks share this node's cores."""
    if config.data.workers != "auto":
        return config.data.workers
    if not torch.cuda.is_available():
        return 0  # the cores do the training; a loader process would only take them away
    return min(8, max(1, len(os.sched_getaffinity(0)) // local_world))


def train_batches(
    index: Index, config: Config, batch: Batch, rank: int, start_step: int, local_world: int = 1
) -> Generator[MicroBatch]:
    """The micro-batches of this rank from `start_step` on, `batch.accumulation` a step, without end; close it."""
    order = Order(len(index), config.train.seed, index.digest)
    samples = Samples(index, config.data, config.model.image_size, config.train.seed, training=True)
    wanted = _wanted(order, batch, rank, start_step)
    batches = iter(_loader(samples, wanted, worker_count(config, local_world)))
    try:
        yield from batches
    finally:
        # Loader processes ignore SIGTERM (see stop.py), so leaving them to the interpreter's end would wait
        # for ever: a traceback keeps them alive. Closing this generator ends them.
        del batches


def _wanted(order: Order, batch: Batch, rank: int, start_step: int) -> Iterator[Wanted]:
    for step in itertools.count(start_step):
        for accumulation_index in range(batch.accumulation):
            epochs, ids = order.ids(*rank_slots(step, accumulation_index, rank, batch))
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
    return DataLoader(
        samples,
        batch_sampler=wanted,
        collate_fn=_as_it_is,
        num_workers=workers,
        # Spawned processes would import torch again, 2.6 s of CPU each. The children never touch CUDA.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_in_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own a DataLoader draws from torch's global generator, and so changes dropout.
        generator=torch.Generator(),
    )


def _as_it_is(batch: MicroBatch) -> MicroBatch:
    return batch


def _in_worker(number: int) -> None:
    stop.ignore_in_child()
    torch.set_num_threads(1)

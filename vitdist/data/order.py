"""Which sample comes when: a pure function of (seed, epoch, data set). Imports numpy only.

    order = Order(len(index), seed, index.digest)
    epochs, ids = order.ids(*rank_slots(step, accumulation_index, rank, batch))

The run is one endless stream: epoch e fills positions [e n, (e+1) n), global batch t takes positions
[t G, (t+1) G). A batch may straddle two epochs, so no sample is dropped or doubled. Ranks, micro-batches and
loader processes only cut that stream, so they cannot change it.

An epoch is shuffled in two levels, which keeps reads near each other: chunks of consecutive samples change
places, then samples change places inside a window of chunks. With 64 x 64 samples of 100 KB a window is
400 MB in 64 places of the disk; `vitdist pack` has shuffled the samples of a chunk already.
"""

import hashlib
from functools import lru_cache

import numpy as np

from vitdist.config import Batch


def _permutation(size: int, *seed: int) -> np.ndarray:
    """int64 [size]. Sorts raw draws: NumPy keeps those for ever, but not what `permutation` does (NEP 19)."""
    draws = np.random.PCG64(seed).random_raw(size)
    return np.argsort(draws, kind="stable")


class Order:
    """The stream of a data set of `n` samples with `digest` (hexadecimal) under `seed`.

    Memory and time: one permutation of n/chunk numbers an epoch (3 ms at 1.28 M samples, 4.5 s at a billion)
    and one of chunk x window numbers a window (0.4 ms). Any position is reached without those before it.
    """

    def __init__(self, n: int, seed: int, digest: str, chunk: int = 64, window: int = 64) -> None:
        assert min(n, chunk, window) > 0
        self.n, self.seed, self.digest, self.chunk, self.window = n, seed, digest, chunk, window
        # A global batch may straddle two epochs, and its micro-batches alternate between windows.
        self._chunks = lru_cache(maxsize=2)(self._shuffled_chunks)
        self._samples = lru_cache(maxsize=4)(self._shuffled_window)

    def ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and index rows, int64 [stop - start] each, of the stream positions [start, stop)."""
        assert 0 <= start <= stop
        epochs, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.n)
            window = self._window_at(epoch, position)
            first = self._window_start(epoch, window)
            piece = self._samples(epoch, window)[position - first : position - first + stop - start]
            ids.append(piece)
            epochs.append(np.full(len(piece), epoch))
            start += len(piece)
        return np.concatenate(epochs), np.concatenate(ids)

    def _shuffled_chunks(self, epoch: int) -> tuple[np.ndarray, int]:
        """The chunks of an epoch in their new places, and the place of the last, perhaps shorter, one."""
        count = -(-self.n // self.chunk)
        chunks = _permutation(count, self.seed, epoch, int(self.digest, 16))
        return chunks, int(np.flatnonzero(chunks == count - 1)[0])

    def _window_start(self, epoch: int, window: int) -> int:
        """Position in the epoch; past the short chunk everything lies earlier by what it lacks."""
        _, short_place = self._chunks(epoch)
        lacks = -self.n % self.chunk
        return window * self.window * self.chunk - (lacks if window * self.window > short_place else 0)

    def _window_at(self, epoch: int, position: int) -> int:
        window = position // (self.window * self.chunk)
        following = window + 1
        chunks, _ = self._chunks(epoch)
        is_next = following * self.window < len(chunks) and self._window_start(epoch, following) <= position
        return following if is_next else window

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        """Index rows, int64, of a window in their order."""
        chunks = self._chunks(epoch)[0][window * self.window : (window + 1) * self.window]
        rows = (chunks[:, None] * self.chunk + np.arange(self.chunk)).ravel()
        rows = rows[rows < self.n]
        return rows[_permutation(len(rows), self.seed, epoch, window)]


def rank_slots(step: int, accumulation_index: int, rank: int, batch: Batch) -> tuple[int, int]:
    """Stream positions [start, stop) of a micro-batch: a part of its rank's part of a global batch."""
    part = rank * batch.accumulation + accumulation_index
    start = step * batch.global_batch + part * batch.micro_batch
    return start, start + batch.micro_batch


def evaluation_ids(n: int, rank: int, world: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Index rows (int64) and mask (bool) of this rank; over the ranks each of `n` samples once.

    Both are as long on every rank, a multiple of `batch`; rows of padding are -1 and masked False.
    """
    share = -(-n // world)
    padded = -(-share // batch) * batch
    slots = np.arange(padded)
    mask = (slots < share) & (rank * share + slots < n)
    return np.where(mask, rank * share + slots, -1), mask


def order_hash(order: Order, global_batch: int) -> str:
    """12 hexadecimal digits of data set and first global batch, for ranks to compare before they train."""
    _, ids = order.ids(0, global_batch)
    return hashlib.sha256(order.digest.encode() + ids.astype("<i8").tobytes()).hexdigest()[:12]

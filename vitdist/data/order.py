"""Which sample comes when: a pure function of (seed, epoch, data set, global batch). Imports numpy only.

    order = Order(Shuffled(len(index), key), global_batch)
    epochs, ids = order.slots(*rank_slots(step, accumulation_index, rank, batch))

The run is one endless stream: epoch e fills positions [e n, (e+1) n), global batch t takes positions
[t G, (t+1) G). A batch may straddle two epochs, so no sample is dropped or doubled. Ranks, micro-batches and
loader processes only cut that stream, so they cannot change it.

`Shuffled` passes over a whole set in two levels, which keep reads near each other: chunks of consecutive samples
change places, then the chunks of a window are dealt like suits of cards: each gives its samples one by one, in an
order of its own. `ByClass` gives each class its share, `Mixed` each of several sets; both by arithmetic on
the position, so that over each period of the weights every class and set comes exactly as often as it should.

A global batch is sorted by place on the disk before ranks take their parts of it. So a rank reads the same few
chunks during a whole window, forwards, and no two ranks read the same chunk but at the seams.

Nothing is stored for an epoch: a shuffle is a keyed permutation that answers for any position by itself.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Protocol

import numpy as np

from vitdist.config import Batch

VERSION = 2
"""Of the order: a checkpoint of another one is refused, since it would repeat and miss samples."""

CHUNK = 64
"""Samples that stay together on the disk: 6 MB of photos, enough for a file server to be at full speed."""
WINDOW = 4096
"""Samples that are shuffled among each other; 400 MB of photos, in up to 64 places of the disk."""

_TOGETHER = 16
"""Windows that are worked out in one go: vector operations of 65,536 numbers, in a processor's cache."""

# Swap-or-not: Hoang, Morris, Rogaway, CRYPTO 2012. Any domain size, and each round costs a few vector operations.
# With r rounds an element is off a uniform place by about 2^(-r/2) sqrt(n): 2^-20 for the chunks of 10^9 samples.
_ROUNDS = 64
_GOLDEN, _M1, _M2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_S33, _S63 = np.uint64(33), np.uint64(63)


def _mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finaliser: uint64 to uint64, one to one."""
    x = (x ^ (x >> _S33)) * _M1  # modulo 2^64
    x = (x ^ (x >> _S33)) * _M2
    return x ^ (x >> _S33)


def key(*parts: int | str) -> int:
    """64 bits for a stream that `parts` name."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def permuted(x: np.ndarray, size: np.ndarray | int, keys: np.ndarray | int, inverse: bool = False) -> np.ndarray:
    """Where a keyed shuffle of [0, size) puts each `x`: int64 of x's shape. `size` and `keys` may differ by element.

    Each (size, key) is one permutation; `inverse` undoes it.
    """
    x, n = np.asarray(x, np.int64), np.asarray(size, np.int64)
    turns = np.arange(1, _ROUNDS + 1, dtype=np.uint64).reshape(-1, *[1] * x.ndim)
    own = _mix(np.asarray(keys, np.uint64) + turns * _GOLDEN)
    sums = (own % n.astype(np.uint64)).astype(np.int64)
    for turn in range(_ROUNDS - 1, -1, -1) if inverse else range(_ROUNDS):
        partner = sums[turn] - x
        partner += n * (partner < 0)
        coin = (np.maximum(x, partner).astype(np.uint64) ^ own[turn]) * _M1
        coin = (coin ^ (coin >> _S33)) * _M2
        x = np.where(coin >> _S63, partner, x)
    return x


class Stream(Protocol):
    """An endless sequence of index rows."""

    n: int
    """Samples of one epoch."""

    def ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and index rows, int64 [stop - start] each, of the positions [start, stop).

        A row comes at most once in an epoch of its own: (epoch, row) is what augmentation may depend on.
        """


class Shuffled:
    """Every one of `n` samples once an epoch, near-sequentially. `name`: the stream's key."""

    def __init__(self, n: int, name: int, chunk: int = CHUNK, window: int = WINDOW) -> None:
        assert min(n, chunk, window) > 0
        # Small sets are shuffled sample by sample: their files fit a cache, and a batch shall be a fair draw.
        self.n, self.name, self.chunk = n, name, max(1, min(chunk, n // window))
        self._chunks = -(-n // self.chunk)
        self.windows = max(1, n // window)
        # A global batch may straddle two epochs, and its micro-batches alternate between windows.
        self._short_place = lru_cache(maxsize=4)(self._place_of_short_chunk)
        self._block = lru_cache(maxsize=3)(self._dealt_windows)

    def ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """See Stream."""
        assert 0 <= start <= stop
        epochs, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.n)
            block = self._window_at(epoch, position) // _TOGETHER
            first = self._start(epoch, block * _TOGETHER)
            piece = self._block(epoch, block)[position - first : position - first + stop - start]
            assert len(piece)  # else a position lies in no window, and this would never end
            ids.append(piece)
            epochs.append(np.full(len(piece), epoch))
            start += len(piece)
        return np.concatenate(epochs), np.concatenate(ids)

    def _epoch_key(self, epoch: int) -> int:
        return key(self.name, epoch)

    def _place_of_short_chunk(self, epoch: int) -> int:
        return int(permuted(np.array([self._chunks - 1]), self._chunks, self._epoch_key(epoch), inverse=True)[0])

    def _places(self, window: int) -> int:
        """First chunk place of a window; windows have as many chunks each, give or take one."""
        return window * self._chunks // self.windows

    def _start(self, epoch: int, window: int) -> int:
        """Position in the epoch; past the last, perhaps shorter, chunk all lies earlier by what that lacks."""
        place = self._places(window)
        lacks = self._chunks * self.chunk - self.n
        return place * self.chunk - (lacks if place > self._short_place(epoch) else 0)

    def _window_at(self, epoch: int, position: int) -> int:
        window = min(position // self.chunk * self.windows // self._chunks, self.windows - 1)
        while window + 1 < self.windows and self._start(epoch, window + 1) <= position:
            window += 1
        return window

    def _dealt_windows(self, epoch: int, block: int) -> np.ndarray:
        """Index rows, int64, of _TOGETHER windows in their order."""
        name, first = self._epoch_key(epoch), block * _TOGETHER
        edges = [self._places(w) for w in range(first, min(first + _TOGETHER, self.windows) + 1)]
        chunks = permuted(np.arange(edges[0], edges[-1]), self._chunks, name)
        if self.chunk == 1:
            return chunks
        rows = chunks[:, None] * self.chunk + np.arange(self.chunk)
        draws = _draws(rows, name)
        draws[rows >= self.n] = np.uint64(2**64 - 1)  # what the short chunk lacks comes last, to be cut off
        rows = chunks[:, None] * self.chunk + _argsorted(draws)
        # Turn i takes the i-th sample of every chunk of a window, the chunks in another order at each turn.
        draws = _draws(rows, key(name, "turns"))
        dealt = []
        for begin, end in itertools.pairwise(edges):
            begin, end = begin - edges[0], end - edges[0]
            turns = _argsorted(np.ascontiguousarray(draws[begin:end].T))
            dealt.append(np.take_along_axis(rows[begin:end].T, turns, axis=1).ravel())
        ids = np.concatenate(dealt)
        return ids[ids < self.n]


def _draws(rows: np.ndarray, name: int) -> np.ndarray:
    """A random number for each row, uint64 of the same shape."""
    return _mix(rows.astype(np.uint64) * _GOLDEN + np.uint64(name))


def _argsorted(draws: np.ndarray) -> np.ndarray:
    """int64 argsort of uint64 [N, M] along the rows, ties by place. Five times argsort's speed: places ride along."""
    low = np.uint64(max(1, (draws.shape[1] - 1).bit_length()))
    packed = (draws >> low << low) | np.arange(draws.shape[1], dtype=np.uint64)
    packed.sort(axis=1)
    return (packed & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


class ByClass:
    """Each class in its share, its samples in passes of their own. `shares`: exact, one of each class.

    A pass over a class is a shuffle of its rows without chunks: rows of one class lie far from each other anyway.
    Keeps one int64 a sample.
    """

    def __init__(self, labels: np.ndarray, shares: Sequence[Fraction], name: int) -> None:
        """Raises ValueError for a share above 0 of a class without samples."""
        counts = np.bincount(labels, minlength=len(shares))
        missing = [i for i, share in enumerate(shares) if share and not counts[i]]
        if missing:
            raise ValueError(f"class {missing[0]} has a share of the batches but no samples")
        self.n = int(sum(count for count, share in zip(counts, shares, strict=True) if share))
        self._rows, self._counts = np.argsort(labels, kind="stable"), counts
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._deal = Deal(shares)
        self._names = np.array([key(name, label) for label in range(len(shares))], np.uint64)

    def ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """See Stream."""
        label, turn = self._deal(np.arange(start, stop))
        epochs, place = np.divmod(turn, self._counts[label])
        keys = _mix(self._names[label] + epochs.astype(np.uint64) * _GOLDEN)
        return epochs, self._rows[self._starts[label] + permuted(place, self._counts[label], keys)]


class Mixed:
    """Several streams, each in its share; the rows of stream i count from `offsets[i]`."""

    def __init__(self, streams: Sequence[Stream], shares: Sequence[Fraction], offsets: Sequence[int]) -> None:
        self.n = sum(stream.n for stream, share in zip(streams, shares, strict=True) if share)
        self._streams, self._offsets, self._deal = streams, offsets, Deal(shares)

    def ids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """See Stream."""
        epochs, ids = np.empty((2, stop - start), np.int64)
        number, turn = self._deal(np.arange(start, stop))
        for i, (stream, offset) in enumerate(zip(self._streams, self._offsets, strict=True)):
            mine = number == i
            if mine.any():  # consecutive positions are consecutive turns of each stream
                epochs[mine], ids[mine] = stream.ids(int(turn[mine][0]), int(turn[mine][-1]) + 1)
                ids[mine] += offset
        return epochs, ids


class Deal:
    """Deals positions to shares, exactly: after any multiple of the period each has had its share of them.

    A binary tree of shares; a node of weights a and b sends position p to b where p b / (a + b), rounded down,
    takes a step. Within a period a count is off by less than one for each level of the tree.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """Raises ValueError for shares that are negative, all 0, or have too long a period."""
        whole = lcm(*(share.denominator for share in shares))
        self.weights = [int(share * whole) for share in shares]
        self.period = sum(self.weights)
        if min(self.weights) < 0 or not self.period:
            raise ValueError("shares must be at least 0, and one above 0")
        if self.period >= 2**31:  # its square must fit in 64 bits
            raise ValueError("shares are too fine: give them as numbers of few digits, such as 0.25 or 3")
        self._upto = np.concatenate([[0], np.cumsum(self.weights)])

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The share that each position falls to, and how often it had been dealt to before: int64 each."""
        turns = positions.astype(np.int64)
        first, last = np.zeros_like(turns), np.full_like(turns, len(self.weights))
        while (last - first > 1).any():
            middle = (first + last + 1) // 2  # of a single share: its end, to the right of which nothing is
            right = self._upto[last] - self._upto[middle]
            total = np.maximum(1, self._upto[last] - self._upto[first])
            period, rest = np.divmod(turns, total)
            before = rest * right // total
            goes = (rest + 1) * right // total > before
            to_the_right = period * right + before
            turns = np.where(goes, to_the_right, turns - to_the_right)
            first, last = np.where(goes, middle, first), np.where(goes, last, middle)
        return first, turns


class Order:
    """A stream in global batches of `global_batch` samples."""

    def __init__(self, stream: Stream, global_batch: int) -> None:
        self.stream, self.global_batch = stream, global_batch
        self._batch = lru_cache(maxsize=2)(self.batch)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and index rows, int64 [global batch] each, of a step, in the order of its slots.

        Sorted by row, then the two halves side by side: slots 2i and 2i + 1, which mixup takes as partners, lie
        far from each other in the shards, also where those are sorted by class.
        """
        start = step * self.global_batch
        epochs, ids = self.stream.ids(start, start + self.global_batch)
        by_row = np.argsort(ids, kind="stable")
        half = self.global_batch // 2
        slots = np.concatenate([by_row[: 2 * half].reshape(2, half).T.ravel(), by_row[2 * half :]])
        return epochs[slots], ids[slots]

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and index rows of slots [start, stop) of the stream; they must lie in one global batch."""
        step, first = divmod(start, self.global_batch)
        epochs, ids = self._batch(step)
        return epochs[first : first + stop - start], ids[first : first + stop - start]


def of_sets(
    labels: Sequence[np.ndarray],
    set_shares: Sequence[float],
    class_shares: Sequence[float] | None,
    seed: int,
    digest: str,
    global_batch: int,
) -> Order:
    """The order of one or several sets, whose rows are counted on from set to set.

    `labels`: of each set, int32 [samples]. `class_shares`: one a class, in relation to each other, applied within
    each set; None: each sample as often as every other of its set. `digest`: of all sets together. Shares are
    taken as decimal numbers, exactly. Raises ValueError for shares that cannot be kept.
    """
    streams: list[Stream] = []
    for number, its_labels in enumerate(labels):
        name = key(VERSION, seed, digest, number)
        if class_shares is None:
            streams.append(Shuffled(len(its_labels), name))
        else:
            streams.append(ByClass(its_labels, [Fraction(str(share)) for share in class_shares], name))
    if len(streams) == 1:
        return Order(streams[0], global_batch)
    offsets = np.concatenate([[0], np.cumsum([len(its_labels) for its_labels in labels])[:-1]]).tolist()
    return Order(Mixed(streams, [Fraction(str(share)) for share in set_shares], offsets), global_batch)


def rank_slots(step: int, accumulation_index: int, rank: int, batch: Batch) -> tuple[int, int]:
    """Slots [start, stop) of a micro-batch: a part of its rank's part of a global batch."""
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


def order_hash(order: Order) -> str:
    """12 hexadecimal digits of the first global batch, for ranks to compare before they train."""
    epochs, ids = order.batch(0)
    return hashlib.sha256(np.stack([epochs, ids]).astype("<i8").tobytes()).hexdigest()[:12]

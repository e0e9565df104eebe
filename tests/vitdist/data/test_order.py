"""The order of samples is a pure function of seed, epoch, data set and global batch.

python -m pytest tests/vitdist/data/test_order.py
"""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdist.config import Batch
from vitdist.data.order import (
    ByClass,
    Deal,
    Mixed,
    Order,
    Shuffled,
    Stream,
    evaluation_ids,
    key,
    of_sets,
    order_hash,
    permuted,
    rank_slots,
)

sizes = st.integers(1, 700)
small = st.integers(1, 9)
names = st.integers(0, 2**64 - 1)
shares = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), name=names)
def test_a_permutation_and_its_inverse(n: int, name: int) -> None:
    there = permuted(np.arange(n), n, name)
    assert sorted(there.tolist()) == list(range(n))
    assert permuted(there, n, name, inverse=True).tolist() == list(range(n))


def test_permutations_may_differ_by_element() -> None:
    sizes, keys = np.array([5, 5, 900, 7]), np.array([1, 2, 1, 9], np.uint64)
    together = permuted(np.array([3, 3, 3, 6]), sizes, keys)
    alone = [permuted(np.array([x]), int(n), int(k))[0] for x, n, k in zip([3, 3, 3, 6], sizes, keys, strict=True)]
    assert together.tolist() == alone


def test_permutations_are_fair() -> None:
    """Every place equally likely for every element, and neighbours independent: chi-squared over 6,000 keys."""
    n, draws = 8, 6000
    places = permuted(np.tile(np.arange(n), (draws, 1)), n, np.arange(draws, dtype=np.uint64)[:, None])
    counts = np.stack([np.bincount(places[:, x], minlength=n) for x in range(n)])
    assert ((counts - draws / n) ** 2 / (draws / n)).sum() < 100  # 49 degrees of freedom: 100 is beyond 1 in 20,000
    pairs = np.bincount(places[:, 0] * n + places[:, 1], minlength=n * n)
    expected = draws / n / (n - 1)
    assert ((pairs[pairs > 0] - expected) ** 2 / expected).sum() < 110  # 55 degrees of freedom


@settings(max_examples=60, deadline=None)
@given(n=sizes, name=names, chunk=small, window=st.integers(1, 80), epoch=st.integers(0, 5))
def test_each_sample_once_an_epoch(n: int, name: int, chunk: int, window: int, epoch: int) -> None:
    epochs, ids = Shuffled(n, name, chunk, window).ids(epoch * n, (epoch + 1) * n)
    assert sorted(ids.tolist()) == list(range(n))
    assert set(epochs.tolist()) == {epoch}


def streams(n: int) -> list[Stream]:
    labels = np.random.default_rng(n).integers(0, 4, n).astype(np.int32)
    some = [Fraction(int(present)) for present in np.bincount(labels, minlength=4) > 0]
    return [
        Shuffled(n, 7, 4, 12),
        ByClass(labels, some, 3),
        Mixed([Shuffled(n, 1), Shuffled(5, 2), ByClass(labels, some, 4)], [Fraction(3), Fraction(0), Fraction(2)],
              [0, n, n + 5]),
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(n=sizes, start=st.integers(0, 2000), length=st.integers(0, 500), which=st.integers(0, 2))
def test_starting_anywhere_is_the_straight_stream(n: int, start: int, length: int, which: int) -> None:
    straight, piece = streams(n)[which].ids(0, start + length), streams(n)[which].ids(start, start + length)
    for whole, part in zip(straight, piece, strict=True):
        np.testing.assert_array_equal(whole[start:], part)
        assert len(part) == length
    epochs, ids = straight
    assert len(set(zip(epochs.tolist(), ids.tolist(), strict=True))) == len(ids)  # what augmentation depends on


@settings(max_examples=12, deadline=None)
@given(n=sizes, unit=st.integers(1, 5), first_step=st.integers(0, 40), which=st.integers(0, 2))
def test_R8_D7_same_global_batches_for_every_split(n: int, unit: int, first_step: int, which: int) -> None:
    total = 48 * unit
    expected = [np.stack(Order(streams(n)[which], total).batch(step)) for step in (first_step, first_step + 1)]
    for world in (1, 2, 3, 4, 6, 8):
        for accumulation in (1, 2):
            batch = Batch(
                global_batch=total, micro_batch=total // world // accumulation, accumulation=accumulation, world=world
            )
            order = Order(streams(n)[which], total)
            parts = [
                np.stack(order.slots(*rank_slots(step, part, rank, batch)))
                for step in (first_step, first_step + 1)
                for rank in range(world)
                for part in range(accumulation)
            ]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.concatenate(expected, axis=1))


@settings(max_examples=25, deadline=None)
@given(n=sizes, total=st.integers(1, 90))
def test_R8_the_tail_of_an_epoch_is_neither_dropped_nor_doubled(n: int, total: int) -> None:
    order = Order(Shuffled(n, 5, 4, 12), total)
    steps = -(-3 * n // total)
    epochs, ids = np.concatenate([np.stack(order.batch(step)) for step in range(steps)], axis=1)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(weights=shares, period=st.integers(0, 10**12), periods=st.integers(1, 3))
def test_shares_are_exact_over_each_period(weights: list[int], period: int, periods: int) -> None:
    deal = Deal([Fraction(w) for w in weights])
    start = period * deal.period
    numbers, turns = deal(np.arange(start, start + periods * deal.period))
    for number, weight in enumerate(deal.weights):
        assert turns[numbers == number].tolist() == list(range(period * weight, (period + periods) * weight))


@settings(max_examples=40, deadline=None)
@given(weights=shares, start=st.integers(0, 10**6), length=st.integers(1, 400))
def test_shares_are_near_in_every_stretch(weights: list[int], start: int, length: int) -> None:
    numbers, _ = Deal([Fraction(w) for w in weights])(np.arange(start, start + length))
    counts = np.bincount(numbers, minlength=len(weights))
    depth = int(np.ceil(np.log2(len(weights)))) + 1
    assert (np.abs(counts - length * np.array(weights) / sum(weights)) <= 2 * depth).all()


def test_decimal_shares_are_taken_exactly() -> None:
    labels = np.array([0] * 90 + [1] * 10, np.int32)
    order = of_sets([labels, labels[::-1]], [0.3, 0.7], [0.25, 1], 0, "aa", 500)
    _, ids = order.batch(3)
    both = np.concatenate([labels, labels[::-1]])
    assert np.bincount(ids // 100).tolist() == [150, 350]
    assert [np.bincount(both[ids[ids // 100 == number]]).tolist() for number in (0, 1)] == [[30, 120], [70, 280]]


def test_balancing_uses_every_sample_of_a_class_in_turn() -> None:
    labels = np.array([0] * 40 + [1] * 5, np.int32)
    _, ids = ByClass(labels, [Fraction(1)] * 2, 3).ids(0, 80)
    rare, common = ids[labels[ids] == 1], ids[labels[ids] == 0]
    assert sorted(common.tolist()) == list(range(40))
    assert all(sorted(rare[i : i + 5].tolist()) == [40, 41, 42, 43, 44] for i in range(0, 40, 5))
    assert len({tuple(rare[i : i + 5]) for i in range(0, 40, 5)}) > 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([Fraction(-1), Fraction(1)], "at least 0"),
        ([Fraction(0)], "one above 0"),
        ([Fraction("0.000000001"), Fraction(7)], "too fine"),
    ],
)
def test_shares_that_cannot_be_kept(weights: list[Fraction], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Deal(weights)
    with pytest.raises(ValueError, match="class 1 has a share of the batches but no samples"):
        ByClass(np.zeros(3, np.int32), [Fraction(1)] * 2, 0)


@settings(max_examples=40, deadline=None)
@given(n=sizes, world=st.sampled_from([1, 2, 3, 7, 16]), batch=st.integers(1, 40))
def test_R8_evaluation_has_each_sample_once(n: int, world: int, batch: int) -> None:
    parts = [evaluation_ids(n, rank, world, batch) for rank in range(world)]
    assert len({len(ids) for ids, _ in parts}) == 1
    assert len(parts[0][0]) % batch == 0
    assert sorted(i for ids, mask in parts for i in ids[mask].tolist()) == list(range(n))
    assert all((ids[~mask] == -1).all() for ids, mask in parts)


@pytest.mark.parametrize("n", [5000, 100_000])
def test_epochs_and_names_differ(n: int) -> None:
    first = Shuffled(n, key(0, "a")).ids(0, n)[1]
    others = [
        Shuffled(n, key(0, "a")).ids(n, 2 * n)[1],
        Shuffled(n, key(1, "a")).ids(0, n)[1],
        Shuffled(n, key(0, "b")).ids(0, n)[1],
    ]
    for other in others:
        assert np.mean(first == other) < 0.01
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.1


def test_a_rank_reads_few_chunks_forwards_and_alone() -> None:
    """Photos of a million samples on 8 ranks: 4 steps read 64 chunks in all, each rank its own 8 or so."""
    order = Order(Shuffled(1_000_000, 1), 1024)
    window = order.stream.ids(0, 4096)[1]
    assert len(np.unique(window // 64)) == 64
    read = []
    for rank in range(8):
        mine = [order.slots(step * 1024 + rank * 128, step * 1024 + (rank + 1) * 128)[1] for step in range(4)]
        for ids in mine:
            assert (np.diff(ids[0::2]) > 0).all()  # two runs, for the partners of mixup lie apart
            assert (np.diff(ids[1::2]) > 0).all()
        read.append(set((np.concatenate(mine) // 64).tolist()))
    assert max(map(len, read)) <= 12
    assert sum(map(len, read)) <= 64 + 4 * 8


def test_partners_lie_apart_also_in_shards_sorted_by_class() -> None:
    labels = np.arange(100_000) // 100
    _, ids = Order(Shuffled(100_000, 1), 256).batch(0)
    assert (labels[ids[0::2]] == labels[ids[1::2]]).mean() < 0.05


def test_known_order() -> None:
    """Written down: another order would change every run that is resumed under a new version."""
    assert Shuffled(10, 3, 2, 6).ids(8, 16)[1].tolist() == [2, 6, 9, 3, 7, 8, 6, 1]
    assert order_hash(of_sets([np.zeros(1000, np.int32)], [1.0], None, 0, "5f", 64)) == "0bf1f052114e"
    labels = (np.arange(100_000) % 7).astype(np.int32)
    assert order_hash(of_sets([labels, labels], [1.0, 3.0], None, 0, "5f", 64)) == "1935451caf7a"
    assert order_hash(of_sets([labels], [1.0], [1.0] * 7, 0, "5f", 64)) == "3b481745dfb2"


def test_imports_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, vitdist.data.order, vitdist.data.index; print({'torch', 'webdataset', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

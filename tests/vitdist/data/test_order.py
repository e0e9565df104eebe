"""The order of samples is a pure function of seed, epoch and data set."""

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdist.config import Batch
from vitdist.data.order import Order, evaluation_ids, order_hash, rank_slots

DIGEST = "5f" * 32
sizes = st.integers(1, 700)
small = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(n=sizes, seed=st.integers(0, 2**32 - 1), chunk=small, window=small, epoch=st.integers(0, 5))
def test_each_sample_once_an_epoch(n: int, seed: int, chunk: int, window: int, epoch: int) -> None:
    epochs, ids = Order(n, seed, DIGEST, chunk, window).ids(epoch * n, (epoch + 1) * n)
    assert sorted(ids.tolist()) == list(range(n))
    assert set(epochs.tolist()) == {epoch}


@settings(max_examples=40, deadline=None)
@given(n=sizes, chunk=small, window=small, start=st.integers(0, 2000), length=st.integers(0, 500))
def test_starting_anywhere_is_the_straight_stream(n: int, chunk: int, window: int, start: int, length: int) -> None:
    straight = Order(n, 7, DIGEST, chunk, window).ids(0, start + length)
    piece = Order(n, 7, DIGEST, chunk, window).ids(start, start + length)
    for whole, part in zip(straight, piece, strict=True):
        np.testing.assert_array_equal(whole[start:], part)
        assert len(part) == length


@settings(max_examples=12, deadline=None)
@given(n=sizes, unit=st.integers(1, 5), first_step=st.integers(0, 40))
def test_same_global_batches_for_every_split(n: int, unit: int, first_step: int) -> None:
    order = Order(n, 1, DIGEST, 4, 4)
    total = 48 * unit
    expected = np.stack(order.ids(first_step * total, (first_step + 2) * total))
    for world in (1, 2, 3, 4, 6):
        for accumulation in (1, 2, 4):
            batch = Batch(
                global_batch=total, micro_batch=total // world // accumulation, accumulation=accumulation, world=world
            )
            parts = [
                np.stack(order.ids(*rank_slots(step, part, rank, batch)))
                for step in (first_step, first_step + 1)
                for rank in range(world)
                for part in range(accumulation)
            ]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@settings(max_examples=40, deadline=None)
@given(n=sizes, world=st.sampled_from([1, 2, 3, 7, 16]), batch=st.integers(1, 40))
def test_evaluation_has_each_sample_once(n: int, world: int, batch: int) -> None:
    parts = [evaluation_ids(n, rank, world, batch) for rank in range(world)]
    assert len({len(ids) for ids, _ in parts}) == 1
    assert len(parts[0][0]) % batch == 0
    assert sorted(i for ids, mask in parts for i in ids[mask].tolist()) == list(range(n))
    assert all((ids[~mask] == -1).all() for ids, mask in parts)


def test_epochs_seeds_and_data_sets_differ() -> None:
    n = 5000
    first = Order(n, 0, DIGEST).ids(0, n)[1]
    others = [
        Order(n, 0, DIGEST).ids(n, 2 * n)[1],
        Order(n, 1, DIGEST).ids(0, n)[1],
        Order(n, 0, "00" * 32).ids(0, n)[1],
    ]
    for other in others:
        assert np.mean(first == other) < 0.01
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.1


def test_reads_stay_inside_a_window_of_chunks() -> None:
    ids = Order(100_000, 0, DIGEST, chunk=64, window=8).ids(0, 512)[1]
    assert len(np.unique(ids // 64)) <= 9


def test_known_order() -> None:
    """Written down: another order would change every run that is resumed under a new version."""
    assert Order(10, 3, DIGEST, 2, 3).ids(8, 16)[1].tolist() == [2, 0, 8, 0, 9, 1, 2, 3]
    assert order_hash(Order(1000, 0, DIGEST), 64) == "53427fab4fcd"


def test_imports_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, vitdist.data.order, vitdist.data.index; print({'torch', 'webdataset', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

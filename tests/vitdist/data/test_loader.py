"""Batches are the same however they are made. python -m pytest tests/vitdist/data/test_loader.py"""

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitdist.config import Batch, Config, Data, Model, Scratch, Train
from vitdist.data.index import Index
from vitdist.data.loader import class_counts, class_shares, evaluation_batches, open_training, worker_count
from vitdist.data.order import of_sets
from vitdist.data.pack import pack
from vitdist.data.storage import Storage

GLOBAL = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """50 samples: steps of 24 straddle the epochs."""
    folder = tmp_path_factory.mktemp("loader")
    for i in range(50):
        path = folder / "pictures" / f"c{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    pack(folder / "pictures", folder / "out", workers=1, shard_samples=20)
    return Index.open(folder / "out/train")


def settings(index: Index, workers: int = 0, **data: Any) -> Config:
    return Config(
        data=Data(**({"train": index.folder, "val": "-", "workers": workers} | data)),
        model=Model(scratch=Scratch(patch_size=8), image_size=16),
        train=Train(global_batch=GLOBAL, epochs=2),
    )


def global_batches(
    config: Config, world: int, accumulation: int, start: int, steps: int, total: int = GLOBAL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and ids of the global batches [start, start + steps), ranks and micro-batches put together."""
    batch = Batch(
        global_batch=total, micro_batch=total // world // accumulation, accumulation=accumulation, world=world
    )
    ranks = [
        list(itertools.islice(open_training(config, total).batches(batch, rank, start, 1), steps * accumulation))
        for rank in range(world)
    ]
    parts = [
        ranks[rank][step * accumulation + part]
        for step in range(steps)
        for rank in range(world)
        for part in range(accumulation)
    ]
    assert not any(part.bad for part in parts)
    assert all(part.mask.all() for part in parts)
    return tuple(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "ids"))


@pytest.fixture(scope="module")
def straight(index: Index) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return global_batches(settings(index), world=1, accumulation=1, start=0, steps=10)


@pytest.mark.parametrize(
    ("world", "accumulation", "workers", "start"),
    [
        (1, 1, 2, 0),
        (2, 1, 0, 0),
        (2, 3, 2, 0),
        (4, 1, 0, 0),
        (4, 1, 2, 0),
        (3, 2, 0, 0),
        (1, 1, 0, 7),
        (4, 3, 2, 7),
        (2, 1, 1, 4),
        (6, 1, 3, 0),
        (8, 3, 1, 2),
        (3, 1, 1, 5),
    ],
)
def test_D7_pixels_are_the_same(
    index: Index, straight: tuple[torch.Tensor, ...], world: int, accumulation: int, workers: int, start: int
) -> None:
    got = global_batches(settings(index, workers), world, accumulation, start, steps=10 - start)
    for ours, expected in zip(got, straight, strict=True):
        assert torch.equal(ours, expected[start * GLOBAL :])


@pytest.mark.parametrize("auto_augment", ["rand-m9-mstd0.5-inc1", "trivial"])
def test_augmented_pixels_are_the_same(index: Index, auto_augment: str) -> None:
    how = {"auto_augment": auto_augment, "colour_jitter": 0.3}
    whole = global_batches(settings(index, **how), 1, 1, 0, 5)[0]
    assert not torch.equal(whole, global_batches(settings(index), 1, 1, 0, 5)[0])
    for world, accumulation, workers, start in ((1, 1, 2, 0), (2, 3, 0, 0), (3, 1, 1, 3)):
        got = global_batches(settings(index, workers, **how), world, accumulation, start, 5 - start)[0]
        assert torch.equal(got, whole[start * GLOBAL :])


def test_stream_is_that_of_the_order(index: Index, straight: tuple[torch.Tensor, ...]) -> None:
    _, labels, ids = straight
    order = of_sets([index.labels], [1.0], None, 0, index.digest, GLOBAL)
    assert ids.tolist() == [int(i) for step in range(10) for i in order.batch(step)[1]]
    assert sorted(np.bincount(ids).tolist()) == [4] * 10 + [5] * 40  # four epochs and 40 samples of the fifth
    assert labels.tolist() == index.labels[ids.numpy()].tolist()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """30 more samples of the same classes."""
    folder = tmp_path_factory.mktemp("other")
    for i in range(30):
        path = folder / "pictures" / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(1000 + i).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    pack(folder / "pictures", folder / "out", workers=1)
    return Index.open(folder / "out/train")


@pytest.mark.parametrize("shares", ["balanced", {"c0": 0, "c1": 2, "c2": 1}])
def test_mixed_and_balanced_batches_are_exact_for_every_split(
    index: Index, other: Index, shares: str | dict[str, float]
) -> None:
    config = settings(index, train={index.folder: 1.0, other.folder: 3.0}, class_shares=shares)
    straight = global_batches(config, 1, 1, 0, 6, total=24)
    for world, start in ((2, 0), (3, 2), (8, 5)):
        for ours, expected in zip(global_batches(config, world, 1, start, 6 - start, 24), straight, strict=True):
            assert torch.equal(ours, expected[start * 24 :])
    _, labels, ids = straight
    assert (ids < 50).sum() == len(ids) / 4  # the first set's share
    expected = [1 / 3] * 3 if shares == "balanced" else [0, 2 / 3, 1 / 3]
    assert (torch.bincount(labels, minlength=3) / len(labels)).tolist() == pytest.approx(expected)


def test_what_a_checkpoint_must_fit(index: Index, other: Index) -> None:
    both = {index.folder: 1.0, other.folder: 3.0}
    changes = [{}, {"class_shares": "balanced"}, {"train": both}, {"train": both | {other.folder: 2.0}}]
    identities = [open_training(settings(index, **change), GLOBAL).identity for change in changes]
    assert len(set(identities)) == 4
    assert open_training(settings(index, 3, flip=0.0), GLOBAL).identity == identities[0]
    firsts = {open_training(settings(index), total).first_batch for total in (GLOBAL, 48)}
    assert len(firsts) == 2


def test_class_shares() -> None:
    assert class_shares("natural", ["a", "b"], [9, 4]) is None
    assert class_shares("sqrt", ["a", "b"], [9, 2]) == [3.0, 1.414]
    assert class_shares("balanced", ["a", "b"], [9, 0]) == [1.0, 0.0]
    many = class_shares("sqrt", [str(i) for i in range(10_000)], [50_000 + 10 * i for i in range(10_000)])
    assert many
    of_sets([np.arange(10_000, dtype=np.int32)], [1.0], many, 0, "aa", 8)  # their period is short enough
    assert class_shares({"b": 3.0}, ["a", "b"], [9, 4]) == [1.0, 3.0]
    with pytest.raises(ValueError, match="there is no class 'c'; there are: a, b"):
        class_shares({"c": 3.0}, ["a", "b"], [9, 4])


@pytest.mark.parametrize("shares", ["natural", "balanced", "sqrt", {"c0": 0, "c1": 2, "c2": 1}])
@pytest.mark.parametrize("sets", [1, 2])
def test_class_counts_are_what_comes(index: Index, other: Index, shares: str | dict[str, float], sets: int) -> None:
    train = index.folder if sets == 1 else {index.folder: 1.0, other.folder: 3.0}
    training = open_training(settings(index, train=train, class_shares=shares), GLOBAL)
    assert sum(training.class_counts) == pytest.approx(training.samples)
    if sets == 1 and shares == "natural":
        assert training.class_counts == index.counts
    labels = global_batches(settings(index, train=train, class_shares=shares), 1, 1, 0, 50)[1]
    found = torch.bincount(labels, minlength=3) / len(labels)
    expected = [count / training.samples for count in training.class_counts]
    assert found.tolist() == pytest.approx(expected, abs=0.01)


def test_class_counts_of_sets() -> None:
    assert class_counts([[9, 3]], [1.0], None, 12) == [9, 3]
    assert class_counts([[9, 3]], [1.0], [1.0, 1.0], 12) == [6, 6]
    assert class_counts([[9, 3], [0, 8]], [1.0, 3.0], None, 20) == [3.75, 1.25 + 15]
    assert class_counts([[9, 3], [0, 0]], [2.0, 0.0], None, 12) == [9, 3]  # a set that is switched off may be empty


def test_the_first_batch_after_a_resume_reads_no_more_than_at_the_start(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = Storage.read_into
    monkeypatch.setattr(Storage, "read_into", lambda *args: asked.append(len(args[3])) or read(*args))
    monkeypatch.setattr("vitdist.data.reader._GAP", -1)  # no neighbour's bytes in between
    read_bytes = []
    for start in (0, 10**9):
        batch = Batch(global_batch=GLOBAL, micro_batch=GLOBAL, accumulation=1, world=1)
        asked.clear()
        ids = next(open_training(settings(index), GLOBAL).batches(batch, 0, start, 1)).ids.tolist()
        read_bytes.append(sum(asked) - sum(index.span(i)[2] for i in ids))
    assert read_bytes == [0, 0]


def test_an_epoch_of_a_part_is_that_part(index: Index, other: Index) -> None:
    assert open_training(settings(index, class_shares={"c0": 0}), GLOBAL).samples == 50 - index.counts[0]
    mixed = settings(index, train={index.folder: 1.0, other.folder: 0.0})
    assert open_training(mixed, GLOBAL).samples == 50


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0), (7, 0)])
def test_R8_evaluation_has_each_sample_once(index: Index, world: int, workers: int) -> None:
    ids, lengths, pixels = [], set(), {}
    for rank in range(world):
        batches = evaluation_batches(index, settings(index, workers), rank, world, 8)
        lengths.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (8, 3, 16, 16)
            ids += batch.ids[batch.mask].tolist()
            pixels |= dict(zip(batch.ids[batch.mask].tolist(), batch.images[batch.mask], strict=True))
    assert sorted(ids) == list(range(50))
    assert len(lengths) == 1
    again = next(iter(evaluation_batches(index, settings(index), 0, 1, 50)))
    assert all(torch.equal(pixels[i], again.images[i]) for i in range(50))


def test_evaluation_may_be_repeated(index: Index) -> None:
    batches = evaluation_batches(index, settings(index), 1, 2, 10)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == len(batches) == 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_loading_leaves_the_global_generators_alone(index: Index) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    global_batches(settings(index, auto_augment="trivial", colour_jitter=0.3), 1, 1, 0, 1)
    list(evaluation_batches(index, settings(index), 0, 1, 25))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_worker_count(monkeypatch: pytest.MonkeyPatch, index: Index) -> None:
    auto = settings(index).model_copy(update={"data": Data(train="-", val="-")})
    assert worker_count(settings(index, 3), 1) == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert worker_count(auto, 1) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert [worker_count(auto, ranks) for ranks in (1, 8, 16, 100)] == [8, 8, 4, 1]

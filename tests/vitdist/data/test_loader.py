"""Batches are the same however they are made. python -m pytest tests/vitdist/data/test_loader.py"""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vitdist.config import Batch, Config, Data, Model, Scratch, Train
from vitdist.data.index import Index
from vitdist.data.loader import evaluation_batches, train_batches, worker_count
from vitdist.data.order import Order
from vitdist.data.pack import pack

GLOBAL = 12


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """50 samples: steps of 12 straddle the epochs."""
    folder = tmp_path_factory.mktemp("loader")
    for i in range(50):
        path = folder / "pictures" / f"c{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    pack(folder / "pictures", folder / "out", workers=1, shard_samples=20)
    return Index.open(folder / "out/train")


def settings(workers: int = 0) -> Config:
    return Config(
        data=Data(train="-", val="-", workers=workers),
        model=Model(scratch=Scratch(patch_size=8), image_size=16),
        train=Train(global_batch=GLOBAL, epochs=2),
    )


def global_batches(
    index: Index, world: int, accumulation: int, workers: int, start: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and ids of the global batches [start, start + steps), ranks and micro-batches put together."""
    batch = Batch(
        global_batch=GLOBAL, micro_batch=GLOBAL // world // accumulation, accumulation=accumulation, world=world
    )
    ranks = [
        list(itertools.islice(train_batches(index, settings(workers), batch, rank, start), steps * accumulation))
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
    return global_batches(index, world=1, accumulation=1, workers=0, start=0, steps=10)


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
    ],
)
def test_pixels_are_the_same(
    index: Index, straight: tuple[torch.Tensor, ...], world: int, accumulation: int, workers: int, start: int
) -> None:
    got = global_batches(index, world, accumulation, workers, start, steps=10 - start)
    for ours, expected in zip(got, straight, strict=True):
        assert torch.equal(ours, expected[start * GLOBAL :])


def test_stream_is_that_of_the_order(index: Index, straight: tuple[torch.Tensor, ...]) -> None:
    _, labels, ids = straight
    assert ids.tolist() == Order(50, 0, index.digest).ids(0, 120)[1].tolist()
    assert sorted(ids[:50].tolist()) == sorted(ids[50:100].tolist()) == list(range(50))
    assert labels.tolist() == index.labels[ids.numpy()].tolist()


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0), (7, 0)])
def test_evaluation_has_each_sample_once(index: Index, world: int, workers: int) -> None:
    ids, lengths, pixels = [], set(), {}
    for rank in range(world):
        batches = evaluation_batches(index, settings(workers), rank, world, 8)
        lengths.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (8, 3, 16, 16)
            ids += batch.ids[batch.mask].tolist()
            pixels |= dict(zip(batch.ids[batch.mask].tolist(), batch.images[batch.mask], strict=True))
    assert sorted(ids) == list(range(50))
    assert len(lengths) == 1
    again = next(iter(evaluation_batches(index, settings(), 0, 1, 50)))
    assert all(torch.equal(pixels[i], again.images[i]) for i in range(50))


def test_evaluation_may_be_repeated(index: Index) -> None:
    batches = evaluation_batches(index, settings(), 1, 2, 10)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == len(batches) == 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_loading_leaves_the_global_generators_alone(index: Index) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    global_batches(index, 1, 1, 0, 0, 1)
    list(evaluation_batches(index, settings(), 0, 1, 25))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = settings().model_copy(update={"data": Data(train="-", val="-")})
    assert worker_count(settings(3), 1) == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert worker_count(auto, 1) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert [worker_count(auto, ranks) for ranks in (1, 8, 16, 100)] == [8, 8, 4, 1]


def test_images_are_planar_by_shape_only(index: Index) -> None:
    images = next(iter(evaluation_batches(index, settings(), 0, 1, 4))).images
    assert images.is_contiguous(memory_format=torch.channels_last)

"""Shards without an index. python -m pytest tests/vitdist/data/test_stream.py"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vitdist.data.test_corruption import write
from vitdist.config import Batch, Config, Data, Model, Scratch, Train
from vitdist.data.reader import DataFailed, MicroBatch
from vitdist.data.stream import open_stream

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(4):
        write(folder / f"{shard}.tar", shard * 3, [0, 1, 2])
    return folder


def batches(place: str, world: int, rank: int, number: int, workers: int = 0, start: int = 0) -> list[MicroBatch]:
    config = settings(place, workers=workers)
    training = open_stream(config, CLASSES, world)
    batch = Batch(global_batch=4 * world, micro_batch=4, accumulation=1, world=world)
    return list(itertools.islice(training.batches(batch, rank, start, 1), number))


def settings(place: str, **data: Any) -> Config:
    return Config(
        data=Data(train=f"stream:{place}", val="-", stream_samples=12, crop_scale=(1, 1), crop_ratio=(1, 1), **data),
        model=Model(scratch=Scratch(patch_size=8), image_size=8),
        train=Train(global_batch=4, epochs=1),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_R8_every_rank_draws_as_much_as_it_wants_of_shards_of_its_own(shards: Path, workers: int) -> None:
    drawn = [batches(f"{shards}/{{0..3}}.tar", 2, rank, 9, workers) for rank in range(2)]
    for rank in drawn:
        assert len(rank) == 9
        for batch in rank:
            assert batch.images.shape == (4, 3, 8, 8)
            number = torch.div(batch.images[:, 0].flatten(1).max(1).values, 20, rounding_mode="floor")
            assert (number % 3).tolist() == batch.labels.tolist()  # a label is that of its picture


def test_one_pass_has_every_sample_once_over_all_ranks(shards: Path) -> None:
    colours = [
        int(image[0].max())
        for rank in range(2)
        for batch in batches(f"{shards}/{{0..3}}.tar", 2, rank, 2)[:2]
        for image in batch.images
    ]
    # Two shards of 3 each rank: 6 of 8 drawn samples are the first pass, the rest begin the second.
    assert len(set(colours)) == 12


def test_the_same_start_gives_the_same_and_a_resume_another_deal(shards: Path) -> None:
    place = f"{shards}/{{0..3}}.tar"
    first, again, resumed = (batches(place, 1, 0, 6, start=start) for start in (0, 0, 6))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.images, b.images) for a, b in zip(first, resumed, strict=True))


def test_a_broken_picture_is_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    content = bytearray((shards / "0.tar").read_bytes())
    picture = content.index(b"\x89PNG")
    content[picture : picture + 8] = bytes(8)
    (tmp_path / "0.tar").write_bytes(content)
    drawn = batches(f"{tmp_path}/0.tar", 1, 0, 3)
    assert {bad.key for batch in drawn for bad in batch.bad} == {"00000"}
    assert all(label != 0 for batch in drawn for label in batch.labels.tolist())


def test_colours_are_changed_here_too_and_classes_are_not_counted(shards: Path) -> None:
    place, batch = f"{shards}/{{0..3}}.tar", Batch(global_batch=4, micro_batch=4, accumulation=1, world=1)
    pictures = []
    for more in ({}, {"auto_augment": "trivial", "colour_jitter": 0.5}):
        training = open_stream(settings(place, workers=0, **more), CLASSES, 1)
        assert training.class_counts is None
        pictures.append(next(training.batches(batch, 0, 0, 1)).images)
    assert not torch.equal(*pictures)
    again = next(open_stream(settings(place, workers=0, **more), CLASSES, 1).batches(batch, 0, 0, 1))
    assert torch.equal(pictures[1], again.images)


def test_D4_D7_too_few_shards_and_no_samples(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 shards cannot feed 5 ranks"):
        batches(f"{shards}/{{0..3}}.tar", 5, 0, 1)
    write(tmp_path / "empty.tar", 0, [])
    with pytest.raises(DataFailed, match=r"no samples in .*empty\.tar"):
        batches(f"{tmp_path}/empty.tar", 1, 0, 1)


def test_D8_pipes_run_only_where_they_are_allowed(shards: Path, tmp_path: Path) -> None:
    command = f"pipe:cat {shards}/{{0..3}}.tar"
    for hidden in (command, f"{{pipe,pipe}}:touch {tmp_path}/ran; cat /dev/null", "a.tar:: pipe:true"):
        with pytest.raises(ValueError, match=r"allow it with data\.allow_pipe=true|no such shard"):
            open_stream(settings(hidden), CLASSES, 1)
    assert not (tmp_path / "ran").exists()
    config = settings(command, allow_pipe=True)
    batch = Batch(global_batch=4, micro_batch=4, accumulation=1, world=1)
    assert len(next(open_stream(config, CLASSES, 1).batches(batch, 0, 0, 1)).labels) == 4
    failing = open_stream(settings("pipe:exit 3", allow_pipe=True), CLASSES, 1)
    with pytest.raises(DataFailed, match=r"data\.train: a shard cannot be read: .*exit 3"):
        next(failing.batches(batch, 0, 0, 1))


def test_D4_a_shard_that_is_not_there(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"4\.tar: no such shard"):
        open_stream(settings(f"{shards}/{{3..4}}.tar"), CLASSES, 1)

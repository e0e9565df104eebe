"""Shards without an index, in webdataset's way: for sets that cannot be indexed.

    data.train='stream:https://host/part-{0000..0099}.tar' data.stream_samples=1000000
    data.train='stream:pipe:aws s3 cp s3://bucket/part-{0000..0099}.tar -' data.allow_pipe=true ...

What is lost against indexed shards, and said at start: the order depends on the number of ranks and loader
processes; a resume begins a new pass instead of going on in the middle of one, so samples come twice or not at
all; a damaged header ends a shard without a word (webdataset 1.0.2), and no CRC tells a changed sample. What is
kept: every rank draws as many batches, without end; shards are dealt anew each pass by (seed, pass).
"""

import hashlib
import itertools
import json
import random
import re
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from vitdist.config import Batch, Config, Data
from vitdist.data import colour, storage, transforms
from vitdist.data.index import IMAGES
from vitdist.data.loader import Training, closing, in_processes, worker_count
from vitdist.data.reader import Bad, DataFailed, MicroBatch

LOST = (
    "streaming without an index: the order depends on ranks and loader processes, a resume begins a new pass, "
    "and damage inside a shard may pass unseen; `vitdist index` ends all three"
)
_BUFFER = 2048
"""Samples among which a loader process shuffles; 200 MB of photos."""


def open_stream(config: Config, classes: list[str], world: int) -> Training:
    """Training on the stream that the settings name, with the classes of the validation set.

    Raises ValueError if no shards are named, or fewer than there are ranks.
    """
    assert config.data.stream
    assert config.data.stream_samples
    shards = _shards(config.data)
    if world > len(shards):
        raise ValueError(
            f"data.train: {len(shards)} shards cannot feed {world} ranks: each needs one of its own; "
            "write smaller shards, or use fewer ranks"
        )
    about = json.dumps([shards, config.data.stream_samples])
    identity = hashlib.sha256(about.encode()).hexdigest()

    def batches(batch: Batch, rank: int, start_step: int, local_world: int) -> Generator[MicroBatch]:
        workers = min(worker_count(config, local_world), len(shards) // batch.world)
        # A pass is numbered by its first step: a resumed run deals its shards anew.
        samples = _Stream(config, shards, classes, batch, rank, start_step)
        return closing(in_processes(samples, workers, batch_size=None))

    return Training(
        samples=config.data.stream_samples,
        classes=classes,
        class_counts=None,
        summary={
            "folder": storage.shown(config.data.stream),
            "samples": config.data.stream_samples,
            "classes": len(classes),
            "shards": len(shards),
            "digest": identity[:12],
        },
        parts=[],
        identity=identity,
        first_batch="",
        batches=batches,
        samples_of=None,
    )


def _shards(settings: Data) -> list[str]:
    """The shards of the pattern. Raises ValueError for a file that is not there and a command that is not allowed."""
    assert settings.stream
    shards = [shard for part in settings.stream.split("::") for shard in braceexpand(part)]
    if not all(shards):
        raise ValueError("data.train=stream: names no shards; write stream:URL-{0000..0099}.tar")
    for shard in shards:  # as webdataset will see them: a brace may hide a scheme
        scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", shard)
        if scheme and scheme[1].lower() == "pipe" and not settings.allow_pipe:
            raise ValueError("data.train: pipe: runs a command on every node; allow it with data.allow_pipe=true")
        if not scheme and not Path(shard).is_file():
            raise ValueError(f"data.train: {shard}: no such shard")
    return shards


class _Stream(IterableDataset):
    """This rank's micro-batches, without end."""

    def __init__(
        self, config: Config, shards: list[str], classes: list[str], batch: Batch, rank: int, start_step: int
    ) -> None:
        self.config, self.shards, self.batch, self.rank, self.start_step = config, shards, batch, rank, start_step
        self.numbers = {name: number for number, name in enumerate(classes)}
        self.classes = len(classes)

    def __iter__(self) -> Iterator[MicroBatch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = random.Random(f"{self.config.train.seed} {self.start_step} {self.rank} {number}")
        samples = self._samples(rng, number, workers)
        while True:
            yield self._batch(list(itertools.islice(samples, self.batch.micro_batch)), samples, rng)

    def _samples(self, rng: random.Random, number: int, workers: int) -> Iterator[dict[str, Any]]:
        mine = self.rank * workers + number
        for turn in itertools.count():
            # Dealt over all loader processes of all ranks: the same deal in each of them.
            dealt = self.shards.copy()
            random.Random(f"{self.config.train.seed} {self.start_step} {turn}").shuffle(dealt)
            urls = dealt[mine :: self.batch.world * workers]
            seen = 0
            pipeline = webdataset.DataPipeline(
                webdataset.SimpleShardList(urls),
                webdataset.tarfile_to_samples(handler=webdataset.reraise_exception),
                webdataset.shuffle(_BUFFER, rng=rng),
            )
            try:
                for sample in pipeline:
                    seen += 1
                    yield sample
            except (OSError, tarfile.TarError) as error:
                first = str(error).partition("\n")[0]
                raise DataFailed(f"data.train: a shard cannot be read: {storage.shown(first)}") from error
            if not seen:
                raise DataFailed(f"data.train: no samples in {', '.join(urls[:3])}: are they tar shards?")

    def _batch(self, drawn: list[dict[str, Any]], more: Iterator[dict[str, Any]], rng: random.Random) -> MicroBatch:
        size, bad = self.config.model.image_size, list[Bad]()
        images = torch.empty((len(drawn), 3, size, size), dtype=torch.uint8)
        labels = torch.empty(len(drawn), dtype=torch.int64)
        for slot, sample in enumerate(drawn):
            for _ in range(100):
                try:
                    payload = next(sample[extension] for extension in IMAGES if extension in sample)
                    labels[slot] = self._label(sample)
                    generator = np.random.default_rng(rng.getrandbits(64))
                    pixels = transforms.training_pixels(payload, self.config.data, size, generator)
                    break
                except Exception as error:  # whatever a picture of unknown origin makes of a decoder
                    detail = f"not usable ({type(error).__name__}: {error})"
                    bad.append(
                        Bad(
                            -1, storage.shown(str(sample.get("__url__"))), str(sample["__key__"]), "undecodable", detail
                        )
                    )
                    sample = next(more)
            else:
                raise DataFailed(
                    f"100 samples in a row are broken: {bad[-1].key} of {bad[-1].shard} is {bad[-1].detail}"
                )
            images[slot] = colour.change(pixels, self.config.data, generator)
        ids = torch.full((len(drawn),), -1)
        return MicroBatch(images, labels, ids, torch.ones(len(drawn), dtype=torch.bool), bad)

    def _label(self, sample: dict[str, Any]) -> int:
        text = next(sample[kind] for kind in ("cls", "txt") if kind in sample).decode().strip()
        number = self.numbers[text] if text in self.numbers else int(text)
        if not 0 <= number < self.classes:
            raise ValueError(f"label {number} is not among {self.classes} classes")
        return number

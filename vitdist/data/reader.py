"""Samples by index row: pread, verify, decode, transform. A map-style data set for torch's DataLoader.

    samples = Samples(index, config.data, size=224, seed=0, training=True)
    batch = samples.__getitems__([(epoch, row), ...])

A broken sample (CRC, cut file, undecodable picture) never changes the size of a batch: in training another
one, chosen by a hash of (epoch, row), takes its place; in evaluation its slot is masked out. Either way it is
named in `batch.bad`, for the trainer to count.
"""

import functools
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vitdist.config import Data
from vitdist.data import transforms
from vitdist.data.index import IMAGES, LABEL, Index

PADDING = -1
"""Row of a slot that only fills up a batch."""

# Bytes between two samples that are cheaper to read than to skip, and the most read in one call.
_GAP, _LARGEST = 64 << 10, 16 << 20
# Open shards of one process; a window of the order has up to 64, and 1024 is a common limit for all files.
_OPEN_SHARDS = 128
_ATTEMPTS = 100


class Bad(NamedTuple):
    """A sample that could not be used."""

    id: int
    shard: str
    key: str
    reason: str


class MicroBatch(NamedTuple):
    images: torch.Tensor
    """uint8 [B, 3, H, W]; channels last in memory, as PIL makes them: the device does the copy to planes."""
    labels: torch.Tensor
    """int64 [B]"""
    ids: torch.Tensor
    """int64 [B], index rows; those of replacements where a sample was broken; -1 for padding."""
    mask: torch.Tensor
    """bool [B], False for padding and for samples that are broken in evaluation."""
    bad: list[Bad]
    """Broken samples that this batch met."""


class Samples(torch.utils.data.Dataset):
    def __init__(self, index: Index, settings: Data, size: int, seed: int, training: bool) -> None:
        self.index, self.settings, self.size, self.seed, self.training = index, settings, size, seed, training
        # Opened on first use. A forked process may inherit open shards: pread has no position to share.
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> MicroBatch:
        """The samples (epoch, row) in that order; row -1 gives a black, masked slot.

        Raises ValueError if 100 replacements in a row are broken too.
        """
        pixels = np.zeros((len(wanted), self.size, self.size, 3), np.uint8)
        ids = np.full(len(wanted), PADDING, np.int64)
        labels = np.zeros(len(wanted), np.int64)
        bad: list[Bad] = []
        slots = [(slot, epoch, row) for slot, (epoch, row) in enumerate(wanted) if row != PADDING]
        for attempt in range(_ATTEMPTS):
            broken = []
            spans = self._read([row for _, _, row in slots])
            for (slot, epoch, row), span in zip(slots, spans, strict=True):
                picture = span if isinstance(span, Bad) else self._pixels(epoch, row, span)
                if isinstance(picture, Bad):
                    bad.append(picture)
                    broken.append((slot, epoch, self._replacement(epoch, row, attempt)))
                else:
                    pixels[slot], ids[slot], labels[slot] = picture, row, self.index.labels[row]
            slots = broken if self.training else []
            if not slots:
                break
        else:
            last = bad[-1]
            raise ValueError(f"{_ATTEMPTS} samples in a row are broken: {last.key} {last.reason}")
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        ids_ = torch.from_numpy(ids)
        return MicroBatch(images, torch.from_numpy(labels), ids_, ids_ != PADDING, bad)

    def _replacement(self, epoch: int, row: int, attempt: int) -> int:
        digest = hashlib.blake2b(f"{epoch} {row} {attempt}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % len(self.index)

    def _pixels(self, epoch: int, row: int, span: bytes) -> np.ndarray | Bad:
        start, size = int(self.index.rows["image_offset"][row]), int(self.index.rows["image_size"][row])
        payload = span[start : start + size]
        try:
            if not self.training:
                return transforms.evaluation_pixels(payload, self.settings, self.size)
            # By sample, not by slot or process: the same pixels whoever decodes. 1: not a seed of order.py.
            rng = np.random.default_rng([self.seed, epoch, row, 1])
            return transforms.training_pixels(payload, self.settings, self.size, rng)
        except Exception as error:
            return self._bad(row, f"not decodable ({type(error).__name__}: {error})")

    def _read(self, ids: Sequence[int]) -> list[bytes | Bad]:
        """The verified spans of `ids`, neighbours read in one call."""
        rows = self.index.rows[ids]
        spans: list[bytes | Bad] = [b""] * len(ids)
        group: list[int] = []
        for place in np.lexsort((rows["offset"], rows["shard"])).tolist():
            if group and not _together(rows[group[0]], rows[group[-1]], rows[place]):
                self._read_group(group, ids, rows, spans)
                group = []
            group.append(place)
        if group:
            self._read_group(group, ids, rows, spans)
        return spans

    def _read_group(self, group: list[int], ids: Sequence[int], rows: np.ndarray, spans: list[bytes | Bad]) -> None:
        start = int(rows["offset"][group[0]])
        ends = [int(rows["offset"][place]) + int(rows["size"][place]) for place in group]
        try:
            data = os.pread(self._open(int(rows["shard"][group[0]])).fileno(), max(ends) - start, start)
        except OSError as error:
            for place in group:
                spans[place] = self._bad(ids[place], f"not readable ({error.strerror})")
            return
        for place, end in zip(group, ends, strict=True):
            span = data[int(rows["offset"][place]) - start : end - start]
            intact = zlib.crc32(span) == rows["crc32"][place]
            spans[place] = span if intact else self._bad(ids[place], "changed since it was indexed (CRC)")

    def _open_shard(self, shard: int) -> io.FileIO:
        return open(self.index.folder / self.index.shards[shard].name, "rb", buffering=0)

    def _bad(self, row: int, reason: str) -> Bad:
        try:
            key = self.index.key(row)
        except (OSError, ValueError):
            key = f"sample {row}"  # its tar header is part of what is broken
        return Bad(int(row), self.index.shards[self.index.rows["shard"][row]].name, key, reason)


def _together(first: np.void, last: np.void, following: np.void) -> bool:
    if following["shard"] != first["shard"]:
        return False
    start, size = int(following["offset"]), int(following["size"])
    gap = start - int(last["offset"]) - int(last["size"])
    return gap <= _GAP and start + size - int(first["offset"]) <= _LARGEST


def through_webdataset(index: Index, ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """Picture file and label of `ids` as webdataset itself parses them: what the tests hold the reader to."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    spans = ({"url": str(i), "stream": io.BytesIO(index.read(i))} for i in ids)
    for sample in group_by_keys(tar_file_expander(spans)):
        yield next(sample[extension] for extension in IMAGES if extension in sample), int(sample[LABEL])

"""Samples by index row: read, verify, decode, transform. A map-style data set for torch's DataLoader.

    samples = Samples(index, config.data, size=224, seed=0, training=True)
    batch = samples.__getitems__([(epoch, row), ...])

A broken sample (CRC, cut file, undecodable picture) never changes the size of a batch: in training another
one of its class, chosen by a hash of (epoch, row), takes its place; in evaluation its slot is masked out. Either
way it is named in `batch.bad`, for the trainer to count.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32

from vitdist.config import Data
from vitdist.data import colour, device_decode, storage, transforms
from vitdist.data.device_decode import Encoded, Jpeg
from vitdist.data.index import IMAGES, LABEL, Index

PADDING = -1
"""Row of a slot that only fills up a batch."""

# Bytes between two samples that are cheaper to read than to skip, and the most read in one call. A request to a
# server costs some 10 ms, in which 1 MB flows; from a local file 1 MB stays in the processor's cache for the CRC:
# 35 us a photo, with 16 MB 60 us.
_GAP, _LARGEST = 64 << 10, 1 << 20
_REMOTE_GAP, _REMOTE_LARGEST = 1 << 20, 16 << 20
_ATTEMPTS = 100
_ADVISED = 4096
"""Chunks of which a process remembers that it has told the system to read them."""


class DataFailed(RuntimeError):
    """The data cannot be had: a server that does not answer, nothing but broken samples. In one line."""


class Bad(NamedTuple):
    """A sample that could not be used."""

    id: int
    shard: str
    key: str
    reason: str
    """unreadable, changed or undecodable."""
    detail: str


class MicroBatch(NamedTuple):
    images: torch.Tensor
    """uint8 [B, 3, H, W]"""
    labels: torch.Tensor
    """int64 [B]"""
    ids: torch.Tensor
    """int64 [B], index rows; those of replacements where a sample was broken; -1 for padding."""
    mask: torch.Tensor
    """bool [B], False for padding and for samples that are broken in evaluation."""
    bad: list[Bad]
    """Broken samples that this batch met."""
    encoded: Encoded | None = None
    """JPEGs that the device is to decode into their slots of `images` (data.decode=gpu)."""


class Samples(torch.utils.data.Dataset):
    """The samples of `index`. `chunk`: samples that the order keeps together, which are worth reading ahead."""

    def __init__(
        self, index: Index, settings: Data, size: int, seed: int, training: bool, chunk: int | None = None
    ) -> None:
        self.index, self.settings, self.size, self.seed, self.training = index, settings, size, seed, training
        self._chunk, self._advised = chunk, dict[int, None]()
        remote = any(storage.is_remote(place.url) for place in index.places)
        self._gap, self._largest = (_REMOTE_GAP, _REMOTE_LARGEST) if remote else (_GAP, _LARGEST)
        self._buffer, self._of_class = bytearray(), dict[int, np.ndarray]()
        self._remote = remote
        self._on_device = training and settings.decode == "gpu"

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> MicroBatch:
        """The samples (epoch, row) in that order; row -1 gives a black, masked slot.

        Raises DataFailed if 100 replacements in a row are broken too, and for a server that does not answer.
        """
        # NumPy asks for huge pages where torch does not: 0.7 against 3.1 ms to fill 64 pictures of 224 pixels.
        images = torch.from_numpy(np.empty((len(wanted), 3, self.size, self.size), np.uint8))
        ids = np.full(len(wanted), PADDING, np.int64)
        labels = np.zeros(len(wanted), np.int64)
        bad: list[Bad] = []
        files: list[Jpeg | None] = [None] * len(wanted)
        slots = [(slot, epoch, row) for slot, (epoch, row) in enumerate(wanted) if row != PADDING]
        for attempt in range(_ATTEMPTS):
            broken = []
            for place, picture in self.pictures([row for _, _, row in slots]):
                slot, epoch, row = slots[place]
                pixels = picture if isinstance(picture, Bad) else self._pixels(epoch, row, picture)
                if isinstance(pixels, Bad):
                    bad.append(pixels)
                    broken.append((slot, epoch, self._replacement(epoch, row, attempt)))
                    continue
                if isinstance(pixels, Jpeg):
                    files[slot] = pixels
                else:
                    images[slot] = pixels
                ids[slot], labels[slot] = row, self.index.labels[row]
            slots = broken if self.training else []
            if not slots:
                break
        else:
            last = bad[-1]
            raise DataFailed(f"{_ATTEMPTS} samples in a row are broken: {last.key} of {last.shard} is {last.detail}")
        for slot in np.flatnonzero(ids == PADDING).tolist():
            images[slot] = 0
        bad.sort()  # they came in the order of the shards; of a replacement's replacement too
        ids_ = torch.from_numpy(ids)
        encoded = device_decode.pack(files) if self._on_device else None
        return MicroBatch(images, torch.from_numpy(labels), ids_, ids_ != PADDING, bad, encoded)

    def instead(self, batch: MicroBatch, slot: int) -> torch.Tensor:
        """Pixels for a slot whose file the device could not decode: decoded here, or those of its replacement.

        `batch` then tells of that one. The crop is that of epoch 0.
        """
        settings = self.settings.model_copy(update={"decode": "cpu"})
        here = Samples(self.index, settings, self.size, self.seed, self.training)
        other = here.__getitems__([(0, int(batch.ids[slot]))])
        batch.bad.extend(other.bad)
        batch.ids[slot], batch.labels[slot] = other.ids[0], other.labels[0]
        return other.images[0]

    def _replacement(self, epoch: int, row: int, attempt: int) -> int:
        """Another row of the same class, so that class shares stay what they are; of any, if it has no other."""
        label = int(self.index.labels[row])
        if label not in self._of_class:
            self._of_class[label] = np.flatnonzero(self.index.labels == label)
        rows: Sequence[int] | np.ndarray = self._of_class[label]
        if len(rows) < 2:
            rows = range(len(self.index))
        digest = hashlib.blake2b(f"{epoch} {row} {attempt}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") % len(rows)
        return int(rows[place] if rows[place] != row else rows[(place + 1) % len(rows)])

    def _pixels(self, epoch: int, row: int, payload: memoryview) -> torch.Tensor | Jpeg | Bad:
        try:
            if not self.training:
                return transforms.evaluation_pixels(payload, self.settings, self.size)
            # By sample, not by slot or process: the same pixels whoever decodes. 1: not a seed of augment.py.
            rng = np.random.default_rng([self.seed, epoch, row, 1])
            if self._on_device and (file := device_decode.jpeg(payload, self.settings, rng)):
                return file
            pixels = transforms.training_pixels(payload, self.settings, self.size, rng)
        except Exception as error:
            return self._bad(row, "undecodable", f"not decodable ({type(error).__name__}: {error})")
        return colour.change(pixels, self.settings, rng)  # whose faults are not the file's

    def pictures(self, rows: Sequence[int]) -> Iterator[tuple[int, memoryview | Bad]]:
        """Place in `rows` and verified picture file of each sample, in the order in which they lie in the shards.

        Neighbours are read in one call. A picture is valid until the next one is asked for: they share a buffer,
        which stays in the processor's cache for CRC and decoder.
        """
        if not rows:
            return
        columns, places = self.index.columns, self.index.shard_of(rows)
        by_place = np.lexsort((columns["offset"][rows], places))
        self._read_ahead(np.asarray(rows)[by_place])
        # Lists: arithmetic on NumPy's scalars costs ten times that on Python's integers.
        shards, (offsets, sizes, starts, lengths, checksums) = (
            places.tolist(),
            [columns[name][rows].tolist() for name in ("offset", "size", "image_offset", "image_size", "crc32")],
        )
        for group in _groups(by_place.tolist(), shards, offsets, sizes, self._gap, self._largest):
            begin = offsets[group[0]]
            try:
                data = self._read(shards[group[0]], begin, max(offsets[p] + sizes[p] for p in group) - begin)
            except OSError as error:
                if self._remote and not isinstance(error, FileNotFoundError):
                    # Tried for a minute already. To go on without these samples would take a minute for each, and
                    # change what the model sees for the sake of a server's bad hour.
                    raise DataFailed(str(error)) from None
                data = memoryview(b"")  # a whole group may fail for the sake of one member: each alone
            for place in group:
                span = data[offsets[place] - begin : offsets[place] - begin + sizes[place]]
                if crc32(span) == checksums[place] and len(span) == sizes[place]:
                    yield place, span[starts[place] : starts[place] + lengths[place]]
                else:
                    yield place, self._again(rows[place])

    def _read(self, shard: int, start: int, size: int) -> memoryview:
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        self.index.storage.read_into(shard, start, view)
        return view

    def _again(self, row: int) -> memoryview | Bad:
        """The picture of a row whose first reading failed: perhaps only a cached copy was damaged."""
        try:
            return memoryview(self.index.image(row))
        except OSError as error:
            return self._bad(row, "unreadable", f"not readable ({error})")
        except ValueError:
            return self._bad(row, "changed", "changed since it was indexed (CRC)")

    def _bad(self, row: int, reason: str, detail: str) -> Bad:
        shard = self.index.shards[int(self.index.shard_of(row))].name
        return Bad(int(row), shard, self.index.key(row), reason, detail)

    def _read_ahead(self, rows: np.ndarray) -> None:
        """Have the system read whole chunks: their other samples are wanted in the next steps."""
        if not self._chunk:
            return
        for chunk in np.unique(rows // self._chunk).tolist():
            if chunk in self._advised:
                continue
            self._advised[chunk] = None
            if len(self._advised) > _ADVISED:
                del self._advised[next(iter(self._advised))]
            first, last = chunk * self._chunk, min((chunk + 1) * self._chunk, len(self.index)) - 1
            shard, start, _ = self.index.span(first)
            end_shard, end, size = self.index.span(last)
            if shard == end_shard:
                self.index.storage.expect(shard, start, end + size - start)


def _groups(
    by_place: list[int], shards: list[int], offsets: list[int], sizes: list[int], gap: int, largest: int
) -> Iterator[list[int]]:
    """Places whose samples lie close enough together to be read in one call."""
    group, shard, begin, end = list[int](), -1, 0, 0
    for place in by_place:
        offset, size = offsets[place], sizes[place]
        if group and (shards[place] != shard or offset - end > gap or offset + size - begin > largest):
            yield group
            group = []
        if not group:
            shard, begin = shards[place], offset
        end = offset + size
        group.append(place)
    if group:
        yield group


def through_webdataset(index: Index, ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """Picture file and label of `ids` as webdataset itself parses them: what the tests hold the reader to."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    spans = ({"url": str(i), "stream": io.BytesIO(index.read(i))} for i in ids)
    for sample in group_by_keys(tar_file_expander(spans)):
        yield next(sample[extension] for extension in IMAGES if extension in sample), int(sample[LABEL])

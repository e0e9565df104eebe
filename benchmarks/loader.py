"""Pictures a second on one core, side by side with the peers in one run.

make peers                                  # once: .venv-peers with webdataset, MosaicML Streaming, torchvision
.venv/bin/python benchmarks/loader.py       # some 5 minutes; --photos 200 --rounds 2 for a quick look

All cases take turns in `--rounds` rounds, each in one process with one thread; counted is CPU time, since other work
on the machine changes the clock's. What stands in the table are medians, and ratios of medians.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import photos, results
from vitdist.config import Batch, Config, Data, Model, Scratch, Train
from vitdist.data import index, loader, reader, transforms
from vitdist.data.index import Index
from vitdist.data.reader import Bad, Samples

BATCH = 64


def settings(folder: Path) -> Config:
    return Config(
        data=Data(train=str(folder / "plain"), val="-", workers=0),
        model=Model(scratch=Scratch(), image_size=224),
        train=Train(global_batch=BATCH, epochs=1),
    )


def beside_the_bare_loop(folder: Path) -> tuple[float, float]:
    """Pictures a CPU second of the training loader as it is (order, read, CRC, decode, crop, flip, batch of uint8), and
    of decode, crop and flip of the same pictures from memory. Batch by batch in turn: the machine's speed changes.
    """
    config, opened = settings(folder), Index.open(folder / "plain")
    payloads = [opened.image(i) for i in range(len(opened))]
    training = loader.open_training(config, BATCH)
    batches = training.batches(Batch(global_batch=BATCH, micro_batch=BATCH, accumulation=1, world=1), 0, 0, 1)
    next(batches)
    ours = bare = 0.0
    steps = training.samples // BATCH - 1
    for _ in range(steps):
        began = time.process_time()
        ids = next(batches).ids.tolist()
        ours, began = ours + time.process_time() - began, time.process_time()
        for i in ids:
            transforms.training_pixels(payloads[i], config.data, 224, np.random.default_rng([0, 0, i, 1]))
        bare += time.process_time() - began
    batches.close()
    return steps * BATCH / ours, steps * BATCH / bare


def read(folder: Path) -> Iterator[int]:
    """Read and verify alone, in the order of training, 64 at a time."""
    config = settings(folder)
    training = loader.open_training(config, BATCH)
    assert training.samples_of
    samples, order = training.samples_of(), np.random.default_rng(0).permutation(training.samples)
    yield 0
    for ids in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
        for _, picture in samples.pictures(ids.tolist()):
            assert not isinstance(picture, Bad)
        yield len(ids)


def read_unverified(folder: Path) -> Iterator[int]:
    """The same without CRCs: webdataset verifies nothing either."""
    kept = reader.crc32
    reader.crc32 = _Anything
    try:
        yield from read(folder)
    finally:
        reader.crc32 = kept


class _Anything:
    """A checksum that fits."""

    def __init__(self, content: memoryview) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def first_batch(folder: Path) -> dict[str, float]:
    """Milliseconds from opening the set to its first batch, at the start of an epoch and at 90 % of one."""
    config, batch = settings(folder), Batch(global_batch=BATCH, micro_batch=BATCH, accumulation=1, world=1)
    steps = loader.open_training(config, BATCH).samples // BATCH
    times: dict[str, list[float]] = {"at 0 %": [], "at 90 %": []}
    for _ in range(9):
        for kept, start in zip(times.values(), (0, round(0.9 * steps)), strict=True):
            began = time.process_time()
            batches = loader.open_training(config, BATCH).batches(batch, 0, start, 1)
            next(batches)
            kept.append(1000 * (time.process_time() - began))
            batches.close()
    return {name: round(float(np.median(kept)), 1) for name, kept in times.items()}


def parts(folder: Path) -> dict[str, float]:
    """Microseconds of one picture's parts, each measured alone: where the time goes."""
    import simplejpeg
    from isal.isal_zlib import crc32
    from torch.nn import functional as F

    opened = Index.open(folder / "plain")
    config, rows = settings(folder), list(range(min(256, len(opened))))
    payloads = [opened.image(i) for i in rows]
    decoded = [torch.from_numpy(simplejpeg.decode_jpeg(p)).permute(2, 0, 1) for p in payloads[:64]]
    rng = np.random.default_rng(0)
    crop = transforms.training_crop(config.data, rng)
    boxes = [tuple(map(int, crop(d.shape[2], d.shape[1]))) for d in decoded]
    views = [d[None, :, t : max(t + 1, b), x : max(x + 1, r)] for d, (x, t, r, b) in zip(decoded, boxes, strict=True)]
    batch, square = torch.zeros((64, 3, 224, 224), dtype=torch.uint8), torch.zeros((3, 224, 224), dtype=torch.uint8)
    samples = Samples(opened, config.data, 224, 0, training=True)

    def each(work: Callable[[Any], Any], items: list[Any]) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            for item in items:
                work(item)
            times.append((time.process_time() - began) / len(items))
        return 1e6 * float(np.median(times))

    return {
        "decode (simplejpeg)": each(simplejpeg.decode_jpeg, payloads),
        "resize of the crop": each(lambda v: F.interpolate(v, (224, 224), mode="bilinear", antialias=True), views),
        "generator and box": each(
            lambda i: transforms.training_crop(config.data, np.random.default_rng([0, 0, i, 1]))(500, 375), rows
        ),
        "flip": each(lambda _: square.flip(-1), rows),
        "into the batch": each(lambda i: batch[i % 64].copy_(square), rows),
        "read, group, verify": each(lambda ids: list(samples.pictures(ids)), [rows]) / len(rows),
        "CRC-32 of it": each(crc32, payloads),
    }


class Peers:
    """peers.py, running."""

    def __init__(self, python: Path, folder: Path) -> None:
        script = Path(__file__).with_name("peers.py")
        self._process = subprocess.Popen(
            [str(python), str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, case: str) -> tuple[int, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{case}: the peers' process ended, exit code {self._process.wait()}")
        done, seconds = json.loads(answer)
        return done, seconds


def measured(case: Callable[[Path], Iterator[int]], folder: Path) -> tuple[int, float]:
    batches = case(folder)
    next(batches)
    began, done = time.process_time(), 0
    for number in batches:
        done += number
    return done, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/tmp/vitdist-bench"), help="folder for the photos")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="their Python")
    args = parser.parse_args()
    if not args.peers.exists():
        raise SystemExit(f"{args.peers}: not there; run: make peers")
    torch.set_num_threads(1)
    folder = args.work / str(args.photos)
    if not (folder / "default").exists():
        print(f"making {args.photos} photos in {folder} ...", file=sys.stderr)
        photos.shards(folder / "plain", args.photos, 100)
        index.build(folder / "plain")
        photos.shards(folder / "default", args.photos, 100, mtime=None)
    peers = Peers(args.peers, folder)
    cases: dict[str, Callable[[], tuple[int, float]]] = {
        "webdataset + PIL + float": lambda: peers.run("webdataset_classic"),
        "MosaicML Streaming + PIL": lambda: peers.run("streaming_pil"),
        "vitdist, reading alone": lambda: measured(read, folder),
        "vitdist, reading unverified": lambda: measured(read_unverified, folder),
        "webdataset, reading alone": lambda: peers.run("webdataset_read"),
        "webdataset, its default tars": lambda: peers.run("webdataset_read_default"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ("vitdist", "bare decode + crop", *cases)}
    shares: list[float] = []
    for turn in range(args.rounds + 1):
        ours, bare = beside_the_bare_loop(folder)
        if turn:
            speeds["vitdist"].append(ours)
            speeds["bare decode + crop"].append(bare)
            shares.append(ours / bare)
        for name, case in cases.items():
            done, seconds = case()
            if turn:  # the first round warms caches
                speeds[name].append(done / seconds)
    medians = {name: float(np.median(values)) for name, values in speeds.items()}
    ratios = {
        "over webdataset + PIL + float": medians["vitdist"] / medians["webdataset + PIL + float"],
        "over MosaicML Streaming + PIL": medians["vitdist"] / medians["MosaicML Streaming + PIL"],
        "of the bare loop": float(np.median(shares)),
        "reading unverified over webdataset": medians["vitdist, reading unverified"]
        / medians["webdataset, reading alone"],
        "reading over webdataset": medians["vitdist, reading alone"] / medians["webdataset, reading alone"],
        "reading over its default tars": medians["vitdist, reading alone"] / medians["webdataset, its default tars"],
    }
    results.publish(
        "loader",
        {
            "photos": args.photos,
            "mean_bytes": sum(p.stat().st_size for p in (folder / "plain").glob("*.tar")) // args.photos,
            "images_per_cpu_second": {name: round(value, 1) for name, value in medians.items()},
            "all_rounds": {name: [round(v, 1) for v in values] for name, values in speeds.items()},
            "ratios": {name: round(value, 3) for name, value in ratios.items()},
            "first_batch_ms": first_batch(folder),
            "microseconds_a_picture": {name: round(value, 1) for name, value in parts(folder).items()},
        },
    )


if __name__ == "__main__":
    main()

"""Samples a second on one core for reading the headers of a shard, for its checksums, and for a whole scan.

.venv/bin/python benchmarks/index.py        # a minute; photos of some 97 KB

CPU time, medians of `ROUNDS`, files in the page cache.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import photos, results
from vitdist.data import index, tar

ROUNDS = 7


def headers(path: Path) -> int:
    """Walk and verify every header, group members to samples."""
    with open(path, "rb", buffering=0) as file:
        return sum(1 for _ in tar.samples(tar.File(file.fileno()), str(path)))


def whole(path: Path) -> int:
    """What `vitdist index` does: headers, labels, CRC-32 of each sample, SHA-256 of the shard."""
    return index.scan(path).shard.samples


def without_digest(path: Path) -> int:
    """The same without the SHA-256."""
    kept = hashlib.sha256
    hashlib.sha256 = _Nothing  # type: ignore[assignment,misc]
    try:
        return index.scan(path).shard.samples
    finally:
        hashlib.sha256 = kept  # type: ignore[misc]


class _Nothing:
    def update(self, content: memoryview) -> None:
        """Hash nothing."""

    def hexdigest(self) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("/tmp/vitdist-bench"), help="folder for the photos")
    args = parser.parse_args()
    folder = args.work / str(args.photos) / "plain"
    if not folder.exists():
        photos.shards(folder, args.photos, 100)
    shards = index.tars(folder)
    cases: dict[str, Callable[[Path], int]] = {
        "headers": headers,
        "headers and CRC-32": without_digest,
        "headers, CRC-32 and SHA-256": whole,
    }
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(ROUNDS + 1):
        for name, case in cases.items():
            began = time.process_time()
            done = sum(case(path) for path in shards)
            if turn:
                speeds[name].append(done / (time.process_time() - began))
    results.publish(
        "index",
        {
            "photos": args.photos,
            "samples_per_cpu_second": {name: round(float(np.median(v))) for name, v in speeds.items()},
        },
    )


if __name__ == "__main__":
    main()

"""The peers' side of loader.py, in an environment of their own: MosaicML Streaming wants older libraries.

python benchmarks/peers.py FOLDER    # reads the name of a case a line, answers with [pictures, seconds of CPU time]

Every pipeline gives batches of 64 in one process, as its own documentation sets it up.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision import transforms

BATCH = 64
CLASSIC = transforms.Compose(
    [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
)


def tars(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def webdataset_classic(folder: Path) -> Iterator[int]:
    """The recipe of webdataset's own ImageNet example."""
    data = (
        webdataset.WebDataset(tars(folder / "plain"), shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(CLASSIC, lambda label: label)
        .batched(BATCH)
    )
    for images, _ in webdataset.WebLoader(data, batch_size=None, num_workers=0):
        yield len(images)


class Mosaic(StreamingDataset):
    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(number)
        return CLASSIC(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), sample["cls"]


def streaming_pil(folder: Path) -> Iterator[int]:
    """MosaicML Streaming from a local folder, shuffled, with PIL and the same transforms."""
    mds = folder / "mds"
    if not (mds / "index.json").exists():
        with MDSWriter(out=str(mds), columns={"jpg": "bytes", "cls": "int"}, size_limit=16 << 20) as out:
            for sample in webdataset.WebDataset(tars(folder / "plain"), shardshuffle=False):
                out.write({"jpg": sample["jpg"], "cls": int(sample["cls"])})
    for images, _ in DataLoader(Mosaic(local=str(mds), shuffle=True, batch_size=BATCH), BATCH, num_workers=0):
        yield len(images)


def webdataset_read(folder: Path) -> Iterator[int]:
    """Iterating over the samples' bytes, nothing decoded."""
    for _ in webdataset.WebDataset(tars(folder / "plain"), shardshuffle=False):
        yield 1


def webdataset_read_default(folder: Path) -> Iterator[int]:
    """The same on tars as TarWriter writes them by default, with a PAX header for every member."""
    for _ in webdataset.WebDataset(tars(folder / "default"), shardshuffle=False):
        yield 1


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    cases = {c.__name__: c for c in (webdataset_classic, streaming_pil, webdataset_read, webdataset_read_default)}
    for line in sys.stdin:
        batches = cases[line.strip()](folder)
        done = next(batches)  # what is set up once is not counted
        began, done = time.process_time(), 0
        for number in batches:
            done += number
        print(json.dumps([done, time.process_time() - began]), flush=True)


if __name__ == "__main__":
    main()

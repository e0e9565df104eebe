"""Pictures a second on one core with each augmentation, from JPEGs in memory to 224 px, and torchvision beside it.

.venv/bin/python benchmarks/augment.py       # two minutes; --photos 100 --rounds 3 for a quick look

All cases take turns in `--rounds` rounds of the same photos, in one process with one thread. Counted is CPU time, since
other work on the machine changes the clock's; what stands in the table are medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import photos, results
from vitdist.config import Data
from vitdist.data import colour, transforms

SIZE = 224
CASES: dict[str, dict[str, Any]] = {
    "crop and flip": {},
    "+ colour jitter 0.3": {"colour_jitter": 0.3},
    "+ trivial": {"auto_augment": "trivial"},
    "+ rand-m9-mstd0.5-inc1": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "+ original": {"auto_augment": "original"},
    "+ 3a and colour jitter 0.3": {"auto_augment": "3a", "colour_jitter": 0.3},
    "+ augmix-m5-w4": {"auto_augment": "augmix-m5-w4"},
}


def seconds(work: Callable[[int], object], number: int) -> float:
    """CPU time of `work` for each of `number` pictures."""
    began = time.process_time()
    for i in range(number):
        work(i)
    return time.process_time() - began


def ours(files: list[bytes], more: dict[str, Any]) -> Callable[[int], object]:
    """A picture as a loader process makes it."""
    settings = Data(train="-", val="-", **more)
    colour.load(settings)

    def work(i: int) -> torch.Tensor:
        rng = np.random.default_rng([0, 0, i, 1])
        return colour.change(transforms.training_pixels(files[i], settings, SIZE, rng), settings, rng)

    return work


def peers(cut: list[torch.Tensor]) -> dict[str, Callable[[int], object]]:
    """Jitter and TrivialAugment of pixels that are there: ours, and torchvision's kernels for tensors."""
    from torchvision.transforms import v2

    jitter, trivial = v2.ColorJitter(0.3, 0.3, 0.3), v2.TrivialAugmentWide()
    settings = {name: Data(train="-", val="-", **CASES[name]) for name in ("+ colour jitter 0.3", "+ trivial")}
    return {
        "colour jitter, vitdist": lambda i: colour.change(
            cut[i], settings["+ colour jitter 0.3"], np.random.default_rng(i)
        ),
        "colour jitter, torchvision": lambda i: jitter(cut[i]),
        "trivial, vitdist": lambda i: colour.change(cut[i], settings["+ trivial"], np.random.default_rng(i)),
        "trivial, torchvision": lambda i: trivial(cut[i]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = list(photos.jpegs(args.photos))
    settings = Data(train="-", val="-")
    cut = [transforms.training_pixels(file, settings, SIZE, np.random.default_rng(i)) for i, file in enumerate(files)]
    whole = {name: ours(files, more) for name, more in CASES.items()}
    alone = peers(cut)
    taken: dict[str, list[float]] = {name: [] for name in whole | alone}
    for turn in range(args.rounds + 1):
        for name, work in (whole | alone).items():
            spent = seconds(work, args.photos)
            if turn:  # the first round warms caches
                taken[name].append(spent / args.photos)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    results.publish(
        "augment",
        {
            "photos": args.photos,
            "rounds": args.rounds,
            "images_per_cpu_second": {name: round(1 / medians[name], 1) for name in whole},
            "microseconds_a_picture_without_decoding": {name: round(1e6 * medians[name]) for name in alone},
        },
    )


if __name__ == "__main__":
    main()

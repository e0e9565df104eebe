"""Whether loader processes can feed the model: measured decode speed against what the model takes.

    supply = supply.check(samples, flops_per_image, device, cores, gpu)
    print(supply.text())          # need 5 cpus per GPU for 900 images/s, have 2

A GPU that waits for pictures is the dearest fault of a training set-up and the least visible: SLURM gives 1 or 2
cores a task unless asked. So it is told at the start, with what to do.
"""

import math
import time
from typing import NamedTuple

import torch

from vitdist.data.reader import Samples

# Of the speed of plain matrix multiplication, what training a ViT reaches: 40 to 55 % in published runs.
_EFFICIENCY = 0.45


class Supply(NamedTuple):
    per_core: float
    """Pictures that one core reads, decodes and crops in a second."""
    demand: float
    """Pictures that the model of one rank can train on in a second."""
    cores: int
    """Cores of one rank."""
    gpu: bool

    @property
    def needed(self) -> int:
        """Cores of one rank that keep up with its GPU."""
        return max(1, math.ceil(self.demand / self.per_core))

    @property
    def share(self) -> float:
        """Without a GPU: part of the time that goes into pictures, as cores do both in turn."""
        return self.demand / (self.per_core * self.cores + self.demand)

    def text(self) -> str:
        """One line for the reader of the log."""
        if not self.gpu:
            return f"pictures take about {100 * self.share:.0f} % of the time ({self.per_core:,.0f} images/s a core)"
        speed = f"{self.per_core:,.0f} images/s a core"
        if self.needed <= self.cores:
            return f"data: {self.needed} of {self.cores} cpus per GPU feed {self.demand:,.0f} images/s ({speed})"
        return (
            f"warning: need {self.needed} cpus per GPU for {self.demand:,.0f} images/s, have {self.cores} ({speed}): "
            "ask for more cpus in the cluster's profile, or pack smaller pictures (vitdist pack --resize 256)"
        )


def check(samples: Samples, flops_per_image: float, device: torch.device, dtype: torch.dtype, cores: int) -> Supply:
    """Measure decoding on this core and matrix multiplication on `device`, half a second at most each.

    `flops_per_image`: forward and backward.
    """
    return Supply(
        decode_speed(samples), _EFFICIENCY * matmul_flops(device, dtype) / flops_per_image, cores, device.type == "cuda"
    )


def decode_speed(samples: Samples, most: int = 64, seconds: float = 0.5) -> float:
    """Pictures a second of CPU time, over up to `most` neighbours, for `seconds` of the clock at most.

    Neighbours: behind a cache, samples from all over would bring a block of 8 MiB each.
    """
    first = max(0, (len(samples) - most) // 2)
    rows = range(first, min(first + most, len(samples)))
    samples.__getitems__([(0, rows[0])])  # opens files, warms caches
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began, until, done = time.process_time(), time.monotonic() + seconds, 0
        for row in rows:
            samples.__getitems__([(0, row)])
            done += 1
            if time.monotonic() > until:
                break
        return done / max(time.process_time() - began, 1e-6)
    finally:
        torch.set_num_threads(threads)


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix multiplication, as training does it on `device`."""
    side = 4096 if device.type == "cuda" else 512
    a = torch.ones((side, side), dtype=dtype, device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ a
    synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        synchronize()
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - began)

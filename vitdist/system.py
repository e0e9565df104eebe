"""What the machines of a run say of themselves: processor, memory and disk of the nodes, and each rank's GPU.

    machine = Machine(device, run.path if me.first else None)
    figures(me.gather(machine.now()))

The GPU's own figures need nvidia-ml-py and a driver that tells them; where one of the two lacks, they are left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Gpu(NamedTuple):
    """What NVML tells of a GPU."""

    busy_pct: float
    """Of the last sample period (1/6 to 1 s), the time in which any kernel ran."""
    temperature_c: float
    power_w: float


class Now(NamedTuple):
    """What one rank sees at a row of the log."""

    cpu_pct: float
    """Of all cores of its node, since the row before."""
    ram_pct: float
    """Of its node, whoever uses it."""
    disk_free_gib: float | None
    """Where the run folder lies; None on ranks that do not ask: on a parallel file system each asking costs."""
    peak_gib: float | None
    """Most GPU memory that was allocated so far, without what the allocator keeps in reserve; None on a CPU."""
    gpu: Gpu | None


class Machine:
    """Asks a rank's node and GPU; `folder`: whose disk to look at."""

    def __init__(self, device: torch.device, folder: Path | None) -> None:
        self._device, self._folder = device, folder
        self._tells = device.type == "cuda"
        psutil.cpu_percent()  # counts from one call to the next: the first says nothing

    def now(self) -> Now:
        cuda = self._device.type == "cuda"
        return Now(
            cpu_pct=psutil.cpu_percent(),
            ram_pct=psutil.virtual_memory().percent,
            disk_free_gib=_free_gib(self._folder) if self._folder else None,
            peak_gib=torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else None,
            gpu=self._gpu(),
        )

    def _gpu(self) -> Gpu | None:
        if not self._tells:
            return None
        try:
            return Gpu(
                busy_pct=torch.cuda.utilization(self._device),
                temperature_c=torch.cuda.temperature(self._device),
                power_w=torch.cuda.power_draw(self._device) / 1000,  # it tells milliwatts
            )
        except Exception:  # no nvidia-ml-py, no NVML, a part of a GPU (MIG): each has an error of its own type
            self._tells = False
            return None


def _free_gib(folder: Path) -> float | None:
    try:
        about = os.statvfs(folder)
    except OSError:  # a figure less; who writes there will hear of it
        return None
    return about.f_bavail * about.f_frsize / 2**30


def figures(nows: Sequence[Now]) -> dict[str, float]:
    """Of all ranks, by rank: what they have in the mean, of what is scarce the worst."""
    found: dict[str, float] = {
        "sys/cpu_pct": sum(now.cpu_pct for now in nows) / len(nows),
        "sys/ram_pct": max(now.ram_pct for now in nows),
    }
    free = [now.disk_free_gib for now in nows if now.disk_free_gib is not None]
    peaks = [now.peak_gib for now in nows if now.peak_gib is not None]
    gpus = [now.gpu for now in nows if now.gpu]
    if free:
        found["sys/disk_free_gib"] = min(free)
    if peaks:
        found["perf/memory_gib"] = max(peaks)
    if gpus:
        found["sys/gpu_pct"] = sum(gpu.busy_pct for gpu in gpus) / len(gpus)
        found["sys/gpu_temperature_c"] = max(gpu.temperature_c for gpu in gpus)
        found["sys/gpu_power_w"] = sum(gpu.power_w for gpu in gpus) / len(gpus)
    return found

"""How fast a run goes and what it waits for: images/s, data wait, MFU, memory, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Matrix multiplication that can really be had, TFLOP/s in fp16/bf16, dense; 790 is the best that
# stas00/ml-engineering measured on H100 and H200 (of 989 on paper), 312 NVIDIA's figure for the A100.
PEAK_TFLOPS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU is measured against, or None where no honest figure is known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in name), None)


class Meter:
    """Times between two rows of the log, on this rank; `world` ranks run in step."""

    def __init__(self, global_batch: int, flops_per_image: float, world: int, device: torch.device) -> None:
        self._batch, self.flops_per_image, self._world, self._device = global_batch, flops_per_image, world, device
        self._peak = peak_flops(device)
        self._images, self._busy = 0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    def waited(self, seconds: float) -> None:
        """Time that the step loop stood still for data."""
        self._waited += seconds

    def step(self) -> None:
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the figures what is no training: an evaluation, a save."""
        before = time.monotonic()
        yield
        self._start += time.monotonic() - before

    def row(self, steps_left: int) -> dict[str, float]:
        """Figures since the last row, and start the next."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # kernels still queued belong to this row
        elapsed, steps = max(time.monotonic() - self._start, 1e-9), max(1, self._steps)
        images_per_s = self._steps * self._batch / elapsed
        figures = {
            "perf/images_per_s": images_per_s,
            "perf/step_s": elapsed / steps,
            "perf/data_wait_pct": 100 * self._waited / elapsed,
            "perf/eta_s": steps_left * elapsed / steps,
        }
        if self._device.type == "cuda":
            figures["perf/memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        if self._peak:
            figures["perf/mfu_pct"] = 100 * images_per_s * self.flops_per_image / (self._peak * self._world)
        self._images += self._steps * self._batch
        self._busy += elapsed
        self._restart()
        return figures

    @property
    def images_per_s(self) -> float:
        """Of the whole run so far, training alone."""
        return self._images / self._busy if self._busy else 0.0

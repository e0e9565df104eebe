"""How fast a run goes and what it waits for: images/s, steps, data wait, MFU, time left, the slowest rank.

Ranks run in step, so all take the time of the slowest, and figures of the step cannot tell which one it is. What can is
each rank's own time: in its forward passes, which wait for no peer (but under ZeRO-3, where layers are gathered in
them, so that a slow rank slows the others' too and is hard to see), and standing still for its own data.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Matrix multiplication that can really be had, TFLOP/s in fp16/bf16, dense; 790 is the best that
# stas00/ml-engineering measured on H100 and H200 (of 989 on paper), 312 NVIDIA's figure for the A100.
PEAK_TFLOPS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}


MOST_EVENTS = 512
"""Forward passes timed on a GPU between two rows; the first ones stand for all."""
# When a rank is called slow. Clocks of healthy GPUs of one kind differ by a few percent.
SLOW_RATIO = 1.5
SLOW_SHARE = 0.1
"""Of a step, what the rank needs longer than the median: less would cost too little to tell."""
WAIT_SHARE = 0.5
ROWS = 3
"""In so many rows of the log one after the other: a single one may be a page cache or a neighbour."""


class Own(NamedTuple):
    """One rank's own time in a step, in seconds; the mean since the last row."""

    compute_s: float
    """In forward passes."""
    wait_s: float
    """Standing still for its data."""


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU is measured against, or None where no honest figure is known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in name), None)


class Meter:
    """Times between two rows of the log, on this rank; `world` ranks run in step.

    A step's own time is that between two ends of `step` on this processor: kernels may then still be queued on a GPU,
    where to wait for them at each step would leave it idle. What runs ahead in one step is waited for in a later one,
    so the mean is right, and their spread is that of the processor.
    """

    def __init__(self, global_batch: int, flops_per_image: float, world: int, device: torch.device) -> None:
        self._batch, self.flops_per_image, self._world, self._device = global_batch, flops_per_image, world, device
        self._peak = peak_flops(device)
        self._updates, self._paused_s = 0, 0.0
        """Of the rows so far."""
        self.busy_s = 0.0
        """Seconds of training so far, without what was left out."""
        self._restart()

    def begin(self) -> None:
        """Leave out what was before: the start, or its first update, in which loaders and kernels get ready."""
        self._catch_up()
        self._restart()

    def _catch_up(self) -> None:
        """Have the GPU do what is queued: it belongs to what was before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _restart(self) -> None:
        self._start = self._stepped = time.monotonic()
        self._durations: list[float] = []
        self._waited = 0.0
        self._computed, self._passes = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waited(self, seconds: float) -> None:
        """Time that the step loop stood still for data."""
        self._waited += seconds

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a forward pass: this rank's own work, in which it waits for nobody."""
        self._passes += 1
        if self._device.type != "cuda":
            before = time.monotonic()
            yield
            self._computed += time.monotonic() - before
        elif len(self._events) < MOST_EVENTS:
            # The GPU notes when it gets there: to wait for it here would leave it idle between kernels.
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            yield

    def step(self) -> None:
        """One update was made."""
        now = time.monotonic()
        self._durations.append(now - self._stepped)
        self._stepped = now

    def own(self) -> Own:
        """This rank's own times since the last row; to be asked before `row`, which starts anew."""
        computed, steps = self._computed, max(1, len(self._durations))
        if self._events:
            self._events[-1][1].synchronize()
            measured = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000  # it tells milliseconds
            computed = measured / len(self._events) * self._passes
        return Own(computed / steps, self._waited / steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the figures what is no training: an evaluation, a save."""
        self._catch_up()
        before = time.monotonic()
        yield
        pause = time.monotonic() - before
        self._start += pause
        self._stepped += pause
        self._paused_s += pause

    def row(self, steps_left: int) -> dict[str, float]:
        """Figures since the last row, and start the next."""
        self._catch_up()
        elapsed, steps = max(time.monotonic() - self._start, 1e-9), max(1, len(self._durations))
        images = len(self._durations) * self._batch
        self._updates += len(self._durations)
        self.busy_s += elapsed
        # What is left out of the speed is part of the time that is left: of each step as much as so far.
        pause = self._paused_s / max(1, self._updates)
        figures = {
            "perf/images_per_s": images / elapsed,
            "perf/step_s": elapsed / steps,
            **quantiles(self._durations or [elapsed]),
            "perf/data_wait_pct": 100 * self._waited / elapsed,
            "perf/eta_s": steps_left * (elapsed / steps + pause),
        }
        if self._device.type == "cuda":
            figures["perf/images_per_s_gpu"] = images / elapsed / self._world
        if self._peak:
            figures["perf/mfu_pct"] = 100 * images / elapsed * self.flops_per_image / (self._peak * self._world)
        self._restart()
        return figures

    @property
    def images_per_s(self) -> float:
        """Of this start so far, training alone."""
        return self._updates * self._batch / self.busy_s if self.busy_s else 0.0


def quantiles(durations: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and longest of the times of steps, in seconds: each that of a step (nearest rank)."""
    ordered = sorted(durations)

    def of(share: float) -> float:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return {"perf/step_p50_s": of(0.5), "perf/step_p95_s": of(0.95), "perf/step_max_s": ordered[-1]}


def lag(owns: Sequence[Own], step_s: float) -> dict[str, float]:
    """Figures of the slowest ranks from the times of all, by rank; `step_s`: seconds of a step. It is pure."""
    computes, waits = [own.compute_s for own in owns], [own.wait_s for own in owns]
    slowest, waiting = computes.index(max(computes)), waits.index(max(waits))
    typical = _typical(computes)
    return {
        "perf/slowest_rank": float(slowest),
        "perf/slowest_rank_ratio": computes[slowest] / typical if typical > 0 else 1.0,
        "perf/data_wait_max_pct": 100 * waits[waiting] / step_s if step_s > 0 else 0.0,
        "perf/data_wait_slowest_rank": float(waiting),
    }


class Lags:
    """Says of each rank once that it is slow, and once that it waits for its data while the others wait for it."""

    def __init__(self) -> None:
        self._in_a_row: Counter[tuple[str, int]] = Counter()
        """Of (kind, rank): rows in which it was so, up to the newest."""
        self._said: set[tuple[str, int]] = set()

    def see(self, owns: Sequence[Own], step_s: float, hosts: Sequence[str]) -> list[tuple[str, str]]:
        """Look at a row of the log; returns what is to be said, as (slow_rank or slow_data, text).

        All by rank; `step_s`: seconds of a step.
        """
        found = _lagging(owns, step_s)
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in found})
        due = [key for key in found if self._in_a_row[key] >= ROWS and key not in self._said]
        self._said.update(due)
        return [(kind, f"rank {rank} ({hosts[rank]}) {found[kind, rank]}") for kind, rank in due]


def _lagging(owns: Sequence[Own], step_s: float) -> dict[tuple[str, int], str]:
    """(kind, rank) -> what is to be said of it, for the ranks that lag in one row."""
    found = {}
    compute_s, wait_s = (_typical(values) for values in zip(*owns, strict=True))
    for rank, own in enumerate(owns):
        if own.compute_s > SLOW_RATIO * compute_s and own.compute_s - compute_s > SLOW_SHARE * step_s:
            found["slow_rank", rank] = (
                f"is slow: its forward passes take {own.compute_s:.3g} s of a step of {step_s:.3g} s, those of the "
                f"median rank {compute_s:.3g} s, and all wait for it: look at its node for other processes, and at "
                "its clocks and temperature (nvidia-smi -q -d PERFORMANCE)"
            )
        # Where most ranks wait for data, none of them is to blame: perf/data_wait_pct tells.
        if own.wait_s > WAIT_SHARE * step_s and wait_s < own.wait_s / 2:
            found["slow_data", rank] = (
                f"waits for its data in {100 * own.wait_s / step_s:.0f} % of the time, and all wait for it: look at "
                "the storage, the cache and the processor cores of its node (data.cache, data.workers)"
            )
    return found


def _typical(values: Sequence[float]) -> float:
    """The median; of an even number the lower of the two, since the mean of two ranks would hide the slow one."""
    return statistics.median_low(values)

"""What a run takes of time, network, processors and disk, from shapes alone; imports no torch.

    needs = memory.estimate(settings, classes=1000, world=32)
    found = cost.estimate(settings, needs, samples=1_281_167, assumed=cost.Assumed(mfu=0.5))
    found.gpu_hours, found.sent, found.cores, found.checkpoint

What is arithmetic is exact: FLOP, updates, the bytes of a checkpoint. What hangs on machines is assumed, and `Assumed`
says what: the share of the GPUs' peak that is reached, and the speed of the file system.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitdist import config, memory
from vitdist.config import Config, Data
from vitdist.memory import Estimate
from vitdist.shapes import Network, Parameter

# JPEGs of 500 x 375 and 100 kB on one core of an AMD EPYC, images/s of CPU time (benchmarks/results, 2026-11-24: loader
# and augment).
_DECODED = {"none": 425.0, "trivial": 260.0, "rand": 260.0, "original": 283.0, "v0": 283.0, "3a": 212.0, "augmix": 78.0}
_JITTERED = 280.0
_RANDOM = 5056
"""Bytes of torch's generator on a CPU; one of CUDA has 16."""
_WIDEST = 64
"""Ranks whose files are all made up to be measured; of more, the first one stands for all."""


@dataclass(frozen=True)
class Assumed:
    """What is not known before a run."""

    tflops: float = 790.0
    """Peak of one GPU in half precision, 10^12 FLOP/s: what matrix multiplication reaches on an H100 or H200."""
    mfu: float = 0.4
    """Share of it that the run reaches."""
    write_gb_s: float = 0.5
    """10^9 bytes that the file system of the run folder takes each second, from all ranks together."""


@dataclass(frozen=True)
class Cost:
    """Of a run; None where the number of samples is not known."""

    updates: int | None
    """In all."""
    flops_update: float
    """FLOP of one update over all ranks, 2 a multiply-add, recomputation not counted (as MFU has it)."""
    flops_run: float | None
    sent: int
    """Bytes that each GPU sends in an update."""
    images_s: float
    """Of all GPUs, at the assumed share of their peak."""
    hours: float | None
    gpu_hours: float | None
    cores: float | None
    """Cores for each GPU that decoding needs to keep up; None where the GPU decodes."""
    checkpoint: int
    """Bytes of the files of a checkpoint, beside its manifest."""
    save_s: float
    """To write them."""


def estimate(settings: Config, found: Estimate, samples: int | None, assumed: Assumed) -> Cost:
    """The cost of training `settings` on a set of `samples`, without evaluations."""
    batch, net = found.batch, found.net
    updates = None
    if settings.train.steps is not None or samples is not None:
        updates = config.total_steps(settings.train, batch, samples or 0)
    again = 2.0 * net.macs if found.checkpointing else 0.0
    images_s = batch.world * assumed.tflops * 1e12 * assumed.mfu / (net.flops + again)
    hours = None if updates is None else updates * batch.global_batch / images_s / 3600
    size = sum(checkpoint_files(settings, found))
    return Cost(
        updates=updates,
        flops_update=net.flops * batch.global_batch,
        flops_run=None if updates is None else net.flops * batch.global_batch * updates,
        sent=sent(found),
        images_s=images_s,
        hours=hours,
        gpu_hours=None if hours is None else hours * batch.world,
        cores=None if settings.data.decode == "gpu" else images_s / batch.world / decoded(settings.data),
        checkpoint=size,
        save_s=size / (assumed.write_gb_s * memory.GB),
    )


def decoded(data: Data) -> float:
    """Pictures that one core decodes, crops and augments each second."""
    kind = data.auto_augment.split("-")[0].removesuffix("r")
    rate = _DECODED[kind]
    return min(rate, _JITTERED) if data.colour_jitter else rate


def sent(found: Estimate) -> int:
    """Bytes that each GPU sends in one update, by rings: an all-reduce of n bytes sends 2 n (w - 1) / w.

    As DeepSpeed 0.19 does it: ZeRO 1 and 2 reduce gradients by all-reduce, not by the reduce-scatter of the ZeRO paper,
    so that with the weights' all-gather it is 3 times the gradients; ZeRO 2 does so after each micro-batch. ZeRO 3
    gathers the weights for each micro-batch once, twice in a model too large to stay whole until its backward pass.
    """
    net, world = found.net, found.batch.world
    trained, whole = net.trained, net.total
    passes = found.batch.accumulation
    if found.zero == 0:
        elements = 2 * trained
    elif found.zero < 3:
        elements = trained * (2 * (passes if found.zero == 2 else 1) + 1)
    else:
        elements = passes * (whole * (1 if 2 * whole <= memory.REUSE else 2) + trained)
    return round(elements * memory.element(found.precision, found.autocast) * (world - 1) / world)


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_files(settings: Config, found: Estimate, cuda: bool = True) -> list[int]:
    """Bytes of each rank's file of a checkpoint after the first update: see checkpoint.py."""
    kinds = ["master", *memory.moments(settings.optim), *(["average"] if settings.optim.ema else [])]
    world, half = found.batch.world, found.precision if not found.autocast else "fp32"
    frozen = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[half]
    ranks = range(min(world, _WIDEST) if world <= _WIDEST else 1)
    sizes = []
    for rank in ranks:
        pieces: dict[str, tuple[int, int, str]] = {}
        for parameter, offset, size in fragments(found.net, found.zero, world, rank):
            pieces |= {f"{kind}/{parameter.name}": (offset, size, "F32") for kind in kinds}
        for parameter, offset, size in _frozen(found.net, found.zero, world, rank):
            pieces[f"frozen/{parameter.name}"] = (offset, size, frozen)
        ordered = dict(sorted(pieces.items()))
        if found.zero == 0:
            ordered = dict(list(ordered.items())[rank::world])
        sizes.append(_file(ordered, cuda))
    return sizes if world <= _WIDEST else sizes * world


def fragments(net: Network, zero: int, world: int, rank: int) -> Iterator[tuple[Parameter, int, int]]:
    """(parameter, where its part begins, elements of it) of what `rank` holds of what is trained."""
    for group in net.groups():
        part, begin = memory.partition(group, world), 0
        for p in group:
            if zero == 0:
                yield p, 0, p.numel
            elif zero == 3:
                yield from _shared(p, world, rank)
            else:
                low, high = max(rank * part, begin), min((rank + 1) * part, begin + p.numel)
                if low < high:
                    yield p, low - begin, high - low
            begin += p.numel


def _shared(p: Parameter, world: int, rank: int) -> Iterator[tuple[Parameter, int, int]]:
    share = memory.share(p, world)
    size = min(share, p.numel - rank * share)
    if size > 0:
        yield p, rank * share, size


def _frozen(net: Network, zero: int, world: int, rank: int) -> Iterator[tuple[Parameter, int, int]]:
    for p in net.parameters:
        if p.trained:
            continue
        if zero == 3:
            yield from _shared(p, world, rank)
        elif rank == 0 or zero == 0:
            yield p, 0, p.numel


def _file(pieces: dict[str, tuple[int, int, str]], cuda: bool) -> int:
    """Bytes of a file with these pieces: 8 of a length, the table, padded to 8, and the values."""
    widths = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    values = {key: (size, kind) for key, (_, size, kind) in pieces.items()}
    values |= {"rng/cpu": (_RANDOM, "U8")} | ({"rng/cuda": (16, "U8")} if cuda else {})
    offsets = {key: offset for key, (offset, _, _) in pieces.items()}
    table: dict[str, Any] = {"__metadata__": {"format": "vitdist", "offsets": json.dumps(offsets)}}
    end = 0
    for key in sorted(values, key=lambda key: (-widths[values[key][1]], key)):
        size, kind = values[key]
        begin, end = end, end + size * widths[kind]
        table[key] = {"dtype": kind, "shape": [size], "data_offsets": [begin, end]}
    text = len(json.dumps(table, separators=(",", ":")).encode())
    return 8 + text + -text % 8 + end

"""What a run needs of a GPU's memory, from names, shapes and types alone; imports no torch.

    found = memory.estimate(settings, classes=1000, world=32)      # raises shapes.Unknown where shapes are not known
    found.peak, found.parts                                        # bytes
    memory.fits(found, gpu_memory_gb=80), found.largest(80)

Weights, gradients and what the optimizer holds are DeepSpeed 0.19's own buffers to the byte, padding included; tests
compare them with real engines. What autograd saves is a formula that tests hold to real graphs on a CPU. What the CUDA
context takes and the allocator wastes is assumed: there was no GPU to measure it.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vitdist import config, shapes
from vitdist.config import Batch, Config, Optim
from vitdist.shapes import Network, Parameter

GB = 10**9
BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients under way (reduce_bucket_size), which it allocates whole."""
REUSE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a gathered parameter for its next use (max_reuse_distance)."""
PERSIST = 100_000
"""Elements below which ZeRO-3 keeps a parameter gathered for ever (param_persistence_threshold)."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead (prefetch_bucket_size)."""
CONTEXT = 1_500_000_000
"""Assumed: bytes of the CUDA context, cuBLAS, and NCCL's channels."""
_ASKED = 4096
WASTE = 0.05
"""Assumed: share of a GPU that the caching allocator cannot hand out."""


class State(NamedTuple):
    """Bytes that a rank holds between updates, and of gradients as an update begins with them."""

    weights: int
    """As the model computes with them, trained and frozen."""
    gradients: int
    """Reduced, after the last micro-batch."""
    masters: int
    """fp32 weights of the optimizer, where those are others."""
    moments: int
    """What the optimizer keeps of each weight, and its step counts."""
    average: int
    """optim.ema."""


class Saved(NamedTuple):
    """Bytes of one forward pass that the backward pass needs."""

    image: int
    """For each image."""
    fixed: int
    """Whatever the batch: autocast's copies of weights, relative position biases."""
    work: int
    """For each image: what the backward pass needs beside, at its worst."""


# ---- DeepSpeed's buffers ------------------------------------------------------------------------


def element(precision: str, autocast: bool) -> int:
    """Bytes of a weight as the model computes with it: 2 in fp16 and bf16, 4 in fp32 and under autocast."""
    return 4 if autocast or precision == "fp32" else 2


def moments(optim: Optim) -> tuple[str, ...]:
    """Kinds of tensors that the optimizer keeps of each weight."""
    if optim.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    if optim.name == "lion":
        return ("exp_avg",)
    return ("momentum_buffer",) if optim.momentum else ()


def partition(group: list[Parameter], world: int) -> int:
    """Elements of each rank's part of a group under ZeRO 1 and 2.

    The flattened group is padded to a multiple of 2 x ranks, for 4-byte alignment in half precision.
    """
    whole = sum(p.numel for p in group)
    return -(-whole // (2 * world)) * 2


def share(parameter: Parameter, world: int) -> int:
    """Elements of each rank's part of a parameter under ZeRO 3, which pads each to a multiple of the ranks."""
    return -(-parameter.numel // world)


def state(
    net: Network,
    zero: int,
    world: int,
    precision: str,
    optim: Optim,
    autocast: bool = False,
    rank: int | None = None,
) -> State:
    """What `rank` holds, or the fullest one. `precision`: fp16, bf16 or fp32.

    Under ZeRO 1 and 2, ranks differ in the gradients of tensors that lie across their borders.
    """
    size, groups = element(precision, autocast), net.groups()
    frozen = [p for p in net.parameters if not p.trained]
    if zero == 0:
        held = net.trained
        weights, gradients = net.total * size, net.trained * size
        masters, pieces = (0 if size == 4 else 4 * held), sum(map(len, groups))
    elif zero == 3:
        held = sum(share(p, world) for group in groups for p in group)
        weights, gradients = (held + sum(share(p, world) for p in frozen)) * size, held * size
        # In fp32 they are a copy too: DeepSpeed compares a device with its name, and finds another one.
        masters, pieces = 4 * held, len(groups)
    else:
        held = sum(partition(group, world) for group in groups)
        weights = (held * world + sum(p.numel for p in frozen)) * size
        # Of very many ranks some thousand tell how full the fullest is.
        ranks = range(0, world, -(-world // _ASKED)) if rank is None else [rank]
        each = (_across(group, world, ranks) for group in groups)
        gradients = size * max(map(sum, zip(*each, strict=True)), default=0)
        masters, pieces = 4 * held, len(groups)
    counts = 4 * pieces if optim.name == "adamw" else 0
    return State(weights, gradients, masters, 4 * held * len(moments(optim)) + counts, 4 * held if optim.ema else 0)


def _across(group: list[Parameter], world: int, ranks: Iterable[int]) -> list[int]:
    """Elements of gradients that each of `ranks` holds of a group: whole tensors, of which only a part is its own.

    Where the group ends within a rank's part, zeros follow; a rank that has no parameter of a group holds zeros alone.
    """
    part = partition(group, world)
    ends = list(itertools.accumulate((p.numel for p in group), initial=0))
    begins, whole = ends[:-1], ends[-1]
    found = []
    for rank in ranks:
        first, last = rank * part, min((rank + 1) * part, whole)
        if first >= whole:
            found.append(part)
            continue
        low, high = bisect.bisect_right(begins, first) - 1, bisect.bisect_left(begins, last)
        found.append(ends[high] - ends[low] + (rank + 1) * part - last)
    return found


def buckets(net: Network, zero: int, precision: str, autocast: bool = False) -> int:
    """Bytes of the buffers through which gradients are reduced; one for each type that is sent."""
    if zero == 0:
        return 0
    size = element(precision, autocast)
    types = {2 if p.linear else 4 for p in net.parameters if p.trained} if autocast else {size}
    return BUCKET * (sum(types) if zero == 3 else size * len(types))


def gathered(net: Network, world: int, precision: str, autocast: bool = False) -> tuple[int, int]:
    """(most, always) bytes of whole parameters that ZeRO 3 holds beside its parts.

    It lets go of a parameter after the forward pass only if the backward pass is more than REUSE elements away: a model
    of up to half as many is whole from its forward to its backward pass.
    """
    if world == 1:  # its parts are whole
        return 0, 0
    size = element(precision, autocast)
    padded = [(p.numel, share(p, world) * world * size) for p in net.parameters]
    always = sum(size_ for numel, size_ in padded if numel < PERSIST)
    most = sum(size_ for _, size_ in padded)
    if 2 * net.total > REUSE:
        most = min(most, (REUSE // 2 + PREFETCH) * size + always)
    return most, always


# ---- activations -----------------------------------------------------------------------------------------------


def saved(net: Network, precision: str, autocast: bool = False, checkpointing: bool = False) -> Saved:
    """What autograd saves of one image's forward pass, without dropout and torch.compile.

    After Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, for a block of width h over s tokens: 34 s h bytes in
    half precision and 5 a s^2 for the scores of a heads. Without dropout's masks 32 s h are left, in units of 2 s h:
    the inputs of two norms, of the three maps of attention together, of o_proj (which is the output of attention), of
    fc1, of GELU (4) and of fc2 (4), and q, k and v. SDPA computes scores again: of them a logarithm a row is left.
    What is frozen does not save its input; below the lowest trained layer nothing is saved.

    `checkpointing`: of each block only its input is kept, and one block's share is made again at a time.
    """
    half = element(precision, autocast=False)
    full = 4 if autocast else half
    blocks = [_block(net, i, half, full, autocast) for i in range(1, net.depth + 1)]
    stream = net.tokens * net.width * full
    inside = sum(blocks)
    if checkpointing:
        inside = stream * sum(b > 0 for b in blocks)
    embeddings = 0
    if any(p.trained and p.layer == 0 and p.linear for p in net.parameters):
        embeddings = 3 * net.image_size**2 * half
    # The head's input is a view of the last norm's whole output.
    after = net.tokens * net.width * half if net.pool == "cls" else 0
    if net.pool != "mean" and (net.lowest <= net.depth or _trains(net, net.depth + 1, "norm")):
        after += stream + _statistics(net)
    logits = 3 * 4 * net.classes
    fixed = 0
    if net.relative != "none":  # a mask of all scores, made of the table and its index
        fixed = net.tokens**2 * (net.heads * half * (net.depth if net.relative == "own" else 1) + 8)
    if autocast:
        fixed += 2 * sum(p.numel for p in net.parameters if p.linear and len(p.shape) > 1 and net.lowest <= p.layer)
    # The backward pass lets go as it goes. Peaks of real passes (ViT-Ti and S, torch's profiler on a CPU) were 2 to 4
    # per cent below what is saved plus gradients of an inner tensor and of the residual, or one block made again.
    work = net.tokens * (net.hidden * half + net.width * full)
    if checkpointing:
        work = max(blocks, default=0)
    return Saved(inside + embeddings + after + logits, fixed, work)


def _statistics(net: Network) -> int:
    """Mean and deviation of a norm's rows, in fp32."""
    return 2 * 4 * net.tokens


def _trains(net: Network, layer: int, *names: str) -> bool:
    return any(p.trained and p.layer == layer and any(name in p.name for name in names) for p in net.parameters)


def _learnt_biases(net: Network, layer: int) -> bool:
    """Whether relative position biases of a block are trained."""
    place = {"none": -1, "own": layer, "shared": net.depth + 1}[net.relative]
    return _trains(net, place, "relative_position_bias_table")


def _block(net: Network, layer: int, half: int, full: int, autocast: bool) -> int:
    """Bytes of one image in one block."""
    row = net.tokens * net.width
    flows = net.lowest < layer
    own = [p for p in net.parameters if p.layer == layer and p.trained]

    def trains(*names: str) -> bool:
        return any(name in p.name for p in own for name in names)

    def adapter(*names: str) -> int:
        """Inner values of adapters."""
        rank = net.lora.rank if net.lora else 0
        return sum(net.tokens * rank * half for name in names if any(f"{name}.lora_B" in p.name for p in own))

    total = 0
    first, second = ("norm1", "norm2") if net.family.startswith("dinov2") else ("layernorm_before", "layernorm_after")
    maps = ("q_proj", "k_proj", "v_proj")
    if flows or trains(first):
        total += row * full + _statistics(net)
        flows = True
    if trains(*maps):
        # Under autocast each map makes its own copy in half precision.
        total += row * half * (sum(trains(name) for name in maps) if autocast else 1)
    total += adapter(*maps)
    learnt = _learnt_biases(net, layer)
    flows = flows or learnt or trains(*maps)
    if learnt:
        # Such a mask keeps SDPA from its fused kernels: q, k, v and the scores are there in fp32.
        total += row * (3 * 4 + half) + net.heads * net.tokens**2 * 4
    elif flows:
        total += 4 * row * half + net.heads * net.tokens * 4
    elif trains("o_proj"):
        total += row * half
    total += adapter("o_proj")
    flows = flows or trains("o_proj")
    scales = sum(trains(name) for name in ("lambda_1", "layer_scale1", "lambda_2", "layer_scale2"))
    total += scales * row * half
    flows = flows or trains("lambda_1", "layer_scale1")
    if flows or trains(second):
        total += row * full + _statistics(net)
        flows = True
    up = ("gate_proj", "up_proj") if net.gated else ("fc1",)
    if trains(*up):
        total += row * half * (sum(trains(name) for name in up) if autocast else 1)
    total += adapter(*up)
    flows = flows or trains(*up)
    hidden = net.tokens * net.hidden * half
    if flows:
        total += hidden * (3 if net.gated else 1)
    if trains("down_proj" if net.gated else "fc2"):
        total += hidden
    return total + adapter("down_proj" if net.gated else "fc2")


# ---- together ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Bytes of the fullest rank, by part and by moment."""

    net: Network
    batch: Batch
    zero: int
    precision: str
    autocast: bool
    checkpointing: bool
    evaluated: int | None
    """Samples of one forward pass in evaluation; None: twice the micro batch."""
    state: State
    buckets: int
    gathered: tuple[int, int]
    """Most and always, under ZeRO 3."""
    largest_group: int
    """Elements of the fullest parameter group that this rank updates."""
    saved: Saved

    @cached_property
    def moments(self) -> dict[str, int]:
        """Bytes at each moment of the run; the largest is `peak`."""
        return self._at(self.batch.micro_batch, self.batch.accumulation)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """When memory is fullest."""
        return max(self.moments, key=lambda name: self.moments[name])

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by part. Not all are there at once: see `moments`."""
        held, micro = self.state, self.batch.micro_batch
        return {
            "weights": held.weights,
            "gathered weights": self.gathered[0],
            "gradients": held.gradients,
            "masters": held.masters,
            "moments": held.moments,
            "average": held.average,
            "buckets": self.buckets,
            "activations": micro * self.saved.image + self.saved.fixed,
            "backward pass": micro * self.saved.work,
            "images": self._images(micro),
        }

    def largest(self, gpu_memory_gb: float) -> int:
        """The largest micro batch that fits, whatever the global batch; 0 if none does."""
        room = usable(gpu_memory_gb)
        if max(self._at(1, self.batch.accumulation).values()) > room:
            return 0
        low, high = 1, 2
        while high <= 2**20 and max(self._at(high, self.batch.accumulation).values()) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits_ = max(self._at(middle, self.batch.accumulation).values()) <= room
            low, high = (middle, high) if fits_ else (low, middle)
        return low

    def _images(self, micro: int) -> int:
        """Pixels of a micro-batch: as they were read, and as the model takes them."""
        return 3 * self.net.image_size**2 * micro * (1 + 4 + element(self.precision, self.autocast))

    def _at(self, micro: int, accumulation: int) -> dict[str, int]:
        held, zero, world = self.state, self.zero, self.batch.world
        size = element(self.precision, self.autocast)
        always = held.weights + held.masters + held.moments + held.average
        if zero == 3:  # its buffers stay
            always += self.buckets + held.gradients
        whole, kept = self.gathered
        passing = 0 if zero == 3 else self.buckets
        carried = 0
        if accumulation > 1 and zero < 3:
            carried = self.net.trained * size if zero < 2 else held.gradients
        trained = self.net.trained * size
        sent = 0 if world == 1 and zero else min(trained, BUCKET * size)
        reduced = {0: trained, 1: trained + held.gradients, 2: held.gradients + carried, 3: 0}[zero]
        # The wrapper for half precision without ZeRO makes fp32 gradients of all weights, the others group by group.
        update = 4 * self.net.trained if zero == 0 and size == 2 else self.largest_group * (4 + size) if zero else 0
        forward = self.saved.image * micro + self.saved.fixed + self.saved.work * micro + self._images(micro)
        evaluated = self.evaluated or 2 * micro
        return {
            "forward and backward": always + whole + passing + carried + forward,
            "reducing gradients": always + kept + passing + reduced + sent,
            "update": always + kept + (held.gradients if zero < 3 else 0) + update,
            "evaluation": always + whole + self._images(evaluated) + evaluated * self._without_gradients(),
        }

    def _without_gradients(self) -> int:
        """Of one image: the residual, and the two sides of an activation in the MLP or of attention."""
        net, half = self.net, element(self.precision, autocast=False)
        inner = max(net.hidden * (3 if net.gated else 2), 4 * net.width)
        return net.tokens * (2 * net.width * element(self.precision, self.autocast) + inner * half)


def estimate(
    settings: Config, classes: int, world: int, precision: str | None = None, net: Network | None = None
) -> Estimate:
    """What each of `world` ranks with a GPU needs for `settings`.

    `precision`: fp16, bf16 or fp32; default: what engine.precision means on a GPU. `net`: where the shapes are known
    already. Raises shapes.Unknown where they cannot be known without torch and the network, SettingsError where the
    batch does not divide over the ranks, and ValueError for a model that cannot be made.
    """
    engine = settings.engine
    net = net or shapes.network(settings.model, classes)
    if precision is None:
        precision = "bf16" if engine.autocast else "fp16" if engine.precision == "auto" else engine.precision
    batch = config.split_batch(settings.train, world)
    groups = net.groups()
    sizes = [
        partition(g, world) if engine.zero in (1, 2) else sum(share(p, world if engine.zero == 3 else 1) for p in g)
        for g in groups
    ]
    return Estimate(
        net=net,
        batch=batch,
        zero=engine.zero,
        precision=precision,
        autocast=engine.autocast,
        checkpointing=settings.model.gradient_checkpointing,
        evaluated=settings.evaluation.batch,
        state=state(net, engine.zero, world, precision, settings.optim, engine.autocast),
        buckets=buckets(net, engine.zero, precision, engine.autocast),
        gathered=gathered(net, world, precision, engine.autocast) if engine.zero == 3 else (0, 0),
        largest_group=max(sizes, default=0),
        saved=saved(net, precision, engine.autocast, settings.model.gradient_checkpointing),
    )


def usable(gpu_memory_gb: float) -> int:
    """Bytes that tensors may take of a GPU with that memory (10^9 bytes)."""
    return int(gpu_memory_gb * GB * (1 - WASTE)) - CONTEXT


def fits(found: Estimate, gpu_memory_gb: float) -> bool:
    """Whether the run fits into GPUs of that memory (10^9 bytes)."""
    return found.peak <= usable(gpu_memory_gb)


@dataclass(frozen=True)
class Remedy:
    """Overrides under which a run fits."""

    overrides: tuple[str, ...]
    price: str
    peak: int
    """Bytes."""


def remedies(
    settings: Config, classes: int, world: int, gpu_memory_gb: float, net: Network | None = None
) -> list[Remedy]:
    """What makes a run fit, the cheapest first: more accumulation, sharding, recomputation; empty if nothing does.

    The global batch, and with it what is trained, stays the same. Raises as `estimate` does.
    """
    first = estimate(settings, classes, world, net=net)
    found: list[Remedy] = []
    for overrides, price in _changes(first):
        tried = _with(settings, overrides)
        there = estimate(tried, classes, world, net=first.net)
        smaller = _accumulated(there, gpu_memory_gb)
        if fits(there, gpu_memory_gb) and overrides:
            found.append(Remedy(overrides, price, there.peak))
        elif smaller and not any(set(r.overrides) <= {*overrides, *smaller} for r in found):
            both = estimate(_with(tried, smaller), classes, world, net=first.net)
            told = "; ".join(filter(None, (price, "more, smaller passes for each update")))
            found.append(Remedy((*overrides, *smaller), told, both.peak))
    return found


def _changes(first: Estimate) -> Iterator[tuple[tuple[str, ...], str]]:
    higher = {0: 1, 1: 2}.get(first.zero) if first.batch.world > 1 else None
    recompute = ("model.gradient_checkpointing=true",)
    price = "a third more arithmetic"
    yield (), ""
    if higher:
        yield (f"engine.zero={higher}",), "a little more communication"
    if not first.checkpointing:
        yield recompute, price
        if higher:
            yield (f"engine.zero={higher}", *recompute), f"a little more communication and {price}"
    if first.zero < 3 and first.batch.world > 1:
        most = ("engine.zero=3",) + (() if first.checkpointing else recompute)
        yield most, "more communication" + ("" if first.checkpointing else f" and {price}")


def _accumulated(found: Estimate, gpu_memory_gb: float) -> tuple[str, ...]:
    """The largest smaller micro batch that fits and divides a rank's part of the global batch; () if there is none."""
    batch = found.batch
    most = min(found.largest(gpu_memory_gb), batch.micro_batch - 1)
    per_rank = batch.micro_batch * batch.accumulation
    for micro in range(most, 0, -1):
        if per_rank % micro == 0 and max(found._at(micro, per_rank // micro).values()) <= usable(gpu_memory_gb):
            named = f"train.global_batch={batch.global_batch}", f"train.micro_batch={micro}"
            return (*named, f"train.accumulation={per_rank // micro}")
    return ()


def _with(settings: Config, overrides: tuple[str, ...]) -> Config:
    """`settings` with overrides that are known to be good."""
    return config.parse(Config, config.override(config.to_plain(settings), overrides), "plan")

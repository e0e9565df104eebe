"""What a configuration trains, layer by layer, and what that takes of GPUs, time and disk: `vitdist plan CONFIG`.

    settings = config.load("configs/vit_large_mae.yaml")
    print(plan.table(settings, classes=1000))                                   # layers, rates, groups
    print(plan.text(plan.budget(settings, 1000, plan.Place(nodes=4, gpu_memory_gb=80), samples=1_281_167)))

No weights are read. The table of layers builds the model on the meta device and takes rates and groups from where the
trainer takes them; the rest is arithmetic (shapes.py, memory.py, cost.py) that needs no torch.
"""

import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vitdist import config, cost, memory, shapes
from vitdist.config import Config, Optim
from vitdist.cost import Assumed, Cost
from vitdist.memory import GB, Estimate, Remedy

if TYPE_CHECKING:
    from torch import nn

MOST_RANKS = 1_000_000
CARDS = (24.0, 40.0, 80.0, 141.0)
"""10^9 bytes of usual GPUs: A10 and RTX 4090, A100, A100 and H100, H200."""


@dataclass(frozen=True)
class Row:
    """One layer; numbers of parameters are counts of scalars."""

    layer: int
    name: str
    modules: str
    """Its modules as the model names them: "layers.0", or "layernorm, classifier"."""
    parameters: int
    decayed: int
    """Trained with weight decay."""
    undecayed: int
    """Trained without."""
    lr: float | None
    """At the peak of the schedule; None if all of it is frozen."""

    @property
    def frozen(self) -> int:
        return self.parameters - self.decayed - self.undecayed


@dataclass(frozen=True)
class Plan:
    rows: list[Row]
    groups: int
    """Parameter groups of the optimizer."""
    optim: Optim
    """With the rate that the global batch makes of it."""


def make(settings: Config, classes: int) -> Plan:
    """A row for each layer, from the embeddings to the head. Raises ValueError for a model that cannot be had."""
    from vitdist import model, optim

    with contextlib.suppress(shapes.Unknown):
        try:
            shapes.network(settings.model, classes)
        except shapes.NotCached as reason:
            raise ValueError(str(reason)) from None
    scaled = config.scaled(settings.optim, _global_batch(settings))
    net = model.skeleton(settings.model, classes)
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, scaled, model.layer_name)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    bare = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    made = []
    for number in range(depth + 2):
        own = {name: p.numel() for name, p in net.named_parameters() if layer[name] == number}
        trained = [name for name in own if name in rates]
        made.append(
            Row(
                layer=number,
                name=model.layer_name(number, depth),
                modules=", ".join(dict.fromkeys(_module(net, name) for name in own)),
                parameters=sum(own.values()),
                decayed=sum(own[name] for name in trained if name not in bare),
                undecayed=sum(own[name] for name in trained if name in bare),
                lr=rates[trained[0]] if trained else None,
            )
        )
    return Plan(made, len(groups), scaled)


def _global_batch(settings: Config) -> int:
    """As it is given, else that of one rank: how many there will be is not known here."""
    return settings.train.global_batch or config.split_batch(settings.train, 1).global_batch


def _module(net: "nn.Module", parameter: str) -> str:
    """The module that `parameter` counts with, without the name of the family: embeddings, layers.3, classifier."""
    parts = parameter.removeprefix(f"{getattr(net, 'base_model_prefix', '')}.").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def table(settings: Config, classes: int) -> str:
    """`make` as text with totals and a summary; in colour and frames where stdout is a terminal."""
    plan = make(settings, classes)
    total = [
        sum(getattr(row, field) for row in plan.rows) for field in ("parameters", "decayed", "undecayed", "frozen")
    ]
    header = ["layer", "modules", "peak lr", "parameters", "decayed", "not decayed", "frozen"]
    rows = []
    for row in plan.rows:
        counts = (row.parameters, row.decayed, row.undecayed, row.frozen)
        rate = "frozen" if row.lr is None else f"{row.lr:.3g}"
        rows.append([row.name, row.modules, rate, *(f"{count:,}" if count else "-" for count in counts)])
    footer = ["total", "", "", *(f"{count:,}" for count in total)]
    dim = [row.lr is None for row in plan.rows]
    return "\n".join([*_drawn(header, rows, footer, left=2, dim=dim), *_summary(settings, plan)])


def _drawn(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    footer: Sequence[str] | None = None,
    left: int = 1,
    dim: Sequence[bool] = (),
) -> list[str]:
    """Lines of a table, the first `left` columns aligned left; frames and colour on a terminal, else plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    shown = Table(
        box=box.ROUNDED if terminal else None,
        show_footer=footer is not None,
        padding=(0, 1) if terminal else (0, 2, 0, 0),
    )
    for i, name in enumerate(header):
        shown.add_column(name, footer[i] if footer else "", justify="left" if i < left else "right")
    for i, row in enumerate(rows):
        shown.add_row(*row, style="dim" if i < len(dim) and dim[i] else None)
    text = io.StringIO()
    Console(file=text, force_terminal=terminal, width=None if terminal else 160, highlight=False).print(shown)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _summary(settings: Config, plan: Plan) -> list[str]:
    used, given = plan.optim, settings.optim
    trained = sum(row.decayed + row.undecayed for row in plan.rows)
    whole = sum(row.parameters for row in plan.rows)
    average = f", average of the weights with decay {used.ema:g}" if used.ema else ""
    falls = "" if used.schedule == "constant" else f", down to {used.min_lr:g} of the peak"
    lines = [
        f"{used.name}, {plan.groups} groups, lr {used.lr:.3g} x {used.layer_decay:g} for each layer down, "
        f"weight decay {used.weight_decay:g}, clip {used.clip or 'off'}{average}",
        f"{used.schedule} by {used.schedule_by}, warm-up {used.warmup:.1%} of the run{falls}",
        f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.1%})"
        + (": LoRA adapters and the head" if settings.model.lora else ""),
    ]
    if given.lr_batch:
        alone = "" if settings.train.global_batch else ", that of one rank: train.global_batch is not given"
        lines.append(
            f"lr {given.lr:g} is meant for batches of {given.lr_batch} and follows ({given.lr_scaling}) to "
            f"{_global_batch(settings)}{alone}"
        )
    return lines


# ---- what it takes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run would go."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gb: float | None = None
    """10^9 bytes of one GPU; None: not known."""
    cpus_per_node: int | None = None
    signal_delay_s: float | None = None
    """Seconds from SLURM's signal to the end."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Budget:
    """What a run takes of a place."""

    settings: Config
    place: Place
    assumed: Assumed
    stages: list[Estimate]
    """Memory under ZeRO 0, 1, 2 and 3."""
    cost: Cost
    remedies: list[Remedy]
    """Where it does not fit."""

    @property
    def memory(self) -> Estimate:
        """As the settings have it."""
        return self.stages[self.settings.engine.zero]

    @property
    def fits(self) -> bool | None:
        """None where the GPUs' memory is not known."""
        return None if self.place.gpu_memory_gb is None else memory.fits(self.memory, self.place.gpu_memory_gb)


def network(settings: Config, classes: int) -> shapes.Network:
    """The shapes without torch, or where that cannot be (a pickle, an id that was not fetched) with it.

    Raises ValueError, where torch is not installed shapes.Unknown.
    """
    try:
        return shapes.network(settings.model, classes)
    except shapes.NotCached:
        raise
    except shapes.Unknown as reason:
        try:
            from vitdist import model
        except ImportError:
            raise reason from None
    net: Any = model.skeleton(settings.model, classes)
    layer, _ = model.layers(net)
    held = tuple(shapes.Parameter(n, tuple(p.shape), layer[n], p.requires_grad) for n, p in net.named_parameters())
    told = net.config.to_dict() | {"architectures": [type(net).__name__]}
    return replace(shapes.of_config(told, classes), lora=settings.model.lora, parameters=held)


def budget(
    settings: Config, classes: int, place: Place, samples: int | None = None, assumed: Assumed | None = None
) -> Budget:
    """What `settings` take. `samples`: of the training set; None: not known.

    Raises ValueError for a model that cannot be had, SettingsError for a batch that does not divide over the ranks.
    """
    if place.world > MOST_RANKS:
        raise ValueError(f"{place.world:,} ranks: more than {MOST_RANKS:,}; use fewer --nodes")
    net, assumed = network(settings, classes), assumed or Assumed()
    stages = []
    for zero in range(4):
        engine = settings.engine.model_copy(update={"zero": zero})
        other = settings.model_copy(update={"engine": engine})
        stages.append(memory.estimate(other, classes, place.world, net=net))
    own = stages[settings.engine.zero]
    ways = []
    if place.gpu_memory_gb is not None and not memory.fits(own, place.gpu_memory_gb):
        ways = memory.remedies(settings, classes, place.world, place.gpu_memory_gb, net=net)
    return Budget(settings, place, assumed, stages, cost.estimate(settings, own, samples, assumed), ways)


def as_json(found: Budget) -> dict[str, Any]:
    """All numbers, in bytes, seconds and FLOP; what is assumed stands under `assumed`."""
    place, own = found.place, found.memory

    def of(each: Estimate) -> dict[str, Any]:
        most = None if place.gpu_memory_gb is None else each.largest(place.gpu_memory_gb)
        return {"peak": each.peak, "at": each.moment, "largest_micro_batch": most} | {
            "parts": each.parts,
            "moments": each.moments,
        }

    return {
        "model": {
            "family": own.net.family,
            "parameters": own.net.total,
            "trained": own.net.trained,
            "tokens": own.net.tokens,
            "multiply_adds_forward": own.net.macs,
            "flops_forward_and_backward": own.net.flops,
        },
        "batch": own.batch.model_dump(),
        "precision": own.precision,
        "zero": own.zero,
        "place": asdict(place),
        "assumed": asdict(found.assumed) | {"context_bytes": memory.CONTEXT, "allocator_waste": memory.WASTE},
        "memory": {f"zero_{each.zero}": of(each) for each in found.stages},
        "fits": found.fits,
        "remedies": [asdict(way) for way in found.remedies],
        "cost": asdict(found.cost),
    }


def text(found: Budget) -> str:
    """A budget for people: memory by part and stage, whether it fits, what would make it fit, time and disk."""
    return "\n".join([*_memory_table(found), "", *_verdict(found), "", *_costs(found)])


def _memory_table(found: Budget) -> list[str]:
    own, batch = found.memory, found.memory.batch
    names = [f"ZeRO {each.zero}{' *' if each is own else ''}" for each in found.stages]
    rows: list[list[str]] = []
    for part in own.parts:
        sizes = [each.parts[part] for each in found.stages]
        if any(sizes):
            rows.append([part, *(_bytes(size) if size else "-" for size in sizes)])
    rows.append(["most at once", *(_bytes(each.peak) for each in found.stages)])
    known = found.place.gpu_memory_gb
    for card in CARDS if known is None else (known,):
        rows.append([f"largest micro batch, {card:g} GB", *(str(each.largest(card)) for each in found.stages)])
    where = f"{found.place.nodes} x {found.place.gpus_per_node} GPUs"
    split = f"{batch.global_batch} = {batch.micro_batch} x {batch.accumulation} accumulated x {batch.world} ranks"
    again = ", gradient checkpointing" if own.checkpointing else ""
    return [
        f"Memory of a GPU ({where}, {own.precision}{' autocast' if own.autocast else ''}, batch {split}{again})",
        *_drawn(["part", *names], rows),
        f"* as set; fullest: {own.moment}. Weights to average, and buckets: exact; the others by formula",
    ]


def _verdict(found: Budget) -> list[str]:
    own, card = found.memory, found.place.gpu_memory_gb
    if card is None:
        return ["GPU memory is not known: --gpu-memory-gb N tells whether it fits"]
    reserve = (card * GB - memory.usable(card)) / GB
    of = f"{own.peak / GB:.1f} GB of {card:g} GB less {reserve:.1f} GB assumed for CUDA, NCCL and the allocator"
    if found.fits:
        return [f"fits: {of}", *_faster(found, card)]
    lines = [f"does not fit: {of}"]
    if not found.remedies:
        return [*lines, "nothing here makes it fit: more GPUs, a smaller model or a smaller model.image_size would"]
    for way in found.remedies:
        lines.append(f"  would, with {way.peak / GB:.1f} GB: {' '.join(way.overrides)}  ({way.price})")
    return lines


def _faster(found: Budget, card: float) -> list[str]:
    """Where memory is left: what costs time and is not needed."""
    own, lines = found.memory, list[str]()
    batch, most = own.batch, own.largest(card)
    per_rank = batch.micro_batch * batch.accumulation
    better = max((m for m in range(batch.micro_batch + 1, min(most, per_rank) + 1) if per_rank % m == 0), default=None)
    if better:
        lines.append(
            f"  larger passes fit too: train.global_batch={batch.global_batch} train.micro_batch={better} "
            f"train.accumulation={per_rank // better}"
        )
    if own.checkpointing:
        model = found.settings.model.model_copy(update={"gradient_checkpointing": False})
        other = found.settings.model_copy(update={"model": model})
        if memory.fits(memory.estimate(other, own.net.classes, batch.world, net=own.net), card):
            lines.append("  model.gradient_checkpointing=false fits too and saves a quarter of the arithmetic")
    fitting = [each for each in found.stages[: own.zero] if memory.fits(each, card)]
    if lower := [each.zero for each in fitting if cost.sent(each) < found.cost.sent]:
        best = min(lower, key=lambda zero: cost.sent(found.stages[zero]))
        share = 1 - cost.sent(found.stages[best]) / found.cost.sent
        lines.append(f"  engine.zero={best} fits too and sends {share:.0%} less in each update")
    return lines


def _costs(found: Budget) -> list[str]:
    own, told, place, assumed = found.memory, found.cost, found.place, found.assumed
    net, rows = own.net, list[tuple[str, str]]()
    sends = f"; each GPU sends {_bytes(told.sent)}" if told.sent else ""
    forward, both = _giga(2 * net.macs), _giga(net.flops)
    rows.append(("model", f"{net.total / 1e6:,.4g} M parameters, {net.trained / 1e6:,.4g} M trained"))
    rows.append(
        (
            "image",
            f"{forward} GFLOP forward, {both} with the backward pass: 2 a multiply-add, of which tables that say "
            f'{_giga(net.macs)} "GFLOPs" count one',
        )
    )
    rows.append(("update", f"{_short(told.flops_update / 1e12)} TFLOP{sends}"))
    if told.updates is not None and told.flops_run and told.hours is not None and told.gpu_hours is not None:
        rows.append(("run", f"{told.updates:,} updates, {_short(told.flops_run / 1e15)} PFLOP"))
        rows.append(
            ("time", f"{_hours(told.hours)}, {_short(told.gpu_hours)} GPU-hours, {told.images_s:,.0f} images/s")
        )
    else:
        rows.append(("speed", f"{told.images_s:,.0f} images/s; how long the run is, is not known: --samples N"))
    again = ", recomputation included" if own.checkpointing else ""
    share = f"{assumed.mfu:.0%} of {assumed.tflops:g} TFLOP/s a GPU (--mfu, --tflops){again}"
    small = "; a model as small as this stays far below" if net.flops < 1e9 else ""
    rows.append(("", f"assumed: {share}; without evaluations{small}"))
    rows.append(("decoding", _decoding(found)))
    kept = found.settings.checkpoint.keep
    speed = f"{told.save_s:,.1f} s at {assumed.write_gb_s:g} GB/s (assumed: --write-gb-s)"
    rows.append(("checkpoint", f"{_bytes(told.checkpoint)}, {speed}"))
    room = _bytes((kept + 2) * told.checkpoint)
    rows.append(("", f"{kept} and the best are kept beside the one that is written: {room} on the disk"))
    if place.signal_delay_s:
        # A save may be under way when the signal comes.
        needed = 2 * told.save_s
        verdict = "enough" if needed < place.signal_delay_s else "TOO SHORT, raise signal_delay_s in the profile"
        rows.append(
            ("stopping", f"a save under way and its own, {needed:,.1f} s of {place.signal_delay_s:g}: {verdict}")
        )
    wide = max(len(name) for name, _ in rows)
    return [f"{name:<{wide}}  {what}" for name, what in rows]


def _decoding(found: Budget) -> str:
    told, place = found.cost, found.place
    if told.cores is None:
        return "on the GPU"
    rate, there = cost.decoded(found.settings.data), place.cpus_per_node
    node = told.cores * place.gpus_per_node
    text = f"{node:,.0f} cores a node keep up, at {rate:.0f} images/s a core (photos of 500 x 375 px)"
    if there is None or node <= there:
        return text if there is None else f"{text}; it has {there}"
    most = there * rate * place.nodes
    return f"{text}; it has {there}, which make {most:,.0f} images/s: shards of smaller pictures decode faster"


def _giga(number: float) -> str:
    return _short(number / 1e9)


def _short(number: float) -> str:
    """Four digits, or all before the point."""
    return f"{number:,.4g}" if number < 1e4 else f"{number:,.0f}"


def _bytes(number: float) -> str:
    if number >= GB:
        return f"{number / GB:,.2f} GB"
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"

"""What a configuration trains, layer by layer: `vitdist plan CONFIG`. No weights are read.

    print(plan.table(config.load("configs/vit_large_mae.yaml"), classes=1000))

It builds the model on the meta device and takes rates and groups from where the trainer takes them.
"""

import io
import sys
from dataclasses import dataclass

from torch import nn

from vitdist import config, model, optim
from vitdist.config import Config, Optim


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


def _module(net: nn.Module, parameter: str) -> str:
    """The module that `parameter` counts with, without the name of the family: embeddings, layers.3, classifier."""
    parts = parameter.removeprefix(f"{getattr(net, 'base_model_prefix', '')}.").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def table(settings: Config, classes: int) -> str:
    """`make` as text with totals and a summary; in colour and frames where stdout is a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    plan = make(settings, classes)
    terminal = sys.stdout.isatty()
    shown = Table(box=box.ROUNDED if terminal else None, show_footer=True, padding=(0, 1) if terminal else (0, 2, 0, 0))
    total = [
        sum(getattr(row, field) for row in plan.rows) for field in ("parameters", "decayed", "undecayed", "frozen")
    ]
    shown.add_column("layer", "total")
    shown.add_column("modules")
    shown.add_column("peak lr", justify="right")
    for name, count in zip(("parameters", "decayed", "not decayed", "frozen"), total, strict=True):
        shown.add_column(name, f"{count:,}", justify="right")
    for row in plan.rows:
        counts = (row.parameters, row.decayed, row.undecayed, row.frozen)
        rate = "frozen" if row.lr is None else f"{row.lr:.3g}"
        shown.add_row(
            row.name, row.modules, rate, *(f"{count:,}" if count else "-" for count in counts),
            style="dim" if row.lr is None else None,
        )  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=None if terminal else 160, highlight=False)
    console.print(shown)
    return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), *_summary(settings, plan)])


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

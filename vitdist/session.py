"""The state of one attempt at a run: what the chapters of train.py share. Imports no torch.

    begun = Begun(run, attempt, settings, me, journal, watchdog, stopping, began)     # before data and model
    session, about = assembly.assemble(begun)                                         # with both
    session.progress("saving", long=True)                                             # this rank goes on

A session itself never changes. What does is in the rooms that it holds (steps and weights in the engine, the state of
checkpoints in the writer) or belongs to the loop: Broken and Skips.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vitdist import config
from vitdist.config import Batch, Config, Pixels
from vitdist.rundir import RunDir
from vitdist.stop import StopRequest
from vitdist.watchdog import Watchdog

if TYPE_CHECKING:  # the rooms behind torch are imported when a run begins: bad settings answer at once
    from torch import Tensor
    from torch.nn import Module

    from vitdist.checkpoint import Writer
    from vitdist.data.index import Index
    from vitdist.data.loader import Training
    from vitdist.data.reader import Bad, MicroBatch
    from vitdist.dist import Processes
    from vitdist.engine import Engine
    from vitdist.inputs import Inputs
    from vitdist.ledger import Ledger
    from vitdist.loss import Loss
    from vitdist.manifest import Identity
    from vitdist.metrics import Lags, Meter
    from vitdist.model import DropPaths
    from vitdist.selection import Evaluations
    from vitdist.spikes import Spikes
    from vitdist.system import Machine
    from vitdist.tracking import Journal

# Start-up, export and report read and write whole models while other ranks wait: so many times engine.hang_s.
LONG = 3


@dataclass(frozen=True)
class Begun:
    """What an attempt has before it opens its data and builds its model."""

    run: RunDir
    attempt: int
    given: Config
    """The settings as they stand in the run folder."""
    me: "Processes"
    journal: "Journal"
    watchdog: Watchdog
    stopping: StopRequest
    began: float
    """By time.monotonic()."""


@dataclass(frozen=True)
class Session(Begun):
    """What the chapters of one attempt share."""

    settings: Config
    """Those that hold: the rate scaled to the batch."""
    versions: dict[str, str | None]
    """Of the libraries that its numbers come from."""
    training: "Training"
    val_set: "Index"
    batch: Batch
    total: int
    """Updates of the whole run."""
    net: "Module"
    """The model, as DeepSpeed holds it now; under ZeRO-3 it has no weights of its own."""
    pixels: Pixels
    drop_paths: "DropPaths | None"
    loss: "Loss"
    engine: "Engine"
    identity: "Identity"
    meter: "Meter"
    machine: "Machine"
    inputs: "Inputs | None"
    """On rank 0 of a run that has not kept them."""
    lags: "Lags"
    spikes: "Spikes"
    ledger: "Ledger"
    hosts: list[str]
    """Of the ranks."""
    writer: "Writer"
    evaluations: "Evaluations | None"
    """On rank 0."""

    def progress(self, phase: str, long: bool = False) -> None:
        """This rank goes on: for the bar and for the watchdog, which allows for a `long` phase."""
        step, limit = self.engine.steps, self.settings.engine.hang_s
        self.watchdog.mark(step, phase, LONG * limit if long else limit)
        self.journal.progress(step, phase)

    @property
    def steps_per_epoch(self) -> float:
        """Updates that the training set lasts for, seldom a whole number."""
        return self.training.samples / self.batch.global_batch

    def prepare(self, batch: "MicroBatch") -> "Tensor":
        """The pictures of a batch as the model's normalised input [B, 3, S, S] on the device."""
        from vitdist.data import device_decode, transforms

        device = self.me.device
        if batch.encoded:
            assert self.training.samples_of
            instead = functools.partial(self.training.samples_of().instead, batch)
            images = device_decode.pixels(batch.encoded, batch.images, device, batch.images.shape[-1], instead)
        else:
            images = batch.images.to(device, non_blocking=True)
        return transforms.normalise(images, self.pixels.mean, self.pixels.std, self.engine.dtype)


@dataclass
class Broken:
    """Samples that could not be used in this attempt."""

    new: "list[Bad]" = field(default_factory=list)
    """Of this rank, since the last row of the log."""
    known: set[tuple[int, str, str]] = field(default_factory=set)
    """Row, shard and key of each that any rank has met; the next two count these."""
    reasons: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)


@dataclass
class Skips:
    """Updates that were skipped since the last one that was not."""

    in_a_row: int = 0
    seen: "list[tuple[Tensor, Tensor]]" = field(default_factory=list)
    """Rows and losses of this rank's samples in the newest step, a pair for each micro-batch."""

    def samples(self) -> list[tuple[int, float]]:
        """(row, loss) of each of this rank's samples in the newest step."""
        return [
            (int(row), float(loss))
            for rows, losses in self.seen
            for row, loss in zip(rows.tolist(), losses.cpu().tolist(), strict=True)
        ]


class Standing(NamedTuple):
    """Where a run stands by its evaluations so far."""

    best: int
    """Step of the best one; the present step before any."""
    exhausted: bool
    """Whether the patience is at its end."""
    owed: bool
    """Whether the present step is not evaluated yet."""


def group_timeout(settings: config.Engine) -> float:
    """Seconds that a collective waits: longer than the watchdog, which knows more, and ends the attempt first."""
    return LONG * settings.hang_s + 60

"""From settings to a session: the data is opened, the model built and grouped, and both are handed to DeepSpeed.

    session, about = assembly.assemble(begun)        # all ranks, alike

`train.py` imports this room when an attempt has begun, and with it nearly all that a training needs. What cannot be
trained with is a ValueError here, before the first update, on all ranks alike.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from vitdist import (
    checkpoint,
    config,
    decision,
    dist,
    faults,
    history,
    ledger,
    manifest,
    metrics,
    model,
    optim,
    spikes,
    system,
)
from vitdist.checkpoint import Writer
from vitdist.config import Batch, Config, Pixels
from vitdist.data import augment, device_decode, loader
from vitdist.data.index import Index
from vitdist.data.loader import Training
from vitdist.dist import Processes
from vitdist.engine import Engine  # asks at import which device `dist` chose
from vitdist.inputs import Inputs
from vitdist.loss import Loss
from vitdist.manifest import Identity
from vitdist.model import Weights
from vitdist.rundir import RunDir
from vitdist.selection import Evaluations
from vitdist.session import Begun, Session, group_timeout
from vitdist.tracking import Journal


def assemble(begun: Begun) -> tuple[Session, dict[str, Any]]:
    """The session of this attempt, at step 0, and what the run's record says of the model and its groups.

    Raises ValueError for what cannot be trained with.
    """
    given, me, journal = begun.given, begun.me, begun.journal
    batch, training, val_set = _data(begun)
    losses = me.on_every_rank(lambda: _loss(given, training))
    _see_the_same(me, training, val_set)
    total = config.total_steps(given.train, batch, training.samples)

    settings = given.model_copy(update={"optim": config.scaled(given.optim, batch.global_batch)})
    net, weights = _model(begun, training.classes)
    pixels = config.pixels(settings, weights.mean, weights.std)
    layer, depth = model.layers(net)
    groups = optim.groups(net, layer, depth, settings.optim, model.layer_name)
    # Read off the model and its groups before DeepSpeed changes them.
    meter = metrics.Meter(batch.global_batch, model.flops_per_image(net), me.world, me.device)
    about = {"groups": optim.describe(groups), "model": model.describe(settings.model, net, weights)}
    identity = _identity(settings, batch, training, net, groups)
    drop_paths = model.drop_paths(net)
    journal.stage("model")

    engine = _engine(net, groups, settings, batch, me)
    versions = _versions()
    writer = _writer(begun, engine, identity, versions)
    journal.stage("DeepSpeed")
    past, evaluations = _history(begun)
    session = Session(
        **vars(begun),
        settings=settings,
        versions=versions,
        training=training,
        val_set=val_set,
        batch=batch,
        total=total,
        net=net,
        pixels=pixels,
        drop_paths=drop_paths,
        loss=losses,
        engine=engine,
        identity=identity,
        meter=meter,
        machine=system.Machine(me.device, begun.run.path if me.first else None),
        inputs=_inputs(begun, pixels, training.classes),
        lags=metrics.Lags(),
        spikes=spikes.Spikes(),
        ledger=ledger.Ledger(past, begun.began, me.world, torch.get_num_threads(), gpu=me.device.type == "cuda"),
        hosts=me.gather(socket.gethostname()),
        writer=writer,
        evaluations=evaluations,
    )
    return session, about


# ---- the data ----------------------------------------------------------------------------------


def _data(begun: Begun) -> tuple[Batch, Training, Index]:
    """How a global batch is split, the training and the validation set."""
    given, me = begun.given, begun.me
    batch = me.on_every_rank(lambda: config.split_batch(given.train, me.world))
    me.on_every_rank(lambda: augment.check(given.data, batch.micro_batch))
    training, val_set = me.on_every_rank(lambda: _open_data(given, batch))
    begun.journal.stage("data")
    return batch, training, val_set


def _open_data(settings: Config, batch: Batch) -> tuple[Training, Index]:
    """The training and the validation set. Raises ValueError for what cannot be trained on."""
    if settings.data.decode == "gpu":
        device_decode.check()
    val_set = Index.open(settings.data.val, loader.cache(settings.data))
    if settings.data.stream:
        from vitdist.data import stream  # webdataset costs 0.6 s to import

        training = stream.open_stream(settings, val_set.classes, batch.world)
    else:
        training = loader.open_training(settings, batch.global_batch)
    if training.classes != val_set.classes:
        odd = sorted(set(training.classes) ^ set(val_set.classes)) or ["their order"]
        raise ValueError(
            f"data.train and data.val differ in classes ({', '.join(odd[:5])}): pack both with one `vitdist pack`, "
            "or with one list (--classes)"
        )
    if len(training.classes) < 2:
        raise ValueError(f"data.train: a single class, {training.classes[0]!r}: there is nothing to tell apart")
    return training, val_set


def _loss(settings: Config, training: Training) -> Loss:
    """The loss by the classes of the training set; what `unsure` wants of them is looked at too."""
    losses = Loss(settings.loss, training.class_counts, training.classes)
    if settings.evaluation.unsure:
        decision.of(settings.evaluation.unsure, training.classes)  # refuses what it cannot use
    return losses


def _see_the_same(me: Processes, training: Training, val_set: Index) -> None:
    """Raises ValueError if nodes have other data under the same names, or another order of them."""
    me.agree(
        {
            "training shards": training.identity[:12],
            "validation shards": val_set.digest[:12],
            "order of samples": training.first_batch,
        }
    )


# ---- the model ---------------------------------------------------------------------------------


def _model(begun: Begun, classes: list[str]) -> tuple[Module, Weights]:
    """The model on this rank's device, and what became of the weights that it began with."""
    given, me = begun.given, begun.me
    net, weights = me.on_every_rank(lambda: model.build(given.model, classes, given.train.seed, me.device))
    # A run with checkpoints of its own goes on from them.
    if given.model.warm_start and not me.of_first(lambda: manifest.steps(begun.run)):
        begun.journal.say(me.on_every_rank(lambda: _warm_start(net, str(given.model.warm_start), classes)))
    return net, weights


def _warm_start(net: Module, place: str, classes: list[str]) -> str:
    """Give the model the weights of another run's checkpoint; returns what to say of it. Raises ValueError."""
    folder = checkpoint.newest(Path(place))
    found, weights = checkpoint.weights(folder)
    same_classes = found.identity.classes == classes
    taken, left = model.take(net, weights, head=same_classes)
    if not taken:
        raise ValueError(
            f"model.warm_start: nothing in {folder} fits the model: is it one of the same family and size?"
        )
    rest = f"; as without it: {', '.join(left[:5])}" + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return f"warm start: {taken} tensors of {folder}" + (rest if left else "")


def _identity(
    settings: Config, batch: Batch, training: Training, net: Module, groups: list[dict[str, Any]]
) -> Identity:
    """What a checkpoint must have in common with this run to be gone on from; before DeepSpeed has the groups."""
    return Identity(
        optimizer=settings.optim.name,
        global_batch=batch.global_batch,
        model=model.configuration(net),
        classes=training.classes,
        data=training.identity,
        groups=checkpoint.layout(groups),
        rest=checkpoint.rest(net),
    )


# ---- what trains it and keeps it ---------------------------------------------------------------


def _engine(net: Module, groups: list[dict[str, Any]], settings: Config, batch: Batch, me: Processes) -> Engine:
    """DeepSpeed over the model and its groups."""
    if not settings.engine.compile:
        optim.without_compiler()
    engine = Engine(net, groups, optim.optimizer(groups, settings.optim, me.device), settings, batch, me)
    dist.bound_all_groups(group_timeout(settings.engine))  # DeepSpeed's own have its default, half an hour
    return engine


def _writer(begun: Begun, engine: Engine, identity: Identity, versions: dict[str, str | None]) -> Writer:
    """The writer of checkpoints, to which the run's folder of them belongs from here on."""
    given, plain = begun.given, config.to_plain(begun.given)
    about = {
        "zero": given.engine.zero,
        "precision": engine.precision,
        "average": bool(given.optim.ema),
        "settings": plain,
        "settings_digest": manifest.digest(plain),
        "versions": versions,
    }
    writer = Writer(begun.run, engine, begun.me, identity, given.checkpoint, begun.attempt, about)
    begun.me.of_first(writer.claim)
    return writer


def _versions() -> dict[str, str | None]:
    return {
        name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers", "deepspeed")
    }


# ---- what is known of earlier starts -----------------------------------------------------------


def _history(begun: Begun) -> tuple[list[ledger.Start], Evaluations | None]:
    """The starts before this one, for the figures of the run; on rank 0 its evaluations too."""
    me, run, journal = begun.me, begun.run, begun.journal
    past = me.of_first(lambda: _past(run, begun.attempt, journal))
    # No rank but the first needs them, and they are nothing to send.
    evaluations: list[Evaluations] = []
    me.of_first(lambda: evaluations.append(Evaluations(run, journal.publish)))
    return past, evaluations[0] if evaluations else None


def _past(run: RunDir, attempt: int, journal: Journal) -> list[ledger.Start]:
    """The starts before this one, and how far each came: a killed one says it by its rows alone."""
    earlier = [each for each in run.attempts() if each.number < attempt]
    rows = history.read(run).reached if earlier else {}
    past = []
    for each in earlier:
        try:
            past.append(ledger.start(each, rows.get(each.number), faults.read(each)))
        except (OSError, ValueError, TypeError) as error:  # only figures of the run come from it
            journal.warn("damaged_record", f"start {each.number} is left out of the figures of the run: {error}")
    return past


def _inputs(begun: Begun, pixels: Pixels, classes: list[str]) -> Inputs | None:
    """What collects the first pictures, on rank 0 of a run that has not kept them."""
    if not begun.me.first or begun.run.inputs.exists():
        return None
    return Inputs(pixels, classes, begun.journal.inputs)

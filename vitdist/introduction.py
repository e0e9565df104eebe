"""What a start says before its first update: its record, a few lines for who looks, and the beginning of W&B.

    introduction.introduce(session, about, resumed, passed_over)        # all ranks, after checkpoint.resume

It is the last that can refuse a start, for settings that do not go with the checkpoint. So the settings in the run
folder are brought up to date here, and not before.
"""

import os
import re
from typing import Any

import torch

from vitdist import changes, config, dist, model
from vitdist.checkpoint import Resumed
from vitdist.session import Session

SLOW_LINK = 2.0
"""GB/s of an all-reduce between GPUs; ethernet of 25 Gbit/s reaches 3, InfiniBand and NVLink 20 to 400."""
_LINK = (
    "has NCCL found InfiniBand? NCCL_DEBUG=INFO in slurm/env.sh tells, network_interface and infiniband of the "
    "profile choose"
)


def introduce(s: Session, about: dict[str, Any], resumed: Resumed | None, passed_over: list[str]) -> None:
    """Record what runs, tell it in a few lines, and begin W&B.

    `about`: what the record says of the model and its groups. `passed_over`: checkpoints that could not be resumed
    from, in words. Raises ValueError for changed settings that cannot be gone on with.
    """
    s.progress("starting", long=True)
    changed = changes.between(resumed.manifest.settings, config.to_plain(s.given)) if resumed else []
    changes.refuse(changed, f"step {resumed.step} of {s.run.path}" if resumed else "")

    about = about | _numbers(s)
    _tell_what_runs(s, about)
    about |= _look_at_the_loader(s)
    about |= _look_at_the_network(s)
    step = s.engine.steps
    s.journal.record(**about, total_steps=s.total, step=step, resumed_from=resumed.step if resumed else None)
    for text in passed_over:
        s.journal.warn("checkpoint_passed_over", f"checkpoint passed over: {text}")
    for change in changed:
        s.journal.say(f"setting changed: {change}")
        s.journal.event("settings_changed", str(change))
    _tell_where_it_begins(s, resumed)
    _put_down(s, resumed)
    s.journal.start_mirrors(s.settings, {"settings": config.to_plain(s.settings)} | about, step)


def _numbers(s: Session) -> dict[str, Any]:
    """Ranks, precision, batch, data and versions, for the record and W&B."""
    return {
        "world": s.me.world,
        "device": torch.cuda.get_device_name() if s.me.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "precision": s.engine.precision,
        "zero": s.settings.engine.zero,
        "batch": config.to_plain(s.batch),
        "data": {"train": s.training.summary, "val": s.val_set.summary()},
        "versions": s.versions,
    }


def _tell_what_runs(s: Session, about: dict[str, Any]) -> None:
    """Model, samples and ranks, and what of the settings a user may not have meant."""
    net, groups = about["model"], about["groups"]
    s.journal.say(f"{net['weights']}: {net['parameters'] / 1e6:.2f} M parameters in {len(groups)} groups")
    s.journal.say(
        f"{s.training.samples:,} training and {len(s.val_set):,} validation samples of "
        f"{len(s.training.classes)} classes"
    )
    if s.settings.data.stream:
        from vitdist.data import stream  # webdataset costs 0.6 s to import

        s.journal.say(stream.LOST)
    wanted = s.settings.loss
    if wanted.label_smoothing and (wanted.class_weights != "none" or wanted.logit_adjustment):
        s.journal.say(
            "warning: label smoothing promises rare classes more than they have, and class weights and logit "
            "adjustment multiply that: set loss.label_smoothing=0 (docs/recipes.md)"
        )
    if model.dropout(s.net):
        s.journal.say("note: dropout draws from each rank's own generator: losses depend on the number of ranks")
    if s.val_set.digest in s.training.parts:
        s.journal.say("warning: the validation samples are trained on too: data.val is among data.train")
    auto = " (auto)" if s.settings.engine.precision == "auto" else ""
    s.journal.say(
        f"{s.me.world} ranks on {about['device']}, {s.engine.precision}{auto}, ZeRO-{s.settings.engine.zero}; global "
        f"batch {s.batch.global_batch} = {s.batch.micro_batch} x {s.batch.accumulation} accumulated x "
        f"{s.batch.world} ranks"
    )


def _look_at_the_loader(s: Session) -> dict[str, Any]:
    """Say whether a rank's cores can feed the model; returns what the record keeps of it, {} where nobody looked."""
    if not s.me.first or not s.training.samples_of:
        return {}
    from vitdist.data import supply

    cores = max(1, len(os.sched_getaffinity(0)) // s.me.local_world)
    fed = supply.check(s.training.samples_of(), s.meter.flops_per_image, s.me.device, s.engine.dtype, cores)
    s.journal.say(fed.text())
    return {"supply": fed._asdict()}


def _look_at_the_network(s: Session) -> dict[str, Any]:
    """Say how fast the ranks reach each other; returns what the record keeps of it, {} of one rank. All call it."""
    speed = dist.bus_bandwidth(s.me)
    if speed is None:
        return {}
    s.journal.say(f"all-reduce over {s.me.world} ranks: {speed:.3g} GB/s")
    if s.me.device.type == "cuda" and speed < SLOW_LINK:
        s.journal.warn("slow_network", f"all-reduce at {speed:.2g} GB/s: {_LINK}")
    return {"all_reduce_gb_per_s": speed}


def _tell_where_it_begins(s: Session, resumed: Resumed | None) -> None:
    """The step, and what another number of ranks, stage or precision made of the checkpoint."""
    if resumed:
        before = resumed.manifest
        if (before.world, before.zero, before.precision) != (s.me.world, s.settings.engine.zero, s.engine.precision):
            s.journal.say(
                f"converted: saved by {before.world} ranks with ZeRO-{before.zero} in {before.precision}; every group "
                "keeps its rate, and the order of samples is the same"
            )
        s.journal.say(f"goes on at step {s.engine.steps} of {s.total}")
    elif s.attempt:
        s.journal.say("no checkpoint yet: begins at step 0")


def _put_down(s: Session, resumed: Resumed | None) -> None:
    """Bring the run folder up to what runs: the settings, and W&B's name of the run where only a checkpoint has it."""
    known = resumed.manifest.wandb if resumed else None
    if s.me.first and known and re.fullmatch(r"[0-9a-z_-]{1,64}", known) and s.run.wandb_id is None:
        s.journal.publish(s.run.wandb / "run-id", known)
    # What the run folder says is what runs; not before it is known that it can.
    if s.me.first and config.load(s.run.config) != s.given:
        s.journal.publish(s.run.config, config.to_yaml(s.given))

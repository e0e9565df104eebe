"""Fine-tune a ViT, one process a GPU (or a CPU worker): the whole run, from data to report, in order.

torchrun --nproc-per-node 2 -m vitdist.train configs/demo.yaml optim.lr=1e-3
python -m vitdist.train configs/demo.yaml              # one process, also under a debugger
torchrun ... -m vitdist.train runs/NAME --attempt 0    # what the launcher starts on every node
"""

import argparse
import contextlib
import functools
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vitdist import changes, config, console, faults, manifest, rundir, stop
from vitdist.config import Config, SettingsError
from vitdist.rundir import RunDir
from vitdist.session import LONG, Begun, Broken, Session, Skips, Standing, group_timeout
from vitdist.stop import StopRequest
from vitdist.watchdog import Mark, Watchdog

if TYPE_CHECKING:  # the rooms behind torch are imported when a run begins: bad settings answer at once
    from torch import Tensor

    from vitdist.data.reader import MicroBatch
    from vitdist.decision import Decision
    from vitdist.dist import Processes
    from vitdist.tracking import Journal


_REMEDY = "the run diverged; lower optim.lr, lengthen optim.warmup or set optim.clip"


class TrainingFailed(RuntimeError):
    """The run cannot go on, for a reason that a user can act on."""


class Interrupted(Exception):
    """All ranks have agreed to stop in the middle of an evaluation."""


def train(place: Callable[[], RunDir], settings: Config, attempt: int | None, stopping: StopRequest) -> int:
    """Train to the end or to a stop; returns the exit code (rundir.EXIT_*). Rank 0 asks `place` for the run folder."""
    from vitdist import dist
    from vitdist.tracking import Journal

    began = time.monotonic()
    engine = settings.engine
    with dist.processes(None if engine.threads == "auto" else engine.threads, group_timeout(engine)) as me:
        run = RunDir(Path(me.of_first(lambda: str(place().path))))
        number = me.from_first(run.next_attempt() if attempt is None and me.first else attempt)
        here = run.attempt(number)
        mark = Mark(0, 0, "starting", math.inf)
        try:
            with _only_writer(run, me), Journal(run, here, me.first) as journal:
                journal.stage("torch and ranks")
                me.of_first(lambda: manifest.clean(run))
                hung = functools.partial(_hung, journal)
                with Watchdog(here, me.rank, me.world, engine.hang_s, hung) as watchdog:
                    watchdog.mark(0, "starting", LONG * engine.hang_s)
                    try:
                        begun = Begun(run, number, settings, me, journal, watchdog, stopping, began)
                        summary = _attempt(begun)
                    finally:
                        mark = watchdog.newest
        except BaseException as error:  # after the watchdog, which may know better why this rank fails
            # Refused are all ranks alike, and rank 0 takes the folder of a new run away again: nothing may follow.
            if me.first or not isinstance(error, ValueError):
                faults.note(here, faults.of(error, me.rank, mark.step, mark.phase))
            raise
        # The journal is closed, W&B with it, before the ranks part: torchrun kills the ranks that are
        # left 30 s after the first one has gone with a code other than 0.
        if me.first and summary:
            _finish(run, summary)
        elif me.first:
            print(f"to go on: the same command with --name {run.name}")
        me.barrier()
        return rundir.EXIT_DONE if summary else rundir.EXIT_STOPPED


def _attempt(begun: Begun) -> dict[str, float] | None:
    """One attempt from the data to the model; returns the figures of the finished run, None if it was stopped."""
    from vitdist import checkpoint, model

    journal = begun.journal
    model.import_quickly(begun.given.engine.compile)
    journal.stage("transformers")
    from vitdist import assembly, introduction  # with them DeepSpeed, which asks what `dist` chose
    from vitdist.data.reader import DataFailed

    # data, model with a learning rate for each layer, DeepSpeed
    s, about = assembly.assemble(begun)

    # go on where an earlier attempt stopped
    resumed, passed_over = checkpoint.resume(s.run, s.engine, s.me, s.identity, s.settings.train.seed)
    if resumed:
        s.writer.began_at(resumed)
    else:
        s.me.of_first(lambda: manifest.refuse_if_gone(s.run, s.attempt))
    if s.evaluations:
        s.evaluations.forget_after(resumed.step if resumed else 0)
    s.ledger.goes_on_from(resumed.step if resumed else 0)
    journal.stage("checkpoint")
    introduction.introduce(s, about, resumed, passed_over)
    journal.stage("W&B and a look at the loader")

    # the loop, and what a finished run leaves
    try:
        return _to_the_end(s)
    except DataFailed as error:  # out of a loader process it comes with that one's traceback before it
        raise TrainingFailed(str(error).strip().splitlines()[-1].split("DataFailed: ")[-1]) from error
    except (checkpoint.SaveFailed, checkpoint.Fenced) as error:
        raise TrainingFailed(str(error)) from error
    except ValueError as error:  # before the loop it is bad input, from there on a fault to be seen whole
        raise RuntimeError(f"fault after step {s.engine.steps}: {error}") from error
    finally:
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # a second Ctrl-C means now
            s.writer.close()


def _to_the_end(s: Session) -> dict[str, float] | None:
    """Train, evaluate, export; returns the figures of the finished run, None if it was stopped, with a checkpoint."""
    try:
        reason = _loop(s)
        if reason is None:
            _settle(s)
            ended = s.engine.steps
            summary = _export(s)
            s.journal.record(state="done", step=ended, summary=summary, ended=rundir.now())
            return summary
    except Interrupted:
        s.writer.wait()  # or ranks might differ in what they know of it
        if s.engine.steps > (s.writer.newest or 0):
            _save(s)
        reason = _reason(s)
    _stop(s, reason)
    return None


def _settle(s: Session) -> None:
    """Wait for the checkpoint of the last step; one that failed is tried once more, since storage has bad moments."""
    from vitdist.checkpoint import SaveFailed

    with contextlib.suppress(SaveFailed):
        s.writer.wait()
    if (s.writer.newest or 0) < s.engine.steps:
        _save(s)
        s.writer.wait()
    _tell_saves(s)


def _stop(s: Session, reason: str) -> None:
    """Wait for the checkpoint of the last step, and say what the run goes on from."""
    s.progress("saving", long=True)
    s.writer.wait()
    newest = s.writer.newest
    step = max(s.engine.steps, newest or 0)  # in the last evaluation of all, the weights may be those of the best step
    _tell_saves(s)
    saved = "checkpoint saved"
    if newest != step:
        saved = f"no checkpoint of it: it will go on from {'the beginning' if newest is None else f'step {newest}'}"
    s.journal.stopping()
    s.journal.record(state="stopped", reason=reason, step=step, goes_on_from=newest or 0, ended=rundir.now())
    s.journal.say(f"stopped by {reason} at step {step} of {s.total}, {saved}")


def _export(s: Session) -> dict[str, float]:
    """What a finished run leaves: the last evaluation and the model; returns the figures of the whole run."""
    from vitdist import checkpoint, export, model

    ended = s.engine.steps
    s.progress("exporting", long=True)
    scores, rule = _evaluate(s, final=True)
    best = _judge(s, scores).best
    if s.settings.evaluation.export == "best" and best != ended:
        try:
            checkpoint.load_step(s.run, s.engine, s.me, s.identity, best)
        except ValueError as error:  # the last weights are whole: a run without any model would be worse
            s.journal.warn("bad_best", f"the best checkpoint, {error}: exporting the last weights")
        else:
            s.journal.say(f"back to step {best}, the best by {s.settings.evaluation.best}")
            scores, rule = _evaluate(s, final=True, log=False)
    counted = f"{scores['samples']:,} of {len(s.val_set):,}"
    s.journal.say(f"evaluated {counted} validation samples, each once")
    s.progress("exporting", long=True)
    with s.engine.averaged():
        whole = s.engine.full_weights(keep=s.me.first)
    if s.me.first:
        evaluation = rundir.read_json(s.run.evaluation)
        assert evaluation is not None
        card = export.card(s.run.name, config.load(s.run.config), rundir.state(s.run), evaluation, s.pixels)
        export.write(s.run.model, model.finished(s.net, whole), s.pixels, card, rule)
    return {**scores, "images_per_s": s.meter.images_per_s, "seconds": time.monotonic() - s.began}


def _loop(s: Session) -> str | None:
    """Update until the last step; returns None, or the signal that stopped it, with a checkpoint on its way."""
    settings = s.settings.evaluation
    evaluate_every = settings.every_steps or max(1, round((settings.every_epochs or 1.0) * s.steps_per_epoch))
    save_every = s.settings.checkpoint.every_steps or evaluate_every
    with contextlib.closing(s.training.batches(s.batch, s.me.rank, s.engine.steps, s.me.local_world)) as batches:
        return _steps(s, batches, evaluate_every, save_every)


def _steps(s: Session, batches: "Iterator[MicroBatch]", evaluate_every: int, save_every: int) -> str | None:
    """The loop itself."""
    from vitdist.engine import Diverged

    settings, engine = s.settings, s.engine
    losses: list[Tensor] = []
    broken, skips = Broken(), Skips()
    first = True
    engine.train()
    s.meter.begin()
    while engine.steps < s.total and not _patience_ends(s, evaluate_every):
        skipped = engine.skipped
        try:
            losses.append(_update(s, batches, broken, skips))
        except Diverged as error:  # on all ranks alike
            raise TrainingFailed(_diverged(s, skips, f"{error} at step {engine.steps + 1}")) from error
        step = engine.steps
        last = step == s.total
        row_is_due = step % settings.tracking.log_every == 0 or last
        if first:
            first = False
            s.journal.stage("first update")
            s.journal.started()
            if not row_is_due:
                s.meter.begin()  # the first one waited for loaders and kernels to get ready
        skips.in_a_row = skips.in_a_row + 1 if engine.skipped > skipped else 0
        if skips.in_a_row:
            _judge_skips(s, skips)
        if row_is_due:
            _log(s, losses, broken)
            losses = []
        s.progress("training")
        _tell_saves(s)
        # Also where a checkpoint has failed and the settings ask for an end: the next one tells it, and ends.
        stop_now = s.me.any(bool(s.stopping) or s.writer.must_stop) and not last
        # Saved first: an evaluation may be long, and what it costs to do again is little.
        if step % save_every == 0 or last or stop_now:
            with s.meter.paused():
                _save(s)
        if stop_now:
            return _reason(s)
    if engine.steps < s.total:
        patience, metric = settings.evaluation.patience, settings.evaluation.best
        s.journal.say(f"{patience} evaluations brought no better {metric}: ends at step {engine.steps} of {s.total}")
    return None


def _reason(s: Session) -> str:
    """The signal that asked a rank to stop; all ranks call it when one was."""
    return str(next(reason for reason in s.me.gather(s.stopping.reason) if reason))


def _update(s: Session, batches: "Iterator[MicroBatch]", broken: Broken, skips: Skips) -> "Tensor":
    """One update over a global batch; returns this rank's mean loss, adds to `broken`, renews `skips.seen`."""
    import torch
    from torch.nn import functional as F

    from vitdist import optim
    from vitdist.data import augment
    from vitdist.data.order import rank_slots

    total_loss, data, step = torch.zeros((), device=s.me.device), s.settings.data, s.engine.steps
    seed, batch = s.settings.train.seed, s.batch
    # Skipped updates do not advance the schedule: it counts the applied ones.
    applied = s.engine.steps - s.engine.skipped
    s.engine.set_lr(optim.schedule(applied, s.total, s.settings.optim, s.steps_per_epoch))
    asked = time.monotonic()
    micros = [next(batches) for _ in range(batch.accumulation)]
    s.meter.waited(time.monotonic() - asked)
    share = _share_of_a_sample(s, micros)
    skips.seen = []
    for part, micro in enumerate(micros):
        images, target = s.prepare(micro), micro.labels.to(s.me.device, non_blocking=True)
        slots = rank_slots(step, part, s.me.rank, batch)
        plan = augment.plan(data, seed, step, slots, batch.global_batch, images.shape[-1])
        if plan:
            images, target = augment.apply(plan, images, F.one_hot(target, len(s.training.classes)).float())
        if s.inputs:
            s.inputs.see(images, target)
        if s.drop_paths:
            s.drop_paths.draw(seed, step, slots, batch.global_batch)
        with s.meter.computing():
            logits = s.engine.forward(images)
        logits = logits.float()
        # DeepSpeed takes the mean over micro-batches and ranks: so that their sum is left, each counts as often.
        of_samples = s.loss(logits, target)
        loss = of_samples.sum() * (share * batch.accumulation * batch.world)
        skips.seen.append((micro.ids, of_samples.detach()))
        s.engine.backward(loss)
        s.engine.step()
        total_loss += loss.detach()
        broken.new += micro.bad
        for bad in micro.bad:
            print(f"step {step}: replaced sample {bad.key} of {bad.shard}: {bad.detail}", file=sys.stderr)
        s.watchdog.mark(step, "training")
    s.meter.step()
    return total_loss / batch.accumulation


def _share_of_a_sample(s: Session, micros: "list[MicroBatch]") -> float:
    """What one sample of weight 1 counts in the loss of a global batch: 1 / (sum of the weights over all ranks)."""
    import torch

    if not s.loss.weighted:
        return 1 / s.batch.global_batch
    # Mixing does not change the sum: what a sample gives away, its partner, of the same micro-batch, gets.
    mine = sum((s.loss.weight(micro.labels).double().sum() for micro in micros), torch.zeros((), dtype=torch.float64))
    return 1 / max(float(s.me.sum(mine)), 1e-12)


def _log(s: Session, losses: "list[Tensor]", broken: Broken) -> None:
    """One row of figures of the steps since the last; ends a run that cannot learn any more."""
    import torch

    from vitdist import metrics, system

    engine, step = s.engine, s.engine.steps
    seen = step * s.batch.global_batch
    mine = torch.stack(losses).double().cpu()
    finite = mine.isfinite()  # a step whose loss was not is told by itself
    sums, numbers = s.me.sum(torch.stack([mine.where(finite, 0.0), finite.double()]))
    sums = sums.where(numbers == s.me.world, math.nan)  # all ranks skip what one of them must
    whole = sums.isfinite()
    loss = float(sums[whole].sum() / numbers[whole].sum())  # NaN where none was
    _note_broken(s, broken)
    told = s.me.gather((s.meter.own(), s.machine.now()))
    owns = [own for own, _ in told]
    speed = s.meter.row(s.total - step)
    speed |= metrics.lag(owns, speed["perf/step_s"])
    for kind, text in s.lags.see(owns, speed["perf/step_s"], s.hosts):
        s.journal.warn(kind, text)
    rates = {f"lr/{name}": rate for name, rate in engine.lrs().items() if not name.endswith("_no_decay")}
    s.journal.row(
        step,
        {
            "train/loss": loss,
            "train/epoch": seen / s.training.samples,
            "train/samples_seen": seen,
            **rates,
            "optim/grad_norm": engine.grad_norm,
            "optim/loss_scale": engine.loss_scale,
            "optim/skipped_steps": engine.skipped,
            "data/bad_samples": len(broken.known),
            **{f"data/bad_{reason}": number for reason, number in sorted(broken.reasons.items())},
            **speed,
            **system.figures([now for _, now in told]),
            **s.ledger.row(step, s.meter.busy_s),
        },
    )
    for text in s.spikes.see(step - len(losses), (sums / numbers).tolist()):
        s.journal.warn("loss_spike", text)
    # Counted are samples, not meetings: one that every epoch meets again is one.
    max_bad = s.settings.data.max_bad
    budget = max(1, math.floor(max_bad * s.training.samples)) if max_bad else 0
    if len(broken.known) > budget:
        reasons = ", ".join(f"{number} {reason}" for reason, number in broken.reasons.most_common())
        shard, most = broken.shards.most_common(1)[0]
        raise TrainingFailed(
            f"{len(broken.known)} samples could not be used by step {step} ({reasons}; {most} in {shard}), more than "
            f"data.max_bad {max_bad} allows ({budget}): {s.run.bad_samples} names them; "
            "run `vitdist verify` on the shards, or raise data.max_bad"
        )


def _judge_skips(s: Session, skips: Skips) -> None:
    """After a skipped update: say whose loss or gradient was not finite, and end a run that does nothing else."""
    step = s.engine.steps
    ending = skips.in_a_row >= s.settings.train.max_skipped
    # fp16 skips updates in the search for its loss scale; those say nothing.
    searching = s.engine.precision == "fp16" and not ending
    if searching and not s.me.any(any(not math.isfinite(loss) for _, loss in skips.samples())):
        return
    if ending:
        many = f"{skips.in_a_row} updates in a row up to step {step} were not finite and skipped"
        raise TrainingFailed(_diverged(s, skips, many))
    what, text, _ = _spoilt(s, skips)
    s.journal.warn("skipped_step", f"step {step} is skipped by all ranks: its {what} was not finite ({text})")


def _diverged(s: Session, skips: Skips, how: str) -> str:
    """What to say of a run that ends since its losses or gradients are not finite; it is recorded too. All call it."""
    what, text, told = _spoilt(s, skips)
    newest = s.writer.newest
    s.journal.record(not_finite={"step": s.engine.steps, "in_a_row": skips.in_a_row, "of": what, "ranks": told})
    remedy = _REMEDY + (", or engine.precision=bf16 where the GPU has it" if s.engine.precision == "fp16" else "")
    kept = f"; the checkpoint of step {newest} is intact" if newest else ""
    return f"{how}; in the last the {what} was not ({text}): {remedy}{kept}"


def _spoilt(s: Session, skips: Skips) -> tuple[str, str, list[tuple[bool, list[str], int]]]:
    """(what of the newest update was not finite, the ranks and samples in words, the same of each rank)."""
    mine = skips.samples()
    spoiled = [(row, loss) for row, loss in mine if not math.isfinite(loss)]
    samples = s.training.samples_of() if s.training.samples_of else None
    keys = [samples.index.key(row) if samples else f"number {slot}" for slot, (row, _) in enumerate(spoiled or mine)]
    told = s.me.gather((bool(spoiled), keys[:8], len(keys)))
    of_loss = [(rank, named, count) for rank, (bad, named, count) in enumerate(told) if bad]
    what = "loss" if of_loss else "gradient, though each loss was finite,"
    of_ranks = of_loss or [(rank, named, count) for rank, (_, named, count) in enumerate(told)]
    text = "; ".join(
        f"rank {rank}: samples {', '.join(named)}" + (f" and {count - len(named)} more" if count > len(named) else "")
        for rank, named, count in of_ranks[:4]
    ) + (f"; and {len(of_ranks) - 4} more ranks" if len(of_ranks) > 4 else "")
    return what, text, told


def _note_broken(s: Session, broken: Broken) -> None:
    """Count what all ranks met since the last row, and list it in the run folder."""
    if not s.me.any(bool(broken.new)):
        return
    met = sorted(bad for rank in s.me.gather(broken.new) for bad in rank)
    s.journal.bad_samples(s.engine.steps, "train", met)
    # By row: sets that are mixed may have shards and keys of the same names. A stream has no rows, all are -1.
    new = {key: bad for bad in met if (key := (bad.id, bad.shard, bad.key)) not in broken.known}
    broken.known.update(new)
    broken.reasons.update(bad.reason for bad in new.values())
    broken.shards.update(bad.shard for bad in new.values())
    broken.new.clear()


def _evaluate(s: Session, final: bool = False, log: bool = True) -> "tuple[dict[str, float], Decision | None]":
    """Evaluate, publish the result, log a row; returns metrics and, on rank 0, the rule that says `unsure`.

    `final`: with all that takes long, such as intervals. Raises Interrupted, on all ranks, if one was asked to stop.
    """
    from vitdist import evaluate
    from vitdist.data import loader

    step, settings, classes = s.engine.steps, s.settings.evaluation, s.val_set.classes

    def go_on() -> bool:
        s.watchdog.mark(step, "evaluating")
        return not s.me.any(bool(s.stopping))

    s.progress("evaluating")
    size = settings.batch or 2 * s.batch.micro_batch
    batches = loader.evaluation_batches(s.val_set, s.settings, s.me.rank, s.me.world, size, s.me.local_world)
    s.engine.eval()
    whole = final or settings.best == "auroc"
    with s.engine.averaged():
        result = evaluate.evaluate(
            s.engine.forward, batches, s.prepare, len(classes), len(s.val_set), s.me, settings.tta, whole, go_on
        )
    s.engine.train()
    if result is None:
        raise Interrupted
    s.journal.bad_samples(step, "val", result.bad)
    if log:
        s.journal.row(step, {f"val/{name}": value for name, value in result.metrics.items()})
    if not math.isfinite(result.metrics["loss"]):
        raise TrainingFailed(f"the validation loss is {result.metrics['loss']} at step {step}: {_REMEDY}")
    rule = None
    if s.me.first:
        rule = evaluate.publish(s.run, step, result, classes, settings, final, s.journal.publish)
    return result.metrics, rule


def _patience_ends(s: Session, evaluate_every: int) -> bool:
    """Evaluate, if that is due at this step and was not done; returns whether the run should end early.

    What a run evaluates hangs on the step and its history alone, not on where it was interrupted. The last step is
    evaluated by the end of the run.
    """
    step = s.engine.steps
    if step == 0 or step % evaluate_every:
        return False
    standing = _standing(s)
    if standing.owed:
        with s.meter.paused():
            standing = _judge(s, _evaluate(s)[0])
            if standing.best == step or standing.exhausted:
                _save(s)
    return standing.exhausted


def _judge(s: Session, scores: dict[str, float]) -> Standing:
    """Remember an evaluation; returns where the run stands with it."""
    if s.evaluations:
        s.evaluations.record(s.engine.steps, scores)
    return _standing(s)


def _standing(s: Session) -> Standing:
    """Where the run stands by its history, which rank 0 reads; all ranks call it."""
    from vitdist import selection

    if not s.evaluations:
        return cast(Standing, s.me.from_first(None))
    metric, step = s.settings.evaluation.best, s.engine.steps
    history = s.evaluations.history(metric, step)
    best = selection.best(history, metric)
    exhausted = selection.exhausted(history, metric, s.settings.evaluation.patience)
    owed = step not in (done for done, _ in history)
    return cast(Standing, s.me.from_first(Standing(best[0] if best else step, exhausted, owed)))


def _save(s: Session) -> None:
    """Begin a checkpoint of this step; the loop goes on while it is written."""
    s.progress("saving", long=True)
    samples = s.engine.steps * s.batch.global_batch
    s.writer.save({"epoch": samples / s.training.samples, "samples": float(samples)}, best=_standing(s).best)
    _tell_saves(s)


def _tell_saves(s: Session) -> None:
    """Record what became of checkpoints."""
    for saved in s.writer.news():
        if saved.fault is not None:
            s.journal.warn(
                "checkpoint_failed",
                f"the checkpoint of step {saved.step} could not be saved: {saved.fault}; the older ones stay",
            )
        else:
            about = {"seconds": saved.seconds, "blocked_s": saved.blocked_s, "bytes": saved.bytes}
            s.journal.record(step=saved.step, saved=about)


# ---- what the chapters need of small things ----------------------------------------------------


def _hung(journal: "Journal", verdict: str) -> None:
    """What the watchdog does before it ends this rank; who hung stands in attempts/K/faults."""
    journal.record(state="failed", reason=verdict, ended=rundir.now())


@contextlib.contextmanager
def _only_writer(run: RunDir, me: "Processes") -> Iterator[None]:
    """Rank 0 holds the run: two trainings of one folder would write each other's checkpoints."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            try:
                stack.enter_context(rundir.only_writer(run))
            except BlockingIOError:
                raise ValueError(
                    f"{run.path} is being trained by another process; wait for it or stop it first"
                ) from None

        me.of_first(lock)
        yield


def _finish(run: RunDir, summary: dict[str, Any]) -> None:
    """Write the report and tell where everything lies; a failed report takes nothing from the run."""
    from vitdist.report import page

    try:
        page.write(run)
    except Exception:  # the run is complete and saved: say what went wrong and go on
        traceback.print_exc()
        print(f"the report could not be written; try again with: vitdist report {run.path}", file=sys.stderr)
    try:
        console.final_table(run, summary)
    except ValueError as error:  # a terminal that cannot print a path
        print(f"{run.name} is done ({error})")


# ---- the command -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line of this file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vitdist.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="settings (section.name=value overrides the file):\n" + config.describe(Config),
    )
    parser.add_argument("target", help="a run folder, or a configuration (.yaml) for a new run")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings over those of the file")
    parser.add_argument("--name", help="name of the run folder; an existing one with the same settings is continued")
    parser.add_argument("--runs", default="runs", help="where run folders lie (default: runs)")
    parser.add_argument(
        "--warm-start",
        metavar="RUN",
        help="begin with the weights of another run, or of one of its checkpoints (model.warm_start)",
    )
    parser.add_argument(
        "--attempt", type=int, help="number of this start of a run folder; its ranks write to their own log files"
    )
    args = parser.parse_intermixed_args(argv)  # options may stand between overrides
    stopping = stop.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop.end_with_parent()
    rank, node = int(os.environ.get("RANK", "0")), int(os.environ.get("GROUP_RANK", "0"))
    made: list[RunDir] = []
    try:
        settings, run = _open(args)
        if run and args.attempt is not None:
            from vitdist.tracking import to_file

            to_file(run.attempt(args.attempt).rank_log(node, rank))
        if run and _finished(run, settings):
            if rank == 0 and not run.report.exists():  # it was killed while it wrote it
                _finish(run, rundir.state(run)["summary"])
            elif rank == 0:
                print(f"{run.path} is finished; its report is {run.report}")
            return rundir.EXIT_DONE
        return train(lambda: run or _new_run(args, settings, made), settings, args.attempt, stopping)
    except (ValueError, TrainingFailed) as error:
        if isinstance(error, ValueError) and made and not _holds_work(made[0]):  # refused: its name is free again
            shutil.rmtree(made[0].path)
            with contextlib.suppress(OSError):
                made[0].path.parent.rmdir()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        print((f"rank {rank}: " if world > 1 else "") + f"error: {error}", file=sys.stderr)
        return rundir.EXIT_REFUSED if isinstance(error, ValueError) else rundir.EXIT_DO_NOT_REQUEUE


def _holds_work(run: RunDir) -> bool:
    """Whether there is more in a run folder than a start that was refused."""
    return run.model.exists() or bool(manifest.steps(run))


def _open(args: argparse.Namespace) -> tuple[Config, RunDir | None]:
    """The settings, and the run folder if there is one already."""
    target = Path(args.target)
    there = os.path.isdir(target)  # as `exists` and `realpath` of os.path: False for names too long, circles of links
    overrides = args.overrides + ([f"model.warm_start={args.warm_start}"] if args.warm_start else [])
    if there:
        if args.name:
            raise SettingsError(f"{target} is a run folder and has a name; give a .yaml for another run")
        run = RunDir(target.resolve())
        if not os.path.exists(run.config):
            raise SettingsError(f"{target} is no run folder (it has no config.yaml); give one, or a configuration")
    else:
        rundir.check_name(args.name or target.stem)
        run = RunDir(Path(os.path.realpath(args.runs)) / (args.name or ""))
    settings = config.with_absolute_paths(config.load(run.config if there else target, overrides))
    if not (there or args.name) or not os.path.exists(run.config):
        return settings, None
    changed = changes.between(config.to_plain(config.load(run.config)), config.to_plain(settings))
    changes.refuse(changed, str(run.path))
    return settings, run


def _finished(run: RunDir, settings: Config) -> bool:
    """Whether there is nothing left to do: a run that is made longer goes on."""
    if rundir.state(run)["state"] != "done":
        return False
    try:  # not config.yaml, which the launcher, or a person, has changed already
        newest = manifest.read(run.checkpoints / manifest.name_of(manifest.steps(run)[0])).settings
    except (IndexError, manifest.Damaged):
        return True
    return not changes.longer(changes.between(newest, config.to_plain(settings)))


def _new_run(args: argparse.Namespace, settings: Config, made: list[RunDir]) -> RunDir:
    """A folder, noted in `made`, for a new run; named after configuration and time unless --name says otherwise."""
    name = args.name or f"{Path(args.target).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run = RunDir(Path(os.path.realpath(args.runs)) / rundir.check_name(name))
    try:
        rundir.publish(run.config, config.to_yaml(settings))
    except OSError as error:
        raise SettingsError(f"--runs {args.runs}: {run.path} cannot be made ({error.strerror})") from None
    made.append(run)
    return run


if __name__ == "__main__":
    console.spare_output()
    sys.exit(main())

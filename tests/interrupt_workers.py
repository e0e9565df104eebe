"""What ranks of interrupted runs do: the trainer's own main, which a signal meets at a chosen point.

    codes = start(2, Attempt(arguments, folder, Strike("rename", "SIGKILL")))    # exit codes of all ranks

Unlike ranks.run, a rank may die here, and the others are then ended as torchrun does it.
"""

import contextlib
import errno
import functools
import json
import math
import multiprocessing.connection
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import ranks, workers
from vitdist import checkpoint, console, dist, evaluate, export, loss, manifest, rundir, stop
from vitdist import train as trainer
from vitdist.config import Checkpoint
from vitdist.engine import Engine, Piece
from vitdist.manifest import Group, Identity
from vitdist.report import charts, page
from vitdist.rundir import RunDir

PATIENCE_S = 60.0
"""The longest wait for ranks whose peer is gone before they are killed; torchrun waits 30 s."""


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself at a point of its run."""

    point: str
    """A name of POINTS."""
    signal: str
    ranks: str = "all"
    """all, or the number of one. What only rank 0 does strikes rank 0 alone."""
    after: int = 0
    """The point is passed so many times before, in this attempt."""


@dataclass(frozen=True)
class Attempt:
    """A start of the trainer."""

    arguments: Sequence[str]
    folder: Path
    """Working directory; output.R and ids.R of rank R are added to there."""
    strike: Strike | None = None
    hook: Callable[[int], None] | None = None
    """Called in each rank, with its number, before the trainer; a function of an importable file."""


class _Signal:
    """Sends the signal at the call that the strike means, and never again."""

    def __init__(self, strike: Strike) -> None:
        self._number, self._left = signal.Signals[strike.signal], strike.after

    def __call__(self) -> None:
        self._left -= 1
        if self._left == -1:
            os.kill(os.getpid(), self._number)


def _start(send: _Signal) -> None:
    """Before the signals are taken over: each is a plain death."""
    original = stop.install

    def install() -> Any:
        send()
        return original()

    stop.install = install


def _import(send: _Signal) -> None:
    """Before the first collective operation."""
    original = dist.processes

    def processes(*args: Any) -> Any:
        send()
        return original(*args)

    dist.processes = processes


def _rendezvous(send: _Signal) -> None:
    """While ranks wait for each other; the rank that is struck comes late, or never."""
    original = torch.distributed.init_process_group

    def init_process_group(*args: Any, **more: Any) -> None:
        send()
        original(*args, **more)

    torch.distributed.init_process_group = init_process_group


def _accumulation(send: _Signal) -> None:
    """In the middle of an update, after the first of two backward passes."""
    original = Engine.step

    def step(self: Engine) -> None:
        before = self.steps
        original(self)
        if self.steps == before:
            send()

    Engine.step = step  # type: ignore[method-assign]


def _evaluation(send: _Signal) -> None:
    """In the middle of it, with the averages in the place of the weights."""
    original = evaluate.evaluate

    def struck(forward: Any, batches: Any, prepare: Any, *rest: Any) -> Any:
        seen = []

        def first(batch: Any) -> Any:
            if not seen:
                seen.append(batch)
                send()
            return prepare(batch)

        return original(forward, batches, first, *rest)

    evaluate.evaluate = struck


def _write(send: _Signal) -> None:
    """In the writer's thread, with half of the file written."""
    original = checkpoint.write_file

    def write_file(path: Path, header: bytes, body: memoryview) -> Any:
        original(path, header, body[: len(body) // 2])
        send()
        return original(path, header, body)

    checkpoint.write_file = write_file


def _vote(send: _Signal) -> None:
    """In the writer's thread: this rank knows that all have written, and nothing is published."""
    original = dist.Processes.gather

    def gather(self: dist.Processes, value: Any, group: Any = None) -> list[Any]:
        votes = original(self, value, group)
        if group is not None and group is self.background:
            send()
        return votes

    dist.Processes.gather = gather  # type: ignore[method-assign]


def _around_rename(send: _Signal, before: bool) -> None:
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        meant = Path(target).name.startswith("step-")
        if meant and before:
            send()
        original(source, target)
        if meant and not before:
            send()

    os.rename = rename  # type: ignore[assignment]


def _pointer(send: _Signal) -> None:
    original = rundir.publish

    def publish(path: Path, content: str | bytes) -> None:
        if path.name == "latest":
            send()
        original(path, content)

    rundir.publish = publish


def _before(module: Any, name: str) -> Callable[[_Signal], None]:
    """The point at which `module.name` is called."""

    def arm(send: _Signal) -> None:
        original = getattr(module, name)

        def struck(*args: Any, **more: Any) -> Any:
            send()
            return original(*args, **more)

        setattr(module, name, struck)

    return arm


POINTS: dict[str, tuple[bool, Callable[[_Signal], None]]] = {
    "start": (False, _start),
    "import": (False, _import),
    "rendezvous": (False, _rendezvous),
    "resume": (False, _before(checkpoint, "resume")),
    "step": (False, _before(trainer, "_update")),
    "accumulation": (False, _accumulation),
    "evaluation": (False, _evaluation),
    "write": (False, _write),
    "vote": (False, _vote),
    "rename": (True, lambda send: _around_rename(send, before=True)),
    "renamed": (True, lambda send: _around_rename(send, before=False)),
    "pointer": (True, _pointer),
    "export": (True, _before(export, "write")),
    "exported": (True, _before(export, "_put")),
    "report": (True, _before(page, "write")),
    "reported": (True, _before(console, "final_table")),
}
"""name -> (whether only rank 0 passes it, what lays the strike there)"""


def signals_in_a_save(rank: int) -> None:
    """Three signals with half of the first file written."""
    for name in ("SIGUSR2", "SIGTERM", "SIGUSR2"):
        _write(_Signal(Strike("write", name)))


def killed_in_the_save_of_a_stop(rank: int) -> None:
    """The window after a warning is too short: SIGTERM before the fourth update, the end in the middle of its save."""
    ask = _Signal(Strike("step", "SIGTERM", after=3))
    _before(trainer, "_update")(ask)
    original = checkpoint.write_file

    def write_file(path: Path, header: bytes, body: memoryview) -> Any:
        if "step-00000004" in str(path):
            original(path, header, body[: len(body) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, header, body)

    checkpoint.write_file = write_file


def full_disk(step: int, rank: int) -> None:
    """The last rank finds no room for its file of the checkpoint of `step`."""
    original = checkpoint.write_file

    def write_file(path: Path, header: bytes, body: memoryview) -> Any:
        if manifest.name_of(step) in str(path) and rank == int(os.environ["WORLD_SIZE"]) - 1:
            original(path, header, body[: len(body) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, header, body)

    checkpoint.write_file = write_file


def spoil(what: str, first: int, last: int, rank: int) -> None:
    """In updates [first, last) the last rank's loss is NaN, or `gradient`: finite, with gradients that are not."""
    if rank != int(os.environ["WORLD_SIZE"]) - 1:
        return
    update, original, now = trainer._update, loss.Loss.__call__, [0]

    def noted(s: Any, *rest: Any) -> Any:
        now[0] = s.engine.steps
        return update(s, *rest)

    def call(self: loss.Loss, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not first <= now[0] < last:
            return original(self, logits, target)
        if what == "gradient":
            logits.register_hook(lambda gradient: gradient * math.inf)
            return original(self, logits, target)
        return original(self, logits, target) * math.nan

    trainer._update = noted
    loss.Loss.__call__ = call  # type: ignore[method-assign]


def attempt(given: Attempt) -> int:
    """The trainer's own main in this rank; its exit code, if it comes to an end."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.chdir(given.folder)
    charts.vega = lambda: ""  # type: ignore[assignment]  # 1.8 s of work for scripts that no test here reads
    if any("fp16" in argument for argument in given.arguments):
        workers.allow_fp16_on_cpu()
    _note_samples(given.folder / f"ids.{rank}")
    if given.hook:
        given.hook(rank)
    if strike := given.strike:
        first_only, arm = POINTS[strike.point]
        if rank == 0 if first_only else strike.ranks in ("all", str(rank)):
            arm(_Signal(strike))
    assert world >= 1
    with (
        open(given.folder / f"output.{rank}", "a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return trainer.main(list(given.arguments))


def _note_samples(path: Path) -> None:
    """Leave a line for each update in a file: its number and the rows of this rank's samples, in order."""
    original = trainer._share_of_a_sample

    def share(s: Any, micros: Any) -> float:
        with open(path, "a") as file:
            file.write(json.dumps([s.engine.steps, [row for micro in micros for row in micro.ids.tolist()]]) + "\n")
        return original(s, micros)

    trainer._share_of_a_sample = share


def start(world: int, given: Attempt, patience_s: float = PATIENCE_S) -> list[int]:
    """Start the ranks and wait for their end; each one's exit code, -9 for one that SIGKILL ended, 1 for an error.

    After the first that did not end by itself the others get SIGTERM, as torchrun does it, and after `patience_s`
    SIGKILL: a rank that waits in the rendezvous knows nothing of a peer's death.
    """
    context, port, pipes, processes = ranks._context, ranks.free_port(), [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=ranks._child, args=(theirs, rank, world, port, attempt, (given,)))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    running, died = set(range(world)), False
    codes = [0] * world
    deadline = time.monotonic() + 240
    while running:
        left = deadline - time.monotonic()
        ended = multiprocessing.connection.wait([pipes[rank] for rank in running], timeout=max(left, 0.0))
        for rank in [rank for rank in running if pipes[rank] in ended]:
            running.remove(rank)
            try:
                good, value = pipes[rank].recv()
                codes[rank] = value if good else 1
                if not good:
                    with open(given.folder / f"output.{rank}", "a") as file:
                        file.write(str(value))
            except EOFError:
                processes[rank].join(10)
                codes[rank] = processes[rank].exitcode
                if running and not died:
                    died, deadline = True, time.monotonic() + patience_s
                    for other in running:
                        processes[other].terminate()
        if not ended:
            for rank in running:
                processes[rank].kill()
            assert died, f"ranks {running} do not end"
            deadline = time.monotonic() + 10
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def options(steps: int, zero: int, precision: str) -> list[str]:
    """Settings of the runs that are interrupted, which evaluate, save, mix and average."""
    return [
        f"train.steps={steps}", "train.global_batch=16", "train.accumulation=2", f"engine.zero={zero}",
        f"engine.precision={precision}", "engine.loss_scale_power=17", "engine.loss_scale_hysteresis=1",
        "optim.ema=0.9", "model.drop_path=0.3", "data.mixup=0.8",
        "evaluation.every_steps=3", "evaluation.every_epochs=null", "checkpoint.every_steps=2",
    ]  # fmt: skip


# ---- saves without a run: a few tensors in the place of an engine -------------------------------------


class Alone:
    """The one process of a world of one, without torch's process groups."""

    rank, world, first, device = 0, 1, True, torch.device("cpu")
    control = background = None

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        return [value]

    def from_first(self, value: Any, group: Any = None) -> Any:
        return value


class State:
    """In the place of an engine: tensors whose values tell the step."""

    def __init__(self, size: int = 1000, rank: int = 0, world: int = 1) -> None:
        self.steps, self.replicated, self._offset = 0, False, rank * size
        self._values = {name: torch.zeros(size) for name in ("master/a", "exp_avg/a", "average/a")}
        self.shape = [size * world]
        self._fill()

    def pieces(self) -> dict[str, Piece]:
        return {name: Piece(self._offset, values) for name, values in self._values.items()}

    def counters(self) -> dict[str, Any]:
        return {"steps": self.steps, "skipped": 0, "optimizer": {"step": float(self.steps)}, "loss_scaler": {}}

    def restore(
        self, kinds: set[str], fill: Callable[[dict[str, Piece]], None], counters: dict[str, Any], precision: str
    ) -> None:
        assert kinds <= {"exp_avg"}
        fill(self.pieces())
        self.steps = counters["steps"]

    def update(self) -> None:
        self.steps += 1
        self._fill()

    def _fill(self) -> None:
        for values, wanted in zip(self._values.values(), self._wanted(), strict=True):
            values.copy_(wanted)

    def whole(self) -> bool:
        """Whether every value is that of the step."""
        return all(map(torch.equal, self._values.values(), self._wanted()))

    def _wanted(self) -> list[torch.Tensor]:
        size = len(self._values["master/a"])
        return [torch.arange(size) + 1000.0 * self.steps + n + 7 * self._offset for n in range(len(self._values))]


def identity_of(state: State) -> Identity:
    group = Group(name="all", lr_scale=1.0, weight_decay=0.0, parameters={"a": state.shape})
    return Identity(
        optimizer="adamw",
        global_batch=1,
        model={"model_type": "vit"},
        classes=["x"],
        data="data",
        groups=[group],
        rest={},
    )


ABOUT = {
    "zero": 2, "precision": "fp32", "average": True, "settings": {}, "settings_digest": "0", "versions": {},
}  # fmt: skip


def writer_of(run: RunDir, state: State, me: Any = None, attempt: int = 0, **settings: Any) -> checkpoint.Writer:
    """A writer of `state`, as an attempt has it."""
    written = checkpoint.Writer(
        run,
        state,
        me or Alone(),
        identity_of(state),
        Checkpoint(**settings),
        attempt,
        ABOUT,  # type: ignore[arg-type]
    )
    if written._me.first:
        written.claim()
    return written


def save_states(run: RunDir, count: int) -> tuple[State, checkpoint.Writer]:
    """A run of `count` steps with a checkpoint of each, of which the newest two are kept."""
    state = State()
    written = writer_of(run, state)
    for _ in range(count):
        state.update()
        written.save({})
        written.wait()
    return state, written


def go_on(run: RunDir, size: int = 1000) -> tuple[State, list[str]]:
    """A new start: the state that it goes on from and what was passed over. Nothing may be left over by then."""
    state = State(size)
    resumed, passed_over = checkpoint.resume(run, state, Alone(), identity_of(state))  # type: ignore[arg-type]
    assert state.whole()
    assert state.steps == (resumed.step if resumed else 0)
    names = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.exists() else []
    assert {name for name in names if not name.startswith("step-")} <= {"latest", "writer.json"}
    return state, passed_over


CALLS = ("write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "chmod")
"""What a save asks of the system and what can fail there or be the last that a process does."""


def fail_at(number: int, how: str) -> list[str]:
    """From now on the call `number` of CALLS fails: with SIGKILL, with `half` of a write and then SIGKILL, or errno.

    Returns the list of names of the calls so far, which grows.
    """
    seen: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 != number:
                return original(*args, **more)
            if how == "half" and name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            if how in ("kill", "half"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return seen


def in_fork(work: Callable[[], Any], bound_s: int = 60) -> int:
    """`work()` in a fork of this process; its exit status as `os.waitstatus_to_exitcode` has it, or -14."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(bound_s)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_every_call(folder: str) -> dict[str, Any]:
    """The third save of a run, and a new attempt's claim before it, killed at each of its calls in turn."""
    run = RunDir(Path(folder) / "run")

    def third(number: int, how: str) -> list[str]:
        state, _ = go_on(run)
        seen = fail_at(number, how)
        written = writer_of(run, state, attempt=1)
        state.update()
        written.save({})
        written.wait()
        return seen

    run.path.mkdir()
    save_states(run, 2)
    originals = {name: getattr(os, name) for name in CALLS}
    calls = third(-1, "")
    for name, original in originals.items():
        setattr(os, name, original)
    torn, steps = [], []
    for number, name in enumerate(calls):
        for how in ("kill", "half") if name == "write" else ("kill",):
            shutil.rmtree(run.path)
            run.path.mkdir()
            save_states(run, 2)
            assert in_fork(functools.partial(third, number, how)) == -signal.SIGKILL
            state, passed_over = go_on(run)
            torn += passed_over
            steps.append(state.steps)
    return {"calls": calls, "torn": torn, "steps": steps}


def killed_at_random(folder: str, kills: int) -> dict[str, Any]:
    """One run whose process is killed again and again while it saves without a pause."""
    run, size = RunDir(Path(folder)), 30_000
    faults, cut_short, newest, draw = [], 0, 0, random.Random(0)
    for number in range(kills):
        reader, writer = os.pipe()

        def work(number: int = number, writer: int = writer) -> None:
            state, _ = go_on(run, size)
            written = writer_of(run, state, attempt=number)
            os.write(writer, b"begin\n")
            while True:
                state.update()
                written.save({})
                written.wait()
                assert [outcome.fault for outcome in written.news()] == [None]
                os.write(writer, b"%d\n" % state.steps)

        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writer)
        os.read(reader, 6)
        time.sleep(draw.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        told = b""
        while part := os.read(reader, 4096):
            told += part
        os.close(reader)
        newest = max([newest, *map(int, told.split())])
        cut_short += bool(manifest.left_over(run))
        state, passed_over = go_on(run, size)
        if passed_over or not newest <= state.steps <= newest + 1:
            faults.append((number, state.steps, newest, passed_over))
        newest = state.steps
    return {"faults": faults, "kills": kills, "cut_short": cut_short}


def failed_at_every_call(folder: str, how: str) -> dict[str, Any]:
    """The third save of a run whose call 0, 1, 2 ... fails, until none does; then a fourth."""
    faults, told, number = [], set(), 0
    while True:
        run = RunDir(Path(folder) / str(number))
        run.path.mkdir(parents=True)
        state, written = save_states(run, 2)
        originals = {name: getattr(os, name) for name in CALLS}
        seen = fail_at(number, how)
        state.update()
        written.save({})
        written.wait()
        for name, original in originals.items():
            setattr(os, name, original)
        third = [outcome.fault for outcome in written.news()][-1]
        told.add(third)
        whole = [entry.step for entry in manifest.entries(run, thorough=True) if entry.fault is None]
        wanted = {2, 1} if third else {3, 2}
        if not wanted <= set(whole):
            faults.append((number, seen[number], third, whole))
        state.update()
        written.save({})
        written.wait()
        if [outcome.fault for outcome in written.news()] != [None] or manifest.steps(run)[0] != 4:
            faults.append((number, seen[number], "the next save fails"))
        if go_on(run)[0].steps != 4:
            faults.append((number, seen[number], "not resumed"))
        shutil.rmtree(run.path)
        if len(seen) <= number:
            return {"faults": faults, "told": told, "calls": number}
        number += 1


def one_of_two_fails(folder: str, on_failure: str) -> dict[str, Any]:
    """Three saves by two ranks, of which rank 1 finds its disk full in the second."""
    run = RunDir(Path(folder))
    with dist.processes(1) as me:
        state = State(1000, me.rank, me.world)
        written = writer_of(run, state, me, on_failure=on_failure)
        original, raised = os.write, None

        def full(handle: int, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            for _ in range(3):
                state.update()
                os.write = full if me.rank == 1 and state.steps == 2 else original  # type: ignore[assignment]
                written.save({})
                written.wait()
        except checkpoint.SaveFailed as error:
            raised = str(error)
        me.barrier()
        return {
            "told": [outcome.fault for outcome in written.news() if raised is None or outcome.fault is None],
            "raised": raised,
            "kept": manifest.steps(run),
            "left": [str(path) for path in manifest.left_over(run)],
        }

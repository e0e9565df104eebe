"""Short real trainings that are killed, stopped, starved and damaged at random moments, and what becomes of them.

.venv/bin/python -m benchmarks.chaos --rounds 60 --seed 1                  # forked ranks, about 10 s a round
.venv/bin/python -m benchmarks.chaos --rounds 8 --where torchrun           # real torchrun, about a minute a round
.venv/bin/python -m benchmarks.chaos --rounds 4 --where cluster            # the real SLURM of slurm/dev-cluster
.venv/bin/python -m benchmarks.chaos --only 17 --seed 1                    # one round again, with its script
.venv/bin/python -m benchmarks.chaos --picture                             # the newest result, as PICTURE below

A round is a tiny ViT on 60 pictures (two ranks, ZeRO-2, loader processes, mixup, drop path, an average of the weights,
a checkpoint every few steps, W&B offline) that is disturbed once or more and started again until it says that it is
done, or refuses. Everything about round N follows from (seed, N); when the blow falls within a step is up to the
machine. After each round:

- the exported weights are those of the undisturbed run, bit for bit, and so are the losses of every step and
  evaluation; where another number of ranks had a part in it, the losses are within 1e-4;
- every step saw the samples that it has in the undisturbed run (forked ranks tell);
- or the run has refused, with exit code 2 or 93 and one line that names a reason that fits the disturbance;
- no whole checkpoint has vanished but by the rule of checkpoint.keep, and a stop that was asked for cost no step;
- no left-over lies among the checkpoints, and no process of the round lives on.

A violation is told with the round's script; the exit code is 1 if there was one. Needs Linux; the full disk needs root
(a tmpfs is mounted) and is left out without.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from vitdist import faults, manifest, rundir, selection
from vitdist.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "chaos.svg"
STEPS, SAVE_EVERY, EVALUATE_EVERY, KEEP = 40, 4, 15, 2
WORLD = 2
STARTS = 8
"""A round that is not at its end after so many starts is a violation."""
NAME = "run"
PLACES = {"forked": "with forked ranks", "torchrun": "under torchrun", "cluster": "on SLURM"}
PATIENCE_S = {"forked": 4.0, "torchrun": 30.0, "cluster": 30.0}
"""For the ranks after TERM; torchrun's own is 30 s."""
START_S = {"forked": 120.0, "torchrun": 240.0, "cluster": 400.0}
"""A start that takes longer is a violation (W&B's dead service alone may take a minute)."""
SLOWER = 4
"""How much longer a start takes under torchrun, at least."""
GONE_S = 30.0
"""For processes to be gone after the end; loaders look for their parent every 5 s."""
TMPFS = "16m"
POLL_S = 0.002

MISSED = "missed"
REFUSALS = (rundir.EXIT_REFUSED, rundir.EXIT_DO_NOT_REQUEUE)
HELD = r"is being trained by another process"
_OWN_FRAME = re.compile(r'^ *(\[rank\d+\]: *)?File ".*/vitdist/\w+\.py"', re.MULTILINE)


# ---- what is done to a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a blow falls: (`step` N done), (a `save` after step N on its way), or (`delay`: N s after the start)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return {
            "step": f"after step {self.value:.0f}",
            "save": f"in a save after step {self.value:.0f}",
            "delay": f"{self.value:.2f} s after the start",
        }[self.kind]


@dataclass(frozen=True)
class Blow:
    """Signals to processes of a start: pairs of a signal's name and who gets it, `pause_s` apart."""

    moment: Moment
    signals: tuple[tuple[str, str], ...]
    pause_s: float = 0.0

    def __str__(self) -> str:
        what = f", {self.pause_s:.2f} s later ".join(f"{name} to {victim}" for name, victim in self.signals)
        return f"{self.moment}: {what}"


@dataclass(frozen=True)
class Plan:
    """A round: what is done to the run and what it may answer."""

    kind: str
    blows: tuple[Blow, ...] = ()
    """One a start, in order; the starts after them are left alone."""
    damage: str | None = None
    """To files, when the start with the first blow has ended."""
    worlds: tuple[int, ...] = (WORLD,)
    """Ranks of each start; the last holds for all later ones."""
    hang_s: float = 60.0
    disk: Moment | None = None
    """When the disk gets full."""
    free_after_s: float = 0.0
    rival: Moment | None = None
    """When the same run is started a second time."""
    at_once: bool = False
    """Whether the next start does not wait until the processes of the last one are gone."""
    refusal: str | None = None
    """Pattern of the reason with which the run may refuse for good."""
    try_again: str | None = None
    """Pattern of a refusal after which it is started again."""
    graceful: bool = False
    """A stop that was asked for: it costs no step."""
    unharmed: bool = False
    """The start is to survive it."""
    hang: bool = False
    """The start is to end as hung."""
    wandb: str = "off"
    """`offline` in every second round, and where W&B is what is disturbed."""

    def script(self) -> list[str]:
        """The round in words, one line a deed."""
        lines = [f"ranks of the starts: {', '.join(map(str, self.worlds))}; hang_s {self.hang_s:g}; W&B {self.wandb}"]
        lines += [f"start {number}, {blow}" for number, blow in enumerate(self.blows)]
        if self.disk:
            lines.append(f"{self.disk}: the disk is full, for {self.free_after_s:.1f} s")
        if self.rival:
            lines.append(f"{self.rival}: a second start of the same run")
        if self.damage:
            lines.append(f"then damage: {self.damage}")
        return [*lines, "the next start waits for no process" if self.at_once else "the next start waits"]


def moment(rng: random.Random, duration_s: float, least: int = 1) -> Moment:
    """A random moment of a run of `duration_s` seconds."""
    kind = rng.choices(("step", "save", "delay"), (4, 3, 3))[0]
    step = rng.randint(least, STEPS - 2)
    if kind == "delay" and least == 1:
        return Moment("delay", rng.uniform(0.1, 0.8) * duration_s)
    return Moment("save", step) if kind == "save" and step < STEPS - SAVE_EVERY else Moment("step", step)


def _killed(victim: str, wait: bool = False) -> Callable[[random.Random, float], Plan]:
    def plan(rng: random.Random, duration_s: float) -> Plan:
        blows = [Blow(moment(rng, duration_s), (("KILL", victim),)) for _ in range(rng.choice((1, 1, 2, 3)))]
        return Plan("", tuple(blows), at_once=rng.random() < 0.5 and not wait, try_again=HELD)

    return plan


def _asked(name: str) -> Callable[[random.Random, float], Plan]:
    def plan(rng: random.Random, duration_s: float) -> Plan:
        victims = ("rank 0", "rank 1", "ranks", "all") + (("agent",) if name != "USR2" else ())
        blows = [Blow(moment(rng, duration_s), ((name, rng.choice(victims)),)) for _ in range(rng.choice((1, 2, 3)))]
        return Plan("", tuple(blows), graceful=True)

    return plan


def _two_signals(rng: random.Random, duration_s: float) -> Plan:
    victims = ("rank 0", "rank 1", "ranks", "all", "agent")
    names = rng.choice((("USR2", "TERM"), ("TERM", "TERM"), ("INT", "INT"), ("TERM", "KILL"), ("USR2", "USR2", "USR2")))
    # USR2 never comes to torchrun alone: the launcher starts it with that signal ignored.
    blow = Blow(moment(rng, duration_s), tuple((name, rng.choice(victims)) for name in names), rng.uniform(0, 0.3))
    return Plan("", (blow,), try_again=HELD)


def _stopped_long(rng: random.Random, duration_s: float) -> Plan:
    step = Moment("step", rng.randint(1, STEPS - 6))
    return Plan("", (Blow(step, (("STOP", rng.choice(("rank 0", "rank 1"))),)),), hang_s=4.0, hang=True)


def _stopped_short(rng: random.Random, duration_s: float) -> Plan:
    victim = rng.choice(("rank 0", "rank 1", "agent", "a loader", "all"))
    # All at once may stand still for longer than the limit: that is no hang.
    pause_s, hang_s = (6.0, 4.0) if victim == "all" else (2.0, 10.0)
    blow = Blow(Moment("step", rng.randint(1, STEPS - 6)), (("STOP", victim), ("CONT", victim)), pause_s)
    return Plan("", (blow,), hang_s=hang_s, unharmed=True)


def _damaged(*ways: str, refusal: str | None = None) -> Callable[[random.Random, float], Plan]:
    def plan(rng: random.Random, duration_s: float) -> Plan:
        blow = Blow(moment(rng, duration_s, least=2 * SAVE_EVERY + 2), (("KILL", "rank 1"), ("KILL", "rank 0")))
        return Plan("", (blow,), damage=rng.choice(ways), refusal=refusal)

    return plan


def _full(rng: random.Random, duration_s: float) -> Plan:
    disk = Moment("step", rng.randint(1, STEPS - 2)) if rng.random() < 0.8 else Moment("delay", rng.random())
    return Plan("", disk=disk, free_after_s=rng.uniform(0.1, duration_s), try_again=r"(?i)no space left|disk is full")


def _other_world(rng: random.Random, duration_s: float) -> Plan:
    blows = [Blow(moment(rng, duration_s, least=SAVE_EVERY + 1), ((rng.choice(("USR2", "KILL")), "ranks"),))]
    worlds = (WORLD, rng.choice((1, 3)))
    if rng.random() < 0.5:
        blows.append(Blow(moment(rng, duration_s, least=30), (("TERM", "ranks"),)))
        worlds += (rng.choice((1, 2, 3)),)
    if rng.random() < 0.3:  # 12 samples are no shares for 5 ranks
        worlds = (worlds[0], 5, *worlds[1:])
        blows.insert(1, Blow(Moment("step", STEPS - 1), ()))
    return Plan("", tuple(blows), worlds=worlds, try_again=r"global.?batch")


def _service_stopped(rng: random.Random, duration_s: float) -> Plan:
    return Plan("", (Blow(Moment("step", rng.randint(1, STEPS - 2)), (("STOP", "wandb-core"),)),), unharmed=True)


def _service_killed(rng: random.Random, duration_s: float) -> Plan:
    return Plan("", (Blow(Moment("step", rng.randint(1, STEPS - 2)), (("KILL", "wandb-core"),)),), unharmed=True)


def _rival(rng: random.Random, duration_s: float) -> Plan:
    return Plan("", rival=Moment("step", rng.randint(1, STEPS // 2)), unharmed=True)


RECORDS = ("metrics", "evaluations", "train.json", "writer.json")

KINDS: dict[str, Callable[[random.Random, float], Plan]] = {
    "kill -9: the agent": _killed("agent"),
    "kill -9: rank 0": _killed("rank 0"),
    "kill -9: rank 1": _killed("rank 1"),
    "kill -9: a loader": _killed("a loader"),
    "kill -9: all": _killed("all", wait=True),
    "kill -9: wandb-core": _service_killed,
    "TERM": _asked("TERM"),
    "USR2": _asked("USR2"),
    "INT": _asked("INT"),
    "two signals": _two_signals,
    "SIGSTOP, too long": _stopped_long,
    "SIGSTOP, for a while": _stopped_short,
    "SIGSTOP: wandb-core": _service_stopped,
    "torn file of a checkpoint": _damaged("truncate rank", "empty rank", "remove rank"),
    "flipped bit in a checkpoint": _damaged("flip rank"),
    "damaged manifest": _damaged("truncate manifest", "empty manifest", "remove manifest", "flip manifest"),
    "damaged pointer": _damaged("truncate latest", "empty latest", "remove latest", "flip latest", "mislead latest"),
    "left-over of a save": _damaged("left-over"),
    "every checkpoint damaged": _damaged("all", refusal=r"no checkpoint can be resumed: step-\d+: .*; step-\d+: "),
    "torn records": _damaged(*RECORDS, refusal=r"(evaluations|train|writer)\.json"),
    "full disk": _full,
    "another number of ranks": _other_world,
    "a second start": _rival,
}  # fmt: skip


def _by_slurm(name: str, *victims: str, graceful: bool = False) -> Callable[[random.Random, float], Plan]:
    def plan(rng: random.Random, duration_s: float) -> Plan:
        blow = Blow(Moment("step", rng.randint(1, STEPS - 6)), ((name, rng.choice(victims)),))
        return Plan("", (blow,), graceful=graceful)

    return plan


ON_SLURM: dict[str, Callable[[random.Random, float], Plan]] = {
    "SLURM: warning (USR2)": _by_slurm("USR2", "job", graceful=True),
    "SLURM: kill -9 of a rank": _by_slurm("KILL", "rank 0", "rank 1"),
    "SLURM: scontrol requeue": _by_slurm("requeue", "job"),
    "SLURM: scancel": _by_slurm("scancel", "job", graceful=True),
    "SLURM: kill -9 of slurmstepd": _by_slurm("KILL", "slurmstepd"),
    "SLURM: kill -9 of torchrun": _by_slurm("KILL", "agent"),
}


def plan(seed: int, number: int, duration_s: float, where: str = "forked") -> Plan:
    """Round `number` of `seed`, for runs of `duration_s` seconds; every kind comes once before any comes again."""
    makers = ON_SLURM if where == "cluster" else KINDS
    kinds = [kind for kind in makers if kind != "full disk" or can_mount()]
    block, place = divmod(number, len(kinds))
    random.Random(f"{seed}/{block}").shuffle(kinds)
    kind = kinds[place]
    made = makers[kind](random.Random(f"{seed}/{number}"), duration_s)
    wandb = "offline" if "wandb" in kind or (number + block) % 2 else "off"
    made = replace(made, kind=kind, wandb=wandb)
    if where == "forked" or made.hang_s == Plan.hang_s:
        return made
    # Under torchrun a rank imports for so long that a limit of 3 s would take it for hung.
    blows = tuple(replace(blow, pause_s=SLOWER * blow.pause_s) for blow in made.blows)
    return replace(made, hang_s=SLOWER * made.hang_s, blows=blows)


def can_mount() -> bool:
    """Whether a full disk can be had."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


# ---- damage ----------------------------------------------------------------------------------------


def damage(run: RunDir, how: str, rng: random.Random) -> set[int]:
    """Do `how` to the files of a run that stands still; returns the steps whose checkpoints are spoilt by it."""
    verb, _, what = how.partition(" ")
    steps = manifest.steps(run)
    if how == "left-over":
        for name in (f".tmp-{manifest.name_of(STEPS)}-0-0badf00d", ".tmp-old-step-00000004-0badf00d"):
            (run.checkpoints / name).mkdir(parents=True, exist_ok=True)
            (run.checkpoints / name / manifest.file_of(0)).write_bytes(b"half")
        for name in (".latest.0badf00d", ".writer.json.0badf00d"):
            (run.checkpoints / name).write_text("half")
        return set()
    if how == "all":
        for step in steps:
            _spoil(run.checkpoints / manifest.name_of(step) / manifest.file_of(rng.randrange(WORLD)), "truncate", rng)
        return set(steps)
    if how in RECORDS:
        record = {
            "metrics": run.metrics,
            "evaluations": selection.path(run),
            "train.json": run.attempts()[-1].train,
            "writer.json": run.checkpoints / "writer.json",
        }[how]
        if record.exists():
            _spoil(record, "truncate", rng)
        return set()
    if what == "latest":
        path = run.checkpoints / "latest"
        if verb == "mislead":
            path.write_text("../../../../etc\n")
        elif path.exists():
            _spoil(path, verb, rng)
        return set()
    if not steps:
        return set()
    name = "manifest.json" if what == "manifest" else manifest.file_of(rng.randrange(WORLD))
    _spoil(run.checkpoints / manifest.name_of(steps[0]) / name, verb, rng)
    return {steps[0]}


def _spoil(path: Path, verb: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if verb == "remove":
        path.unlink()
    elif verb == "empty":
        path.write_bytes(b"")
    elif verb == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)


# ---- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A living process of a round."""

    pid: int
    parent: int
    name: str
    rank: str | None
    """RANK in its environment."""
    command: str


def processes_of(folder: Path) -> list[Process]:
    """All that live with this folder as working directory, or in their command or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            command, environment = ((entry / name).read_text(errors="replace") for name in ("cmdline", "environ"))
            texts = (command, environment, os.readlink(entry / "cwd"))
        except OSError:
            continue
        if int(entry.name) == os.getpid() or not any(str(folder) in text for text in texts):
            continue
        name, rest = stat.partition("(")[2].rpartition(")")[::2]
        state, parent = rest.split()[:2]
        rank = re.search(r"(?:^|\0)RANK=(\d+)", environment)
        if state != "Z":
            found.append(Process(int(entry.name), int(parent), name, rank[1] if rank else None, command))
    return found


class Start:
    """One start of the trainer: an agent and its ranks."""

    def __init__(self, folder: Path, number: int, world: int, where: str) -> None:
        self.folder, self.number, self.world, self.where = folder, number, world, where
        self._began = time.monotonic()
        arguments = [str(folder / "recipe.yaml"), "--name", NAME]
        from tests import chaos_workers, ranks

        self._names = chaos_workers
        if where == "forked":
            self._process: Any = ranks._context.Process(
                target=chaos_workers.agent,
                args=(str(folder), number, world, ranks.free_port(), arguments, PATIENCE_S[where]),
            )
            self._process.start()
            self.pid = int(self._process.pid)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0"]
            command += ["--nproc-per-node", str(world), "--master-addr", "127.0.0.1"]
            command += ["--master-port", str(ranks.free_port()), "--max-restarts", "0", "-m", "vitdist.train"]
            with open(folder / f"output-{number}.log", "ab") as out:
                self._process = subprocess.Popen(
                    [*command, *arguments],
                    cwd=folder,
                    env={**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # as launch/job.py starts it
                )
            self.pid = self._process.pid

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> bool:
        """Whether the agent has ended; its ranks may live on if it was killed."""
        if self.where == "forked":
            return not self._process.is_alive()
        return self._process.poll() is not None

    def codes(self) -> list[int]:
        """Exit codes of the ranks; empty if the agent did not live to tell."""
        if self.where == "forked":
            path = self.folder / f"codes-{self.number}.json"
            return json.loads(path.read_text()) if path.exists() else []
        from launch import torchrun

        if self._process.returncode == 0:
            return [0] * self.world
        return [failure.code for failure in torchrun.failures(self.output())]

    def output(self) -> str:
        """What the ranks wrote."""
        paths = sorted(self.folder.glob(f"output-{self.number}.*"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def kill(self) -> None:
        """End everything of the round."""
        for process in processes_of(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def victims(self, who: str) -> list[int]:
        """Numbers of the living processes that `who` means; of several loaders any one."""
        alive = processes_of(self.folder)
        agents = self._agents(alive)
        if who == "agent":
            return agents[:1]
        ranks: dict[int, int] = {}
        for process in alive:
            if process.parent in agents:
                if self.where == "forked" and process.name.startswith(self._names.RANK):
                    ranks[int(process.name.removeprefix(self._names.RANK))] = process.pid
                elif process.rank is not None and "vitdist.train" in process.command:
                    ranks[int(process.rank)] = process.pid
        if who == "wandb-core":
            return [process.pid for process in alive if process.name.startswith("wandb-core")]
        if who == "a loader":
            loaders = [p.pid for p in alive if p.parent in ranks.values() and not p.name.startswith("wandb")]
            return loaders[:1]
        if who == "ranks":
            return list(ranks.values())
        if who == "all":
            return [process.pid for process in alive]
        return [ranks[rank] for rank in ranks if f"rank {rank}" == who]

    def _agents(self, alive: list[Process]) -> list[int]:
        return [process.pid for process in alive if process.pid == self.pid]

    def strike(self, blow: Blow) -> list[str]:
        """Send the signals; returns what was hit."""
        hit, first = [], True
        for name, who in blow.signals:
            if not first:
                time.sleep(blow.pause_s)
            first = False
            if who == "wandb-core":  # it comes up beside the training, which takes a second or two
                _until(lambda: self.victims("wandb-core") or not processes_of(self.folder), GONE_S)
            for pid in self.victims(who):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, getattr(signal, f"SIG{name}"))
                    hit.append(f"{name} {who} ({pid})")
        return hit


class Job(Start):
    """One job on the cluster, with all its requeues: a node for each rank."""

    def __init__(self, folder: Path, number: int, world: int, environment: dict[str, str]) -> None:
        self.folder, self.number, self.world, self.where, self.pid = folder, number, world, "cluster", -1
        self._began = time.monotonic()
        self._environment, self._run = environment, RunDir(folder / "runs" / NAME)
        self._looked, self._ended = 0.0, False
        from tests import chaos_workers

        self._names = chaos_workers
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--nodes", str(world), "--name", NAME]
        self._said = self._slurm(*command, "--config", str(folder / "recipe.yaml"))
        found = re.search(r"^job (\d+):", self._said.stdout, re.MULTILINE)
        self._id = found[1] if found else None

    def _slurm(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )

    def over(self) -> bool:
        """Whether the job has left the queue; one that waits for another start gets it at once."""
        now = time.monotonic()
        if self._id is None or self._ended or now < self._looked + 0.5:
            return self._id is None or self._ended
        self._looked = now
        told = self._slurm("squeue", "-h", "-t", "all", "-j", self._id, "-o", "%T|%r")
        state, _, reason = told.stdout.strip().partition("|")
        self._ended = state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED")
        if state == "PENDING" and reason == "BeginTime":
            self._slurm("scontrol", "update", f"JobId={self._id}", "StartTime=now")
        return self._ended

    def codes(self) -> list[int]:
        """As the ranks of the last attempt would have ended, by what the records say."""
        if self._id is None:
            return [self._said.returncode]
        state = rundir.state(self._run)["state"]
        return [{"done": 0, "stopped": rundir.EXIT_STOPPED, "refused": rundir.EXIT_REFUSED}.get(state, 1)]

    def output(self) -> str:
        """What submit.py and the newest attempt's logs say."""
        attempts = self._run.attempts()
        logs = sorted(attempts[-1].path.glob("logs/*/*.log")) if attempts else []
        return self._said.stderr + "".join(log.read_text(errors="replace") for log in logs)

    def kill(self) -> None:
        if self._id and not self._ended:
            self._slurm("scancel", self._id)
        super().kill()

    def victims(self, who: str) -> list[int]:
        if who != "slurmstepd":
            return super().victims(who)
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"slurmstepd: [{self._id}.0]" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
        return found[:1]

    def _agents(self, alive: list[Process]) -> list[int]:
        return [process.pid for process in alive if "torch.distributed.run" in process.command]

    def strike(self, blow: Blow) -> list[str]:
        """As for any start; what is for the job goes through SLURM."""
        ((name, who),) = blow.signals
        if who != "job":
            return super().strike(blow)
        command = {
            "USR2": ("scancel", "--signal", "USR2", self._id),
            "scancel": ("scancel", self._id),
            "requeue": ("scontrol", "requeue", self._id),
        }[name]
        self._slurm(*map(str, command))
        return [" ".join(map(str, command))]


def begin(folder: Path, number: int, world: int, where: str, environment: dict[str, str] | None) -> Start:
    """A start of the trainer at that place; `environment`: of a user of the cluster."""
    if where == "cluster":
        assert environment
        return Job(folder, number, world, environment)
    return Start(folder, number, world, where)


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[dict[str, str]]:
    """The environment of a user of a real SLURM on this machine. Raises RuntimeError where there is none."""
    folder = Path(tempfile.mkdtemp(prefix="vitdist-", dir="/tmp"))  # SLURM's paths must be short
    command = [sys.executable, str(ROOT / "slurm" / "dev-cluster"), "--dir", str(folder)]
    try:
        started = subprocess.run([*command, "start", str(nodes)], capture_output=True, text=True, timeout=120)
        if started.returncode:
            raise RuntimeError(started.stderr.strip())
        conf = started.stdout.strip().removeprefix("export SLURM_CONF=").strip("'\"")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "CUDA"))}
        yield clean | {"SLURM_CONF": conf, "WANDB_MODE": "offline"}
    finally:
        subprocess.run([*command, "stop"], capture_output=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def newest_step(run: RunDir) -> int:
    """The step of the last whole row of metrics.jsonl; 0 before the first."""
    try:
        with open(run.metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["train/global_step"])
    return 0


def has_come(when: Moment, run: RunDir, start: Start, before: int) -> bool:
    """Whether the moment is there. `before`: the newest step when this start began."""
    if when.kind == "delay":
        return start.seconds >= when.value
    # Another start has done steps already: at least one must be new.
    if newest_step(run) < when.value or (before and not _rows_of_attempt(run, before)):
        return False
    return when.kind == "step" or any(run.checkpoints.glob(".tmp-step-*"))


def _rows_of_attempt(run: RunDir, before: int) -> bool:
    """Whether the newest row is of a later attempt than number `before` - 1."""
    try:
        last = run.metrics.read_bytes().splitlines()[-1]
        return int(json.loads(last)["attempt"]) >= before
    except (OSError, ValueError, KeyError, IndexError):
        return False


# ---- a round ---------------------------------------------------------------------------------------


@dataclass
class Straight:
    """The undisturbed run."""

    weights: bytes
    losses: dict[int, float]
    evaluations: list[Any]
    samples: dict[int, list[int]]
    seconds: float


@dataclass
class Outcome:
    """What became of a round."""

    number: int
    kind: str
    verdict: str = ""
    """`same weights`, `refused by name`, `violation`, or MISSED."""
    reason: str = ""
    """Of a refusal."""
    violations: list[str] = field(default_factory=list)
    starts: int = 0
    lost: int = 0
    """Steps that were done again."""
    hits: list[str] = field(default_factory=list)
    seconds: float = 0.0
    strays: list[str] = field(default_factory=list)
    """Temporary files outside of checkpoints/."""


def recipe(folder: Path, shards: Path, hang_s: float, wandb: str) -> None:
    """The configuration of all rounds."""
    (folder / "recipe.yaml").write_text(f"""
data: {{train: {shards}/train, val: {shards}/val, crop_scale: [0.7, 1.0], flip: 0.5, mixup: 0.8, workers: 1}}
model: {{image_size: 16, drop_path: 0.2, scratch: {{patch_size: 8, width: 32, depth: 2, heads: 2}}}}
train: {{global_batch: 12, steps: {STEPS}}}
optim: {{lr: 3.0e-3, ema: 0.9}}
engine: {{threads: 1, hang_s: {hang_s}}}
evaluation: {{every_steps: {EVALUATE_EVERY}, bootstrap: 20}}
checkpoint: {{every_steps: {SAVE_EVERY}, keep: {KEEP}}}
tracking: {{log_every: 1, wandb: {wandb}}}
""")


def squares(folder: Path) -> Path:
    """Shards of 60 + 21 small pictures of 3 classes that differ in colour."""
    import numpy as np
    from PIL import Image

    from vitdist.data.pack import pack

    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 7)):
        for label, name in enumerate(("blue", "green", "red")):
            for number in range(count):
                pixels = generator.integers(0, 128, (20, 24, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 100
                path = folder / "pictures" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    pack(folder / "pictures", folder / "shards", workers=1, progress=False)
    return folder / "shards"


def straight(folder: Path, shards: Path, where: str, environment: dict[str, str] | None = None) -> Straight:
    """Do the undisturbed run. Raises RuntimeError if it does not end well."""
    folder.mkdir(parents=True)
    recipe(folder, shards, 60.0, "off")
    start = begin(folder, 0, WORLD, where, environment)
    try:
        if not _until(start.over, START_S[where]) or set(start.codes()) != {0}:
            raise RuntimeError(f"the undisturbed run did not end well:\n{start.output()[-3000:]}")
        seconds = start.seconds
        _until(lambda: not processes_of(folder), GONE_S)
    finally:
        start.kill()
    run = RunDir(folder / "runs" / NAME)
    weights = (run.model / "model.safetensors").read_bytes()
    samples = {step: rows for _, step, rows in samples_of(folder)}
    return Straight(weights, losses_of(run), evaluations_of(run), samples, seconds)


def losses_of(run: RunDir) -> dict[int, float]:
    """The training loss of each step that metrics.jsonl has."""
    return {row["train/global_step"]: row["train/loss"] for row in rundir.rows(run) if "train/loss" in row}


def evaluations_of(run: RunDir) -> list[Any]:
    """Step and loss of each evaluation."""
    return [[step, value] for step, value in selection.history(run, "loss")]


def samples_of(folder: Path) -> list[tuple[int, int, list[int]]]:
    """(start, step, sorted index rows) of every step that all ranks of a start have told of."""
    told: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for path in folder.glob("samples-*"):
        number = int(path.name.split("-")[1].split(".")[0])
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut by a kill
                row = json.loads(line)
                told.setdefault((number, row["step"]), []).append(row)
    return [
        (number, step, sorted(row for rank in rows for row in rank["rows"]))
        for (number, step), rows in sorted(told.items())
        if len(rows) == rows[0]["world"]
    ]


class Round:
    """A disturbed run and the checks."""

    def __init__(
        self,
        folder: Path,
        shards: Path,
        number: int,
        made: Plan,
        where: str,
        reference: Straight,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self.folder, self.plan, self.where, self.reference = folder, made, where, reference
        self.run = RunDir(folder / "runs" / NAME)
        self.outcome = Outcome(number, made.kind)
        self._rng = random.Random(f"damage/{number}")
        self._shards = shards
        self._spoilt: set[int] = set()
        self._whole: set[int] = set()

    def play(self) -> Outcome:
        """The whole round; it leaves no process and no mount behind."""
        began = time.monotonic()
        self.folder.mkdir(parents=True)
        recipe(self.folder, self._shards, self.plan.hang_s, self.plan.wandb)
        with contextlib.ExitStack() as stack:
            if self.plan.disk:
                stack.enter_context(_tmpfs(self.folder / "runs"))
            start = None
            try:
                for number in range(STARTS):
                    start = begin(self.folder, number, self._world(number), self.where, self._environment)
                    if self._one(start):
                        break
                else:
                    self._wrong(f"not at its end after {STARTS} starts")
                self._at_the_end()
            finally:
                if start:
                    start.kill()
                    _until(lambda: not processes_of(self.folder), GONE_S)
        outcome = self.outcome
        outcome.seconds = round(time.monotonic() - began, 1)
        if outcome.violations:
            outcome.verdict = "violation"
        elif not outcome.verdict:
            # A moment that did not come before the end of the run tells nothing: the round is not counted.
            outcome.verdict = "same weights" if outcome.hits else MISSED
        return outcome

    def _wrong(self, text: str) -> None:
        self.outcome.violations.append(_without_place(text))

    def _world(self, number: int) -> int:
        return self.plan.worlds[min(number, len(self.plan.worlds) - 1)]

    def _one(self, start: Start) -> bool:
        """See one start to its end; returns whether the round is over."""
        plan, number = self.plan, start.number
        self.outcome.starts += 1
        blow = plan.blows[number] if number < len(plan.blows) else None
        attempts = len(self.run.attempts())
        struck = filled = rival = None
        deadline = time.monotonic() + START_S[self.where]
        while not start.over():
            if time.monotonic() > deadline:
                self._wrong(f"start {number} did not end within {START_S[self.where]:.0f} s")
                start.kill()
                return True
            if blow and blow.signals and struck is None and has_come(blow.moment, self.run, start, attempts):
                struck = start.strike(blow)
                self.outcome.hits += struck
            if plan.disk and number == 0 and filled is None and has_come(plan.disk, self.run, start, attempts):
                filled = time.monotonic()
                _fill(self.folder / "runs")
                self.outcome.hits.append("disk full")
            if filled and time.monotonic() > filled + plan.free_after_s:
                (self.folder / "runs" / "ballast").unlink(missing_ok=True)
            if plan.rival and number == 0 and rival is None and has_come(plan.rival, self.run, start, attempts):
                rival = begin(self.folder, 100, WORLD, self.where, self._environment)
                self.outcome.hits.append("a second start")
                self._judge_rival(rival)
            time.sleep(POLL_S)
        if filled:
            (self.folder / "runs" / "ballast").unlink(missing_ok=True)
        return self._ended(start, bool(struck), bool(filled))

    def _judge_rival(self, rival: Start) -> None:
        """A second start beside the first refuses."""
        if not _until(rival.over, START_S[self.where]):
            self._wrong("the second start did not end")
        elif set(rival.codes()) != {rundir.EXIT_REFUSED} or HELD not in rival.output():
            self._wrong(f"the second start was not refused: {rival.codes()}, {_last(rival.output())}")

    def _ended(self, start: Start, struck: bool, filled: bool) -> bool:
        """Judge the end of a start; returns whether the round is over."""
        plan, codes, output = self.plan, start.codes(), start.output()
        harmed = (struck or filled) and not plan.unharmed
        if not (plan.at_once and start.number < len(plan.blows)):
            gone = _until(lambda: not processes_of(self.folder), GONE_S)
            if not gone and not harmed:
                alive = [f"{p.name} ({p.pid})" for p in processes_of(self.folder)]
                self._wrong(f"processes live on {GONE_S:.0f} s after start {start.number}: {', '.join(alive)}")
            if gone:
                self._watch_checkpoints(start.number)
        if set(codes) == {0}:
            return True
        refused = sorted({code for code in codes if code in REFUSALS})
        told = "\n".join(line for line in output.splitlines() if "error: " in line)
        if refused and not struck:
            return self._refused(start, codes, told, output)
        if struck or filled:
            if plan.hang and struck:
                self._see_hang()
            if filled:
                self._see_full_disk(output)
            if plan.unharmed:
                self._wrong(f"start {start.number} did not survive: {codes}, {_last(output)}")
            if plan.damage and not self._spoilt and start.number == 0:
                self._spoilt = damage(self.run, plan.damage, self._rng)
                self.outcome.hits.append(f"{plan.damage} {sorted(self._spoilt)}")
            return False
        if set(codes) == {rundir.EXIT_STOPPED} and start.number == 0:
            return False
        self._wrong(f"start {start.number} failed though nothing was done to it: {codes}, {_last(output)}")
        return start.number > 3

    def _refused(self, start: Start, codes: list[int], told: str, output: str) -> bool:
        plan = self.plan
        if _OWN_FRAME.search(output):  # torchrun's own traceback is not ours to spare
            self._wrong(f"a refusal with a traceback: {_last(output)}")
        if plan.try_again and re.search(plan.try_again, told):
            _until(lambda: not processes_of(self.folder), START_S[self.where])
            return False
        if plan.refusal and re.search(plan.refusal, told):
            self.outcome.verdict, self.outcome.reason = "refused by name", _without_place(_last(told))
        else:
            self._wrong(f"refused for no reason that fits: {codes}, {_last(told) or _last(output)}")
        return True

    def _see_hang(self) -> None:
        """The attempt must have named the rank that was stopped."""
        attempts = self.run.attempts()
        found = faults.root(faults.read(attempts[-1])) if attempts else None
        victim = self.plan.blows[0].signals[0][1]
        if not found or found.word != "hang" or f"rank {found.rank}" != victim:
            self._wrong(f"the hang of {victim} was not named: {faults.line(found) if found else 'no fault noted'}")

    def _see_full_disk(self, output: str) -> None:
        """A start that a full disk has ended says so, in its record or, where that had no room, in its output."""
        attempts = self.run.attempts()
        found = faults.root(faults.read(attempts[-1])) if attempts else None
        if not (found and found.word == "disk_full") and not re.search(self.plan.try_again or "", output):
            self._wrong(f"the full disk was not named: {faults.line(found) if found else _last(output)}")

    def _watch_checkpoints(self, number: int) -> None:
        """Between two starts: what was whole is whole, or newer ones have taken its place."""
        if not self.run.checkpoints.exists():
            return
        entries = manifest.entries(self.run, thorough=True)
        whole = {entry.step for entry in entries if entry.fault is None}
        for entry in entries:
            if entry.fault and entry.step not in self._spoilt:
                self._wrong(f"after start {number} {entry.path.name} is not whole: {entry.fault}")
        best = selection.best(selection.history(self.run, "top1"), "top1") if not self._records_torn else None
        for step in self._whole - whole - self._spoilt:
            if sum(newer > step for newer in whole) < KEEP or (best and best[0] == step):
                self._wrong(f"the checkpoint of step {step} vanished with start {number}; left: {sorted(whole)}")
        self._whole = whole

    @property
    def _records_torn(self) -> bool:
        return self.plan.kind == "torn records"

    def _at_the_end(self) -> None:
        if not _until(lambda: not processes_of(self.folder), GONE_S):
            alive = [f"{p.name} ({p.pid})" for p in processes_of(self.folder)]
            self._wrong(f"processes live on {GONE_S:.0f} s after the end: {', '.join(alive)}")
        self._watch_checkpoints(self.outcome.starts - 1)
        self.outcome.lost = lost_steps(self.run)
        if self.plan.graceful and self.outcome.lost:
            self._wrong(f"a stop that was asked for cost {self.outcome.lost} steps")
        if self.outcome.verdict or self.outcome.violations:
            return
        if left := manifest.left_over(self.run):
            self._wrong(f"left over: {', '.join(path.name for path in left)}")
        self.outcome.strays = sorted(
            str(path.relative_to(self.run.path))
            for path in self.run.path.rglob(".*")
            if path.name != ".lock" and not {"wandb", "submitit", "code"} & {*path.parts} and path not in left
        )
        if (newest := max(self._whole, default=0)) != STEPS and not self._last_had_no_room():
            self._wrong(f"the newest whole checkpoint is of step {newest}, not {STEPS}")
        if self.plan.unharmed and self.outcome.starts > 1:
            self._wrong(f"it took {self.outcome.starts} starts")
        self._compare()

    def _last_had_no_room(self) -> bool:
        """Whether the disk was full to the end: the run goes on, as `checkpoint.on_failure` says, and tells it."""
        told = f"the checkpoint of step {STEPS} could not be saved"
        said = (path.read_text(errors="replace") for path in self.folder.glob("output-*"))
        return self.plan.disk is not None and any(told in text for text in said)

    def _compare(self) -> None:
        """With the undisturbed run."""
        model = self.run.model / "model.safetensors"
        if not model.exists():
            self._wrong("it says that it is done, and there is no model")
            return
        told, expected = losses_of(self.run), self.reference.losses
        same_world = set(self.plan.worlds) == {WORLD}
        if same_world and model.read_bytes() != self.reference.weights:
            self._wrong("the weights differ")
        off = {step: abs(told[step] - loss) for step, loss in expected.items() if step in told}
        bound = 0.0 if same_world else 1e-4
        if off and max(off.values()) > bound:
            first = min(step for step, by in off.items() if by > bound)
            self._wrong(f"the loss of step {first} differs by {off[first]:.2g}")
        if not self.plan.disk and not self._records_torn:
            if missing := sorted(set(expected) - set(told)):
                self._wrong(f"metrics.jsonl has no row of the steps {missing}")
            found = evaluations_of(self.run)
            if same_world and found != self.reference.evaluations:
                self._wrong(f"the evaluations are {found}, not {self.reference.evaluations}")
        for number, step, rows in samples_of(self.folder):
            if rows != self.reference.samples.get(step, rows):
                self._wrong(f"step {step} of start {number} had other samples")
                break


def lost_steps(run: RunDir) -> int:
    """Steps that were done more than once, over all attempts."""
    seen: set[tuple[int, int]] = set()
    if run.metrics.exists():
        for line in run.metrics.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if "train/loss" in row:
                    seen.add((row["attempt"], row["train/global_step"]))
    return len(seen) - len({step for _, step in seen})


def _without_place(text: str) -> str:
    """Where the round's folder lay says nothing."""
    return re.sub(r"/\S*/runs/", "runs/", text)


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return faults.one_line(lines[-1]) if lines else "no word"


def _until(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for it; whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def _tmpfs(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _fill(folder: Path) -> None:
    """Take all that is left of the disk."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


# ---- many rounds -----------------------------------------------------------------------------------


def play(where: str, numbers: Sequence[int], seed: int, minutes: float, keep: bool) -> int:
    """The undisturbed run, and rounds until `minutes` are over, each published; returns the number of violations."""
    base = Path(tempfile.mkdtemp(prefix="vitdist-chaos-"))
    deadline = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        # Whatever happens, the folder goes.
        stack.callback(print if keep else shutil.rmtree, f"kept: {base}" if keep else base)
        environment = stack.enter_context(cluster(WORLD)) if where == "cluster" else None
        shards = squares(base / "data")
        if where == "forked":
            _warm_up()
        reference = straight(base / "straight", shards, where, environment)
        print(f"undisturbed, {where}: {reference.seconds:.1f} s", flush=True)
        for number in numbers:
            if time.monotonic() > deadline:
                print(f"{minutes:g} minutes are over: {len(outcomes)} of {len(numbers)} rounds", flush=True)
                break
            made, folder = plan(seed, number, reference.seconds, where), base / f"round-{number:03d}"
            outcome = Round(folder, shards, number, made, where, reference, environment).play()
            outcomes.append(outcome)
            found = publish(where, seed, outcomes, reference)
            print(
                f"round {number:3} {made.kind:28} {outcome.verdict:16} {outcome.starts} starts, {outcome.lost} steps "
                f"lost, {outcome.seconds:.0f} s",
                flush=True,
            )
            if outcome.strays:
                print(f"  strays: {outcome.strays}", flush=True)
            if outcome.violations:
                print("\n".join(f"  VIOLATION: {text}" for text in outcome.violations))
                print("\n".join(f"  {line}" for line in [*made.script(), f"hit: {', '.join(outcome.hits)}"]))
                print(f"  again: python -m benchmarks.chaos --where {where} --seed {seed} --only {number}", flush=True)
            if not (outcome.violations and keep):
                shutil.rmtree(folder, ignore_errors=True)
        print(table(found.get("disturbances", {})))
        return sum(outcome.verdict == "violation" for outcome in outcomes)


def _warm_up() -> None:
    """Have the fork server import what ranks need, which takes it half a minute on a busy machine."""
    from tests import ranks

    first = ranks._context.Process(target=time.monotonic)
    first.start()
    first.join(START_S["torchrun"])


def summary(outcomes: Sequence[Outcome], reference: Straight) -> dict[str, Any]:
    """What is published of the rounds of one place."""
    rows: dict[str, dict[str, Any]] = {}
    outcomes = [outcome for outcome in outcomes if outcome.verdict != MISSED]
    for kind in (*KINDS, *ON_SLURM):
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if of_kind:
            rows[kind] = {
                "rounds": len(of_kind),
                "same_weights": sum(o.verdict == "same weights" for o in of_kind),
                "refused_by_name": sum(o.verdict == "refused by name" for o in of_kind),
                "violations": sum(o.verdict == "violation" for o in of_kind),
                "lost_steps_median": statistics.median(o.lost for o in of_kind),
                "starts": sum(o.starts for o in of_kind),
            }
    return {
        "rounds": len(outcomes),
        "starts": sum(o.starts for o in outcomes),
        "violations": sum(o.verdict == "violation" for o in outcomes),
        "undisturbed_seconds": round(reference.seconds, 1),
        "reasons_of_refusals": sorted({o.reason for o in outcomes if o.reason}),
        "disturbances": rows,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For the screen."""
    lines = [f"{'':30}{'rounds':>8}{'same weights':>14}{'refused by name':>17}{'violations':>12}{'lost steps':>12}"]
    for name, row in rows.items():
        lines.append(
            f"{name:30}{row['rounds']:8}{row['same_weights']:14}{row['refused_by_name']:17}{row['violations']:12}"
            f"{row['lost_steps_median']:12g}"
        )
    return "\n".join(lines)


def publish(where: str, seed: int, outcomes: Sequence[Outcome], reference: Straight) -> dict[str, Any]:
    """Add rounds of one place to today's result, in the place of the same ones; returns what is told of the place."""
    path = newest_result()
    about: dict[str, Any] = json.loads(path.read_text()) if path else {}
    if about.get("date") != f"{datetime.now(UTC):%Y-%m-%d}":
        about = {}
    places = {name: about[name] for name in PLACES if name in about}
    played = places.get(where, {}).get("played", {})
    told = ("kind", "verdict", "reason", "violations", "starts", "lost", "seconds")
    played |= {f"seed {seed}, round {o.number}": {name: getattr(o, name) for name in told} for o in outcomes}
    everything = [Outcome(number=0, **each) for each in played.values()]
    places[where] = summary(everything, reference) | {"played": played}
    with contextlib.redirect_stdout(None):
        results.publish("chaos", places)
    return places[where]


def newest_result() -> Path | None:
    """The newest published result."""
    return max((ROOT / "benchmarks" / "results").glob("*-chaos.json"), default=None)


# ---- the picture -----------------------------------------------------------------------------------

_STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
    .quiet { fill: #59636e } .head { font-size: 15px; font-weight: 600 } .number { text-anchor: end }
    .same { fill: #2f6fb3 } .refused { fill: #d9a520 } .violation { fill: #cf222e } .grid { stroke: #8c959f55 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .quiet { fill: #9198a1 } .same { fill: #58a0e8 } .refused { fill: #e3b341 }
      .violation { fill: #ff6a61 }
    }"""
_BARS = (("same_weights", "same"), ("refused_by_name", "refused"), ("violations", "violation"))


def picture(result: dict[str, Any]) -> str:
    """The published result as an SVG that stands by itself, on light and dark pages."""
    rows: dict[str, dict[str, Any]] = {}
    for place in PLACES:
        for kind, row in result.get(place, {}).get("disturbances", {}).items():
            sums = rows.setdefault(kind, {"rounds": 0, "medians": [], **{name: 0 for name, _ in _BARS}})
            for name in ("rounds", *(name for name, _ in _BARS)):
                sums[name] += row[name]
            sums["medians"].append((row["rounds"], row["lost_steps_median"]))
    left, width, step, top = 215, 380, 24, 96
    most = max(row["rounds"] for row in rows.values())
    height = top + step * len(rows) + 52
    places = ", ".join(f"{result[place]['rounds']} {PLACES[place]}" for place in PLACES if place in result)
    total = {name: sum(row[name] for row in rows.values()) for name, _ in _BARS}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" role="img">',
        f"  <title>Disturbed trainings: {total['same_weights']} ended with the weights of the undisturbed run, "
        f"{total['refused_by_name']} refused by name, {total['violations']} violations</title>",
        f"  <style>{_STYLE}\n  </style>",
        '  <text class="head" x="12" y="24">Killed, stopped, starved and damaged at random moments</text>',
        f'  <text class="quiet" x="12" y="44">rounds: {places}; {result["date"]}</text>',
    ]
    legend = (("same", "same weights, bit for bit"), ("refused", "refused by name"), ("violation", "violation"))
    x = left
    for (style, text), (name, _) in zip(legend, _BARS, strict=True):
        out.append(f'  <rect class="{style}" x="{x}" y="59" width="12" height="12" rx="2"/>')
        out.append(f'  <text x="{x + 18}" y="70">{text}: {total[name]}</text>')
        x += 235 if style == "same" else 165
    out.append(f'  <text class="quiet number" x="748" y="{top - 6}">steps done again</text>')
    for number, (kind, row) in enumerate(rows.items()):
        y, x = top + step * number, float(left)
        out.append(f'  <text class="number" x="{left - 10}" y="{y + 16}">{kind}</text>')
        for name, style in _BARS:
            if row[name]:
                bar = width * row[name] / most
                size = f'width="{bar - 1:.1f}" height="{step - 7}"'
                out.append(f'  <rect class="{style}" x="{x:.1f}" y="{y + 3}" {size} rx="2"/>')
                x += bar
        out.append(f'  <text class="quiet" x="{x + 6:.1f}" y="{y + 16}">{row["rounds"]}</text>')
        again = sum(rounds * median for rounds, median in row["medians"]) / row["rounds"]
        out.append(f'  <text class="number" x="748" y="{y + 16}">{again:.3g}</text>')
    out.append(
        f'  <text class="quiet" x="12" y="{height - 30}">Steps done again: medians, of several places weighted by '
        "rounds. With a full disk nothing can be saved.</text>"
    )
    out.append(
        f'  <text class="quiet" x="12" y="{height - 12}">A round: {STEPS} steps, a checkpoint every {SAVE_EVERY}. '
        "With another number of ranks: losses within 1e-4.</text>"
    )
    return "\n".join([*out, "</svg>", ""])


def main(argv: list[str] | None = None) -> int:
    """The command; returns 1 if there was a violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(KINDS), help="how many (default: one of each kind)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins after so many minutes")
    parser.add_argument("--where", choices=tuple(PLACES), default="forked")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these rounds alone")
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds with violations")
    parser.add_argument("--picture", action="store_true", help="only draw the newest result")
    args = parser.parse_args(argv)
    if args.picture:
        return _draw()
    if args.where == "forked":
        from tests import ranks

        ranks._context.set_forkserver_preload([*ranks._PRELOAD, "wandb", "tests.chaos_workers"])
    violations = play(args.where, args.only or range(args.rounds), args.seed, args.minutes, args.keep)
    _draw()
    return 1 if violations else 0


def _draw() -> int:
    """The newest result as a picture; 2 where there is none."""
    path = newest_result()
    if path is None:
        print("error: there is no result yet: run some rounds first", file=sys.stderr)
        return rundir.EXIT_REFUSED
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(json.loads(path.read_text())))
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What runs once per node: torchrun, and what comes of it: done, stopped and requeued, or failed for a reason.

    sbatch -> srun -> python -m submitit.core._submit -> NodeJob() -> torchrun -> vitdist.train, a process per GPU

The way a job stops (each step was tried on a real SLURM, see docs/architecture.md): SLURM sends USR2 to every
process of the step. torchrun ignores it; a trainer takes it for a wish, all agree at the end of a step, save and
leave. Meanwhile submitit calls `checkpoint()` on the first node, which waits, by polling, since `wait()` would
deadlock with the `wait()` that the signal interrupted, and then has SLURM requeue the job.

SLURM also starts a job again after a node failure, with the same pickle: nothing in a NodeJob may change from one
start to the next. Which attempt this is follows from SLURM_RESTART_COUNT, what was reached from the run folder.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import submitit
from submitit.helpers import DelayedSubmission

from launch import slurm, torchrun, why
from vitdist import faults, rundir
from vitdist.rundir import Attempt, RunDir

POLL_S = 0.2
KILL_S = 2.0
"""From SIGTERM to SIGKILL for trainers that are stuck in a collective."""
ASK_S = 1.0
"""A trainer that is still importing has not taken over USR2 and misses it: ask again this often."""
LOOK_S = 2.0
"""Between two looks at what other nodes have recorded: a shared file system is slow to ask."""
PATIENCE_S = {"slurm": 10.0, "local": 3.0}
"""For what another node writes to reach this one, and for the ranks of a run that lost one to say so."""


class RunFailed(RuntimeError):
    """The run ended for the reason given. Its text is all that submitit keeps of it."""


class _Over(Exception):
    """Out of `checkpoint()`, which interrupts the loop below: there is nothing to requeue for."""


@dataclass
class NodeJob:
    """Picklable, by reference: SLURM's processes import it from the run's own copy of the code."""

    run: str
    """Path of the run folder."""
    processes_per_node: int
    base_attempt: int
    """Number of the first start of this job."""
    kind: Literal["slurm", "local"]
    devices: tuple[str, ...] = ()
    """local: all GPUs that the simulated nodes share, in CUDA_VISIBLE_DEVICES' words."""
    signal_delay_s: int = 120
    launcher: str = torchrun.LAUNCHER
    """A module with torchrun's flags."""
    _node: "Node | None" = field(default=None, init=False, repr=False)
    _process: "Torchrun | None" = field(default=None, init=False, repr=False)

    def __call__(self) -> str:
        """Run this node's trainers to their end; returns how they ended. Raises RunFailed."""
        run = RunDir(Path(self.run))
        record = rundir.state(run)
        if record["state"] == "done" and record.get("attempt", 0) >= self.base_attempt:
            return "done"  # SLURM restarted a finished run; one that an earlier job finished is to be made longer
        self._node = node = Node.here(self)
        node.begin()
        try:
            self._process = self._start(node)
            state = self._finish(node, self._process)
        except (OSError, RunFailed, subprocess.SubprocessError) as error:
            node.end("failed", str(error), None)
            raise RunFailed(str(error)) from None
        cause = None
        if state in ("failed", "refused"):
            cause = node.cause()
        # Said before it is done: who follows the run would take "stopped" for its end, and SLURM may kill this process.
        again = state == "stopped" and self.kind == "slurm" and node.first and node.may_requeue()
        node.end("requeued" if again else state, cause, self._process.poll())
        if cause:
            node.wait_for_first()
            raise RunFailed(cause)
        if again and not node.requeue():
            node.end(state, cause, self._process.poll())
        return state

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook, in the handler of USR2, on the first node: wait for the save, then have the job requeued."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        # Less than SLURM leaves us: the requeue itself takes a moment.
        deadline = time.monotonic() + max(15.0, self.signal_delay_s - 15.0)
        node, process = self._node, self._process
        if node and process:
            process.stopping = True
            while process.poll() is None and time.monotonic() < deadline:
                process.look_after()
                time.sleep(POLL_S)
            record = rundir.read_json(node.attempt.train) or {}
            if process.poll() == 0 or record.get("state") in ("done", "failed", "refused"):
                raise _Over
        if node:
            node.end("requeued", None, process.poll() if process else None)
        return DelayedSubmission(dataclasses.replace(self))

    def _start(self, node: "Node") -> "Torchrun":
        node.find_master()
        node.check_port()
        command = torchrun.argv(
            sys.executable,
            node.nodes,
            node.index,
            self.processes_per_node,
            node.master,
            node.port,
            self.run,
            node.attempt.number,
            self.launcher,
        )
        env = dict(os.environ)
        code = str(node.run.code)
        env["PYTHONPATH"] = os.pathsep.join([code, *filter(None, [env.get("PYTHONPATH")])])
        sharing = self.processes_per_node * (node.nodes if self.kind == "local" else 1)
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // sharing)))
        if self.kind == "local":
            own = self.devices[node.index * self.processes_per_node :][: self.processes_per_node]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return Torchrun(command, env, node.run.code, node.attempt.torchrun_log(node.index))

    def _finish(self, node: "Node", process: "Torchrun") -> str:
        """Wait for torchrun, pass on the wish to stop, end it if another node has failed; returns how it ended."""
        if self.kind == "local":
            # Not SIGINT: submit.py has it ignored here, and turns a Ctrl-C into SIGTERM.
            for number in (signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, process.asked)
        with contextlib.suppress(_Over):
            next_look, end_at = 0.0, float("inf")
            while process.poll() is None:
                time.sleep(POLL_S)
                process.look_after()
                now = time.monotonic()
                if now >= next_look and end_at == float("inf"):
                    next_look = now + LOOK_S
                    end_at = now + PATIENCE_S[self.kind] if self._lost(node) else end_at
                if now >= end_at:
                    process.end()
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        return node.verdict(process.poll())

    def _lost(self, node: "Node") -> bool:
        """Whether another node has failed. In SLURM only the first node looks: srun ends the others."""
        watching = node.first or self.kind == "local"
        return watching and any((record or {}).get("state") in ("failed", "refused") for record in node.others())


class Torchrun:
    """The process that starts this node's trainers."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, log: Path) -> None:
        self.stopping = False
        self._asks, self._next_ask, self._kill_at = 0, 0.0, float("inf")
        self._trainers: dict[int, str] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            # A session of its own: a Ctrl-C of the terminal is ours to pass on, once.
            self._popen = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ignore_usr2,
            )

    def poll(self) -> int | None:
        code = self._popen.poll()
        if code is not None:
            self._clean()
        return code

    def asked(self, number: int, frame: FrameType | None) -> None:
        """Handler of a simulated node: the first signal asks for a checkpoint, the second one ends the run."""
        self._asks += 1
        self.stopping = True
        print("asked to stop" if self._asks == 1 else "told to end", flush=True)
        if self._asks > 1:
            self.end()

    def look_after(self) -> None:
        """Between two polls: repeat the wish to stop; kill what did not end when told to."""
        now = time.monotonic()
        self._find_trainers()
        if self.stopping and now >= self._next_ask:
            self._next_ask = now + ASK_S
            self._send(signal.SIGUSR2)
        if now >= self._kill_at:
            self._send(signal.SIGKILL)
            self._popen.kill()

    def end(self) -> None:
        """End it; trainers stuck in a collective do not hear SIGTERM, so they are killed soon after."""
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + KILL_S
            self._find_trainers()  # while torchrun lives: what it leaves behind is nobody's child
            self._popen.terminate()

    def _find_trainers(self) -> None:
        with contextlib.suppress(OSError):
            pid = self._popen.pid
            for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                self._trainers.setdefault(child, _birth(child))

    def _send(self, number: signal.Signals) -> None:
        # Other children, if any, have inherited the ignored USR2; the trainers handle it.
        for trainer, birth in list(self._trainers.items()):
            if birth and birth == _birth(trainer):  # the number may be another process's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer, number)

    def _clean(self) -> None:
        """A torchrun that was killed leaves its trainers, each in a session of its own, on the GPUs."""
        self._send(signal.SIGKILL)
        self._trainers.clear()


def _birth(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone or only waits to be reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else rest[18]


def _ignore_usr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@dataclass
class Node:
    """This node among those of the job, and what it records."""

    run: RunDir
    attempt: Attempt
    index: int
    nodes: int
    processes: int
    kind: str
    job_id: str
    hosts: list[str]
    master: str
    port: int
    _started: str = field(default_factory=rundir.now)

    @classmethod
    def here(cls, job: NodeJob) -> "Node":
        """From what SLURM, or submitit's local executor, says in the environment."""
        env = submitit.JobEnvironment()
        run = RunDir(Path(job.run))
        # Unset on the first start; counts every later one, whatever ended the one before.
        attempt = job.base_attempt + int(os.environ.get("SLURM_RESTART_COUNT", "0")) * (job.kind == "slurm")
        local = job.kind == "local"
        hosts = [env.hostname] if local else list(env.hostnames)
        return cls(
            run=run,
            attempt=run.attempt(attempt),
            index=env.global_rank if local else env.node,
            nodes=env.num_tasks if local else env.num_nodes,
            processes=job.processes_per_node,
            kind=job.kind,
            job_id=env.job_id,
            hosts=hosts,
            master=torchrun.LOCAL if local or len(hosts) == 1 else hosts[0],
            port=local_port(run, attempt) if local else torchrun.port(env.job_id, attempt),
        )

    @property
    def first(self) -> bool:
        return self.index == 0

    def begin(self) -> None:
        if self.first:
            # A kill in the middle of a dump leaves one, and submitit's next dump would refuse to write (submitit#1617).
            for torn in self.run.submitit.glob(f"{self.job_id}_*.save_tmp"):
                torn.unlink()
            self._publish("running", None, None)

    def end(self, state: str, cause: str | None, code: int | None) -> None:
        """Record how this node ended; the first node records it of the job."""
        ended = {"node": self.index, "host": socket.gethostname(), "state": state, "cause": cause, "code": code}
        rundir.publish_json(self.attempt.node(self.index), {**ended, "ended": rundir.now()})
        if self.first:
            self._publish(state, cause, rundir.now())

    def _publish(self, state: str, cause: str | None, ended: str | None) -> None:
        rundir.publish_json(
            self.attempt.job,
            {
                "attempt": self.attempt.number,
                "scheduler": self.kind,
                "job_id": self.job_id,
                "hosts": self.hosts,
                "nodes": self.nodes,
                "processes": self.processes,
                "master": self.master,
                "port": self.port,
                "started": self._started,
                "ended": ended,
                "state": state,
                "cause": cause,
            },
        )

    def others(self) -> list[dict[str, Any] | None]:
        """What the other nodes have recorded of their end."""
        return [rundir.read_json(self.attempt.node(i)) for i in range(self.nodes) if i != self.index]

    def find_master(self) -> None:
        """Raises RunFailed if this node cannot find the first one."""
        if self.master != torchrun.LOCAL:
            self.master = _address(self.master)

    def check_port(self) -> None:
        """Raises RunFailed if the first node cannot offer the port that all others will look for."""
        if not self.first:
            return
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            try:
                probe.bind(("", self.port))
            except OSError as error:
                raise RunFailed(
                    f"port {self.port} on {socket.gethostname()} cannot be used ({error.strerror}): "
                    "submit again, the next start takes another one"
                ) from None

    def verdict(self, code: int | None) -> str:
        """done, stopped, refused or failed. torchrun turns every exit code of a trainer into 1, so records decide."""
        record = rundir.read_json(self.attempt.train) or {}
        state = str(record.get("state"))
        if state in ("done", "stopped", "refused"):
            return state
        if code == 0:
            return "done"
        # On a shared file system the record of rank 0 may reach this node late; torchrun's log is this node's own.
        failed = torchrun.failures(why.tail(self.attempt.torchrun_log(self.index)))
        left_after_saving = failed and failed[0].code == rundir.EXIT_STOPPED
        return "stopped" if left_after_saving else "failed"

    def cause(self) -> str:
        """Why the run failed. Where a rank only lost its peer, wait a moment for the peer's side of it."""
        deadline = time.monotonic() + (PATIENCE_S[self.kind] / 2 if self.nodes > 1 else 0)
        while True:
            text, consequence = why.cause(self.attempt)
            if not consequence or time.monotonic() > deadline:
                return text
            time.sleep(POLL_S)

    def wait_for_first(self) -> None:
        """Give the first node time to record the end: our exit makes srun kill it."""
        deadline = time.monotonic() + 2 * PATIENCE_S[self.kind]
        while not self.first and self.kind == "slurm" and time.monotonic() < deadline:
            if (rundir.read_json(self.attempt.job) or {}).get("ended"):
                return
            time.sleep(POLL_S)

    def may_requeue(self) -> bool:
        """Whether the run was stopped by a preemption that sends TERM only: a cancelled job stays cancelled."""
        return slurm.state(self.job_id).startswith("RUNNING")

    def requeue(self) -> bool:
        """Not by submitit, which does it after USR2; returns whether SLURM took it."""
        done = subprocess.run(["scontrol", "requeue", self.job_id], capture_output=True, text=True, timeout=60)
        if done.returncode:
            why = faults.one_line(done.stderr) or f"exit code {done.returncode}"
            print(f"SLURM refused the requeue ({why}): the same command with --name {self.run.name} goes on")
        return done.returncode == 0


def local_port(run: RunDir, attempt: int) -> int:
    """Of simulated nodes: known before there is a job, so that `--dry-run` can print it."""
    return torchrun.port(str(run.path), attempt)


def _address(host: str) -> str:
    """`host`, or the address that SLURM has of it where the name does not resolve. Raises RunFailed."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    if found := slurm.address(host):
        return found
    raise RunFailed(
        f"the first node's name, {host}, does not resolve on {socket.gethostname()}: mend DNS or /etc/hosts"
    )

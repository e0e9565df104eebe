"""What runs once per node: torchrun, and what comes of it: done, stopped and requeued, or failed for a reason.

    sbatch -> srun -> python -m submitit.core._submit -> NodeJob() -> torchrun -> vitdist.train, a process per GPU

The nodes check themselves and meet (launch/rollcall.py), start torchrun and wait, by polling. SLURM sends its warning,
USR2, to every process of the step: torchrun ignores it; a trainer takes it for a wish, all agree at the end of a step,
save and leave. Then the first node decides (launch/policy.py) and has SLURM requeue the job, the others stay until it
has (each step was tried on a real SLURM, see docs/architecture.md).

SLURM also starts a job again after a node failure, with the same pickle: nothing in a NodeJob may change from one
start to the next. Which attempt this is follows from SLURM_RESTART_COUNT, all else from the run folder.
"""

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import submitit
from submitit.core.utils import JobPaths
from submitit.helpers import DelayedSubmission

from launch import cluster, slurm, torchrun
from launch.node import PATIENCE_S, POLL_S, Node, RunFailed
from launch.process import Torchrun
from vitdist import config, rundir
from vitdist.rundir import RunDir

LOOK_S = 2.0
"""Between two looks at what other nodes have recorded: a shared file system is slow to ask."""
MARGIN_S = 15.0
"""Left of SLURM's warning time for the requeue."""
SILENCE_S = 300.0
"""A controller that is started anew says nothing for so long at most."""
WARNED = 128 + signal.SIGUSR2
"""srun's exit code for a process that the warning has ended."""
SAVES = 1.5
"""A checkpoint may take so many times the newest one's seconds: shared storage has good and bad hours."""


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
    requeues: bool = True
    """False inside of an allocation, which is the user's own and runs other things."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    """The same on all nodes, and known to them alone."""
    _wish: "Wish" = field(default_factory=lambda: Wish(), init=False, repr=False, compare=False)

    def __call__(self) -> str:
        """Run this node's trainers to their end; returns how they ended. Raises RunFailed."""
        run = RunDir(Path(self.run))
        record = rundir.state(run)
        if record["state"] == "done" and record.get("attempt", 0) >= self.base_attempt:
            return "done"  # SLURM restarted a finished run; one that an earlier job finished is to be made longer
        if self.kind == "slurm" and run.stop.exists():  # asked for in the start before, which was cut off
            here(self).refrain()
            sys.exit(rundir.EXIT_STOPPED)
        self._listen()
        node = here(self)
        node.begin()
        process: Torchrun | None = None
        state, cause = "failed", None
        try:
            node.meet(lambda: bool(self._wish))
            if self._wish:  # before there was a trainer that could save
                state = "stopped"
            else:
                process = self._start(node)
                state = self._finish(node, process)
                cause = node.cause() if state in ("failed", "refused") else None
                if state == "failed" and self.kind == "local" and self._wish.times > 1:
                    cause = "ended at once, as asked"
        except (OSError, RunFailed, subprocess.SubprocessError) as error:
            cause = str(error)
        code = process.poll() if process else None
        if self.kind == "local" or not node.first:
            node.end(state, cause, code)
            node.wait_for_first()
        else:
            state = self._end(node, state, cause, code)
        if cause and state != "requeued":
            raise RunFailed(cause)
        if state == "stopped" and self.kind == "slurm" and node.first:
            sys.exit(rundir.EXIT_STOPPED)  # a job that waits for this one by `afterok` must not begin
        return state

    def conclude(self, code: int) -> str | None:
        """From the batch script, whose step has ended with `code`: what the first node would have done, had its own
        job not been killed, or hung before it met the others. Returns the state; None: there is nothing to do.
        """
        node = here(self)
        try:
            if not node.take_over():
                return None
        except OSError as error:
            print(f"not started again: {node.run.path} cannot be written ({error.strerror})", flush=True)
            return None
        # What ends a job that is not RUNNING is SLURM's affair, or the user's.
        if not self._running(node):
            if slurm.state(node.job_id) == "UNKNOWN":
                print(f"not started again: SLURM does not answer; --name {node.run.name} goes on", flush=True)
            return None
        state, cause = node.verdict(code), node.said.fault
        if code == WARNED and not node.attempt.train.exists():
            state = "stopped"  # SLURM's warning ends a Python that does not listen yet: no crash
        if state != "done" and not cause:
            unsaid = node.unsaid(code)
            cause = unsaid if state == "stopped" else node.cause(unsaid)
        return self._end(node, state, cause, code)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook for a warning that comes before `__call__`: there is nothing to save yet."""
        return DelayedSubmission(dataclasses.replace(self))

    def _listen(self) -> None:
        """Take the stop signals over, from submitit's handler of USR2 too: it would requeue before all is recorded."""
        numbers = (signal.SIGUSR2,) if self.kind == "slurm" else (signal.SIGTERM, signal.SIGUSR2)
        for number in numbers:  # local: not SIGINT, submit.py has it ignored here, and turns a Ctrl-C into SIGTERM
            signal.signal(number, self._wish.heard)

    def _start(self, node: Node) -> Torchrun:
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
        if node.profile:
            places = cluster.places(node.run, config.load(node.run.config), node.profile)
            command = cluster.wrap(command, node.profile, places, node.hosts[node.index])
        return Torchrun(command, env, node.run.code, node.attempt.torchrun_log(node.index))

    def _finish(self, node: Node, process: Torchrun) -> str:
        """Wait for torchrun, pass on the wish to stop, end it if another node has failed; returns how it ended."""
        next_look, end_at = 0.0, float("inf")
        while process.poll() is None:
            time.sleep(POLL_S)
            process.stopping = bool(self._wish)
            process.look_after()
            now = time.monotonic()
            if now >= next_look and end_at == float("inf"):
                next_look = now + LOOK_S
                end_at = now + PATIENCE_S[self.kind] if self._lost(node) else end_at
                if self.kind == "slurm" and node.first and not self._wish and self._late(node):
                    print("a checkpoint takes longer than SLURM's warning: saving now", flush=True)
                    self._wish.heard(signal.SIGUSR2, None)
            too_long = self.kind == "slurm" and self._wish and now >= self._last_moment(node)
            if now >= end_at or too_long or (self.kind == "local" and self._wish.times > 1):
                process.end()
        return node.verdict(process.poll())

    def _last_moment(self, node: Node) -> float:
        """By the monotonic clock: what is not saved by then is not saved before SLURM's limit."""
        left = node.end_at - time.time() - MARGIN_S if node.end_at else 0.0
        return max(self._wish.at + max(MARGIN_S, self.signal_delay_s - MARGIN_S), time.monotonic() + left)

    def _lost(self, node: Node) -> bool:
        """Whether another node has failed. In SLURM only the first node looks: srun ends the others."""
        watching = node.first or self.kind == "local"
        return watching and any(record.get("state") in ("failed", "refused") for record in node.others())

    def _late(self, node: Node) -> bool:
        """Whether the time that is left is just enough to save, and SLURM's warning would come too late for that."""
        if node.end_at is None:
            return False
        saved = node.save_s()
        needed = SAVES * saved + 2 * MARGIN_S
        return needed > self.signal_delay_s and time.time() >= node.end_at - needed

    def _end(self, node: Node, state: str, cause: str | None, code: int | None) -> str:
        """On the first node: record the end, and have the job requeued where its policy says so; returns the state."""
        decision = node.spare(node.decide(state, bool(self._wish)))
        again = self.requeues and decision.again and not node.superseded() and self._running(node)
        # Said before it is done: SLURM kills this process for it, and who follows would take "stopped" for the end.
        node.end("requeued" if again else state, cause, code, decision)
        if not again:
            if state in ("failed", "stopped"):
                why = decision.why if not decision.again else "SLURM does not call the job running, or not this start"
                print(f"not started again: {why}", flush=True)
            return state
        print(f"starts again: {decision.why}", flush=True)
        refused = node.requeue(decision)
        if refused is None:
            return "requeued"
        print(
            f"SLURM refused the requeue ({refused}): the same command with --name {node.run.name} goes on", flush=True
        )
        node.end(state, cause, code, dataclasses.replace(decision, again=False, why=f"SLURM refused: {refused}"))
        return state

    def _running(self, node: Node) -> bool:
        """Whether SLURM calls the job running: nobody requeues what the user has cancelled. A silent one is asked
        for some minutes; then its own warning is believed."""
        deadline = time.monotonic() + SILENCE_S
        while (word := slurm.state(node.job_id).split(" ")[0]) == "UNKNOWN" and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return word == "RUNNING" or (word == "UNKNOWN" and bool(self._wish))


@dataclass
class Wish:
    """The wish to stop, which signals express."""

    times: int = 0
    at: float = float("inf")
    """When it was first heard, by the monotonic clock."""

    def __bool__(self) -> bool:
        return self.times > 0

    def heard(self, number: int, frame: FrameType | None) -> None:
        """A simulated node's second signal ends it; SLURM's own repeat themselves and mean nothing new."""
        self.times += 1
        self.at = min(self.at, time.monotonic())
        if self.times < 3:
            print("asked to stop" if self.times == 1 else "asked again", flush=True)


def submitted(folder: str) -> NodeJob:
    """What was submitted as the SLURM job that this process is part of; `folder`: submitit's. Raises OSError."""
    found = DelayedSubmission.load(JobPaths(folder, submitit.JobEnvironment().job_id).submitted_pickle).function
    assert isinstance(found, NodeJob)
    return found


def here(job: NodeJob) -> Node:
    """This node, from what SLURM, or submitit's local executor, says in the environment."""
    env = submitit.JobEnvironment()
    run = RunDir(Path(job.run))
    # Unset on the first start; counts every later one, whatever ended the one before.
    attempt = job.base_attempt + int(os.environ.get("SLURM_RESTART_COUNT", "0")) * (job.kind == "slurm")
    local = job.kind == "local"
    hosts = [env.hostname] * env.num_tasks if local else list(env.hostnames)
    return Node(
        run=run,
        attempt=run.attempt(attempt),
        base=job.base_attempt,
        index=env.global_rank if local else env.node,
        processes=job.processes_per_node,
        kind=job.kind,
        job_id=env.job_id,
        hosts=hosts,
        master=torchrun.LOCAL if local or len(hosts) == 1 else hosts[0],
        ports=torchrun.ports(str(run.path) if local else env.job_id, attempt),
        token=job.token,
        profile=None if local or not run.cluster.exists() else cluster.of_run(run),
        partition=os.environ.get("SLURM_JOB_PARTITION"),
        end_at=None if local else slurm.end_time(env.job_id),
    )

"""This node among those of a job: who it is, what it records, what the run folder says of the starts before.

    node = Node.here(...)               # from what SLURM, or submitit's local executor, says in the environment
    node.end("requeued", cause, decision)

The run folder is the only memory: SLURM starts a job again after a node's end with the same pickle, and its own counter
does not tell a preemption from a crash.
"""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch import policy, rollcall, slurm, torchrun, why
from launch.cluster import Cluster
from launch.policy import Decision, Start
from launch.rollcall import Answer
from vitdist import faults, manifest, rundir
from vitdist.rundir import Attempt, RunDir

POLL_S = 0.2
CHECK_S = 60.0
"""For a node's check of itself, whose questions to driver and file systems are bounded one by one, but for a read."""
RECORD_S = 1800.0
"""Longest wait for the first node's last word: it exports and writes the report after the others are done."""
PATIENCE_S = {"slurm": 10.0, "local": 3.0}
"""For what another node writes to reach this one, and for the ranks of a run that lost one to say so."""
SPARE_S = 3.0
"""For each question about nodes that may be left out: all of them fit before a time limit (MARGIN_S)."""
CAUSE_S = {"slurm": 5.0, "local": 15.0}
"""For the node of the rank that failed first to name it. Nodes on one machine share its cores with all ranks' ends."""


class RunFailed(RuntimeError):
    """The run ended for the reason given. Its text is all that submitit keeps of it."""


@dataclass
class Node:
    """One of the nodes of a start."""

    run: RunDir
    attempt: Attempt
    base: int
    """Number of the job's first start."""
    index: int
    processes: int
    """Ranks on each node."""
    kind: Literal["slurm", "local"]
    job_id: str
    hosts: list[str]
    """All nodes by number, in the scheduler's words; of simulated ones this machine for each."""
    master: str
    ports: tuple[int, ...]
    """Where the nodes may meet; `said` has the one that they use."""
    token: str
    """What tells the job's own nodes from strangers at the roll call."""
    profile: Cluster | None = None
    """None for simulated nodes."""
    partition: str | None = None
    end_at: float | None = None
    """When SLURM will end it, in Unix seconds."""
    said: Answer = field(default_factory=Answer)
    """Of the roll call."""
    _started: str = field(default_factory=rundir.now)
    _had: int = 0
    """Step of the newest checkpoint when it began."""

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def port(self) -> int:
        return self.said.port or self.ports[0]

    @property
    def first(self) -> bool:
        return self.index == 0

    # ---- before the trainers ---------------------------------------------------------------------

    def begin(self) -> None:
        if self.first:
            # A kill in the middle of a dump leaves one, and submitit's next dump would refuse to write (submitit#1617).
            for torn in self.run.submitit.glob(f"{self.job_id}_*.save_tmp"):
                torn.unlink(missing_ok=True)
            self._had = max(manifest.steps(self.run), default=0)
            self._publish("running", None, None, None)

    def refrain(self) -> None:
        """Record a start that was not to be: the wish to stop came before it."""
        if self.first:
            self.begin()
            self.end("stopped", None, None)

    def take_over(self) -> bool:
        """In the batch script, where the step has ended: as `begin` left it; False if the first node has had its say.

        Where the others have not found the first node, that is the fault. Raises OSError where no record can be
        written: a start of which nothing is known would be requeued for ever.
        """
        told = _read(self.attempt.job)
        if told.get("ended"):
            return False
        self._started = told.get("started") or self._started
        self._had = int(told.get("had") or 0) if told else max(manifest.steps(self.run), default=0)
        self._publish("running", None, None, None)
        lost = next((other for other in self.others() if other.get("word") == "never_came"), None)
        if lost and _read(self.attempt.node(0)).get("word") is None:
            self.said = Answer(str(lost["cause"]), "never_came", self.hosts[:1])
        return True

    def meet(self, ended: Callable[[], bool]) -> None:
        """Check this node and meet the others. Raises RunFailed with the fault, which `said` keeps.

        `ended`: whether there is no point any more, since the job is to stop.
        """
        mine = self._check(ended)
        if ended():
            return
        rundir.publish_json(self.attempt.check(self.index), mine)
        self.find_master()
        if self.first:
            try:
                self.said = rollcall.call(self.token, self.hosts, mine, self.ports, ended=ended)
            except OSError as error:
                tried = ", ".join(map(str, self.ports))
                told = f"ports {tried} on {socket.gethostname()} cannot be used ({error.strerror})"
                self.said = Answer(f"{told}: the next start takes other ones", "port_in_use")
        else:
            self.said = rollcall.report(self.token, self.index, mine, self.master, self.ports, ended=ended)
            if self.said.word == "never_came" and not self.said.hosts:  # no answer, of which only the address is known
                self.said = dataclasses.replace(self.said, hosts=self.hosts[:1])
        if self.first:
            for warning in self.said.warnings:
                print(f"warning: {warning}", flush=True)
        if self.said.fault and not ended():
            raise RunFailed(self.said.fault)

    def _check(self, ended: Callable[[], bool]) -> dict[str, Any]:
        """What vitdist.nodecheck says of this node; a child, since a driver or a mount may hang."""
        gpus = int(self.profile.gpus_per_node) if self.profile else 0
        command = [sys.executable, "-m", "vitdist.nodecheck", str(self.run.path)]
        command += ["--gpus", str(gpus), "--processes", str(self.processes)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.run.code,
            preexec_fn=_deaf,
        )
        deadline = time.monotonic() + CHECK_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, error = child.communicate(timeout=POLL_S)
                break
            if time.monotonic() > deadline or ended():
                child.kill()  # not waited for: a process in a hanging system call does not even hear this
                return self._unchecked(f"its check did not end in {CHECK_S:.0f} s: a mount or a driver hangs")
        try:
            return dict(json.loads(out))
        except ValueError:
            told = [line for line in error.splitlines() if line.strip()]
            return self._unchecked(f"its check ended with {child.returncode}: {told[-1] if told else 'no word'}")

    def _unchecked(self, fault: str) -> dict[str, Any]:
        return {"host": socket.gethostname(), "faults": [fault], "warnings": [], "versions": {}, "gpus": []}

    def find_master(self) -> None:
        """Raises RunFailed if this node cannot find the first one."""
        if self.master != torchrun.LOCAL:
            self.master = address(self.master)

    # ---- records ---------------------------------------------------------------------------------

    def end(self, state: str, cause: str | None, code: int | None, decision: Decision | None = None) -> None:
        """Record how this node ended; the first node records it of the job."""
        ended = {"node": self.index, "host": socket.gethostname(), "state": state, "cause": cause, "code": code}
        ended["word"] = self.said.word
        try:
            rundir.publish_json(self.attempt.node(self.index), {**ended, "ended": rundir.now()})
            if self.first:
                self._publish(state, cause, rundir.now(), decision)
        except OSError as error:  # a full disk must not cost the requeue
            print(f"the end ({state}) cannot be recorded: {error}", flush=True)

    def _publish(self, state: str, cause: str | None, ended: str | None, decision: Decision | None) -> None:
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
                "had": self._had,
                "start": dataclasses.asdict(decision.of) if decision and decision.of else None,
                "decision": decision.why if decision else None,
                "again": decision.again if decision else None,
                "exclude": list(decision.exclude) if decision else [],
            },
        )

    def others(self) -> list[dict[str, Any]]:
        """What the other nodes have recorded of their end."""
        return [_read(self.attempt.node(i)) for i in range(self.nodes) if i != self.index]

    def wait_for_first(self) -> None:
        """Stay until the first node has recorded the end for good: our exit would have srun end it.

        In the middle of a requeue too: then SLURM ends all.
        """
        # A first node that never spoke is not going to.
        deadline = time.monotonic() + (3 * PATIENCE_S[self.kind] if self.said.fault else RECORD_S)
        while not self.first and self.kind == "slurm" and time.monotonic() < deadline:
            told = _read(self.attempt.job)
            if told.get("ended") and told.get("state") != "requeued":
                return
            time.sleep(1.0)

    # ---- how it ended ----------------------------------------------------------------------------

    def verdict(self, code: int | None) -> str:
        """done, stopped, refused or failed. torchrun turns every exit code of a trainer into 1, so records decide."""
        record = _read(self.attempt.train)
        state = str(record.get("state"))
        if state in ("done", "stopped", "refused"):
            return state
        if code == 0:
            return "done"
        # On a shared file system the record of rank 0 may reach this node late; torchrun's log is this node's own.
        failed = torchrun.failures(why.tail(self.attempt.torchrun_log(self.index)))
        left_after_saving = failed and failed[0].code == rundir.EXIT_STOPPED
        return "stopped" if left_after_saving else "failed"

    def cause(self, unsaid: str = "") -> str:
        """Why the run failed. Where a rank only lost its peer, wait a moment for the peer's side of it.

        `unsaid`: the cause, where all that is found is a consequence.
        """
        deadline = time.monotonic() + (CAUSE_S[self.kind] if self.nodes > 1 else 0)
        while True:
            found = why.cause(self.attempt)
            if not found.cascade or time.monotonic() > deadline:
                return unsaid if found.cascade and unsaid else found.text
            time.sleep(POLL_S)

    def unsaid(self, code: int) -> str:
        """The cause where the first node's own job has left no word; `code`: the exit code of the step."""
        log = self.run.submitit / f"{self.job_id}_0_log.out"
        if code > 128:
            how = f"was killed (signal {code - 128})"
        else:
            how = f"ended with exit code {code} before it could say why: {why.last_line(why.tail(log))}"
        return f"the job of the first node ({self.hosts[0]}) {how} ({log})"

    def decide(self, state: str, warned: bool) -> Decision:
        """What follows this start, by the rules of launch/policy.py."""
        record = _read(self.attempt.train)
        start = Start(
            state=state,
            # Not what the trainers say: they may have ended before they knew, or passed over a damaged one.
            began=self._had,
            reached=max(manifest.steps(self.run), default=0),
            out_of_time=warned and self._near_its_limit(),
            wished=self.run.stop.exists(),
            **(self._failure(record) if state == "failed" else {}),
        )
        decision = policy.decide([*self._earlier(), start], self.profile.max_starts if self.profile else None)
        return dataclasses.replace(decision, of=start)

    def save_s(self) -> float:
        """Seconds that the newest checkpoint of this start took; 0 before the first."""
        return float((_read(self.attempt.train).get("saved") or {}).get("seconds") or 0.0)

    def superseded(self) -> bool:
        """Whether SLURM has started the job anew beside this process: it took this node for dead."""
        return any(attempt.number > self.attempt.number for attempt in self.run.attempts())

    def _failure(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.said.fault:
            return {"word": self.said.word, "hosts": tuple(self.said.hosts)}
        root = faults.root(faults.read(self.attempt))
        if root:
            error = None if root.word in ("killed", "hang") else root.type
            host = self.hosts[min(root.rank // self.processes, self.nodes - 1)]
            return {"word": root.word, "error": error, "step": root.step, "hosts": (host,)}
        logs = (self.attempt.torchrun_log(i) for i in range(self.nodes))
        codes = {failure.code for log in logs for failure in torchrun.failures(why.tail(log))}
        final = rundir.EXIT_DO_NOT_REQUEUE in codes
        return {"word": "data_failure" if final else None, "step": int(record.get("step") or 0)}

    def _near_its_limit(self) -> bool:
        # SLURM warns up to a minute early.
        delay = self.profile.signal_delay_s if self.profile else 0
        return self.end_at is not None and time.time() >= self.end_at - delay - 90

    def _earlier(self) -> list[Start]:
        """The job's starts before this one. One that was cut off left no word: a node died, or SLURM requeued it."""
        numbers = [a.number for a in self.run.attempts() if self.base <= a.number < self.attempt.number]
        records = [_read(self.run.attempt(number).job) for number in numbers]
        had = [int(record.get("had") or 0) for record in records] + [self._had]
        return [
            Start(**record["start"] | {"hosts": tuple(record["start"]["hosts"])})
            if record.get("start")
            else Start("running", before, after)
            for record, before, after in zip(records, had[:-1], had[1:], strict=True)
        ]

    # ---- the next start --------------------------------------------------------------------------

    def requeue(self, decision: Decision) -> str | None:
        """Have SLURM start the job again; returns why it would not, or None."""
        if error := slurm.requeue(self.job_id):
            return error
        own = [self.profile.exclude] if self.profile and self.profile.exclude else []
        if decision.exclude and (error := slurm.exclude(self.job_id, [*own, *decision.exclude])):
            print(f"{', '.join(decision.exclude)} cannot be left out of the next start: {error}", flush=True)
        return None

    def spare(self, decision: Decision) -> Decision:
        """`decision` without nodes to leave out where the job could not run without them."""
        if not decision.exclude or not self.profile or self._can_spare(self.profile, decision.exclude):
            return decision
        print(f"{', '.join(decision.exclude)} stay: without them there may be too few nodes", flush=True)
        return dataclasses.replace(decision, exclude=())

    def _can_spare(self, profile: Cluster, hosts: Sequence[str]) -> bool:
        own = [profile.exclude] if profile.exclude else []
        with contextlib.suppress(OSError):
            # SLURM itself knows which nodes have what the job asks for, and are up.
            script = self.run.submit.read_text(encoding="utf-8")
            flag = f"--exclude={','.join([*own, *hosts])}"
            without, _ = slurm.test_only(script, SPARE_S, flags=[flag])
            if without is not None and (without or slurm.test_only(script, SPARE_S)[0]):
                return without
        # It is silent, or does not take the job from here at all.
        there = slurm.partitions(SPARE_S)
        gpus = int(profile.gpus_per_node) if profile.gpu_request != "none" else 0
        known = sum(kind.number for kind in there.nodes(self.partition) if kind.gpus >= gpus) if there else 0
        named = [name for nodes in own for name in slurm.hostnames(nodes)]
        return not profile.constraint and (not known or known - len({*named, *hosts}) >= self.nodes)


def _read(path: Path) -> dict[str, Any]:
    """A record; {} where there is none yet, or none that can be read now: shared storage has bad moments."""
    try:
        return rundir.read_json(path) or {}
    except (OSError, ValueError):
        return {}


def address(host: str) -> str:
    """`host`, or the address that SLURM has of it where the name does not resolve. Raises RunFailed."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    if found := slurm.address(host):
        return found
    raise RunFailed(
        f"the first node's name, {host}, does not resolve on {socket.gethostname()}: mend DNS or /etc/hosts"
    )


def _deaf() -> None:
    """SLURM's signals reach every process of the step; a check that dies of one would read as a bad node."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

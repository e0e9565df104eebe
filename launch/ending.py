"""End a run: `stop` has it save a checkpoint first and keeps SLURM from starting it again, `cancel` ends it at once.

    print(stop(run, say))            # asked; what happens next stands in the run folder
    print(cancel(run, say))

The wish lies in the run folder, RUN/stop.json, before any signal is sent: the node job that has saved finds it there
and does not have itself requeued. USR2 is what SLURM itself sends before a time limit, so that a stop goes the way
that every run goes each night.
"""

import getpass
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from launch import status
from launch.status import LIVE, Folder, Status
from vitdist import faults, manifest, rundir
from vitdist.config import SettingsError
from vitdist.rundir import RunDir

PATIENCE_S = 10.0
"""For an answer of SLURM."""
LISTEN_S = 60.0
"""For the jobs of all nodes to take over the signal: Python starts slowly from a busy file system."""
SCANCEL_S = 30.0
"""For scancel, which itself tries again where the controller is busy."""
_ALREADY_DONE = 2021 % 256
"""scancel's exit code for a job that has ended meanwhile (ESLURM_ALREADY_DONE)."""
ENDS_S = 30.0
"""For processes of this machine that were told to end."""
POLL_S = 0.2

Say = Callable[[str], None]


def stop(run: RunDir, say: Say, listen_s: float = LISTEN_S) -> Status:
    """Ask a run to save and to end for good; returns the state that it was found in.

    Raises SettingsError where it cannot be asked: SLURM is silent, or it runs on another machine.
    """
    folder, found = _found(run)
    if found.state not in LIVE:
        return found
    if folder.inside:
        _stop_inside(folder, say)
        return found
    if folder.job_id is None:
        _stop_here(folder, say)
        return found
    if found.state == "pending":
        _wish(run, checkpoint=True)
        _scancel(folder.job_id, "--state=PENDING")
        folder, now = _found(run)
        if now.state not in LIVE or now.state == "pending":
            say(f"job {folder.job_id} is taken out of the queue")
            return found
    if not _listening(run, listen_s):
        say(f"not all nodes of job {folder.job_id} have begun within {listen_s:.0f} s: asked all the same")
    _wish(run, checkpoint=True)
    _scancel(str(folder.job_id), "--signal=USR2")
    say(f"job {folder.job_id} is asked to save and to end; it will not be started again")
    return found


def ended(run: RunDir) -> Status:
    """Wait until a run that was asked to stop has ended; returns how. A Ctrl-C ends the waiting alone."""
    while True:
        folder, found = status.read_one(run, PATIENCE_S)
        if found.state == "pending" and folder.job_id and (rundir.read_json(run.path / "stop.json") or {}):
            # Requeued, by a node's end or by SLURM itself, before the wish was read.
            _scancel(folder.job_id, "--state=PENDING")
        elif found.state not in (*LIVE, "UNKNOWN"):
            return found
        time.sleep(POLL_S)


def cancel(run: RunDir, say: Say) -> Status:
    """End a run at once; returns the state that it was found in. Raises SettingsError as `stop` does."""
    folder, found = _found(run)
    if found.state not in LIVE:
        return found
    if folder.inside:
        srun = _srun(folder)
        _wish(run, checkpoint=False)
        _send(srun, signal.SIGTERM)
        say(f"the step of {run.name} in allocation {folder.job_id} is ended; the allocation stays")
        return found
    _wish(run, checkpoint=False)
    if folder.job_id:
        _scancel(folder.job_id)
        say(f"job {folder.job_id} is cancelled")
        return found
    _kill_here(folder)
    say(f"the processes of {run.name} have ended")
    return found


def kept(run: RunDir) -> int | None:
    """Step of the newest checkpoint that is whole by its sizes; None: there is none."""
    return next((entry.step for entry in manifest.entries(run, thorough=False) if entry.fault is None), None)


def _found(run: RunDir) -> tuple[Folder, Status]:
    folder, found = status.read_one(run, PATIENCE_S)
    if found.state == "unreadable":
        raise SettingsError(f"{run.path}: {found.note}")
    if found.state == "UNKNOWN":
        raise SettingsError(f"{run.name} cannot be reached: {found.note}; nothing was changed")
    return folder, found


def _wish(run: RunDir, checkpoint: bool) -> None:
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "by": getpass.getuser(),
        "checkpoint": checkpoint,
    }
    rundir.publish_json(run.path / "stop.json", record)


def _scancel(job_id: str, *options: str) -> None:
    """Raises SettingsError with SLURM's words."""
    command = ["scancel", "-v", *options, job_id]
    shown = " ".join(word for word in command if word != "-v")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise SettingsError(f"{shown}: {error.strerror}") from None
    silence = threading.Timer(SCANCEL_S, process.kill)
    silence.start()
    told = []
    with process:
        assert process.stderr
        for line in process.stderr:
            if "transitional state" in line:
                # It has sent the signal and would send it again every 5 s, for a minute: SLURM 22.05 answers so for a
                # point of an array while others still wait.
                process.kill()
                silence.cancel()
                return
            told.append(line)
    silence.cancel()
    errors = [line.removeprefix("scancel: error: ") for line in told if line.startswith("scancel: error: ")]
    if process.returncode < 0:
        raise SettingsError(f"{shown}: no answer in {SCANCEL_S:.0f} s")
    if process.returncode and process.returncode != _ALREADY_DONE:
        raise SettingsError(f"{shown}: {faults.one_line(' '.join(errors)) or f'exit code {process.returncode}'}")


def _listening(run: RunDir, patience_s: float) -> bool:
    """Whether all nodes of the job have taken over the signal, which ends a Python that has only begun."""
    deadline = time.monotonic() + patience_s
    while True:
        attempts = run.attempts()
        job = (rundir.read_json(attempts[-1].job) if attempts else None) or {}
        folders = [attempts[-1].path / "logs" / f"node-{node}" for node in range(job.get("nodes") or 0)]
        # The last: of slurm/train.sbatch, whose trainers are the first to write.
        signs = ("check.json", "torchrun.log", "rank-*.log")
        begun = [folder for folder in folders if any(True for sign in signs for _ in folder.glob(sign))]
        if job.get("state") == "running" and len(begun) == len(folders):
            return True
        if time.monotonic() > deadline or job.get("state") in status.FINAL:
            return False
        time.sleep(POLL_S)


# ---- inside of an allocation ---------------------------------------------------------------------


def _stop_inside(folder: Folder, say: Say) -> None:
    srun = _srun(folder)
    _wish(folder.run, checkpoint=True)
    _send(srun, signal.SIGUSR2)  # which it passes on to all nodes of the step
    say(f"the step of {folder.run.name} in allocation {folder.job_id} is asked to save and to end")


def _srun(folder: Folder) -> int:
    """The process that holds a run's step: scancel would reach all else in the allocation. Raises SettingsError."""
    submitit = os.fsencode(folder.run.submitit)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if os.path.basename(argv[0]) == b"srun" and any(submitit in each for each in argv):
            found.append(int(path.parent.name))
    if not found:
        where = f"inside of allocation {folder.job_id}, from a shell of another machine"
        raise SettingsError(f"{folder.run.name} runs {where}: press Ctrl-C there")
    return min(found)  # srun has a child that looks the same


# ---- without SLURM -------------------------------------------------------------------------------


def _stop_here(folder: Folder, say: Say) -> None:
    if folder.stop:  # a second signal would end the run at once
        say(f"{folder.run.name} was asked already, at {folder.stop['time']}; it is saving")
        return
    # A moment ago: the controller passes signals on as soon as the nodes' jobs have begun.
    process = status.controller(folder.run, folder.job) or status.holder(folder.run)
    if process is None:
        raise SettingsError(f"{folder.run.name} is trained by a process that cannot be found here: on another machine?")
    _wish(folder.run, checkpoint=True)
    _send(process, signal.SIGTERM)
    say(f"process {process} is asked to save and to end")


def _kill_here(folder: Folder) -> None:
    """The first signal asks, the second one ends; repeated, since two that come at once count as one."""
    run = folder.run
    deadline = time.monotonic() + ENDS_S
    trainer = status.holder(run)
    while process := status.controller(run, folder.job) or status.holder(run):
        if time.monotonic() > deadline:
            raise SettingsError(f"{run.name}: process {process} does not end: kill -9 {process}")
        # A trainer without a controller takes any number of SIGTERM for one wish, and SIGINT after it for an order.
        _send(process, signal.SIGTERM)
        if process == trainer:
            _send(process, signal.SIGINT)
        _wait_gone(process, 1.0)


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise SettingsError(f"process {process} is another user's: ask them") from None


def _wait_gone(process: int, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)

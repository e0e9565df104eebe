"""NodeJob under submitit's local executor, several simulated nodes, with a stand-in for torchrun and trainer."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml
from submitit.helpers import DelayedSubmission

from launch import node as launch_node
from launch import rollcall, slurm, torchrun
from launch.job import NodeJob, RunFailed
from vitdist import rundir
from vitdist.rundir import RunDir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.processes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder whose code is this checkout."""
    run = RunDir(tmp_path / "runs" / "a run")
    run.path.mkdir(parents=True)
    run.code.symlink_to(ROOT)
    shards = "{train: 'https://far.example/train', val: 'https://far.example/val'}"
    run.config.write_text(f"data: {shards}\ntrain: {{steps: 8, global_batch: 8}}\nmodel: {{pretrained: some/vit}}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return run


@pytest.fixture
def start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start simulated nodes; returns submitit's controller."""

    def start(
        nodes: int = 2,
        processes: int = 2,
        devices: tuple[str, ...] = (),
        minutes: int = 10,
        first: int | None = None,
        **orders: object,
    ) -> Any:
        monkeypatch.setenv("STANDIN", json.dumps(orders))
        number = run.next_attempt() if first is None else first
        job = NodeJob(str(run.path), processes, number, "local", devices, launcher="standin")
        executor = submitit.LocalExecutor(run.submitit)
        executor.update_parameters(tasks_per_node=nodes, timeout_min=minutes, signal_delay_s=10, stderr_to_stdout=True)
        return executor.submit(job)._process

    return start


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for a condition, at most so long."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def read(path: Path) -> dict[str, Any]:
    return rundir.read_json(path) or {}


def logs(run: RunDir) -> str:
    return "\n".join(path.read_text() for path in sorted(run.submitit.glob("*_log.out")))


def test_two_nodes_run_to_the_end(run: RunDir, start: Callable[..., Any]) -> None:
    start(devices=("4", "5", "6", "7")).wait(30)
    attempt = run.attempt(0)
    assert rundir.state(run)["state"] == "done", logs(run)
    record = read(attempt.job)
    assert (record["state"], record["nodes"], record["processes"], record["cause"]) == ("done", 2, 2, None)
    assert record["scheduler"] == "local"
    assert record["master"] == "127.0.0.1"
    assert record["port"] == torchrun.port(str(run.path), 0)
    assert record["ended"] >= record["started"]
    cores = max(1, len(os.sched_getaffinity(0)) // 4)
    for node, rank, devices in ((0, 0, "4,5"), (0, 1, "4,5"), (1, 2, "6,7"), (1, 3, "6,7")):
        # cwd and share of the machine of every rank
        assert attempt.rank_log(node, rank).read_text() == f"here am I {ROOT} {devices} {cores}\n"
    assert [read(attempt.node(node))["state"] for node in (0, 1)] == ["done", "done"]


def test_S8_a_finished_run_returns_at_once(run: RunDir, start: Callable[..., Any]) -> None:
    """SLURM may start the job of a finished run again; one of a later submission is there to make it longer."""
    start(1, 1).wait(30)
    began = read(run.attempt(0).job)
    start(1, 1, first=0).wait(30)
    assert [attempt.number for attempt in run.attempts()] == [0]
    assert read(run.attempt(0).job) == began
    start(1, 1).wait(30)
    assert [attempt.number for attempt in run.attempts()] == [0, 1]


def test_the_cause_is_the_rank_that_failed_first_not_its_peers(run: RunDir, start: Callable[..., Any]) -> None:
    start(fail={"rank": 3, "message": "no such class"}).wait(30)
    record = read(run.attempt(0).job)
    assert record["state"] == "failed"
    assert record["cause"] == f"rank 3: ValueError: no such class ({run.attempt(0).rank_log(1, 3)})"
    assert read(run.attempt(0).train)["error"]["message"] == "Connection closed by peer"
    assert "RunFailed: rank 3: ValueError" in logs(run)


def test_a_node_that_waits_for_a_dead_one_is_ended(
    run: RunDir, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(fail={"rank": 3, "signal": signal.SIGKILL}, hang=True).wait(40)
    record = read(run.attempt(0).job)
    assert record["state"] == "failed"
    assert "rank 3 was killed by SIGKILL, as the kernel does when memory runs out" in record["cause"]


def test_refused_settings_are_told_in_one_line(run: RunDir, start: Callable[..., Any]) -> None:
    start(1, 1, refuse="shards without pictures").wait(30)
    record = read(run.attempt(0).job)
    assert record["state"] == "refused"
    assert record["cause"] == "ValueError: shards without pictures (rank 0, step 0)"


def test_the_first_term_saves_and_the_next_start_goes_on(run: RunDir, start: Callable[..., Any]) -> None:
    controller = start(until_asked=True)
    until(lambda: read(run.attempt(0).train).get("step", 0) > 3)
    controller.terminate()
    controller.wait(30)
    assert read(run.attempt(0).job)["state"] == "stopped", logs(run)
    reached = read(run.attempt(0).train)["step"]
    start(steps=reached + 2).wait(30)
    assert read(run.attempt(1).train)["resumed_from"] == reached
    assert rundir.state(run)["state"] == "done"


def test_S8_a_wish_to_stop_is_repeated_for_trainers_that_were_not_ready(run: RunDir, start: Callable[..., Any]) -> None:
    controller = start(1, 1, until_asked=True)
    # The node's job handles TERM from here on; its trainer has not yet taken over USR2.
    until(lambda: run.attempt(0).torchrun_log(0).exists())
    time.sleep(0.05)
    controller.terminate()
    controller.wait(30)
    assert read(run.attempt(0).job)["state"] == "stopped", logs(run)


def test_S3_a_second_term_ends_it(run: RunDir, start: Callable[..., Any]) -> None:
    controller = start(1, 1, until_asked=True, hang=True)
    until(lambda: read(run.attempt(0).train).get("step", 0) > 0)
    (run.attempt(0).path / "lost").touch()  # the trainer hangs in a collective
    until((run.attempt(0).path / "hangs").exists)
    controller.terminate()
    until(lambda: "asked to stop" in logs(run))
    controller.terminate()
    controller.wait(30)
    assert read(run.attempt(0).job)["state"] == "failed"
    # The stand-in for torchrun dies of its first SIGTERM; what it leaves must not go on.
    until(lambda: not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(run.path) in _text(path)])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# ---- what a real SLURM would do, step by step, in this process --------------------------------------


@pytest.fixture
def in_slurm(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of one node of a SLURM job, and commands that write down how they are called."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, answer in (("scontrol", ""), ("squeue", "RUNNING|None")):
        (bin_folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\necho "{answer}"\n')
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_JOB_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(launch_node.PATIENCE_S, "slurm", 1.0)
    return tmp_path / "calls"


def node_job(run: RunDir, **changes: Any) -> NodeJob:
    return NodeJob(str(run.path), 1, 0, "slurm", launcher="standin", **changes)


@pytest.mark.parametrize(("restarts", "attempt"), [(None, 2), ("3", 5)])
def test_an_attempt_is_counted_by_slurm(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch, restarts: str | None, attempt: int
) -> None:
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    job = NodeJob(str(run.path), 1, 2, "slurm", launcher="standin")
    with usr2_kept():
        assert job() == "done"
    record = read(run.attempt(attempt).job)
    assert (record["job_id"], record["hosts"], record["port"]) == (
        "4711",
        ["localhost"],
        torchrun.port("4711", attempt),
    )


def concluded(run: RunDir, job: NodeJob, code: int = 137) -> str:
    """What the batch script's last act says, in a process of its own."""
    run.submitit.mkdir(exist_ok=True)
    DelayedSubmission(job).dump(run.submitit / "4711_submitted.pkl")
    command = [sys.executable, "-m", "launch.epilogue", str(run.submitit), str(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_never_came_of_the_first_node_is_requeued_without_it(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung before it met the others: they say so, and the batch script has SLURM start again elsewhere."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1,node2")
    fault = "the first node (10.0.0.1, port 12345) did not answer in 600 s: timed out"
    rundir.publish_json(
        run.attempt(0).node(1),
        {"node": 1, "host": "node2", "state": "failed", "cause": fault, "code": None, "word": "never_came"},
    )
    assert concluded(run, node_job(run)) == "starts again: crash 1 of 3 without a new checkpoint\n"
    calls = in_slurm.read_text().splitlines()
    assert calls[-2:] == ["scontrol requeue 4711", "scontrol update JobId=4711 ExcNodeList=node1"]
    record = read(run.attempt(0).job)
    assert (record["state"], record["cause"], record["exclude"]) == ("requeued", fault, ["node1"])


@pytest.mark.parametrize(
    ("sbatch", "left_out"),
    [
        ("exit 0", True),
        (
            'case "$*" in *--exclude=node1*) echo "Requested node configuration is not available" >&2; exit 1;; esac',
            False,
        ),
        ("echo 'job submission from a compute node is not allowed' >&2; exit 1", False),  # and features are not counted
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_bad_node_stays_where_no_other_has_what_is_asked_for(
    run: RunDir, in_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, left_out: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1,node2")
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    rundir.publish(run.submit, "#!/bin/bash\ntrue\n")
    profile = {"constraint": "h100", "gpus_per_node": 0, "cpus_per_task": 2}
    rundir.publish(run.cluster, yaml.safe_dump({"scheduler": "slurm", "nodes": 2, "processes": 1, "profile": profile}))
    lost = {"node": 1, "state": "failed", "cause": "no answer", "word": "never_came"}
    rundir.publish_json(run.attempt(0).node(1), lost)
    said = concluded(run, node_job(run))
    assert ("node1 stay" in said) == (not left_out), said
    assert ("ExcNodeList=node1" in in_slurm.read_text()) == left_out


@pytest.mark.parametrize(("ended", "answer"), [("failed", "RUNNING|None"), (None, "CANCELLED|None"), (None, "")])
def test_the_batch_script_leaves_alone_what_is_decided(
    run: RunDir, in_slurm: Path, tmp_path: Path, ended: str | None, answer: str
) -> None:
    """The first node has had its say, or the user, or SLURM."""
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '{answer}'\n")
    record = {"attempt": 0, "state": ended or "running", "ended": ended and rundir.now()}
    rundir.publish_json(run.attempt(0).job, record)
    assert concluded(run, node_job(run)) == ""
    assert read(run.attempt(0).job)["state"] == record["state"]
    assert "requeue" not in (in_slurm.read_text() if in_slurm.exists() else "")


def test_R5_a_killed_first_node_is_a_crash(run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.publish_json(run.attempt(0).job, {"attempt": 0, "state": "running", "ended": None, "had": 0})
    assert concluded(run, node_job(run)) == "starts again: crash 1 of 3 without a new checkpoint\n"
    cause = read(run.attempt(0).job)["cause"]
    assert cause.startswith("the job of the first node (localhost) was killed (signal 9)"), cause
    for number in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        said = concluded(run, node_job(run))
    assert said == "not started again: 3 starts in a row have failed without a new checkpoint\n"


def test_a_first_node_that_ended_by_itself_is_quoted(run: RunDir, in_slurm: Path) -> None:
    run.submitit.mkdir(exist_ok=True)
    (run.submitit / "4711_0_log.out").write_text("srun: x\nModuleNotFoundError: No module named 'submitit'\n")
    concluded(run, node_job(run), 1)
    told = "ended with exit code 1 before it could say why: ModuleNotFoundError: No module named 'submitit' ("
    assert told in read(run.attempt(0).job)["cause"]


def test_S8_a_warning_before_anybody_listens_is_no_crash(run: RunDir, in_slurm: Path) -> None:
    assert concluded(run, node_job(run), 128 + signal.SIGUSR2) == "starts again: stopped by SLURM\n"


def test_S7_a_run_folder_that_takes_no_record_is_not_requeued(run: RunDir, in_slurm: Path) -> None:
    """Starts of which nothing is known would be requeued for ever."""
    run.attempt(0).path.parent.mkdir(exist_ok=True)
    run.attempt(0).path.write_text("")  # in the way of the folder
    assert "cannot be written (" in concluded(run, node_job(run))
    assert "requeue" not in (in_slurm.read_text() if in_slurm.exists() else "")


def test_a_wish_to_stop_before_a_start_is_its_end(run: RunDir, in_slurm: Path) -> None:
    rundir.publish_json(run.stop, {"time": rundir.now(), "by": "me", "checkpoint": True})
    assert under_submitit(run, node_job(run)).wait(60) == rundir.EXIT_STOPPED
    assert concluded(run, node_job(run), rundir.EXIT_STOPPED) == ""
    record = read(run.attempt(0).job)
    assert (record["state"], record["cause"]) == ("stopped", None)


@contextlib.contextmanager
def usr2_kept() -> Iterator[None]:
    """The job takes over USR2 of this process."""
    before = signal.getsignal(signal.SIGUSR2)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def under_submitit(run: RunDir, job: NodeJob) -> "subprocess.Popen[bytes]":
    """The process that srun starts on a node, for a pickle as submitit writes it."""
    run.submitit.mkdir(exist_ok=True)
    pickled = DelayedSubmission(job)
    pickled.set_timeout(720, 1000)
    pickled.dump(run.submitit / "4711_submitted.pkl")
    with open(run.path / "node.out", "wb") as out:
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(run.submitit)]
        return subprocess.Popen(command, cwd=run.code, stdout=out, stderr=subprocess.STDOUT)


def test_S1_usr2_saves_before_the_requeue(run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"until_asked": True}))
    process = under_submitit(run, node_job(run))
    until(lambda: read(run.attempt(0).train).get("step", 0) > 2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0, (run.path / "node.out").read_text()
    assert in_slurm.read_text().endswith("scontrol requeue 4711\n")
    assert read(run.attempt(0).train)["state"] == "stopped"
    assert read(run.attempt(0).job)["state"] == "requeued"
    start = read(run.attempt(0).job)["start"]
    assert (start["state"], start["reached"]) == ("stopped", read(run.attempt(0).train)["step"])


def test_S8_usr2_does_not_requeue_a_run_that_is_done_by_then(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"steps": 40, "deaf": True}))
    process = under_submitit(run, node_job(run))
    until(lambda: read(run.attempt(0).train).get("step", 0) > 0)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0, (run.path / "node.out").read_text()
    assert "asked to stop" in (run.path / "node.out").read_text()
    assert read(run.attempt(0).job)["state"] == "done"
    assert "requeue" not in in_slurm.read_text()


def test_a_failure_is_raised_and_short(run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"refuse": "no pictures"}))
    with usr2_kept(), pytest.raises(RunFailed, match=r"^ValueError: no pictures \(rank 0, step 0\)$") as caught:
        node_job(run)()
    pickle.loads(pickle.dumps(caught.value))
    assert "requeue" not in in_slurm.read_text()


def test_other_nodes_stay_until_the_first_has_recorded_a_stop(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their exit would have srun kill the first node while it requeues."""
    for name, value in {
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost,other")
    job = node_job(run)
    process = under_submitit(run, job)
    mine = {"faults": [], "warnings": [], "versions": {}, "gpus": []}
    other = rollcall.call(job.token, ["localhost", "other"], mine, torchrun.ports("4711", 0), 20)
    assert other.word == "software_missing"  # it has packages, this one said that it has none
    rundir.publish_json(run.attempt(0).job, {"state": "failed", "ended": rundir.now()})
    assert process.wait(30) == 1
    run.attempt(0).job.unlink()
    again = under_submitit(run, job)
    mine["versions"] = read(run.attempt(0).check(1))["versions"]
    assert rollcall.call(job.token, ["localhost", "other"], mine, torchrun.ports("4711", 0), 20).fault is None
    rundir.publish_json(run.attempt(0).train, {"state": "running", "step": 1})
    until(lambda: run.attempt(0).rank_log(1, 1).exists())
    again.send_signal(signal.SIGUSR2)
    rundir.publish_json(run.attempt(0).train, {"state": "stopped", "step": 2})
    until(lambda: read(run.attempt(0).node(1)).get("state") == "stopped")
    assert again.poll() is None
    rundir.publish_json(run.attempt(0).job, {"state": "requeued", "ended": rundir.now()})  # asked for, not done yet
    assert again.poll() is None
    rundir.publish_json(run.attempt(0).job, {"state": "stopped", "ended": rundir.now()})
    assert again.wait(30) == 0, (run.path / "node.out").read_text()
    assert "requeue" not in in_slurm.read_text()


def test_S3_stopped_by_term_alone_is_requeued_while_slurm_calls_it_running(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"until_asked": True}))
    process = under_submitit(run, node_job(run))
    until(lambda: read(run.attempt(0).train).get("step", 0) > 2)
    (run.path / "asked").touch()  # a preemption without USR2: the trainers have seen SIGTERM
    assert process.wait(30) == 0, (run.path / "node.out").read_text()
    assert in_slurm.read_text().endswith("scontrol requeue 4711\n")
    assert read(run.attempt(0).job)["state"] == "requeued"


def test_R10_checkpoints_of_earlier_starts_are_no_progress(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three starts that end before their trainers know what they go on from."""
    (run.checkpoints / "step-00000500").mkdir(parents=True)
    run.config.write_text(run.config.read_text().replace("https://far.example/val", str(tmp_path / "gone")))
    for number in (0, 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        with usr2_kept():
            assert node_job(run)() == "requeued"
        assert read(run.attempt(number).job)["decision"] == f"crash {number + 1} of 3 without a new checkpoint"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with usr2_kept(), pytest.raises(RunFailed, match="gone: cannot be read here"):
        node_job(run)()
    assert read(run.attempt(2).job)["decision"] == "3 starts in a row have failed without a new checkpoint"


def test_a_start_that_slurm_has_replaced_requeues_nothing(
    run: RunDir, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", json.dumps({"until_asked": True}))
    process = under_submitit(run, node_job(run))
    until(lambda: read(run.attempt(0).train).get("step", 0) > 2)
    rundir.publish_json(run.attempt(1).job, {"state": "running"})
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == rundir.EXIT_STOPPED
    assert "requeue" not in in_slurm.read_text()


def test_a_wish_to_stop_outlives_a_node_and_the_exit_code_tells_it(run: RunDir, in_slurm: Path) -> None:
    rundir.publish_json(run.stop, {"time": rundir.now(), "by": "me"})
    with pytest.raises(SystemExit) as ended:
        node_job(run)()
    assert ended.value.code == rundir.EXIT_STOPPED
    assert read(run.attempt(0).job)["state"] == "stopped"
    assert not run.attempt(0).train.exists()


def test_a_torn_dump_of_submitit_is_removed(run: RunDir, in_slurm: Path) -> None:
    run.submitit.mkdir()
    torn = run.submitit / "4711_submitted.pkl.save_tmp"
    torn.touch()
    with usr2_kept():
        node_job(run)()
    assert not torn.exists()


def test_R2_another_port_is_taken_where_one_is_in_use(run: RunDir, in_slurm: Path) -> None:
    import socket

    first, second, *_ = torchrun.ports("4711", 0)
    with socket.socket() as taken, usr2_kept():
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", first))
        taken.listen()
        assert node_job(run)() == "done"
    assert read(run.attempt(0).job)["port"] == second


def test_R3_a_name_that_does_not_resolve_is_asked_of_slurm(in_slurm: Path, tmp_path: Path) -> None:
    assert launch_node.address("localhost") == "localhost"
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'NodeName=node1 NodeAddr=10.1.2.3 Port=1'\n")
    assert launch_node.address("no-such-host.invalid") == "10.1.2.3"
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RunFailed, match="does not resolve"):
        launch_node.address("no-such-host.invalid")


def test_silence_of_slurm_is_unknown(in_slurm: Path, tmp_path: Path) -> None:
    squeue = tmp_path / "bin" / "squeue"
    assert slurm.state("1") == "RUNNING"
    for script, state in (
        ("echo 'PENDING|Resources'", "PENDING (Resources)"),
        ("exit 1", "UNKNOWN"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "GONE"),
        ("true", "GONE"),
    ):
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        assert slurm.state("1") == state

"""launch/jobs.py on run folders that are written by hand, with a squeue that answers what a test wants."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch import completion, ending, follow, jobs, logs, pending, shown, slurm, status, submit
from vitdist import faults, manifest, rundir
from vitdist.config import SettingsError
from vitdist.faults import Fault
from vitdist.rundir import RunDir

Put = Callable[[str, str], None]
BEGAN = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.fixture
def runs(place: Path) -> Path:
    """The folder `runs` in the working folder; no SLURM is in PATH."""
    folder = place / "runs"
    folder.mkdir()
    return folder


def made(runs: Path, name: str, job: str | None = None) -> RunDir:
    """A run folder as a submission leaves it."""
    run = RunDir(runs / name)
    run.path.mkdir()
    shutil.copy("tiny.yaml", run.config)
    run.cluster.write_text("{}")
    if job:
        (run.path / "slurm_job").write_text(f"{job}\n")
        os.utime(run.path / "slurm_job", (BEGAN.timestamp() - 60,) * 2)
    return run


def began(run: RunDir, number: int = 0, job: str = "7", state: str = "running", **more: Any) -> None:
    """The launcher's record of a start, an hour after the one before."""
    at = (BEGAN + timedelta(hours=number)).isoformat()
    record = {"attempt": number, "scheduler": "slurm", "job_id": job, "hosts": ["n1", "n2"], "nodes": 2, "started": at}
    rundir.publish_json(run.attempt(number).job, record | {"state": state, "cause": None} | more)


def trained(run: RunDir, number: int = 0, state: str = "running", step: int = 10, **more: Any) -> None:
    record = {"attempt": number, "state": state, "step": step, "total_steps": 40, "resumed_from": None}
    rundir.publish_json(run.attempt(number).train, record | more)


def checkpoint(run: RunDir, step: int) -> Path:
    """A whole checkpoint of one rank."""
    folder = run.checkpoints / manifest.name_of(step)
    folder.mkdir(parents=True)
    (folder / "rank-0.safetensors").write_bytes(b"weights")
    files = {"rank-0.safetensors": {"bytes": 7, "sha256": manifest.sha256(folder / "rank-0.safetensors")}}
    identity = {
        "optimizer": "adamw",
        "global_batch": 8,
        "model": {},
        "classes": [],
        "data": "",
        "groups": [],
        "rest": {},
    }
    counters = {"steps": step, "skipped": 0, "optimizer": {}, "loss_scaler": {}}
    record = {
        "format": manifest.FORMAT,
        "step": step,
        "attempt": 0,
        "saved": rundir.now(),
        "world": 1,
        "zero": 2,
        "precision": "fp32",
        "average": False,
        "counters": counters,
        "position": {"epoch": 0.5},
        "wandb": None,
        "identity": identity,
        "settings": {},
        "settings_digest": "",
        "versions": {},
        "files": files,
    }
    rundir.publish_json(folder / "manifest.json", record | {"digest": manifest.own_digest(record)})
    assert manifest.verify(folder) is None
    return folder


def squeue(command: Put, *lines: str) -> None:
    """A squeue that knows these jobs: `id|state|reason|nodes|start`."""
    command("squeue", "\n".join(f"echo '{line}'" for line in lines) or "true")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    try:
        code = jobs.main(list(arguments))
    except SystemExit as refused:
        code = int(str(refused.code))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


# ---- the list ------------------------------------------------------------------------------------


def states(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, _ = told(capsys, "--json", *arguments)
    assert code == 0
    return {each["name"]: each for each in json.loads(out)}


def test_the_list_tells_every_state(runs: Path, command: Put, capsys: pytest.CaptureFixture[str]) -> None:
    done = made(runs, "done", "1")
    began(done, job="1", state="done")
    trained(done, state="done", step=40, summary={"top1": 0.961, "images_per_s": 1234.5})
    running = made(runs, "running", "2")
    began(running, job="2")
    trained(running)
    now = time.time()
    row = {"attempt": 0, "time": now, "train/global_step": 20, "perf/images_per_s": 900.0, "perf/eta_s": 3600.0}
    running.metrics.write_text(json.dumps(row) + '\n{"attempt": 0, "train/glo')
    made(runs, "waiting", "3")
    requeued = made(runs, "requeued", "4")
    began(requeued, job="4", state="requeued")
    trained(requeued, state="stopped", step=12)
    checkpoint(requeued, 12)
    failed = made(runs, "failed", "5")
    cause = f"nan_or_inf, rank 3 on n2, step 7, training: Diverged: loss is nan; {faults.WORDS['nan_or_inf']}"
    began(failed, job="5", state="failed", cause=cause)
    starting = made(runs, "starting", "6_3")
    squeue(
        command,
        "2|RUNNING|None|node[1-2]|2026-11-24T12:00:00",
        "3|PENDING|QOSMaxNodePerUserLimit||N/A",
        "4|PENDING|BeginTime||2099-01-01T00:00:00",
        "6_3|RUNNING|None|node7|2026-11-24T12:00:00",
    )
    found = states(capsys)
    assert {name: each["state"] for name, each in found.items()} == {
        "done": "done",
        "running": "running",
        "waiting": "pending",
        "requeued": "pending",
        "failed": "failed",
        "starting": "starting",
    }
    assert (found["done"]["note"], found["done"]["images_per_s"]) == ("top-1 96.10 %", 1234.5)
    assert (found["running"]["step"], found["running"]["nodes"]) == (20, "node[1-2]")
    assert 3500 < found["running"]["eta_s"] <= 3600
    assert found["waiting"]["note"] == "the QOS allows you no more nodes at once"
    assert found["requeued"]["note"].startswith("goes on from step 12; its start is set for later")
    assert found["requeued"]["remedy"] == "scontrol update JobId=4 StartTime=now starts it now"
    assert found["failed"]["note"] == "nan_or_inf, rank 3 on n2, step 7, training: Diverged: loss is nan"
    assert found["failed"]["remedy"] == faults.WORDS["nan_or_inf"]
    assert found["starting"]["job"] == "6_3"
    assert starting.path.is_absolute()
    _, out, err = told(capsys)
    head, *lines = out.splitlines()
    assert head.split() == ["NAME", "STATE", "STEP", "ETA", "IMAGES/S", "NODES", "AGE", "NOTE"]
    assert (len(lines), err, "\033" in out) == (6, "", False)
    column = head.index("NOTE")
    assert next(line for line in lines if line.startswith("waiting"))[column:].startswith("the QOS allows you")
    assert set(states(capsys, "--active")) == {"running", "waiting", "requeued", "starting"}


@pytest.mark.parametrize("answer", ["exit 1", "echo something else", None])
def test_silence_of_slurm_is_unknown_and_never_gone(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str], answer: str | None
) -> None:
    run = made(runs, "x", "7")
    began(run)
    trained(run)
    done = made(runs, "done", "8")
    began(done, job="8", state="done")
    if answer:
        command("squeue", answer)
    assert states(capsys)["x"]["state"] == "UNKNOWN"
    assert states(capsys)["done"]["state"] == "done"
    _, out, err = told(capsys)
    assert "SLURM does not answer; last heard: running at step 10" in out
    assert "is UNKNOWN" in err
    code, _, err = told(capsys, "x", "stop")
    assert (code, "cannot be reached: SLURM does not answer" in err) == (2, True)
    assert not (run.path / "stop.json").exists()
    squeue(command)
    assert states(capsys)["x"]["state"] == "gone"


def test_every_job_is_asked_for_in_one_question(runs: Path, command: Put, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        made(runs, f"x-{number}", f"12_{number}")
    made(runs, "y", "7")
    ended = made(runs, "z", "8")
    began(ended, job="8", state="failed")
    done = made(runs, "done", "9")
    began(done, job="9", state="done")
    command("squeue", 'echo "$*" >> asked; echo "${SQUEUE_PARTITION-}${SQUEUE_USERS-}" >> env')
    os.environ["SQUEUE_PARTITION"] = "other"
    try:
        assert states(capsys)["y"]["state"] == "gone"
    finally:
        del os.environ["SQUEUE_PARTITION"]
    # 8 too: after a node's end SLURM may start a job again that has recorded a failure
    assert Path("asked").read_text() == "-h -a -r -t all -o %i|%T|%r|%N|%S -j 12,7,8\n"
    assert Path("env").read_text() == "\n"


def test_what_slurm_says_of_an_end_without_a_record(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, job in (("late", "1"), ("lost", "2"), ("cut", "3"), ("saved", "4"), ("never", "5")):
        run = made(runs, name, job)
        if name != "never":
            began(run, job=job)
            trained(run, state="stopped" if name == "saved" else "running")
    lines = ("1|TIMEOUT|TimeLimit|n1|", "2|NODE_FAIL|None|n1|", "3|CANCELLED|None|n1|", "4|CANCELLED|None|n1|")
    squeue(command, *lines, "5|FAILED|NonZeroExitCode||")
    found = {name: (each["state"], each["note"]) for name, each in states(capsys).items()}
    assert found == {
        "late": ("failed", "the time limit came before it could save"),
        "lost": ("failed", "a node failed, and SLURM did not start it again"),
        "cut": ("cancelled", "begins anew"),
        "saved": ("stopped", "begins anew"),
        "never": ("failed", "ended before it began (FAILED)"),
    }


def test_a_job_that_was_started_again_is_not_taken_for_its_last_start(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a node's end the record still says running, and the next start has written none yet."""
    run = made(runs, "x", "7")
    began(run)
    trained(run)
    start = BEGAN.astimezone().replace(tzinfo=None)
    for after, state in ((0, "running"), (120, "starting")):
        squeue(command, f"7|RUNNING|None|n1|{(start + timedelta(seconds=after)).isoformat()}")
        assert states(capsys)["x"]["state"] == state
    (run.path / "slurm_job").write_text("9\n")  # resumed by hand: the record is of another job
    squeue(command, "9|PENDING|Priority||")
    assert states(capsys)["x"]["state"] == "pending"


@pytest.mark.parametrize("recorded", ["stopped", "failed"])
def test_R7_a_job_that_slurm_starts_again_after_a_nodes_end_is_not_over(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str], recorded: str
) -> None:
    """The node job saw its node go and could not ask for a requeue: SLURM does it by itself."""
    run = made(runs, "x", "7")
    began(run, state=recorded, cause="rank 1 was killed" if recorded == "failed" else None)
    trained(run, state="stopped", step=12)
    checkpoint(run, 12)
    start = BEGAN.astimezone().replace(tzinfo=None)
    next_start = (start + timedelta(minutes=9)).isoformat()
    for line, state in (
        (f"7|COMPLETING|None|n1|{start.isoformat()}", recorded),
        (f"7|RUNNING|None|n1|{start.isoformat()}", recorded),
        ("7|PENDING|BeginTime||N/A", "pending"),
        (f"7|RUNNING|None|n3|{next_start}", "starting"),
        (f"7|FAILED|None|n3|{start.isoformat()}", recorded),
    ):
        squeue(command, line)
        assert states(capsys)["x"]["state"] == state, line
    command("squeue", "exit 1")
    assert states(capsys)["x"]["state"] == recorded


def test_broken_folders_cost_one_line(runs: Path, capsys: pytest.CaptureFixture[str], command: Put) -> None:
    squeue(command)
    made(runs, "good")
    for name, content in (
        ("torn", '{"attempt": 0,'),
        ("hosts", '{"schema": 1, "state": 5, "hosts": 3}'),
        ("list", "[]"),
        ("newer", '{"schema": 99}'),
        ("bytes", "\xff"),
    ):
        run = made(runs, name)
        run.attempt(0).path.mkdir(parents=True)
        run.attempt(0).job.write_bytes(content.encode("latin-1"))
    odd = made(runs, "odd")
    began(odd, started="yesterday")
    (runs / "notes.txt").touch()
    (runs / "data").mkdir()
    (runs / "link").symlink_to(runs / "nowhere")
    found = states(capsys)
    assert {name for name, each in found.items() if each["state"] == "unreadable"} == {
        "torn",
        "list",
        "newer",
        "bytes",
        "odd",
        "hosts",
    }
    assert found["good"]["state"] == "new"
    assert "newer vitdist (schema 99" in found["newer"]["note"]
    assert set(found) == {"good", "torn", "list", "newer", "bytes", "odd", "hosts"}
    for arguments in (("torn",), ("torn", "why"), ("torn", "stop"), ("torn", "logs", "-f"), ("torn", "follow")):
        code, out, err = told(capsys, *arguments)
        assert code in (0, 2)
        assert "damaged" in out + err or "unreadable" in out, arguments


def test_five_hundred_runs_are_listed_by_few_reads(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the newest start of each is read, however many there were."""
    squeue(command)
    run = made(runs, "x", "7")
    for number in range(40):
        began(run, number, state="requeued")
        trained(run, number, state="stopped")
    began(run, 40, state="done")
    trained(run, 40, state="done", step=40)
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    opened.clear()
    status.look(run)
    read = [path for path in opened if str(run.path) in path]
    assert len(read) <= 6, read
    assert not any("/attempts/3/" in path for path in read)
    for number in range(500):
        shutil.copytree(run.attempt(40).path, runs / f"x-{number}" / "attempts" / "0")
    assert len(states(capsys)) == 501


def test_a_terminal_gets_colours_and_lines_that_fit() -> None:
    one = status.Status("a-name", "/r/a-name", "failed", note="x" * 200)
    other = status.Status(
        "b", "/r/b", "running", step=5, total=10, eta_s=3700.0, images_per_s=1234.0, nodes="node[1-4]"
    )
    text = shown.table([one, other], 80, colour=True)
    assert "\033[31mfailed" in text
    assert "\033[32mrunning" in text
    plain = shown.table([one, other], 80, colour=False)
    assert max(map(len, plain.splitlines())) <= 80
    assert "5/10" in plain
    assert "1:01:40" in plain
    assert max(map(len, shown.table([one], 0, colour=False).splitlines())) > 200


def test_watch_ends_with_ctrl_c(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(runs, "x")
    rounds: list[float] = []

    def pause(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", pause)
    code, out, _ = told(capsys, "--watch", "--every", "2")
    assert (code, rounds, out.count("NAME")) == (0, [2.0] * 3, 3)


# ---- runs of this machine ------------------------------------------------------------------------


@contextlib.contextmanager
def holding(run: RunDir) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the run's lock, as rank 0 does, until its stdin ends."""
    hold = "with only_writer(RunDir(Path(sys.argv[1]))): print(1, flush=True); sys.stdin.read()"
    code = f"import sys; from vitdist.rundir import *\n{hold}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=jobs.Path(jobs.__file__).parents[1],
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "1\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def test_without_slurm_the_lock_tells_what_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(runs, "x")
    trained(run)
    with holding(run) as process:
        assert states(capsys)["x"]["state"] == "running"
        assert status.holder(run) == process.pid
        with pytest.raises(BlockingIOError), rundir.only_writer(run):
            pass
    assert states(capsys)["x"]["state"] == "gone"
    with rundir.only_writer(run):  # looking has not taken the lock
        pass
    code, out, _ = told(capsys, "x", "stop")
    assert (code, out) == (0, "x is gone: nothing to stop\n")


def test_a_run_of_this_machine_is_stopped_by_a_signal_to_who_holds_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(runs, "x")
    trained(run)
    checkpoint(run, 5)
    with holding(run) as process:
        code, out, err = told(capsys, "x", "stop")
        assert (code, f"process {process.pid} is asked to save" in err) == (0, True)
        assert process.wait(10) == -15
    wish = rundir.read_json(run.path / "stop.json")
    assert wish
    assert wish["checkpoint"] is True
    assert datetime.fromisoformat(wish["time"]).tzinfo
    with holding(run) as process:  # a second TERM would end a simulated node at once
        _, _, err = told(capsys, "x", "stop")
        assert "was asked already" in err
        assert process.poll() is None
    with holding(run) as process:
        code, out, _ = told(capsys, "x", "cancel")
        assert process.wait(10) in (-15, -2)
    assert "kept: step-00000005, 5 steps behind; python launch/jobs.py x resume goes on" in out


# ---- one run -------------------------------------------------------------------------------------


def test_the_details_name_starts_checkpoints_and_what_to_do(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue(command)
    run = made(runs, "x", "7")
    began(run, state="requeued", ended=BEGAN.isoformat(), decision="its time limit")
    trained(run, state="stopped", step=12, reason="SIGUSR2")
    began(run, 1, state="failed", cause="n2: 7 of 8 GPUs")
    checkpoint(run, 12)
    (checkpoint(run, 20) / "rank-0.safetensors").write_bytes(b"cut")
    code, out, _ = told(capsys, "x")
    assert code == 0
    assert out.startswith("x  failed, n2: 7 of 8 GPUs\n")
    assert "requeued at step 12: SIGUSR2; its time limit" in out
    assert "DAMAGED: rank-0.safetensors has 3 bytes instead of 7" in out
    assert "python launch/jobs.py x resume  # goes on from step 12" in out
    began(run, 1)  # killed without a word
    assert "12:00 to ?" not in out
    assert "to ?  cut off" in told(capsys, "x")[1]
    began(run, 1, state="failed", cause="n2: 7 of 8 GPUs")
    code, out, _ = told(capsys, "x", "--json")
    about = json.loads(out)
    assert (about["goes_on_from"], [each["state"] for each in about["attempts"]]) == (12, ["requeued", "failed"])


def test_R4_why_names_the_first_rank_and_keeps_cascades_apart(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue(command)
    run = made(runs, "x", "7")
    attempt = run.attempt(0)
    for rank, at, word, kind, message in (
        (0, 3.0, "peer_lost", "RuntimeError", "Connection closed by peer [10.0.0.1]:1234"),
        (1, 4.0, "peer_lost", "RuntimeError", "Connection closed by peer [10.0.0.2]:99"),
        (3, 2.0, "cuda_oom", "OutOfMemoryError", "CUDA out of memory"),
    ):
        cascade = word in faults.CASCADES
        faults.note(
            attempt, Fault(rank, "n2", 7, "training", at, word, cascade, kind, message, "vitdist/train.py:5 in f")
        )
    log = attempt.rank_log(1, 3)
    log.parent.mkdir(parents=True)
    log.touch()
    rundir.publish_json(
        attempt.path / "logs" / "node-1" / "check.json", {"host": "n2", "faults": [], "warnings": ["2 cores"]}
    )
    first = faults.line(faults.read(attempt)[2])
    began(run, state="failed", cause=first, decision="another start would end the same (cuda_oom)")
    code, out, _ = told(capsys, "x", "why")
    lines = {line[:12].strip(): line[12:] for line in out.splitlines()[1:]}
    assert code == 0
    assert lines["first"].startswith("cuda_oom, rank 3 on n2, step 7, training: OutOfMemoryError: CUDA out of memory")
    assert lines["what to do"] == faults.WORDS["cuda_oom"]
    assert lines["followed"].startswith("ranks 0-1: peer_lost: RuntimeError: Connection closed by peer")
    assert lines["log"] == str(log)
    assert lines["and then"] == "it is not started again: another start would end the same (cuda_oom)"
    assert lines["nodes"] == "n2: warning: 2 cores"
    code, out, _ = told(capsys, "x", "why", "--json")
    assert (json.loads(out)["attempt"]["rank"], json.loads(out)["attempt"]["word"]) == (3, "cuda_oom")


def test_why_says_so_where_all_is_well(runs: Path, command: Put, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(runs, "x", "7")
    began(run)
    trained(run)
    squeue(command, "7|RUNNING|None|n1|")
    assert told(capsys, "x", "why")[1] == "x: running, and well at step 10/40\n"
    began(run, state="done")
    trained(run, state="done", step=40)
    assert told(capsys, "x", "why")[1] == "x: done, and well at step 40/40\n"


def test_a_run_is_found_by_name_path_job_and_beginning(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue(command)
    made(runs, "alpha", "7")
    beta = made(runs, "beta", "12_1")
    began(beta, job="5", state="stopped")
    made(runs, "beta-2")
    for text, name in (
        ("alpha", "alpha"),
        ("al", "alpha"),
        ("7", "alpha"),
        ("5", "beta"),
        ("12_1", "beta"),
        ("beta", "beta"),
    ):
        assert jobs.find(text, Path("runs")) == RunDir(runs / name)
    assert jobs.find("runs/beta/", Path("elsewhere")) == RunDir(runs / "beta")
    for text, reason in (
        ("alpah", "did you mean alpha?"),
        ("bet", "which of beta, beta-2?"),
        ("99", "no such run"),
        ("", "is empty"),
        ("a\nb\033[2J", r"'a\\nb\\x1b\[2J': no such run"),
        ("x" * 5000, "no such run"),
    ):
        with pytest.raises(SettingsError, match=reason):
            jobs.find(text, Path("runs"))
    assert told(capsys, "logs", "alpha")[0] == 2  # the other way round: its log is not there yet
    assert "alpha has not begun yet" in told(capsys, "logs", "alpha")[2]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("x", "explain"), "'explain': no command; "),
        (("x", "lgs"), "did you mean logs?"),
        (("stop",), "stop: of which run?"),
        (("x", "stop", "--rank", "1"), "--rank: belongs to logs"),
        (("x", "cancel", "--wait", "--nodes", "3"), "--wait: belongs to stop"),
        (("x", "logs", "optim.lr=1"), "settings: belongs to resume"),
        (("x", "logs", "--rank", "-1"), "--rank"),
        (("x", "logs", "--rank", "five"), "--rank 'five': a number from 0, or all"),
        (("x", "logs", "--node", "-1"), "no number from 0"),
        (("x", "--attempt", "3"), "--attempt: belongs to logs and why"),
        (("x", "why", "--attempt", "3"), "--attempt 3: it has none yet"),
        (("x", "resume", "--nodes", "0"), "--nodes 0: at least 1"),
        (("--watch", "--every", "nan"), "--every nan"),
        (("--completion", "fish"), "invalid choice"),
        (("x", "--runs", "tiny.yaml"), "Not a directory"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    made(runs, "x")
    code, out, err = told(capsys, *arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert len(err.splitlines()) <= 2


def test_resume_is_the_submission_with_its_words(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, "x")
    given: list[list[str]] = []
    monkeypatch.setattr(submit, "main", lambda arguments, launcher: given.append(arguments) or 3)
    assert told(capsys, "x", "resume", "--nodes", "3", "--time", "60", "optim.lr=1e-4", "--follow", "--yes")[0] == 3
    assert given == [["--resume", str(run.path), "--nodes", "3", "--time", "60", "--follow", "--yes", "optim.lr=1e-4"]]


# ---- why a job waits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("None", "has not looked at it yet"),
        ("Resources", "waits for nodes to become free"),
        ("Priority", "higher priority"),
        ("BeginTime", "set for later"),
        ("Dependency", "another job to end"),
        ("DependencyNeverSatisfied", "never start"),
        ("JobHeldUser", "held by its owner"),
        ("JobHeldAdmin", "held by the cluster's keepers"),
        ("launch failed requeued held", "a node could not start it"),
        ("JobArrayTaskLimit", "points of the sweep"),
        ("PartitionTimeLimit", "more time than is allowed"),
        ("QOSMaxWallDurationPerJobLimit", "more time than is allowed"),
        ("PartitionNodeLimit", "more nodes than the partition"),
        ("ReqNodeNotAvail, UnavailableNodes:node[3,7]", "down, drained or reserved (node[3,7])"),
        ("QOSMaxGRESPerUser", "the QOS allows you no more GPUs"),
        ("AssocMaxJobsLimit", "your account allows you no more jobs"),
        ("AssocGrpNodeLimit", "the limit of nodes that all users of your account share"),
        ("AssocGrpGRESMinutes", "used up its minutes of GPUs"),
        ("QOSMinGRES", "wants more GPUs"),
        ("QOSMaxCpuPerJobLimit", "fewer cores"),
        ("SomethingNew\033[2J", "SLURM says SomethingNew?[2J"),
    ],
)
def test_L6_slurms_reason_for_waiting_is_told_in_words(reason: str, words: str) -> None:
    wait = pending.why(reason, "12_3")
    assert words in wait.words
    assert "ID" not in wait.remedy.replace("JobId", "")
    assert "requeued" not in reason or wait.remedy == "scontrol release 12_3 tries again"


def test_the_expected_start_is_told_if_it_is_to_come() -> None:
    now = datetime(2026, 11, 24, 12, 0)
    job = slurm.Job("7", "PENDING", "Resources", "", now + timedelta(minutes=90))
    assert pending.told(job, now) == "waits for nodes to become free; starts about 13:30 (in 1:30:00)"
    assert "2026-11-25 13:30" in pending.told(job._replace(start=now + timedelta(hours=25, minutes=30)), now)
    for start in (None, now - timedelta(minutes=1)):
        assert pending.told(job._replace(start=start), now) == "waits for nodes to become free"


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ([], ""),
        (["n1"], "n1"),
        (["node1", "node2", "node3", "node7"], "node[1-3,7]"),
        (["n09", "n10", "n11"], "n[09-11]"),
        (["a", "b", "a"], "a,b"),
        (["vm", "vm"], "vm"),
        (["n0", "n1", "n9", "n10"], "n[0-1,9-10]"),
        (["gpu1-ib", "gpu2-ib", "cpu1"], "gpu[1-2]-ib,cpu1"),
    ],
)
def test_names_of_nodes_are_written_as_slurm_does(hosts: list[str], names: str) -> None:
    assert status.compressed(hosts) == names


# ---- following and logs --------------------------------------------------------------------------


class Told:
    """A scheduler that says what a test wants."""

    def __init__(self) -> None:
        self.waiting, self.silence, self.ended = "", 0.0, False

    def state(self) -> str:
        return "RUNNING"

    def waits(self) -> str:
        return self.waiting

    def silent_s(self) -> float:
        return self.silence

    def over(self) -> bool:
        return self.ended

    def settled(self) -> bool:
        return not self.waiting


def test_restarts_waits_and_silence_are_told_once(runs: Path) -> None:
    run, job, news = made(runs, "x", "7"), Told(), follow.News(0)
    job.waiting = "waits for nodes to become free"
    assert news.of(run, job) == ["pending: waits for nodes to become free"]
    assert news.of(run, job) == []
    job.waiting, job.silence = "", 100.0
    began(run)
    rundir.publish_json(run.attempt(0).train, {"state": "running", "step": 0})
    assert news.of(run, job) == []  # it is not known yet what it goes on from; two minutes of silence are nothing
    trained(run)
    job.silence = 130.0
    assert news.of(run, job) == [
        "attempt 0 on n[1-2] begins at step 0",
        "SLURM does not answer; what is shown comes from the run folder alone",
    ]
    assert news.of(run, job) == []
    job.silence = 0.0
    trained(run, state="stopped", step=12, reason="SIGUSR2")
    began(run, state="requeued", exclude=["n2"])
    assert news.of(run, job) == [
        "attempt 0 ended at step 12, stopped by SIGUSR2: SLURM starts it again, without n2",
        "SLURM answers again",
    ]
    began(run, 1)
    trained(run, 1, resumed_from=12)
    assert news.of(run, job) == ["attempt 1 on n[1-2] goes on from step 12"]
    began(run, 1, state="failed", cause="rank 1: ValueError: x")
    assert news.of(run, job) == []  # the run's end is told at length


def test_a_requeue_is_not_the_end_and_ctrl_c_leaves_the_job(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, job = made(runs, "x", "7"), Told()
    began(run, state="requeued")
    trained(run, state="stopped", step=12, reason="SIGUSR2")

    def later(seconds: float) -> None:
        if not run.attempt(1).job.exists():
            began(run, 1, state="done")
            trained(run, 1, state="done", step=40, resumed_from=12, summary={"top1": 0.5})

    monkeypatch.setattr(follow.time, "sleep", later)
    assert follow.follow(run, job, 0) == 0
    out, _ = capsys.readouterr()
    assert "attempt 1 on n[1-2] goes on from step 12" in out
    assert "50.00 %" in out

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow", interrupt)
    assert follow.attached(run, "7", 0, "the command") == 130
    assert capsys.readouterr().err == "job 7 goes on; watch it again with: the command\n"


def test_slurm_that_falls_silent_does_not_end_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    job, clock = follow.Slurm("7"), [0.0]
    answers: list[dict[str, slurm.Job] | None] = []
    monkeypatch.setattr(slurm, "jobs", lambda ids, patience: answers.pop(0))
    monkeypatch.setattr(follow.time, "monotonic", lambda: clock[0])

    def at(seconds: float, answer: dict[str, slurm.Job] | None) -> tuple[str, bool]:
        clock[0] = seconds
        answers.append(answer)
        return job.state(), job.over()

    running = {"7": slurm.Job("7", "RUNNING", "", "n1", None)}
    waiting = {"7": slurm.Job("7", "PENDING", "Resources", "", None)}
    assert at(0, waiting) == ("PENDING (Resources)", False)
    assert job.waits() == "waits for nodes to become free"
    assert at(10, None) == ("UNKNOWN", False)
    assert at(500, None) == ("UNKNOWN", False)
    assert job.silent_s() == 490
    assert at(600, running) == ("RUNNING", False)
    assert (job.silent_s(), job.waits()) == (0, "")
    assert not job.settled()
    assert at(610, {}) == ("GONE", False)
    assert job.settled()
    assert at(617, None) == ("UNKNOWN", False)
    assert at(630, {}) == ("GONE", False)  # counted anew: silence in between tells nothing
    assert at(650, {}) == ("GONE", True)


def log(run: RunDir, attempt: int, node: int, rank: int, text: str) -> None:
    path = run.attempt(attempt).rank_log(node, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def test_logs_of_a_rank_a_node_all_and_the_last_lines(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = made(runs, "x")
    for node, rank in ((0, 0), (0, 1), (1, 2), (1, 10)):
        log(run, 1, node, rank, f"a{rank}\nb{rank}\nno end")
    log(run, 0, 0, 0, "first start\n")

    def shown(*arguments: str) -> str:
        assert jobs.main(["x", "logs", *arguments]) == 0
        return capfd.readouterr().out

    assert shown() == "a0\nb0\nno end"
    assert shown("--rank", "10", "-n", "2") == "b10\nno end"
    assert shown("--node", "1", "-n", "1") == "rank 2: no end\nrank 10: no end\n"
    assert shown("--rank", "all").splitlines()[3:6] == ["rank 1: a1", "rank 1: b1", "rank 1: no end"]
    assert shown("--attempt", "0") == "first start\n"
    for arguments, reason in (
        (("--rank", "5"), "attempt 1 has ranks 0 to 10 on nodes 0 to 1"),
        (("--rank", "0", "--node", "1"), "node 1 has rank 2, rank 10"),
        (("--attempt", "7"), "--attempt 7: it has 0 to 1"),
    ):
        assert jobs.main(["x", "logs", *arguments]) == 2
        assert reason in capfd.readouterr().err


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 1000, 9999, 10000, 10001, None])
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_last_lines_are_exact(tmp_path: Path, lines: int | None, end: str) -> None:
    whole = [f"line {number} {'x' * (number % 30)}" for number in range(10_000)]
    path = tmp_path / "log"
    path.write_text("\n".join(whole) + end)
    with open(path, "rb") as file:
        logs._seek(file, lines)
        assert file.read().decode().splitlines() == (
            whole if lines is None else whole[len(whole) - min(lines, 10_000) :]
        )


def test_logs_follow_over_to_the_next_start_and_end_with_the_run(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, job, out = made(runs, "x", "7"), Told(), io.BytesIO()

    def one() -> None:
        began(run)
        trained(run)
        log(run, 0, 0, 0, "one\nhalf")
        log(run, 0, 0, 1, "uno\n")

    def stopped() -> None:
        trained(run, state="stopped", step=3, reason="SIGUSR2")
        began(run, state="requeued")
        job.waiting = "its start is set for later"

    def two() -> None:
        job.waiting = ""
        log(run, 0, 0, 0, " and the rest")
        began(run, 1)
        trained(run, 1, resumed_from=3)
        log(run, 1, 0, 0, "two\n")

    def done() -> None:
        log(run, 1, 0, 0, "end\n")
        trained(run, 1, state="done", step=40)
        began(run, 1, state="done")

    script = [one, stopped, two, done]
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: script.pop(0)())
    assert logs.tail(run, logs.Choice(rank=0), job, out) == 0
    assert out.getvalue() == b"one\nhalf and the resttwo\nend\n"
    err = capsys.readouterr().err
    assert "--- attempt 0 ended at step 3, stopped by SIGUSR2: SLURM starts it again" in err
    assert "--- pending: its start is set for later" in err
    assert "--- attempt 1 on n[1-2] goes on from step 3" in err
    out = io.BytesIO()
    assert logs.tail(run, logs.Choice(rank=None, attempt=0, lines=1), job, out) == 75
    assert out.getvalue() == b"rank 0: half and the rest\nrank 1: uno\n"


# ---- stop and cancel -----------------------------------------------------------------------------


def test_stop_of_a_waiting_job_takes_it_out_of_the_queue(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(runs, "x", "7")
    squeue(command, "7|PENDING|Priority||N/A")
    gone = 'echo "echo \'7|CANCELLED|None||\'" > "$(command -v squeue)"'
    command("scancel", f'echo "$*" >> {runs}/calls; test -e {run.path}/stop.json || exit 9; {gone}')
    code, _, err = told(capsys, "x", "stop")
    assert (code, err) == (0, "job 7 is taken out of the queue\n")
    assert (runs / "calls").read_text() == "-v --state=PENDING 7\n"
    assert states(capsys)["x"]["state"] == "stopped"


def test_stop_writes_its_wish_before_it_signals_and_waits_until_all_nodes_hear(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(runs, "x", "7")
    began(run)
    trained(run)
    squeue(command, "7|RUNNING|None|n[1-2]|")
    command("scancel", f'echo "$*" >> {runs}/calls; echo "$(<{run.path}/stop.json)" > {runs}/seen')
    said: list[str] = []
    log(run, 0, 0, 0, "")
    run.attempt(0).torchrun_log(0).touch()
    ending.stop(run, said.append, listen_s=0.0)
    assert said[0] == "not all nodes of job 7 have begun within 0 s: asked all the same"
    run.attempt(0).torchrun_log(1).parent.mkdir()
    (run.attempt(0).torchrun_log(1).parent / "check.json").touch()
    said.clear()
    ending.stop(run, said.append, listen_s=0.0)
    assert said == ["job 7 is asked to save and to end; it will not be started again"]
    assert (runs / "calls").read_text() == "-v --signal=USR2 7\n" * 2
    assert json.loads((runs / "seen").read_text())["checkpoint"] is True
    assert states(capsys)["x"]["state"] == "stopping"


def test_a_run_inside_of_an_allocation_is_ended_without_the_allocation(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(runs, "x", "7")  # an earlier start was a job of its own
    began(run, job="50")
    trained(run)
    squeue(command, "50|RUNNING|None|n[1-9]|2026-11-24T10:00:00")
    command("scancel", f"touch {runs}/called")
    found = states(capsys)["x"]
    assert (found["state"], found["job"], found["nodes"]) == ("running", "50", "n[1-2]")
    code, _, err = told(capsys, "x", "stop")
    assert (code, "inside of allocation 50, from a shell of another machine: press Ctrl-C there" in err) == (2, True)
    assert not (run.path / "stop.json").exists()
    srun = ["srun", "-c", "import time; time.sleep(600)", f"--output={run.submitit}/%j.out"]
    for asked, number in (("stop", 12), ("cancel", 15)):
        with subprocess.Popen(srun, executable=sys.executable) as process:
            code, _, err = told(capsys, "x", asked)
            assert process.wait(10) == -number
        assert code == 0
        assert "in allocation 50" in err
    assert not (runs / "called").exists()
    squeue(command, "50|COMPLETED|None|n[1-9]|2026-11-24T10:00:00")
    assert states(capsys)["x"]["state"] == "cancelled"


def test_scancel_that_repeats_its_signal_is_not_waited_for(runs: Path, command: Put) -> None:
    """SLURM 22.05 answers so for a point of a sweep while others still wait; it has been sent by then."""
    command("scancel", "echo 'scancel: Job is in transitional state, retrying' >&2; exec /bin/sleep 600")
    began_at = time.monotonic()
    ending._scancel("7_0", "--signal=USR2")
    assert time.monotonic() - began_at < ending.SCANCEL_S / 2
    command("scancel", "exit 229")
    ending._scancel("7")
    command("scancel", "echo 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2; exit 1")
    with pytest.raises(SettingsError, match=r"^scancel 7: Kill job error on job id 7: Access/permission denied$"):
        ending._scancel("7")


def test_cancel_asks_back_on_a_terminal_and_names_what_is_kept(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(runs, "x", "7")
    began(run)
    trained(run, step=30)
    checkpoint(run, 25)
    squeue(command, "7|RUNNING|None|n[1-2]|")
    command("scancel", f'echo "$*" >> {runs}/calls')
    questions: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    assert told(capsys, "x", "cancel") == (2, "nothing was changed\n", "")
    assert questions == [
        "cancel x, running at step 30/40? kept: step-00000025, 5 steps behind (`stop` saves first) [y/N] "
    ]
    assert not (run.path / "stop.json").exists()
    code, out, _ = told(capsys, "x", "cancel", "--yes")
    assert code == 0
    assert "kept: step-00000025, 5 steps behind" in out
    assert (runs / "calls").read_text() == "-v 7\n"
    wish = rundir.read_json(run.path / "stop.json")
    assert wish
    assert wish["checkpoint"] is False
    squeue(command)
    assert states(capsys)["x"]["state"] == "cancelled"
    began(run, state="failed", cause="no trainer left a word")  # ended by SLURM's signals in whatever order
    assert states(capsys)["x"]["state"] == "cancelled"


def test_a_sweep_is_listed_stopped_and_cancelled_as_one(
    runs: Path, command: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        made(runs, f"lr-0{number}", f"7_{number}")
    (runs / "lr").mkdir()
    points = [{"folder": f"lr-0{number}", "overrides": [f"optim.lr={number + 1}e-4"]} for number in range(2)]
    record = {"schema": 1, "name": "lr", "metric": "top1", "points": points}
    (runs / "lr" / "sweep.yaml").write_text(json.dumps(record))
    squeue(command, "7_0|PENDING|Priority||N/A", "7_1|PENDING|JobArrayTaskLimit||N/A")
    command("scancel", f'echo "$*" >> {runs}/calls')
    assert set(states(capsys, "lr")) == {"lr-00", "lr-01"}
    assert told(capsys, "lr", "cancel")[0] == 0
    assert (runs / "calls").read_text() == "-v 7_0\n-v 7_1\n"
    code, _, err = told(capsys, "lr", "why")
    assert (code, "why takes one of its points, such as lr-00" in err) == (2, True)


# ---- completion ----------------------------------------------------------------------------------


def completed(script: str, line: str, cwd: Path) -> list[str]:
    """What bash offers at the end of `line`."""
    words = f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
    ask = f"{script}\n{words}; _vitdist_launch; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["/bin/bash", "-c", ask], cwd=cwd, capture_output=True, text=True, timeout=30, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_runs_and_settings(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(runs, "alpha")
    made(runs, "beta")
    (runs / "data").mkdir()
    code, script, _ = told(capsys, "--completion", "bash")
    assert code == 0
    for line, offered in (
        ("python launch/jobs.py ''", ["alpha", "beta"]),
        ("python launch/jobs.py al", ["alpha"]),
        ("python -u /x/launch/jobs.py alpha c", ["cancel"]),
        ("python launch/jobs.py alpha logs --ra", ["--rank"]),
        ("python launch/jobs.py --runs . ''", []),
        ("python launch/jobs.py alpha resume optim.lr_b", ["optim.lr_batch="]),
        ("python launch/jobs.py alpha resume optim.clip", ["optim.clip="]),
        ("launch/submit.py --dry", ["--dry-run"]),
        ("launch/submit.py --resume b", ["beta"]),
        ("launch/submit.py optim.lay", ["optim.layer_decay="]),
        ("python launch/jobs.py --completion z", ["zsh"]),
        ("python train.py a", []),
        ("python launch/jobs.py alpha logs --rank 1", []),
    ):
        assert completed(script, line, runs.parent) == offered, line
    zsh = told(capsys, "--completion", "zsh")[1]
    assert zsh.endswith(script)
    assert "bashcompinit" in zsh


def test_nothing_of_a_parser_runs_in_the_script() -> None:
    parser = jobs._parser()
    parser.add_argument("--odd", choices=("$(touch x)",))
    with pytest.raises(ValueError, match="cannot stand in a completion script"):
        completion.script("bash", {"jobs.py": parser, "submit.py": submit._parser()}, jobs.COMMANDS)


def test_the_command_starts_from_another_folder_and_ends_in_a_pipe(runs: Path) -> None:
    made(runs, "x")
    command = [sys.executable, jobs.__file__, "--runs", str(runs)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["x", "new"]]
    assert done.stderr == ""

"""Why an attempt ended, from what its ranks left behind: the first failing rank, apart from those it took along."""

import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launch import why
from vitdist import faults, rundir
from vitdist.faults import Fault
from vitdist.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "a run")
    run.path.mkdir(parents=True)
    return run


def noted(run: RunDir, rank: int, time: float, word: str, **more: Any) -> Fault:
    """Note a fault, as a rank does; a cascade where the word is one."""
    about = {
        "host": f"n{rank}",
        "step": 7,
        "phase": "training",
        "type": "E",
        "message": f"words of {rank}",
        "where": "",
    }
    about = {"cascade": word in faults.CASCADES} | about | more
    fault = Fault(rank=rank, time=time, word=word, **about)
    faults.note(run.attempt(0), fault)
    return fault


def torchrun_says(run: RunDir, *failures: tuple[int, int]) -> None:
    """torchrun's list of (rank, exit code), the first failure last, at 10 s of Unix time."""
    log = run.attempt(0).torchrun_log(0)
    log.parent.mkdir(parents=True, exist_ok=True)
    at = datetime.fromtimestamp(10).isoformat(sep="_")
    rows = (
        f"  time      : {at}\n  host      : n\n  rank      : {rank} (local_rank: 0)\n  exitcode  : {code} (pid: 1)\n"
        for rank, code in failures
    )
    log.write_text("".join(rows))


def test_R4_the_first_root_that_was_noted_is_the_cause(run: RunDir) -> None:
    noted(run, 0, 1.0, "peer_lost")
    noted(run, 2, 3.0, "nan_or_inf")
    root = noted(run, 1, 2.0, "disk_full")
    error = {"type": "RuntimeError", "message": "what rank 0 has also noted", "rank": 0, "step": 7}
    rundir.publish_json(run.attempt(0).train, {"state": "failed", "error": error})
    torchrun_says(run, (1, 1), (2, 1), (0, 1))
    assert why.cause(run.attempt(0)) == (faults.line(root), False)
    assert why.cause(run.attempt(0)).text.startswith("disk_full, rank 1 on n1, step 7, training: E: words of 1; ")


def test_a_cascade_is_told_as_one(run: RunDir) -> None:
    first = noted(run, 1, 2.0, "collective_timeout")
    noted(run, 0, 3.0, "peer_lost")
    assert why.cause(run.attempt(0)) == (faults.line(first), True)


@pytest.mark.parametrize("hang", [False, True])
def test_R5_a_killed_rank_is_the_cause_though_it_left_no_record(run: RunDir, hang: bool) -> None:
    noted(run, 0, 1.0, "peer_lost")
    if hang:  # what the other ranks noted of it
        noted(run, 1, 11.0, "hang", cascade=False)
    torchrun_says(run, (0, 1), (1, -signal.SIGKILL))
    text, consequence = why.cause(run.attempt(0))
    assert "rank 1 was killed by SIGKILL, as the kernel does when memory runs out" in text
    assert not consequence


def test_R6_a_stopped_rank_that_was_ended_for_it_is_told_as_hung(run: RunDir) -> None:
    root = noted(run, 1, 9.0, "hang", cascade=False)
    torchrun_says(run, (1, -signal.SIGKILL))
    assert why.cause(run.attempt(0)) == (faults.line(root), False)


def test_a_rank_that_noted_its_fault_is_believed_more_than_how_it_ended(run: RunDir) -> None:
    root = noted(run, 1, 20.0, "nan_or_inf")
    torchrun_says(run, (1, -signal.SIGSEGV))
    assert why.cause(run.attempt(0)) == (faults.line(root), False)


def test_an_abort_of_nccls_watchdog_is_a_cascade(run: RunDir) -> None:
    torchrun_says(run, (1, -signal.SIGABRT))
    run.attempt(0).rank_log(0, 1).write_text("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(\n")
    text, consequence = why.cause(run.attempt(0))
    assert (text.startswith("rank 1 was killed by SIGABRT"), consequence) == (True, True)
    root = noted(run, 0, 20.0, "hang", cascade=False)
    assert why.cause(run.attempt(0)) == (faults.line(root), False)


def test_without_records_the_log_of_a_rank_tells(run: RunDir) -> None:
    torchrun_says(run, (1, 1), (0, rundir.EXIT_STOPPED))
    run.attempt(0).rank_log(0, 1).write_text("ValueError: no such class\n")
    run.attempt(0).fault(1).parent.mkdir()
    run.attempt(0).fault(1).write_text('{"schema": 1, "ra')
    assert why.cause(run.attempt(0)).text.startswith("rank 1: ValueError: no such class (")


def test_R1_a_node_that_failed_its_check_is_explained_without_any_rank(run: RunDir) -> None:
    cause = "node2: 7 of 8 GPUs"
    record = {"state": "requeued", "cause": cause, "start": {"word": "node_check_failed"}, "exclude": ["node2"]}
    rundir.publish_json(run.attempt(0).job, record | {"decision": "crash 1 of 3 without a new checkpoint"})
    check = {"host": "node2", "faults": ["7 of 8 GPUs"], "warnings": ["2 cores for 8 ranks"]}
    rundir.publish_json(run.attempt(0).path / "logs" / "node-1" / "check.json", check)
    found = why.explain(run.attempt(0))
    assert (found.first, found.rank, found.word) == (cause, None, "node_check_failed")
    assert "tell the keepers" in found.remedy
    assert found.nodes == ["node2: warning: 2 cores for 8 ranks"]  # what is the cause itself is not told twice
    assert "and then    it is started again: crash 1 of 3 without a new checkpoint, without node2" in why.lines(found)


def test_who_only_followed_is_told_apart(run: RunDir) -> None:
    noted(run, 3, 1.0, "nan_or_inf")
    for rank in (0, 1, 2, 5):
        noted(run, rank, 2.0 + rank, "peer_lost", message=f"Connection reset by [10.0.0.{rank}]:1234")
    noted(run, 4, 9.0, "disk_full")
    run.attempt(0).stacks(3).parent.mkdir()
    run.attempt(0).stacks(3).touch()
    found = why.explain(run.attempt(0))
    assert (found.rank, found.word, found.only_followed) == (3, "nan_or_inf", False)
    assert found.followed == ["ranks 0-2, 5: peer_lost: E: Connection reset by ..."]
    assert [also.split(",")[0] for also in found.also] == ["disk_full"]
    assert found.stacks.endswith("stacks/rank-3.txt")


def test_an_attempt_without_a_word_has_nothing_to_explain(run: RunDir) -> None:
    run.attempt(0).path.mkdir(parents=True)
    assert why.lines(why.explain(run.attempt(0))) == []
    rundir.publish_json(run.attempt(0).job, {"state": "failed", "cause": None})
    assert "no trainer left a word" in why.lines(why.explain(run.attempt(0)))[0]

"""Hangs are seen and named: the watchdog, and the time limits of process groups."""

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, watch_workers
from vitdist import faults, rundir
from vitdist.rundir import Attempt
from vitdist.watchdog import Watchdog, culprit

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_R6_groups_made_without_a_timeout_obey_the_bound() -> None:
    said, _ = ranks.run(watch_workers.groups_with_a_bound, 2, timeout=60)
    assert len(said) == 3
    for text in said:
        assert "imed out" in text, text


@pytest.mark.processes
def test_the_background_group_does_not_mix_with_control() -> None:
    for ahead, behind in ranks.run(watch_workers.two_threads, 2, 50):
        assert ahead == [[(0, i), (1, i)] for i in range(50)]
        assert behind == [[(0, -i), (1, -i)] for i in range(50)]


# ---- the verdict ------------------------------------------------------------------------------------


def at(rank: int, marks: int = 9, waits: bool = True, **more: Any) -> dict[str, Any]:
    """What a rank has left."""
    return {
        "rank": rank,
        "host": f"n{rank}",
        "step": 3,
        "phase": "training",
        "marks": marks,
        "seconds": 60.0,
        "limit_s": 60.0,
        "where": "vitdist/train.py:1 in f",
        "in_collective": waits,
    } | more


@pytest.mark.parametrize(
    ("progress", "verdict"),
    [
        ([at(0), None], "rank 1 left no word: stopped, gone, or hung in the kernel (storage, driver); "
                        "1 other rank waits for it"),
        ([at(0, waits=False), *[None] * 3, at(4), None], "ranks 1-3, 5 left no word: stopped, gone, or hung in the "
                                                         "kernel (storage, driver); 2 other ranks wait for them"),
        ([at(0), at(1, 8), at(2, 8, step=2, phase="evaluating", waits=False)],
         "rank 2 (n2), step 2, evaluating, stands at vitdist/train.py:1 in f; 2 other ranks wait for it"),
        ([at(0), at(1, 8), at(2)], "rank 1 (n1), step 3, training, stands at vitdist/train.py:1 in f; "
                                   "2 other ranks wait for it"),
        ([at(0, waits=False, limit_s=3600.0), at(1)],
         "rank 0 (n0), step 3, training, stands at vitdist/train.py:1 in f, within its own limit of 3600 s; "
         "1 other rank waits for it"),
        ([at(0, waits=False)], "rank 0 (n0), step 3, training, stands at vitdist/train.py:1 in f"),
        ([at(0)], "rank 0 (n0), step 3, training, stands at vitdist/train.py:1 in f"),
        ([at(0), {"rank": 1, "host": "n1", "where": "a.py:2 in g"}],
         "rank 1 (n1) holds Python's lock at a.py:2 in g and could leave its stacks alone; 1 other rank waits for it"),
        ([at(0), *[{"rank": rank, "host": "n1", "where": ""} for rank in (1, 2)]],
         "ranks 1-2 (n1) left no word: stopped, gone, or hung in the kernel (storage, driver); "
         "1 other rank waits for them"),
        ([at(0), None, {"rank": 2, "host": "n1", "where": "a.py:2 in g"}],
         "rank 1 left no word: stopped, gone, or hung in the kernel (storage, driver); 2 other ranks wait for it"),
        ([at(0), {"rank": 1, "ended": "disk_full"}, None],
         "rank 1 had ended (disk_full) and the others did not notice; 2 other ranks wait for it"),
        ([at(0, 8), at(1), {"rank": 2, "ended": ""}],
         "rank 0 (n0), step 3, training, stands at vitdist/train.py:1 in f; 2 other ranks wait for it"),
        ([at(0), at(1), at(2, where="b.py:1 in g")],
         "no rank is behind, all wait in a collective operation (network, or not all in the same one): "
         "ranks 0-1, step 3, training, stands at vitdist/train.py:1 in f; rank 2, step 3, training, stands at "
         "b.py:1 in g"),
    ],
)  # fmt: skip
def test_R6_the_rank_that_the_others_wait_for_is_named(progress: list[dict[str, Any] | None], verdict: str) -> None:
    assert culprit(progress) == verdict


def test_many_culprits_are_not_all_told() -> None:
    text = culprit([at(rank, 8 if rank < 6 else 9) for rank in range(8)])
    assert "rank 3 (n3)" in text
    assert text.endswith(" and 2 more; 2 other ranks wait for them")


@pytest.mark.parametrize("limit_s", [0, -1.0, math.nan])
def test_a_limit_is_above_zero(tmp_path: Path, limit_s: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 s"):
        Watchdog(Attempt(tmp_path), 0, 1, limit_s)


# ---- real hangs -------------------------------------------------------------------------------------


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    path = tmp_path / "attempts" / "0"
    path.mkdir(parents=True)
    return Attempt(path)


def ends(work: Any, world: int, *args: Any) -> list[str]:
    """Run ranks of which some end without an answer; how those ended."""
    with pytest.raises(AssertionError) as caught:
        ranks.run(work, world, *args, timeout=60)
    return [line for line in str(caught.value).splitlines() if line.startswith("rank ")]


KILLED, LEFT = "ended without an answer, exit code -9", "ended without an answer, exit code 1"


@pytest.mark.processes
def test_R6_a_hang_in_a_ranks_own_code_is_named_and_all_ranks_end(attempt: Attempt) -> None:
    assert ends(watch_workers.two_ranks, 2, str(attempt.path), 1.0, "stand_still") == [
        f"rank 0: {LEFT}",
        f"rank 1: {LEFT}",
    ]
    here = socket.gethostname()
    where = f"rank 1 ({here}), step 3, training, stands at tests/watch_workers.py:"
    for rank in (0, 1):
        said = (attempt.path / f"on_hang-{rank}").read_text()
        assert said.startswith("no progress for 1 s: " + where), said
        assert " in stand_still; 1 other rank waits for it (stacks: " in said
        assert f"rank {rank}: hang: {said}\n" == (attempt.path / f"stderr-{rank}").read_text()
        stacks = attempt.stacks(rank).read_text()
        assert "in two_ranks" in stacks
        assert ("in stand_still" if rank else "in barrier") in stacks
        assert "in _watch" in stacks  # of all threads
    progress = [rundir.read_json(attempt.stacks(rank).with_suffix(".json")) or {} for rank in (0, 1)]
    assert [(known["marks"], known["in_collective"]) for known in progress] == [(4, True), (4, False)]
    waiting, hanging = faults.read(attempt)
    assert (waiting.cascade, hanging.cascade, hanging.word) == (True, False, "hang")
    assert hanging.where.endswith(" in stand_still")
    assert faults.root([waiting, hanging]) == hanging


@pytest.mark.processes
def test_R6_a_stopped_rank_is_named_by_the_others_and_not_taken_for_hung_when_it_goes_on(attempt: Attempt) -> None:
    # Rank 0 sends SIGCONT when it has said who is to blame: rank 1 then answers.
    assert ends(watch_workers.two_ranks, 2, str(attempt.path), 1.0, "stop_as_a_whole") == [f"rank 0: {LEFT}"]
    here = socket.gethostname()
    assert f"rank 1 ({here}) left no word: stopped, " in (attempt.path / "on_hang-0").read_text()
    assert "in barrier" in attempt.stacks(0).read_text()
    assert not attempt.stacks(1).exists()
    witness, silent = faults.read(attempt)
    assert (witness.cascade, silent.cascade, silent.host, silent.step) == (True, False, here, 3)


@pytest.mark.processes
def test_R6_a_rank_that_holds_the_interpreters_lock_leaves_its_stacks(attempt: Attempt) -> None:
    assert ends(watch_workers.two_ranks, 2, str(attempt.path), 1.0, "hold_the_lock") == [
        f"rank 0: {LEFT}",
        f"rank 1: {KILLED}",
    ]
    said = (attempt.path / "on_hang-0").read_text()
    assert f"rank 1 ({socket.gethostname()}) holds Python's lock at tests/watch_workers.py:" in said
    assert " in hold_the_lock and could leave its stacks alone" in said
    assert "in hold_the_lock" in attempt.stacks(1).read_text()


@pytest.mark.processes
def test_R6_a_rank_with_a_longer_limit_answers_when_another_calls(attempt: Attempt) -> None:
    assert ends(watch_workers.two_ranks, 2, str(attempt.path), 1.0, "stand_still_late", 100.0) == [
        f"rank 0: {LEFT}",
        f"rank 1: {KILLED}",
    ]
    said = (attempt.path / "on_hang-0").read_text()
    assert " in stand_still, within its own limit of 100 s; 1 other rank waits for it" in said
    assert "in stand_still" in attempt.stacks(1).read_text()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("full", "takes no files (No space left on device)"),
        ("hanging", ", and the run folder does not answer: ended without stacks"),
    ],
)
def test_R6_a_process_ends_though_the_run_folder_takes_no_files(attempt: Attempt, how: str, verdict: str) -> None:
    assert ends(watch_workers.alone, 1, str(attempt.path), how) == [f"rank 0: {LEFT}"]
    assert verdict in (attempt.path / "stderr").read_text()
    assert (attempt.path / "on_hang").exists() == (how == "full")


@pytest.mark.processes
def test_nobody_is_ended_at_a_debuggers_prompt(attempt: Attempt) -> None:
    assert ranks.run(watch_workers.debugged, 1, str(attempt.path), timeout=60) == [True]


@pytest.mark.processes
def test_a_run_that_goes_on_leaves_nothing(attempt: Attempt) -> None:
    assert ranks.run(watch_workers.busy, 1, str(attempt.path), 40, timeout=60) == [[]]


FORKS = """
import os, sys
from pathlib import Path
from vitdist import watchdog
from vitdist.rundir import Attempt

watchdog.LONGEST_TICK_S = 0.002
with watchdog.Watchdog(Attempt(Path(sys.argv[1])), 0, 1, 600.0) as dog:
    for _ in range(50):
        child = os.fork()
        if not child:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
"""


def test_a_forked_child_of_a_watched_process_can_end(attempt: Attempt) -> None:
    """With faulthandler's thread at the fork it would wait for that thread, which it does not have."""
    command = [sys.executable, "-c", FORKS, str(attempt.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["7"] * 50

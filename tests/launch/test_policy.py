"""Pure: what follows the end of a start."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import policy
from launch.policy import Start, decide
from vitdist import faults

CRASH = Start("failed", word="killed")
LATE = Start("stopped", out_of_time=True)
PREEMPTED = Start("stopped")
LOST = Start("running")
TRAP = Start("failed", error="KeyError", step=7)


@pytest.mark.parametrize(
    ("starts", "again", "why"),
    [
        ([Start("done")], False, "it is done"),
        ([Start("refused")], False, "its settings were refused"),
        ([PREEMPTED], True, "stopped by SLURM"),
        ([LATE], True, "its time limit"),
        ([Start("stopped", wished=True)], False, "it was asked to stop"),
        ([PREEMPTED] * 50, True, "stopped by SLURM"),
        ([CRASH], True, "crash 1 of 3"),
        ([CRASH, CRASH, CRASH], False, "3 starts in a row have failed without a new checkpoint"),
        # A preemption or a lost node between them is neither counted nor an excuse.
        ([CRASH, PREEMPTED, CRASH, LOST, CRASH], False, "3 starts in a row"),
        # A new checkpoint is.
        ([CRASH, dataclasses.replace(CRASH, reached=9), CRASH], True, "crash 1 of 3"),
        ([dataclasses.replace(CRASH, began=9, reached=9)] * 3, False, "3 starts in a row"),
        ([LATE, LATE, LATE], False, "give it more --time"),
        ([dataclasses.replace(LATE, reached=5)] * 9, True, "its time limit"),
        ([dataclasses.replace(CRASH, word="nan_or_inf")], False, "would end the same"),
        ([dataclasses.replace(TRAP, reached=3), dataclasses.replace(TRAP, began=3, reached=3)], False,
         "the same KeyError at step 7 twice"),
        # A month lies between.
        ([TRAP, *[dataclasses.replace(LATE, reached=5)] * 20, TRAP], True, "crash 1 of 3"),
        ([dataclasses.replace(CRASH, reached=9)], True, "a crash after a new checkpoint"),
        # Nodes were lost after new checkpoints.
        ([CRASH, dataclasses.replace(LOST, reached=500), CRASH, dataclasses.replace(LOST, reached=900), CRASH], True,
         "crash 1 of 3"),
        ([Start("failed", error="KeyError", step=7), Start("failed", error="KeyError", step=8)], True, "crash 2 of 3"),
    ],
)  # fmt: skip
def test_R10_what_follows(starts: list[Start], again: bool, why: str) -> None:
    decision = decide(starts, None)
    assert decision.again == again
    assert why in decision.why


def test_S6_starts_are_limited_whatever_ends_them() -> None:
    assert decide([LOST, PREEMPTED], 3).again
    decision = decide([LOST, PREEMPTED, LATE], 3)
    assert not decision.again
    assert decision.why == "the profile allows 3 starts (max_starts)"


def test_nodes_that_failures_point_at_are_left_out() -> None:
    gpu = Start("failed", word="gpu_failure", hosts=("node7",))
    hang = Start("failed", word="hang", hosts=("node3",), reached=9)
    killed = Start("failed", word="killed", hosts=("node1",))
    assert decide([gpu], None).exclude == ("node7",)
    assert decide([killed], None).exclude == ()
    assert decide([hang], None).exclude == ()
    assert decide([gpu, hang, hang], None).exclude == ("node3", "node7")


def test_words_are_those_of_the_catalogue() -> None:
    own = {"node_check_failed", "never_came"}
    assert policy.FINAL | policy.OF_THE_NODE - own <= set(faults.WORDS)


STARTS = st.builds(
    Start,
    state=st.sampled_from(["stopped", "failed", "running"]),
    began=st.integers(0, 3),
    reached=st.integers(0, 3),
    word=st.sampled_from([None, "killed", "hang"]),
    out_of_time=st.booleans(),
)


@given(st.lists(STARTS, min_size=1, max_size=12), st.integers(1, 12))
def test_a_fruitless_loop_ends(starts: list[Start], most: int) -> None:
    """However it began, three more crashes in a row without a checkpoint are the last ones."""
    crashes = [Start("failed", began=5, reached=5, word="killed")] * policy.CRASHES
    assert not decide([*starts, *crashes], None).again
    assert not decide(starts, most).again or len(starts) < most

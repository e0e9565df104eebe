"""A trainer does not outlive its torchrun; ranks tell how fast they reach each other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks, workers
from vitdist import dist

pytestmark = pytest.mark.processes

PARENT = """
import subprocess, sys, time
code = "from vitdist import stop; stop.end_with_parent(); print('here', flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_trainer_ends_with_a_torchrun_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    told = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (child,) = (int(text) for text in told if text.isdigit())
    assert "here" in told
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline, "it outlives its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_path_of_the_node_is_filled_in_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch/job7")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert dist.on_this_node("$TMPDIR/vitdist-cache") == "/scratch/job7/vitdist-cache"
    with pytest.raises(ValueError, match=r"\$NOWHERE/x: a variable in it is not set on "):
        dist.on_this_node("$NOWHERE/x")


def test_the_speed_between_ranks_is_told() -> None:
    alone, *both = [*ranks.run(workers.bus, 1), *ranks.run(workers.bus, 2)]
    assert alone is None
    assert both[0] == both[1]
    assert both[0] > 0

"""The torchrun command of each node, its port, and what torchrun says of failures."""

import pytest

from launch import torchrun


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_argv_is_a_static_rendezvous(nodes: int) -> None:
    for node in range(nodes):
        command = torchrun.argv("py", nodes, node, 8, "node1", 12345, "/runs/a b", 3)
        assert command == [
            "py",
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(nodes),
            "--node-rank",
            str(node),
            "--nproc-per-node",
            "8",
            "--master-addr",
            "node1",
            "--master-port",
            "12345",
            "--max-restarts",
            "0",
            "-m",
            "vitdist.train",
            "/runs/a b",
            "--attempt",
            "3",
        ]


def test_R2_ports_are_below_the_ephemeral_range_and_differ_between_starts() -> None:
    ports = [torchrun.port(str(job), attempt) for job in range(500) for attempt in range(2)]
    assert all(10_000 <= port <= 31_999 for port in ports)
    assert torchrun.port("4711", 0) == ports[0] or torchrun.port("4711", 0) == torchrun.port("4711", 0)
    # 1,000 of 22,000: 22.5 collisions are expected
    assert len(set(ports)) > 950
    assert torchrun.port("4711", 0) != torchrun.port("4711", 1)


# Written by torch 2.15, with ranks 0 and 3 added
LOG = """
============================================================
vitdist.train FAILED
------------------------------------------------------------
Failures:
[2]:
  time      : 2026-11-23_22:57:38
  host      : vm
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 4240)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 4240
[1]:
  time      : 2026-11-23_22:57:39
  host      : vm
  rank      : 3 (local_rank: 1)
  exitcode  : 75 (pid: 4243)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_22:57:38
  host      : vm
  rank      : 2 (local_rank: 0)
  exitcode  : -9 (pid: 4242) (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4242
============================================================
"""


def test_the_root_cause_comes_first_and_what_torchrun_ended_is_left_out() -> None:
    first, second = torchrun.failures(LOG)
    assert (first.rank, first.code) == (2, -9)
    assert (second.rank, second.code) == (3, 75)
    assert second.time == first.time + 1
    assert torchrun.failures("") == []

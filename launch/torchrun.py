"""Pure: what is known of the nodes -> the torchrun command of each; torchrun's log -> who failed first.

    argv(sys.executable, nodes=4, node_rank=0, processes=8, master="node1", port=port("4711", 0), ...)

The rendezvous is static, for one node too: c10d ignores `--node-rank`, and with it global rank 0 lands
on any node. Restarts are not torchrun's: SLURM requeues, or the user starts the run again.
"""

import hashlib
import re
import signal
from datetime import datetime
from typing import NamedTuple

LAUNCHER = "torch.distributed.run"
TRAINER = "vitdist.train"
LOCAL = "127.0.0.1"
"""Where simulated nodes meet: they all are this machine."""

# Above the ports of known services, below the ephemeral range (Linux: 32768-60999), which clients take from.
PORTS = range(10_000, 32_000)


def port(job_id: str, attempt: int) -> int:
    """The same for all nodes of a start, most likely another one for any other start."""
    digest = hashlib.sha256(f"{job_id} {attempt}".encode()).digest()
    return PORTS[int.from_bytes(digest[:8], "big") % len(PORTS)]


def ports(job_id: str, attempt: int) -> tuple[int, ...]:
    """Where a start meets: the first of these that is free on its first node."""
    return tuple(dict.fromkeys(port(job_id if i == 0 else f"{job_id} {i}", attempt) for i in range(4)))


def argv(
    python: str,
    nodes: int,
    node_rank: int,
    processes: int,
    master: str,
    port: int,
    run_dir: str,
    attempt: int,
    launcher: str = LAUNCHER,
) -> list[str]:
    """The command that starts the trainers of one node. `launcher`: a module with torchrun's flags."""
    return [
        python,
        "-m",
        launcher,
        "--nnodes",
        str(nodes),
        "--node-rank",
        str(node_rank),
        "--nproc-per-node",
        str(processes),
        "--master-addr",
        master,
        "--master-port",
        str(port),
        "--max-restarts",
        "0",
        "-m",
        TRAINER,
        run_dir,
        "--attempt",
        str(attempt),
    ]


class Failure(NamedTuple):
    """A rank that torchrun found ended with another code than 0."""

    time: float
    rank: int
    code: int


# torch/distributed/elastic/multiprocessing/errors/__init__.py, _FAILURE_FORMAT_TEMPLATE (torch 2.15)
_FAILURE = re.compile(
    r"^ *time +: (?P<time>\S+)\n.*\n *rank +: (?P<rank>\d+) .*\n *exitcode +: (?P<code>-?\d+)", re.MULTILINE
)


def failures(log: str) -> list[Failure]:
    """The failed ranks that torchrun names in its log, what it calls the root cause first.

    Then it ends the others, with SIGTERM and 30 s later SIGKILL, and lists them too: those are left out.
    """
    found = [
        Failure(datetime.fromisoformat(m["time"].replace("_", "T")).timestamp(), int(m["rank"]), int(m["code"]))
        for m in _FAILURE.finditer(log)
    ]
    # The root cause stands last. Times are whole seconds and do not decide.
    root = found[-1:]
    return root + sorted(f for f in found[:-1] if f.code not in (-signal.SIGTERM, -signal.SIGKILL))

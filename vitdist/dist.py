"""Who this process is among the ranks, and the few things that ranks agree on.

torchrun says the rank and world in the environment; a process started without it
(`python -m vitdist.train`, a debugger) is a world of one. Collectives here carry small things over
gloo, also on a GPU, so that they never wait for queued kernels.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed

Result = TypeVar("Result")
# A peer that is gone closes its socket and gloo raises in under a second; this bound is for one that hangs.
# Reading the weights of a large model on one rank while the others wait is the longest lawful wait.
TIMEOUT_S = 30 * 60.0


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `world`, `local_rank` on node number `node`."""

    rank: int
    world: int
    local_rank: int
    node: int
    local_world: int
    """Ranks on this node."""
    device: torch.device
    control: Any
    """Process group of gloo for agreement."""
    background: Any = None
    """Another one, for the thread that writes checkpoints beside training: two threads in one group would take
    each other's messages."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; the same answer on all."""
        vote = torch.tensor([int(flag)])
        torch.distributed.all_reduce(vote, group=self.control)
        return bool(vote.item())

    def mean(self, value: float) -> float:
        """The mean over ranks, the same on all."""
        total = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.control)
        return float(total.item()) / self.world

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor of any shape, the same on all."""
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=self.control)
        return total

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """The value of every rank, in the order of ranks, on all; over `group`, `control` where none is given."""
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=group or self.control)
        return values

    def from_first(self, value: Any, group: Any = None) -> Any:
        """Rank 0's value on all; over `group`, `control` where none is given."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=group or self.control)
        return box[0]

    def of_first(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns on rank 0, on all.

        Raises ValueError, on all ranks at once, for a ValueError or an OSError of it.
        """
        result, fault = None, None
        if self.first:
            try:
                result = work()
            except (ValueError, OSError) as error:
                fault = str(error)
        result, fault = self.from_first((result, fault))
        if fault:
            raise ValueError(fault)
        return cast(Result, result)

    def on_every_rank(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns on this rank, once all have done theirs.

        Raises ValueError, on all ranks at once, for a ValueError or an OSError of any.
        """
        result, fault = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            fault = str(error)
        faults = {rank: text for rank, text in enumerate(self.gather(fault)) if text}
        if faults:
            rank, text = next(iter(faults.items()))
            raise ValueError(text if len(faults) == self.world else f"{text} (on rank {rank}, not on all)")
        return cast(Result, result)

    def agree(self, facts: dict[str, str]) -> None:
        """Hold the facts of this rank, name -> text, against those of rank 0. Raises ValueError, on all, if any differ.

        Ranks that see different things would wait for each other for ever in the middle of a step.
        """
        all_facts = self.gather(facts)
        for name in facts:
            values = [each[name] for each in all_facts]
            odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if odd is not None:
                raise ValueError(
                    f"the {name} of rank {odd} ({values[odd]}) differ from those of rank 0 ({values[0]}): "
                    "do all nodes see the same shards and the same code?"
                )

    def barrier(self) -> None:
        torch.distributed.barrier(group=self.control)


@contextmanager
def processes(threads: int | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[Processes]:
    """Join the other ranks and leave them at the end.

    `threads`: CPU threads of this rank, else its share. `timeout_s`: the longest wait for a rank that hangs, in
    seconds. Raises ValueError for more ranks on a node than it has GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()), RANK="0", WORLD_SIZE="1")
    os.environ.setdefault("LOCAL_RANK", "0")
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torchrun sets OMP_NUM_THREADS to 1 for several ranks on a node, the node job to the share of its cores.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", cores)))
    if gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{local_world} ranks on a node with {torch.cuda.device_count()} GPUs: one rank a GPU, no more"
        )
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=world, timeout=timeout)
    # Every rank makes the groups in this order, or they would not find each other.
    control = torch.distributed.new_group(backend="gloo", timeout=timeout) if gpu else torch.distributed.group.WORLD
    background = torch.distributed.new_group(backend="gloo", timeout=timeout)
    try:
        yield Processes(
            rank=rank,
            world=world,
            local_rank=local_rank,
            node=int(os.environ.get("GROUP_RANK", "0")),
            local_world=local_world,
            device=device,
            control=control,
            background=background,
        )
    finally:
        torch.distributed.destroy_process_group()


def on_this_node(path: str) -> str:
    """`path` with the node's variables filled in, such as `$TMPDIR`. Raises ValueError for one that is not set."""
    filled = os.path.expandvars(path)
    if "$" in filled:
        raise ValueError(f"{path}: a variable in it is not set on {socket.gethostname()}")
    return filled


def bus_bandwidth(me: Processes) -> float | None:
    """Speed of an all-reduce over all ranks, in 10^9 bytes a second; None for a single one. All ranks must call it.

    Bus bandwidth as nccl-tests defines it, 2 (n - 1) / n times bytes by seconds, which a ring reaches whatever the
    number of ranks n. The best of three rounds, after one that makes the connections.
    """
    if me.world == 1:
        return None
    gpu = me.device.type == "cuda"
    data = torch.ones((64 if gpu else 4) << 18, device=me.device)  # MiB of float32
    best = math.inf
    for round_ in range(4):
        me.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(data)
        if gpu:
            torch.cuda.synchronize()
        if round_:
            best = min(best, time.perf_counter() - began)
    size = data.numel() * data.element_size()
    return 2 * (me.world - 1) / me.world * size / me.gather(best)[0] / 1e9


def bound_all_groups(timeout_s: float) -> None:
    """Have every process group of this process wait `timeout_s` seconds at most from now on.

    DeepSpeed makes groups of its own for ZeRO and passes them no timeout, so that they wait torch's 30 minutes
    (gloo; 10 with NCCL) whatever `processes` was given. Call it after they were made.
    """
    from torch.distributed import distributed_c10d

    # Public from torch 2.15 on; before it, the same function under this name.
    set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

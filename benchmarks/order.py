"""What the order of samples costs at a million, a billion, and for 1,024 ranks.

.venv/bin/python benchmarks/order.py        # half a minute

Each figure is CPU time of a fresh process, the best of `ROUNDS` (the machine may be busy, the arithmetic is the same),
with the memory of that process, Python and NumPy included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results

ROUNDS = 5
IMAGENET, BILLION = 1_281_167, 1_000_000_000


def whole_epoch() -> None:
    """Every index row of an ImageNet epoch."""
    from vitdist.data.order import Shuffled

    _, ids = Shuffled(IMAGENET, 1).ids(0, IMAGENET)
    assert len(ids) == IMAGENET


def middle_of_a_billion() -> None:
    """The first batch of 4,096 in the middle of an epoch of a billion samples."""
    from vitdist.data.order import Order, Shuffled

    assert len(Order(Shuffled(BILLION, 1), 4096).batch(BILLION // 2 // 4096)[1]) == 4096


def later_batches_of_a_billion() -> None:
    """A hundred batches of 4,096 one after the other, from there on."""
    from vitdist.data.order import Order, Shuffled

    order = Order(Shuffled(BILLION, 1), 4096)
    for step in range(122_070, 122_170):
        order.batch(step)


def balanced_batch() -> None:
    """A batch of 4,096 in which 1,000 uneven classes come alike, out of ImageNet's number of samples."""
    import numpy as np

    from vitdist.data.order import Order, of_sets

    labels = (np.random.default_rng(0).random(IMAGENET) ** 2 * 1000).astype(np.int32)
    order: Order = of_sets([labels], [1.0], [1.0] * 1000, 0, "aa", 4096)
    assert np.bincount(labels[order.batch(100_000)[1]], minlength=1000).min() >= 4


def share_of_a_rank() -> None:
    """Rank 700 of 1,024 asks for its 64 samples of a batch of 65,536, in the middle of a billion."""
    from vitdist.config import Batch
    from vitdist.data.order import Order, Shuffled, rank_slots

    batch = Batch(global_batch=65_536, micro_batch=64, accumulation=1, world=1024)
    _, ids = Order(Shuffled(BILLION, 1), 65_536).slots(*rank_slots(7_000, 0, 700, batch))
    assert len(ids) == 64


def all_ranks() -> None:
    """The shares of all 1,024 ranks of one step put together: a global batch, no sample twice, none missing."""
    import numpy as np

    from vitdist.config import Batch
    from vitdist.data.order import Order, Shuffled, rank_slots

    batch = Batch(global_batch=65_536, micro_batch=64, accumulation=1, world=1024)
    order = Order(Shuffled(BILLION, 1), 65_536)
    shares = [order.slots(*rank_slots(7_000, 0, rank, batch))[1] for rank in range(1024)]
    assert len(np.unique(np.concatenate(shares))) == 65_536


CASES = (whole_epoch, middle_of_a_billion, later_batches_of_a_billion, balanced_batch, share_of_a_rank, all_ranks)


def measured(name: str) -> tuple[float, float]:
    """Seconds and MB of one run of a case in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout)
    return seconds, megabytes


def main() -> None:
    if len(sys.argv) == 2:
        import vitdist.data.order  # noqa: F401  # importing is not counted

        case = next(case for case in CASES if case.__name__ == sys.argv[1])
        began = time.process_time()
        case()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(json.dumps([time.process_time() - began, memory]))
        return
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for case in CASES:
        runs = [measured(case.__name__) for _ in range(ROUNDS)]
        name = case.__name__.replace("_", " ")
        seconds[name] = round(min(run[0] for run in runs), 4)
        memory[name] = round(max(run[1] for run in runs), 1)
    results.publish("order", {"seconds": seconds, "megabytes": memory})


if __name__ == "__main__":
    main()

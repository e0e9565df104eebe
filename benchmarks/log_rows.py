"""What a row of the log costs: CPU seconds, of this process and of W&B's service beside it.

.venv/bin/python benchmarks/log_rows.py         # four minutes; --seconds 10 --rounds 1 for a quick look

Each case is a process of its own that logs rows at the pace of a fast run, 10 a second: to metrics.jsonl alone, with
TensorBoard's files, with W&B offline, and with W&B online against the tests' server on this machine, whose own time is
not counted. `idle`: W&B is online and gets no row; what it does then (every 15 s it looks at processor and disk) is
told as if it were of the rows. `measured`: what stands in a row is measured too, of one rank without a GPU in a run of
20 starts, and goes to metrics.jsonl alone. All cases of a round run at once, since all of them sleep nearly always;
medians over rounds are told. At 10 rows a second, 1 ms a row is one percent of one core.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results

ROOT = Path(__file__).parents[1]
PACE = 10
"""Rows a second."""
MODES = {
    "file": [],
    "offline": ["tracking.wandb=offline"],
    "online": ["tracking.wandb=online"],
    "tensorboard": ["tracking.wandb=off", "tracking.tensorboard=true"],
    "idle": ["tracking.wandb=online"],
}
CASES = [(mode, keys) for keys in (30, 60) for mode in MODES if mode != "idle"] + [("idle", 0), ("measured", 0)]
SETTLED_S = 8.0
"""From the rows that W&B gets at once to the first row that counts."""


def figures(keys: int) -> dict[str, float]:
    """A row of so many figures, some that change and some that hardly do, as those of a run."""
    changing = {f"perf/figure_{i}": random.random() for i in range(keys // 2)}
    return changing | {f"lr/{i:02}_block_{i}": 1e-3 * 0.75**i for i in range(keys - len(changing))}


def measured_figures(folder: Path) -> Callable[[int], dict[str, float]]:
    """What the trainer's rooms tell at a row; the loss of a step is part of it, the agreement of ranks is not."""
    import torch

    from vitdist import ledger, metrics, spikes, system

    cpu = torch.device("cpu")
    meter, machine, watched = metrics.Meter(64, 1e9, 1, cpu), system.Machine(cpu, folder), spikes.Spikes()
    past = [ledger.Start(True, 100 * i, 100 * i + 150, 60.0, 1, 1) for i in range(20)]
    run = ledger.Ledger(past, time.monotonic(), 1, 1, gpu=False)

    def row(step: int) -> dict[str, float]:
        with meter.computing():
            watched.see(step, [random.random()])
        meter.step()
        own = meter.own()
        speed = meter.row(1000)
        return {**speed, **metrics.lag([own], 1.0), **system.figures([machine.now()]), **run.row(step, meter.busy_s)}

    return row


def service_s() -> float:
    """CPU seconds of the processes that this one started."""
    total, tick = 0.0, os.sysconf("SC_CLK_TCK")
    parents = {os.getpid()}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) in parents:
            parents.add(int(process.name))
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def case(mode: str, keys: int, seconds: float) -> None:
    """In a process of its own: milliseconds a row of this process and of W&B's service, as JSON."""
    from vitdist import config, mirror
    from vitdist.rundir import RunDir
    from vitdist.tracking import Journal

    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        with Journal(run, run.attempt(0), first=True) as journal:
            row = measured_figures(run.path) if mode == "measured" else lambda step: figures(keys)
            if mode not in ("file", "measured"):
                journal.start_mirrors(config.load(ROOT / "configs" / "demo.yaml", MODES[mode]), {}, 0)
                for _ in range(mirror.AT_ONCE + 1):  # the pace that W&B is held to begins after these
                    journal.row(0, figures(keys or 30))
                time.sleep(SETTLED_S)
            rows = int(seconds * PACE)
            own, service, began = time.process_time(), service_s(), time.monotonic()
            for step in range(1, rows + 1):
                if mode != "idle":
                    journal.row(step, row(step))
                time.sleep(max(0.0, began + step / PACE - time.monotonic()))
            record = json.loads(run.attempt(0).train.read_text())
            assert not record.get("events"), record["events"]  # W&B was there
            spent = [1000 * (time.process_time() - own) / rows, 1000 * (service_s() - service) / rows]
    print("\n" + json.dumps(spent))


def measured(seconds: float, url: str) -> dict[tuple[str, int], list[float]]:
    """One round: [ms of this process, ms of the service] a row for each case."""
    environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
    started = {}
    for mode, keys in CASES:
        command = [sys.executable, __file__, "--case", mode, str(keys), "--seconds", str(seconds)]
        started[mode, keys] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return {which: json.loads(process.communicate()[0].splitlines()[-1]) for which, process in started.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case (default: 30)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case(arguments.case[0], int(arguments.case[1]), arguments.seconds)
        return
    from tests import fake_wandb

    with fake_wandb.Server() as server:
        rounds = [measured(arguments.seconds, server.url) for _ in range(arguments.rounds)]
    table = {}
    for mode, keys in CASES:
        own, service = (statistics.median(found[mode, keys][i] for found in rounds) for i in (0, 1))
        name = f"{mode}, {keys} figures" if keys else mode
        table[name] = {"trainer": round(own, 3), "wandb_core": round(service, 3), "both": round(own + service, 3)}
    results.publish("log-rows", {"rows_a_second": PACE, "rounds": len(rounds), "cpu_ms_a_row": table})


if __name__ == "__main__":
    main()

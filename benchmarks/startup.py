"""From `submit.py` to the first update, without a queue, and what it is made of: python -m benchmarks.startup

The demo's model and data by the local launcher, several trainers on this machine, each round beside a trainer's plain
imports: in as many processes at once, torch, transformers' ViT, DeepSpeed and webdataset, as a script would have them.
Medians of the rounds, in seconds of wall-clock time. Stages are those of rank 0 (`startup_s` in train.json).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results
from vitdist.data.pack import pack, write_digits
from vitdist.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "import torch, deepspeed, webdataset; from transformers import ViTForImageClassification"


def plain(trainers: int) -> float:
    """Seconds that so many processes at once take for the imports. Raises RuntimeError if one fails."""
    began = time.perf_counter()
    started = [
        subprocess.Popen([sys.executable, "-c", PLAIN], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(trainers)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"the imports ended with {codes}")
    return time.perf_counter() - began


def launched(trainers: int, shards: Path, run: RunDir) -> dict[str, float]:
    """Seconds to the first update, and the stages before it. Raises CalledProcessError."""
    began = time.time()
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "--cluster", "local", "--nodes", str(trainers)]
    command += ["--config", str(ROOT / "configs" / "demo.yaml"), "--runs", str(run.path.parent), "--name", run.name]
    command += [f"data.{split}={shards / split}" for split in ("train", "val")]
    command += ["train.epochs=null", "train.steps=2", "tracking.log_every=1", "tracking.wandb=off"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    first = json.loads(run.metrics.read_text().splitlines()[0])
    stages = json.loads(run.attempt(0).train.read_text())["startup_s"]
    total = first["time"] - began
    before = {"submit, torchrun, rendezvous of agents": total - sum(stages.values())}
    return {"to the first update": total} | before | stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    imports, starts = list[float](), list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_digits(place / "digits")
        pack(place / "digits", place / "shards", workers=1, progress=False)
        for number in range(args.rounds):
            imports.append(plain(args.trainers))
            starts.append(launched(args.trainers, place / "shards", RunDir(place / "runs" / f"start-{number}")))
            print(f"round {number + 1}: imports {imports[-1]:.1f} s, start {starts[-1]['to the first update']:.1f} s")
    stages = {name: round(statistics.median(one[name] for one in starts), 2) for name in starts[0]}
    results.publish(
        "startup",
        {
            "trainers": args.trainers,
            "rounds": args.rounds,
            "plain_imports_s": round(statistics.median(imports), 1),
            "first_updates_s": [round(one["to the first update"], 1) for one in starts],
            "seconds": stages,
        },
    )


if __name__ == "__main__":
    main()

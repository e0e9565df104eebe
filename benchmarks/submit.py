"""What a dry run of the launcher takes, against the import of what it is made of, in turns: python -m benchmarks.submit

Medians of wall-clock and processor time. `pydantic` loads its parts when they are named, so that `import pydantic`
alone loads next to nothing: both readings of a bare import are measured, and one settings class of one field too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
data: {train: shards/train, val: shards/val}
model: {image_size: 32, scratch: {patch_size: 8, width: 64, depth: 4, heads: 4}}
train: {global_batch: 64, epochs: 2}
"""
IMPORTS = "import submitit, yaml, pydantic"
CLASS = "\nclass Settings(pydantic.BaseModel):\n    lr: float = 1.0\nSettings(lr=2.0)"


def commands(place: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    dry = [sys.executable, str(ROOT / "launch" / "submit.py"), "--config", str(place / "tiny.yaml"), "--dry-run"]
    profile = ["--cluster", str(ROOT / "slurm" / "default.yaml"), "--nodes", "4", "--name", "x"]
    return {
        "bare: import submitit, yaml, pydantic": [sys.executable, "-c", IMPORTS],
        "bare and pydantic.BaseModel": [sys.executable, "-c", f"{IMPORTS}; pydantic.BaseModel"],
        "bare and a class of settings": [sys.executable, "-c", IMPORTS + CLASS],
        "python launch/submit.py --dry-run": [*dry, *profile],
        "the same, a sweep of 16": [*dry, *profile, "--sweep", "optim.lr=1,2,3,4", "optim.weight_decay=1,2,3,4"],
    }


def measure(command: list[str], cwd: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds. Raises CalledProcessError."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # A user's Python keeps its bytecode; without it the launcher would be compiled anew each time, and only it.
    env = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "tiny.yaml").write_text(RECIPE)
        for split in ("train", "val"):
            (place / "shards" / split).mkdir(parents=True)
            (place / "shards" / split / "000.tar").write_bytes(bytes(10_240))
            record = {"samples": 9, "classes": ["cat", "dog"], "shards": [{"name": "000.tar", "bytes": 10_240}]}
            (place / "shards" / split / "index.json").write_text(json.dumps(record))
        timed = commands(place)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
        for number in range(args.rounds + 1):
            for name, command in timed.items():
                taken = measure(command, place)
                if number:  # the first round compiles
                    times[name].append(taken)
    wall = {name: statistics.median(w for w, _ in pairs) for name, pairs in times.items()}
    cpu = {name: statistics.median(c for _, c in pairs) for name, pairs in times.items()}
    bare, named, _, dry, _ = wall
    results.publish(
        "submit",
        {
            "rounds": args.rounds,
            "slurm_answers": "SLURM_CONF" in os.environ,
            "wall_s": {name: round(seconds, 3) for name, seconds in wall.items()},
            "cpu_s": {name: round(seconds, 3) for name, seconds in cpu.items()},
            "dry_run_against_the_bare_import": round(wall[dry] / wall[bare], 2),
            "dry_run_against_bare_and_base_model": round(wall[dry] / wall[named], 2),
        },
    )


if __name__ == "__main__":
    main()

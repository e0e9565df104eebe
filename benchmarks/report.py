"""What the report of a long run costs: 100,000 rows of 36 figures, 34 of them drawn as curves.

.venv/bin/python benchmarks/report.py        # a minute

Each round is a fresh process, Python's start and imports included; medians of `ROUNDS`, first without the script of the
charts that is kept between reports, then with it. The figures of the rows are random: a worst case, no two alike.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results

ROWS, LAYERS, ROUNDS = 100_000, 26, 3
FIGURES = ("train/loss", "optim/grad_norm", "optim/loss_scale", "optim/skipped_steps")
SPEEDS = ("perf/images_per_s", "perf/data_wait_pct", "perf/eta_s")
SCORES = ("val/loss", "val/top1", "val/macro_f1")


def make(folder: Path) -> Path:
    """A run folder with such rows, and an evaluation every 1,000 steps."""
    from vitdist import rundir
    from vitdist.rundir import RunDir

    run = RunDir(folder / "long")
    run.path.mkdir()
    draw = random.Random(0).random
    names = [*FIGURES, *SPEEDS, *(f"lr/{i:02d}_block" for i in range(LAYERS))]
    with open(run.metrics, "w") as file:
        for step in range(1, ROWS + 1):
            about = {"attempt": 0, "time": 1.8e9 + step / 10, "train/global_step": step}
            file.write(json.dumps(about | {name: draw() + 1e-3 for name in names}) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps(about | {name: draw() for name in SCORES}) + "\n")
    record = {"state": "done", "step": ROWS, "total_steps": ROWS, "precision": "fp16", "resumed_from": None}
    rundir.publish_json(run.attempt(0).train, record)
    return run.path


def measure(run: Path, home: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MB of one report in a fresh process with this home."""
    code = f"from pathlib import Path; from vitdist.report import page; page.write(page.RunDir(Path({str(run)!r})))"
    code += "; import resource; used = resource.getrusage(resource.RUSAGE_SELF)"
    code += "; print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    cpu, peak = map(float, done.stdout.split())
    return time.perf_counter() - begun, cpu, peak


def main() -> None:
    figures: dict[str, Any] = {"rows": ROWS, "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        run, home = make(Path(folder)), Path(folder) / "home"
        figures["metrics_mb"] = round((run / "metrics.jsonl").stat().st_size / 1e6)
        bare = [measure(run, home / str(i)) for i in range(ROUNDS)]
        kept = [measure(run, home / str(i)) for i in range(ROUNDS)]
        figures["page_mb"] = round((run / "report.html").stat().st_size / 1e6, 2)
    for name, rounds in (("first_report_of_a_user", bare), ("later_reports", kept)):
        seconds, cpu, peak = (statistics.median(column) for column in zip(*rounds, strict=True))
        figures[name] = {"seconds": round(seconds, 2), "cpu seconds": round(cpu, 2), "peak MB": round(peak)}
    results.publish("report", figures)


if __name__ == "__main__":
    main()

"""Processes that log like a training, for tests of what faults do to them: python -m tests.logs_workers NAME FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

from vitdist import console, tracking
from vitdist.config import Config
from vitdist.rundir import RunDir

ROWS = 20


def settings(**tracking: object) -> Config:
    """Those of a run that is tracked so."""
    place = {
        "data": {"train": "shards/train", "val": "shards/val"},
        "model": {"pretrained": "google/vit-base-patch16-224"},
    }
    return Config.model_validate(place | {"train": {"epochs": 1, "global_batch": 8}, "tracking": tracking})


def services() -> list[int]:
    """The wandb-core processes that this process started and that live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = (process / "stat").read_text()
        except OSError:
            continue
        name, _, rest = about.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        if name.startswith("wandb-core") and int(parent) == os.getpid() and state != "Z":
            found.append(int(process.name))
    return found


def killed_service(folder: Path) -> None:
    """W&B's service dies in the middle of a run, by kill -9."""
    run = RunDir(folder)
    with tracking.Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(settings(wandb="offline"), {}, 0)
        for pid in services():
            os.kill(pid, signal.SIGKILL)
        for step in range(ROWS):
            journal.row(step, {"train/loss": 1.0})
        journal.record(state="done")


def rows_without_end(folder: Path) -> None:
    """Logs ROWS rows offline and waits to be killed."""
    run = RunDir(folder)
    journal = tracking.Journal(run, run.attempt(0), first=True)
    journal.start_mirrors(settings(wandb="offline"), {}, 0)
    for step in range(ROWS):
        journal.row(step, {"train/loss": 1.0})
    while True:
        time.sleep(1)


def talkative(folder: Path) -> None:
    """Prints to its log on a disk that is full."""
    tracking.to_file(folder / "rank.log")
    _talk(folder)


def redirected(folder: Path) -> None:
    """The same, where a shell has sent the output there."""
    console.spare_output()
    _talk(folder)
    (folder / "ballast").write_bytes(b"")
    _fill(folder)
    print("z" * 8192)
    console.final_table(RunDir(folder), {"top1": 0.9})


def _talk(folder: Path) -> None:
    print("before")
    _fill(folder)
    for _ in range(2_000):
        print("x" * 40)
        print("y" * 40, file=sys.stderr)
    (folder / "ballast").unlink()
    print("after")


def _fill(folder: Path) -> None:
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))

"""Where the figures of a run go: console, metrics.jsonl, the attempt's record, Weights & Biases.

Rank 0 alone writes. metrics.jsonl is the truth: one line a row, written at once. W&B mirrors it, and
nothing that W&B does can stop or slow a training: any failure there is told once and W&B is left out.
"""

import json
import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlparse

from vitdist import config, rundir
from vitdist.console import Bar
from vitdist.rundir import Attempt, RunDir


class Journal:
    """Rows, the attempt's record and the bar of one attempt; on ranks other than 0 every call does nothing."""

    def __init__(self, run: RunDir, attempt: Attempt, first: bool) -> None:
        self._run, self._attempt, self._first = run, attempt, first
        self._record: dict[str, Any] = {"attempt": attempt.number, "state": "running", "started": rundir.now()}
        self._wandb: Any = None
        self._last: dict[str, float] = {}
        if first:
            run.metrics.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(run.metrics)
            self._rows = open(run.metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            self._bar = Bar(run.name)
            self.record(step=0, total_steps=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first:
            if isinstance(error, Exception):
                self.record(
                    state="refused" if isinstance(error, ValueError) else "failed",
                    reason=str(error).splitlines()[0] if str(error) else type(error).__name__,
                    error={
                        "type": type(error).__name__,
                        "message": str(error),
                        "rank": 0,
                        "step": self._record["step"],
                    },
                    ended=rundir.now(),
                )
            self._bar.close()
            self._rows.close()
            self._guard(lambda: self._wandb.finish(exit_code=0 if error is None else 1))

    def record(self, **changes: Any) -> None:
        """Publish the attempt's record with `changes` in it."""
        if self._first:
            self._record |= changes
            rundir.publish_json(self._attempt.train, self._record)

    def row(self, step: int, figures: dict[str, float]) -> None:
        """One row of figures at a step, everywhere."""
        if not self._first:
            return
        # JSON has no NaN or infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        row = {"attempt": self._attempt.number, "time": round(time.time(), 3), "train/global_step": step, **finite}
        self._rows.write(json.dumps(row) + "\n")
        self._last |= figures
        self.progress(step, "training")
        self._guard(lambda: self._wandb.log({k: v for k, v in row.items() if k not in ("attempt", "time")}))

    def bad_samples(self, step: int, kind: str, samples: Sequence[NamedTuple]) -> None:
        """Note broken samples of the "train" or "val" set in the run's list of them."""
        if not self._first or not samples:
            return
        about = {"attempt": self._attempt.number, "step": step, "set": kind}
        lines = "".join(json.dumps(about | sample._asdict(), ensure_ascii=False) + "\n" for sample in samples)
        with open(self._run.bad_samples, "a", encoding="utf-8") as file:
            file.write(lines)

    def progress(self, step: int, phase: str) -> None:
        """Move the bar; `phase` says what goes on."""
        if self._first:
            last = self._last
            self._bar.update(
                step,
                self._record["total_steps"] or 0,
                loss=last.get("train/loss"),
                images_per_s=last.get("perf/images_per_s"),
                eta_s=last.get("perf/eta_s"),
                phase=phase,
            )

    def say(self, text: str) -> None:
        """A line for the reader of the console."""
        if self._first:
            self._bar.print(text)

    # ---- Weights & Biases ----------------------------------------------------------------------

    def start_wandb(self, settings: config.Tracking, about: dict[str, Any]) -> None:
        """Begin or continue the run's W&B run: its id is in the run folder, so a requeue goes on with it."""
        if not self._first or settings.wandb == "off":
            return
        self._guard(lambda: self._init_wandb(settings, about), always=True)

    def _init_wandb(self, settings: config.Tracking, about: dict[str, Any]) -> None:
        import wandb

        online = settings.wandb == "online" or (settings.wandb == "auto" and _has_key(wandb.setup().settings))
        if settings.wandb == "auto" and not online:
            self.say(
                f"W&B is kept offline, as there is no API key: `wandb login`, then `vitdist sync {self._run.path}`"
            )
        id_file = self._run.wandb / "run-id"
        if not id_file.exists():
            rundir.publish(id_file, secrets.token_hex(4))
        self._wandb = wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=id_file.read_text(),
            name=self._run.name,
            dir=self._run.path,
            mode="online" if online else "offline",
            resume="allow",
            config=about,
            # Defaults wait 90 s for a server and for ever at the end, and lose 15 s of rows to a SIGKILL.
            # Remotes of git and captured output may hold secrets.
            settings=wandb.Settings(
                init_timeout=30,
                finish_timeout=60,
                x_transaction_log_flush_interval=1,
                console="off",
                disable_git=True,
                silent=True,
            ),
        )
        # W&B's own step is shifted when offline parts are joined; ours is the axis.
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step")

    def wandb_folder(self) -> Path | None:
        """The offline run that `wandb sync` uploads, or None."""
        offline = sorted(self._run.wandb.glob("offline-run-*")) if self._first else []
        return offline[-1] if offline else None

    def _guard(self, call: Any, always: bool = False) -> None:
        if self._wandb is None and not always:
            return
        try:
            call()
        except Exception as error:  # whatever a tracker raises, training goes on: see the head of this file
            self._wandb = None
            self.say(
                f"W&B failed and is left out from here on ({type(error).__name__}: {error}); metrics.jsonl goes on"
            )


def _has_key(settings: Any) -> bool:
    if settings.api_key:
        return True
    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _end_torn_line(path: Path) -> None:
    """A killed writer may leave half a line: end it, so that the next row stands alone."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def to_file(path: Path) -> None:
    """Send this process's output, native libraries' included, to `path`."""

    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]

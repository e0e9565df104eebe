"""What a person sees of a run: a bar while it runs, a table at its end. Imports no torch.

    bar = Bar("demo"); bar.update(120, 840, loss=0.53, images_per_s=1234.0, eta_s=80.0, phase="training")

The trainer and the launcher show the same. Where the output is no terminal a plain line comes now and then.
"""

import contextlib
import errno
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from vitdist.rundir import RunDir

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
"""What a write meets on a disk that is full, over quota or away for a while: no reason to end a training."""


class Bar:
    """Progress of one run on stdout."""

    def __init__(self, name: str, every_s: float = 10.0) -> None:
        self._name, self._every_s = name, every_s
        self._line, self._shown, self._next = "", "", 0.0
        self._rich: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                expand=True,
            )
            self._task = self._rich.add_task(name, total=None, figures="")
            self._rich.start()

    def update(
        self,
        step: int,
        total: int,
        loss: float | None = None,
        images_per_s: float | None = None,
        eta_s: float | None = None,
        phase: str = "",
    ) -> None:
        """Show `step` of `total` (0: not known yet) with what figures there are."""
        figures = _figures(step, total, loss, images_per_s, eta_s, phase)
        if self._rich:
            self._rich.update(self._task, completed=step, total=total or None, figures=figures)
            return
        self._line = f"{self._name}: {figures}"
        if time.monotonic() >= self._next:
            self._write()

    def print(self, text: str) -> None:
        """A line of text above the bar."""
        if self._rich:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _print(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._rich:
            self._rich.stop()
        elif self._line != self._shown:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + self._every_s
        self._shown = self._line
        _print(self._line)


def _print(text: str) -> None:
    with _lost_if_full():
        print(text, flush=True)


@contextlib.contextmanager
def _lost_if_full() -> Iterator[None]:
    """What is printed within is lost where the disk behind stdout is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise


class _Forgiving(io.FileIO):
    """A file descriptor that a full disk makes lose what is written, instead of raising at every print."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return memoryview(data).nbytes


def spare_output() -> None:
    """For the entry of a program: its output may go to a full disk, and neither prints nor its exit fail by that.

    Python flushes stdout at exit, and ends with code 120 where that fails.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and not stream.isatty():
            stream.flush()
            setattr(sys, name, forgiving(descriptor))


def forgiving(descriptor: int) -> io.TextIOWrapper:
    """A text stream over `descriptor`, written line by line, that a full disk cannot fail, at exit neither."""
    raw = _Forgiving(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that shows how many `unit` of `total` are done: a bar on a terminal's stderr, nothing in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    speed = TextColumn("{task.fields[speed]} " + unit + "/s")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, speed="-")

        def show(done: int) -> None:
            rate = done / max(bar.tasks[0].elapsed or 0, 0.1)
            bar.update(task, completed=done, speed=f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}")

        yield show


def _figures(
    step: int, total: int, loss: float | None, images_per_s: float | None, eta_s: float | None, phase: str
) -> str:
    parts = [f"{step}/{total}"] if total else []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if images_per_s is not None:
        parts.append(f"{images_per_s:,.0f} images/s")
    if eta_s is not None:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join([*parts, phase] if phase else parts)


def duration(seconds: float) -> str:
    """1:02:03, and days where there are any."""
    return str(timedelta(seconds=max(0, round(seconds))))


def final_table(run: RunDir, summary: Mapping[str, Any]) -> None:
    """The result in one table, and where model, report and W&B rows are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("top-1", "macro-F1", "images/s", "time")
    table.add_row(
        _shown(summary, "top1", lambda share: f"{100 * share:.2f} %"),
        _shown(summary, "macro_f1", lambda score: f"{score:.3f}"),
        _shown(summary, "images_per_s", lambda rate: f"{rate:,.0f}"),
        _shown(summary, "seconds", duration),
    )
    with _lost_if_full():
        Console().print(table)
    places = {"model": run.model, "report": run.report}
    lines = [f"{name:<8}{path}" for name, path in places.items() if path.exists()]
    if any(run.wandb.glob("offline-run-*")):
        lines.append(f"W&B     vitdist sync {run.path}")
    _print("\n".join(lines))


def _shown(summary: Mapping[str, Any], name: str, words: Any) -> str:
    value = summary.get(name)
    return "-" if value is None else words(value)

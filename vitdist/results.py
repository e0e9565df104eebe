"""What an evaluation says, as tables for people: of one model, of several runs beside each other. Imports no torch.

    results.show(rundir.read_json(run.evaluation), "runs/NAME")
    results.compare({"runs/a": record, "runs/b": record}, scores.spread(...))

A record is evaluation.json (docs/evaluation.md), or the same of `vitdist evaluate`. The model card uses the words too.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdist import rundir
from vitdist.rundir import RunDir

if TYPE_CHECKING:
    from vitdist.scores import Spread

METRICS = {
    "top1": "accuracy (top-1)",
    "top5": "accuracy (top-5)",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC (each class against the rest, mean)",
    "calibration_error": "calibration error (ECE)",
    "loss": "loss",
}
"""The metrics that people are shown, in that order, and their names."""

_MOST_CLASSES = 40
"""Rows of a table of classes; the lowest recalls come first."""
_NO_SHARES = ("loss", "auroc", "macro_f1", "f1")


def figure(metric: str, value: float) -> str:
    """A metric as people read it: shares of samples in percent."""
    return f"{value:.3f}" if metric in _NO_SHARES else f"{100 * value:.1f} %"


def mistaken(name: str, classes: list[str], confusion: list[list[int]]) -> str:
    """`class (times)` that samples of `name` were most often taken for, or -."""
    true = classes.index(name)
    wrong = [(-count, i) for i, count in enumerate(confusion[true]) if i != true and count]
    return f"{classes[min(wrong)[1]]} ({-min(wrong)[0]})" if wrong else "-"


def worst_first(record: Mapping[str, Any], most: int = _MOST_CLASSES) -> tuple[list[dict[str, Any]], int]:
    """The rows of at most `most` classes that have samples, the lowest recall first; and how many have samples."""
    rows = [row for row in record["per_class"] if row["support"]]
    return sorted(rows, key=lambda row: (row["recall"], row["name"]))[:most], len(rows)


def class_cells(row: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Name, samples, recall, its interval, precision, F1 and what a class is most often taken for, as text."""
    taken = mistaken(row["name"], record["classes"], record["confusion"])
    recall, precision, f1 = (figure(score, row[score]) for score in ("recall", "precision", "f1"))
    between = between_words("recall", row.get("recall_interval"))
    return [row["name"], f"{row['support']:,}", recall, between, precision, f1, taken]


def between_words(metric: str, interval: Sequence[float] | None) -> str:
    """`low to high`, or - where there is no interval."""
    return " to ".join(figure(metric, bound) for bound in interval).replace(" % to", " to") if interval else "-"


def show(record: Mapping[str, Any], title: str) -> None:
    """Metrics with their intervals, then the classes, the lowest recall first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    metrics, intervals = record["metrics"], record.get("intervals") or {}
    of = f"{metrics['samples']:,} samples" + (", with their mirror images" if record.get("tta") == "flip" else "")
    unread = f", {metrics['unreadable']:,} could not be read" if metrics.get("unreadable") else ""
    _line(console, f"{title}: {of}{unread}")
    table = Table("metric", "value", "95 % interval")
    for metric, words in METRICS.items():
        if metrics.get(metric) is not None:
            table.add_row(words, figure(metric, metrics[metric]), between_words(metric, intervals.get(metric)))
    console.print(table)
    rows, occurring = worst_first(record)
    classes = Table("class", "samples", "recall", "95 % interval", "precision", "F1", "taken for")
    for row in rows:
        classes.add_row(*map(Text, class_cells(row, record)))
    console.print(classes)
    _show_decision(console, record.get("decision"))
    _show_point(console, record.get("operating_point"))
    if len(rows) < occurring:
        console.print(f"the {len(rows)} lowest recalls of {occurring:,} classes; --json has all of them")


def _show_decision(console: Any, found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    decided = "-" if found["accuracy_decided"] is None else figure("", found["accuracy_decided"])
    _line(
        console,
        f"with `unsure`: decides {figure('', found['coverage'])}, of these {decided} are right (deciding always: "
        f"{figure('', found['accuracy_decided_always'])}); mean cost {found['mean_cost']:.3f} "
        f"(deciding always: {found['mean_cost_decided_always']:.3f})",
    )


def _show_point(console: Any, found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    asked = "recall" if found["asked"]["precision"] is None else "precision"
    missed = "" if found["reached"] else f"; a {asked} of {figure('', found['asked'][asked])} cannot be reached"
    _line(
        console,
        f"{found['class']} from a probability of {found['threshold']:.4f} on: recall {figure('', found['recall'])}, "
        f"precision {figure('', found['precision'])}; {figure('', found['flagged'])} of all are flagged{missed}",
    )


def _line(console: Any, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def of_runs(runs: Sequence[RunDir], json_file: str | None = None) -> None:
    """What runs have measured themselves: of one its last evaluation, of several each, mean and standard deviation.

    Raises ValueError for a run without an evaluation, and for runs that measured other classes.
    """
    from vitdist import scores

    records = {}
    for run in runs:
        record = rundir.read_json(run.evaluation)
        if record is None:
            raise ValueError(f"{run.path}: has no evaluation yet (state: {rundir.state(run)['state']})")
        records[str(run.path)] = record
    first = next(iter(records.values()))
    odd = next((name for name, record in records.items() if record["classes"] != first["classes"]), None)
    if odd:
        raise ValueError(f"{odd}: measured other classes than {next(iter(records))}: their figures have no common mean")
    if len(records) < len(runs):
        raise ValueError("a run is named twice: it would count twice in the mean")
    spread = scores.spread([record["metrics"] for record in records.values()])
    summary = {
        "runs": records,
        "spread": {name: {"mean": found[0], "deviation": found[1], "runs": found[2]} for name, found in spread.items()},
    }
    found = first if len(records) == 1 else summary
    if json_file == "-":
        print(json.dumps({"schema": rundir.SCHEMA, **found}, indent=1, ensure_ascii=False))
        return
    if len(records) == 1:
        show(first, f"{runs[0].path} after {first['step']:,} updates")
    else:
        compare(records, spread)
    if json_file:
        rundir.publish_json(Path(json_file), found)


def compare(records: Mapping[str, Mapping[str, Any]], spread: Mapping[str, "Spread"]) -> None:
    """A row for each run, then their mean and sample standard deviation."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [m for m in METRICS if any(record["metrics"].get(m) is not None for record in records.values())]
    table = Table("run", "samples", *(METRICS[metric].split(" (each")[0] for metric in shown))
    for name, record in records.items():
        values = (record["metrics"].get(metric) for metric in shown)
        cells = ("-" if v is None else figure(m, v) for m, v in zip(shown, values, strict=True))
        table.add_row(Text(name), f"{record['metrics']['samples']:,}", *cells)
    table.add_section()
    known = [spread.get(metric) for metric in shown]
    means = ("-" if s is None else figure(m, s.mean) for m, s in zip(shown, known, strict=True))
    deviations = (
        "-" if s is None or s.deviation is None else figure(m, s.deviation) for m, s in zip(shown, known, strict=True)
    )
    table.add_row(f"mean of {len(records)}", "", *means)
    table.add_row("standard deviation", "", *deviations)
    Console().print(table)


@contextlib.contextmanager
def table(head: list[str]) -> Iterator[Callable[[list[str]], None]]:
    """Takes rows of text and prints them at the end, aligned; columns without any text are left out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows: list[list[str]] = []
    yield rows.append
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    shown = Table(box=None)
    for i in used:
        shown.add_column(Text(head[i]), overflow="fold", no_wrap=0 < i < len(head) - 1)  # a path, an error may be long
    for row in rows:
        shown.add_row(*(Text(row[i]) for i in used))
    Console().print(shown)

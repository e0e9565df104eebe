"""What is in a data set: classes, sizes, colours, pictures that are there twice, groups on both sides of a split.

    vitdist stats shards                                 # train, val and test in it; a page, shards/stats.html
    vitdist stats shards/train shards/val --json all.json
    vitdist stats shards --out classes.png               # samples of each class as a picture; .svg, .html

Minutes before a training that save hours after it: a label that two copies disagree in, a validation picture
that was trained on, a patient in both. 1,000 pictures of 224x224 a second on one core. Imports no torch.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitdist import rundir
from vitdist.data import stats_page, storage
from vitdist.data.survey import (
    SAMPLES,
    Record,
    Stats,
    crossing_groups,
    facts,
    kind,
    measure,
    ranked,
    record,
    sample_record,
    sentences,
)

SHOWN = 10
"""Pairs and groups of each kind that are printed."""
_CLASSES_PRINTED = 40


def run(
    folders: Sequence[str | Path],
    *,
    samples: int = SAMPLES,
    out: str | Path | None = None,
    json_file: str | Path | None = None,
    workers: int | None = None,
) -> None:
    """The command: print what is found, draw it into `out`, by default stats.html beside the splits."""
    if out and Path(out).suffix not in (".html", ".svg", ".png"):
        raise ValueError(f"--out {out}: a name that ends in .html, .svg or .png")
    stats = measure(folders, samples=samples, workers=workers)
    show(stats)
    if json_file:
        rundir.publish(Path(json_file), json.dumps(record(stats), indent=1, ensure_ascii=False) + "\n")
    place = Path(out) if out else _beside([part.folder for part in stats.splits.values()]) / "stats.html"
    stats_page.write(stats, place)
    print(f"as a page: {place}" if place.suffix == ".html" else f"samples of each class: {place}")


def _beside(folders: Sequence[str]) -> Path:
    """Where the page of these splits goes: the folder of all, or the current one where that cannot be written."""
    if any(storage.is_remote(folder) for folder in folders):
        return Path()
    folder = Path(os.path.commonpath([Path(folder).absolute() for folder in folders]))
    return folder if os.access(folder, os.W_OK) else Path()


def show(stats: Stats) -> None:
    """Tables and lines on the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_class_table(stats))
    for name, value in facts(stats):
        console.print(f"{name:<12}{value}", markup=False, soft_wrap=True)
    for line in sentences(stats) or ["no copies, no groups across splits, nothing broken"]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    shown: Counter[str] = Counter()
    for pair in ranked(stats):
        what = kind(stats, pair)
        shown[what] += 1
        if shown[what] <= SHOWN:
            alike = "same file" if pair.exact else f"{pair.likeness:.3f} alike"
            first, second = (_told(sample_record(stats, row)) for row in (pair.first, pair.second))
            console.print(f"{what}: {first} = {second} ({alike})", markup=False, soft_wrap=True)
    for group, counts in crossing_groups(stats)[:SHOWN]:
        where = ", ".join(f"{n} in {name}" for name, n in zip(stats.splits, counts, strict=True) if n)
        console.print(f"group across splits: {group}: {where}", markup=False, soft_wrap=True)


def _told(sample: Record) -> str:
    return f"{sample['split']} {sample['key']} {sample.get('path', '')} [{sample['class']}]"


def _class_table(stats: Stats) -> Any:
    from rich.table import Table

    total = stats.counts.sum(0)
    order = np.argsort(-total, kind="stable").tolist()
    table = Table("class", *stats.splits, "share", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    half = _CLASSES_PRINTED // 2
    folded = len(order) > _CLASSES_PRINTED
    for place, k in enumerate(order):
        if folded and half <= place < len(order) - half:
            if place == half:
                table.add_row(f"... {len(order) - 2 * half:,} classes between ...")
            continue
        cells = [f"{n:,}" for n in stats.counts[:, k].tolist()]
        table.add_row(_plain(stats.classes[k]), *cells, f"{100 * total[k] / total.sum():.1f} %")
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in stats.counts.sum(1).tolist()), "")
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # brackets in a class's name are no markup

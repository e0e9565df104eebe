"""Several runs beside each other: what they differ in, which was best and whether that can be said, curves together.

    vitdist report runs/a runs/b                # runs/comparison.html
    vitdist report runs/lr                      # a sweep, or any folder of runs: comparison.html in it

A run that failed or goes on is there too, with its state.
"""

import hashlib
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitdist import config, results, scores, selection
from vitdist.config import Config
from vitdist.report import charts, sweep
from vitdist.report.charts import Chart
from vitdist.report.facts import Facts, Points, Record, read
from vitdist.report.sweep import Axis, Effect
from vitdist.report.words import DONE, cost, duration, figure, going, percent, reproduction, setting, verdict
from vitdist.rundir import RunDir

SHOWN = 12  # runs with a colour in the charts, the best ones; the others are grey
GREY = 100  # of these so many, of so many points: a page of 1,000 runs stays under 3 MB
RESAMPLES = 1000
NOISE = 0.05
MANY = 12  # finished runs from which on a setting's effect may be told from chance
TESTED = 30  # runs that are held against the best one: of 50,000 samples and 1,000 classes, 0.2 s each
BESIDE = 6  # settings that differ up to which they are columns of the table of runs
PAIRED = ("top1", "balanced_accuracy", "macro_f1")
"""Metrics of labels and predicted classes alone, which predictions.npz holds for each sample."""
APART = ("tracking.",)
"""Settings that say nothing of how a run trains."""
IDLE = ("evaluation.", "checkpoint.", "train.seed")
"""Settings that differ, but are nothing to choose: how a run is measured and saved. Seeds repeat a run."""


@dataclass(frozen=True)
class Entry:
    """One of the runs, as the comparison tells of it."""

    run: RunDir
    name: str
    word: str
    sentence: str
    going: bool
    settings: Record
    """Dotted name -> value."""
    metrics: Record
    """Of the newest evaluation; {} before the first one."""
    intervals: Record
    step: int
    total: int | None
    seconds: float
    cost: tuple[str, str]
    fast: float | None
    ranks: str
    code: str
    train: str
    """Digest of the training set."""
    val: str
    batch: int
    curves: dict[str, Points]
    again: str
    """The command that runs the same once more."""

    def best(self, metric: str) -> tuple[int, float] | None:
        """Step and value of the best evaluation on the way."""
        return selection.best(self.curves[f"val/{metric}"], metric)


@dataclass(frozen=True)
class Comparison:
    entries: list[Entry]
    """The best first, those without a result last."""
    metric: str
    varied: list[str]
    """Dotted names of the settings that differ."""
    chances: dict[str, float | None]
    """Name -> how often runs that are equally good would differ as much from the best; None: not to be told."""
    warnings: list[str]

    @property
    def valued(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.metrics.get(self.metric) is not None]

    @property
    def comparable(self) -> bool:
        """Whether all results are of the same validation set."""
        return len({entry.val for entry in self.valued}) <= 1

    @property
    def winners(self) -> list[Entry]:
        """The best, and those with the very same figure; none where figures cannot be compared."""
        valued = self.valued
        if len(valued) < 2 or not self.comparable:
            return []
        return [entry for entry in valued if entry.metrics[self.metric] == valued[0].metrics[self.metric]]


def read_all(runs: Sequence[RunDir]) -> Comparison:
    """Everything that is compared; one run's rows are in memory at a time."""
    entries = [_entry(read(run), name) for run, name in zip(runs, _names(runs), strict=True)]
    chosen = Counter(entry.settings["evaluation.best"] for entry in entries)
    metric = chosen.most_common(1)[0][0]
    sign = 1 if selection.higher_is_better(metric) else -1
    # The sort is stable: those without a result stay in the order in which they were named.
    entries.sort(key=lambda e: math.inf if e.metrics.get(metric) is None else -sign * e.metrics[metric])
    names = [name for name, _, _, _ in config.flat(Config) if not name.startswith(APART)]
    for kind in ("train", "val"):  # the same data under another path is no difference
        if len({getattr(entry, kind) for entry in entries}) == 1:
            names.remove(f"data.{kind}")
    varied = [name for name in names if len({_key(entry.settings.get(name)) for entry in entries}) > 1]
    warnings = _warnings(entries)
    if len(chosen) > 1:
        warnings.append(f"The runs choose their best by {', '.join(sorted(chosen))}; here it is {metric}.")
    found = Comparison(entries, metric, varied, {}, warnings)
    chances = {e.name: _against(found.valued[0], e, metric) for e in found.valued[1:TESTED]} if found.winners else {}
    return Comparison(entries, metric, varied, chances, warnings)


def _names(runs: Sequence[RunDir]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _flat(settings: Record) -> Record:
    found = {}
    for name, _, default, _ in config.flat(Config):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[name] = (None if default is ... else config.to_plain(default)) if value is None else value
    return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _entry(facts: Facts, name: str) -> Entry:
    record, data = facts.record, facts.about("data")
    keys = (*(f"val/{metric}" for metric in results.METRICS), "train/loss", "perf/images_per_s")
    word, sentence = verdict(facts)
    return Entry(
        run=facts.run,
        name=name,
        word=word,
        sentence=sentence,
        going=going(facts),
        settings=_flat(facts.settings),
        metrics=facts.scores,
        intervals=facts.evaluation.get("intervals") or {},
        step=max((start.last for start in facts.starts), default=0),
        total=record.get("total_steps"),
        seconds=facts.seconds,
        cost=cost(facts),
        fast=facts.about("summary").get("images_per_s") or facts.middle("perf/images_per_s"),
        ranks=f"{record['world']} x {record.get('device', 'rank')}" if "world" in record else "",
        code=_code(facts),
        train=(data.get("train") or {}).get("digest", ""),
        val=(data.get("val") or {}).get("digest", ""),
        batch=facts.about("batch").get("global_batch", 0),
        curves={key: charts.thin(*facts.history.series(key), charts.POINTS) for key in keys},
        again=reproduction(facts)[-1],
    )


def _warnings(entries: Sequence[Entry]) -> list[str]:
    told = []
    for what, differ, so, length in (
        ("val", "Measured on different validation sets", "these figures cannot be compared", 16),
        ("train", "Trained on different data", "differences may come from there", 16),
        ("code", "Ran with different code", "differences may come from there", None),
        ("ranks", "Ran on different machines", "times, cost and images/s cannot be compared", None),
    ):
        groups: dict[str, list[str]] = {}
        for entry in entries:
            if of := getattr(entry, what):
                groups.setdefault(of, []).append(entry.name)
        if len(groups) > 1:
            which = "; ".join(f"{of[:length]}: {_some(names)}" for of, names in groups.items())
            told.append(f"{differ}, so {so} ({which}).")
    return told


def _code(facts: Facts) -> str:
    """The commit, of a run with uncommitted changes with a digest of them."""
    changes = ""
    if facts.env.get("dirty"):
        patch = facts.run.patch
        changes = "+" + (hashlib.sha256(patch.read_bytes()).hexdigest()[:6] if patch.exists() else "")
    return (facts.env.get("commit") or "")[:12] + changes


def _some(names: Sequence[str]) -> str:
    named = [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else list(names)
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


# ---- can the best be told from the others? -------------------------------------------------------


def _against(best: Entry, other: Entry, metric: str) -> float | None:
    """How often chance alone would put two equally good runs so far apart on these samples."""
    if metric not in PAIRED or not (best.run.predictions.exists() and other.run.predictions.exists()):
        return None
    try:
        with np.load(best.run.predictions) as a, np.load(other.run.predictions) as b:
            if not all(np.array_equal(a[name], b[name]) for name in ("ids", "labels")):
                return None
            labels, answers = a["labels"], (a["predicted"], b["predicted"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # empty, cut off or another file: the intervals stand in
    return chance(labels, *answers, metric)


def chance(labels: np.ndarray, a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """Two-sided p of the difference between two models' answers to the same samples.

    Approximate randomization (Noreen 1989; Yeh 2000 for F1): were the models equally good, each sample's two answers
    might as well be swapped. Of top-1 this is McNemar's test. It is of the samples alone: other seeds vary too.
    """
    apart = np.flatnonzero(a != b)
    many = int(max(labels.max(), a.max(), b.max())) + 1
    labels_, a_, b_ = labels[apart], a[apart], b[apart]
    right = (b_ == labels_).astype(int) - (a_ == labels_).astype(int)
    support = np.bincount(labels, minlength=many)
    hits = [np.bincount(labels[of == labels], minlength=many) for of in (a, b)]
    said = [np.bincount(of, minlength=many) for of in (a, b)]

    def difference(swapped: np.ndarray) -> float:
        more = np.bincount(labels_[swapped], right[swapped], many)
        called = np.bincount(b_[swapped], minlength=many) - np.bincount(a_[swapped], minlength=many)
        one = _score(metric, hits[0] + more, said[0] + called, support)
        return one - _score(metric, hits[1] - more, said[1] - called, support)

    seen = abs(difference(np.zeros(len(apart), bool)))
    generator = np.random.default_rng(0)
    drawn = [abs(difference(generator.random(len(apart)) < 0.5)) for _ in range(RESAMPLES)]
    return (1 + sum(value >= seen - 1e-12 for value in drawn)) / (1 + RESAMPLES)


def _score(metric: str, hits: np.ndarray, said: np.ndarray, support: np.ndarray) -> float:
    if metric == "top1":
        return float(hits.sum() / support.sum())
    if metric == "balanced_accuracy":
        return float((hits[support > 0] / support[support > 0]).mean())
    both = support + said
    return float((2 * hits[both > 0] / both[both > 0]).mean())


# ---- in words and figures --------------------------------------------------------------------------


def head(found: Comparison) -> list[str]:
    """What came of it, in sentences."""
    called = results.METRICS[found.metric].split(" (each")[0]
    states = Counter(entry.word for entry in found.entries)
    many = f"{len(found.entries)} runs"
    if states.keys() != {"finished"}:
        many += f" ({', '.join(f'{count} {word}' for word, count in states.items())})"
    winners = found.winners
    if not winners:
        why = "none has been evaluated yet" if not found.valued else "their figures cannot be compared"
        return [f"{many}; {'only one has been evaluated yet' if len(found.valued) == 1 else why}."]
    best = winners[0]
    value = results.figure(found.metric, best.metrics[found.metric])
    between = results.between_words(found.metric, best.intervals.get(found.metric))
    value += f" (95 % interval {between})" if between != "-" else ""
    names = _some([entry.name for entry in winners])
    told = [f"Of {many}, {names} {'is' if len(winners) == 1 else 'are'} best: {called} {value}."]
    others = [entry.name for entry in found.valued if entry not in winners]
    apart = [_apart(found, entry) for entry in found.valued if entry not in winners]
    alike = [name for name, far in zip(others, apart, strict=True) if far is False]
    samples = best.metrics.get("samples")
    on = f"these {samples:,} validation samples" if samples else "these validation samples"
    if alike and len(alike) == len(others):
        told.append(f"None of the others can be told apart from it on {on}.")
    elif alike:
        told.append(f"On {on}, {_some(alike)} cannot be told apart from it.")
    elif others and all(apart):
        told.append(f"It is better than every other by more than the chance of {on} explains.")
    if found.varied == ["train.seed"] and len(found.valued) > 1:
        of = scores.spread([{found.metric: entry.metrics[found.metric]} for entry in found.valued])[found.metric]
        mean, deviation = (results.figure(found.metric, part) for part in (of.mean, of.deviation))
        seeds = f"{called} {mean}, standard deviation {deviation} (n = {of.runs})"
        told.append(f"They differ in their seed alone: {seeds}.")
    return told


def standing(found: Comparison, entry: Entry) -> str:
    """Where a run stands against the best one."""
    if entry in found.winners:
        return "best" if len(found.winners) == 1 else "best, tied"
    p, apart = found.chances.get(entry.name), _apart(found, entry)
    if apart is None:
        return ""
    if p is None:
        return "behind" if apart else "within noise (intervals overlap)"
    return f"behind (p {p:.2g})" if apart else f"within noise (p {p:.2g})"


def _apart(found: Comparison, entry: Entry) -> bool | None:
    """Whether a run is behind the best by more than chance explains; None where that cannot be told."""
    if not found.winners:
        return None
    p = found.chances.get(entry.name)
    if p is not None:
        return p <= NOISE
    # Intervals of two runs on the same samples overlap too often: that claims noise rather than a difference.
    one, other = (e.intervals.get(found.metric) for e in (found.winners[0], entry))
    return bool(one[0] > other[1] or one[1] < other[0]) if one and other else None


def together(found: Comparison) -> list[Chart]:
    """Curves of all runs over each other; over images where a step is not the same for all."""
    batches = {entry.batch for entry in found.entries if entry.batch}
    steps = len(batches) <= 1
    x = "step" if steps else "training images"
    metric = found.metric
    called = results.METRICS[metric].split(" (each")[0]
    form = "~r" if metric in ("loss", "auroc", "macro_f1") else "~%"
    kinds: tuple[tuple[str, str, str, str, Record], ...] = (
        ("quality", f"{called[0].upper()}{called[1:]}", "On the validation set.", f"val/{metric}", {"format": form}),
        ("validation-loss", "Validation loss", "", "val/loss", {}),
        ("training-loss", "Training loss", "Smoothed labels and augmentation raise it.", "train/loss", {}),
        ("throughput", "Images per second", "Of all ranks.", "perf/images_per_s", {"format": ",~f", "zero": True}),
    )
    made = []
    for name, title, about, key, more in kinds if metric != "loss" else kinds[1:]:
        shown = [entry for entry in found.entries[:SHOWN] if len(entry.curves[key]) > 1]
        others = [entry for entry in found.entries[SHOWN : SHOWN + GREY] if len(entry.curves[key]) > 1]
        curves = {}
        for entry in [*others[::-1], *shown]:
            at, of = (np.array(part) for part in zip(*entry.curves[key], strict=True))
            points = charts.thin(at, of, charts.POINTS if entry in shown else GREY)
            curves[entry.name] = points if steps else [(s * entry.batch, v) for s, v in points]
        numbers = {entry.name: i for i, entry in enumerate(found.entries)}
        if curves:
            made.append(Chart(name, title, about, curves, x=x, context=len(others), numbers=numbers, **more))
    return made


def relative(path: Path, home: Path) -> str:
    return Path(os.path.relpath(path.resolve(), home.resolve())).as_posix()


# ---- tables ----------------------------------------------------------------------------------------


def table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and a row for each run: name, state, result, ..."""
    metric = found.metric
    more = [m for m in ("top1", "macro_f1", "loss") if m != metric]
    more = [m for m in more if any(entry.metrics.get(m) is not None for entry in found.entries)]
    varied = found.varied if len(found.varied) <= BESIDE else []
    units = {entry.cost[1] for entry in found.entries if entry.seconds}
    unit = units.pop() if len(units) == 1 else "cost"
    columns = ["run", "state", _short(metric), "interval", "against the best", *varied, *map(_short, more)]
    columns += ["best on the way", "steps", "time", unit, "images/s"]
    rows = []
    for entry in found.entries:
        value = entry.metrics.get(metric)
        steps = f"{entry.step:,}" + (f" of {entry.total:,}" if entry.total and entry.total != entry.step else "")
        best = entry.best(metric)
        way = f"{results.figure(metric, best[1])} at {best[0]:,}" if best else ""
        rows.append(
            [
                entry.name,
                entry.word,
                "" if value is None else results.figure(metric, value),
                results.between_words(metric, entry.intervals.get(metric)).replace("-", ""),
                standing(found, entry),
                *(setting(entry.settings.get(name)) for name in varied),
                *("" if entry.metrics.get(m) is None else results.figure(m, entry.metrics[m]) for m in more),
                way,
                steps,
                duration(entry.seconds) if entry.seconds else "",
                (entry.cost[0] if unit != "cost" else " ".join(entry.cost)) if entry.seconds else "",
                figure(entry.fast) if entry.fast else "",
            ]
        )
    used = [i for i in range(len(columns)) if i < 3 or any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def _short(metric: str) -> str:
    return {"top1": "top-1", "macro_f1": "macro-F1"}.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Swept:
    """What the finished runs of a sweep tell of its settings."""

    names: list[str]
    axes: list[Axis]
    told: list[str]
    """The settings of each run, in a line."""
    effects: list[Effect]


def effect_cells(effect: Effect, metric: str, many: int) -> tuple[str, str, str]:
    """Share of the variance, p, and what was found, as text, of a setting of so many runs.

    A rank correlation is 0 where the best value lies in the middle, the usual case: it claims no share.
    """
    if effect.correlation is None:
        means = [f"{value}: {results.figure(metric, mean)}" for value, mean in effect.means[: sweep.MOST_TICKS]]
        more = " ..." if len(effect.means) > sweep.MOST_TICKS else ""
        return percent(effect.share), f"{effect.chance:.2g}", ", ".join(means) + more
    pick = max if selection.higher_is_better(metric) else min
    best, _ = pick(effect.means, key=lambda mean: mean[1])
    trend = f"trend r = {effect.correlation:+.2f}, which sees no best value in the middle"
    return "", f"{effect.chance:.2g}" if many >= sweep.CHANCE else "", f"best at {best}; {trend}"


def swept(found: Comparison) -> Swept | None:
    """None for too few finished runs, or for settings that do not differ among them."""
    done = [entry for entry in found.valued if entry.word == DONE]
    values = {n: [entry.settings.get(n) for entry in done] for n in found.varied if not n.startswith(IDLE)}
    values = {name: of for name, of in values.items() if len({_key(value) for value in of}) > 1}
    if len(done) < sweep.FEWEST or not found.comparable:
        return None
    result = [entry.metrics[found.metric] for entry in done]
    effects = sweep.effects(values, result)
    if not effects:
        return None
    short = {name: name.rpartition(".")[2] for name in values}
    twice = {name for name, count in Counter(short.values()).items() if count > 1}
    called = {name: name if short[name] in twice else short[name] for name in values}
    # The strongest stands next to the result.
    axes = [sweep.axis(called[effect.name], values[effect.name]) for effect in reversed(effects[: sweep.MOST_AXES])]
    better = selection.higher_is_better(found.metric)
    axes.append(sweep.result(_short(found.metric), result, better, lambda value: results.figure(found.metric, value)))
    told = [", ".join(f"{name} {setting(of[i])}" for name, of in values.items()) for i in range(len(done))]
    return Swept([entry.name for entry in done], axes, told, effects)

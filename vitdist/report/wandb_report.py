"""A run, or several beside each other, as a W&B Report with the sections of our page.

    vitdist report runs/NAME --wandb              # saved at W&B; a second time: the same report, written anew
    vitdist report runs/NAME --wandb --dry-run    # its JSON alone, without a network or a key

Words and tables come from the run folder; curves are panels that W&B draws from its own rows of these runs.
The JSON always lies beside the run (wandb-report.json) and remembers which report it is.
"""

import copy
import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
import wandb_workspaces.reports.v2 as wr

from vitdist import config, results, rundir, selection
from vitdist.report import charts, compare, folders, markdown
from vitdist.report.compare import Comparison
from vitdist.report.facts import Facts, Record, class_counts, confused, differing, read, recipe, undone, waits
from vitdist.report.page import expectation, measured, newest
from vitdist.report.words import (
    cost,
    duration,
    figure,
    goodput,
    moment,
    open_to_all,
    percent,
    reproduction,
    resumption,
    setting,
    verdict,
)
from vitdist.rundir import RunDir

MATRIX = 20  # classes up to which a confusion matrix is a table that can be read
MOST_CLASSES = 50  # rows of a table of classes, the hardest first
MOST_EVENTS = 30
MOST_SETTINGS = 10  # columns of the settings that differ between runs
MOST_RUNS = 100  # lines in one panel
LONG = 300  # letters of a value in a table
TITLE = 128  # W&B takes no longer one
COLUMNS = 24  # of W&B's grid
SWEEP = 3  # runs from which on parallel coordinates and importance say something

STEP = "train/global_step"

# W&B tries for minutes where nobody answers: these say as much.
ANSWER_S, RETRIES = 10, 2

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")

Curves = tuple[str, tuple[str, ...]]
"""Title of a panel, keys of rows."""
Sections = list[tuple[str, list[Any]]]
"""(title, blocks; None for what there is not) of each section. The first one's is the report's title."""
Grid = Callable[..., list[Any]]
"""A function that lays panels out over the runs of the report."""


class NotSavedError(RuntimeError):
    """Why W&B does not have a report whose JSON was written, and what to do about it."""


def save(runs: Sequence[RunDir], home: Path, dry_run: bool = False) -> tuple[Path, str]:
    """Write the report's JSON and, unless `dry_run`, save the report at W&B; returns the JSON's path and the URL.

    `home` is the folder that was named or that the runs share. Raises ValueError for what cannot be reported,
    NotSavedError where only the JSON could be written.
    """
    found = read(runs[0]) if len(runs) == 1 else compare.read_all(runs)
    path = place(runs, home)
    known = rundir.read_json(path) or {}
    report, url = build(found), known.get("url", "")
    report.id = known.get("id", "")
    _write(path, report, url)
    if dry_run:
        return path, url
    try:
        report = _upload(found, report.id)
        url = report.url
    except Exception as error:  # W&B raises anything: its own errors, those of its service, plain Exception
        raise NotSavedError(f"{_said(error)}\nwhat would be sent is in {path}") from error
    finally:
        wandb.teardown()
    _write(path, report, url)
    return path, url


def place(runs: Sequence[RunDir], home: Path) -> Path:
    """Where the JSON lies: in the run or the sweep; of other runs in their common folder, under a name for them."""
    if len(runs) == 1 or (home / folders.SWEEP).exists():
        return home / "wandb-report.json"
    names = sorted(compare.relative(run.path, home) for run in runs)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return home / f"wandb-report-{digest[:8]}.json"


def specification(report: Any) -> Record:
    """`report` as W&B's server gets it, made without asking it.

    A runset asks the server for the internal id of its project when it is written out. Here runsets are written without
    a project, which is put in afterwards: that id is all that is missing.
    """
    report, projects = copy.deepcopy(report), []
    for runset in _runsets(report):
        projects.append({"name": runset.project, "entityName": runset.entity})
        runset.entity = ""
    made: Record = json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True))
    grids = (block["metadata"] for block in made["spec"]["blocks"] if block["type"] == "panel-grid")
    for runset, project in zip((one for grid in grids for one in grid["runSets"]), projects, strict=True):
        runset["project"] = project
    return made


def build(found: Facts | Comparison, entity: str = "") -> Any:
    """The report of a run or of several; `entity` is that of runs whose settings name none. Asks no server.

    Raises ValueError for a run that W&B cannot know.
    """
    ids: dict[tuple[str, str], list[str]] = {}
    for run in _members(found):
        ids.setdefault(_project(run, entity), []).append(_wandb_id(run))
    name = found.run.name if isinstance(found, Facts) else f"{len(found.entries)} runs"

    def grid(panels: Sequence[Any], hidden: bool = True) -> list[Any]:
        """Panels over exactly these runs, two or three in a row."""
        if not panels:
            return []
        width = COLUMNS // min(3 if len(panels) % 2 else 2, len(panels))
        for i, panel in enumerate(panels):
            row, column = divmod(i, COLUMNS // width)
            panel.layout = wr.Layout(x=column * width, y=row * 8, w=width, h=8)
        runsets = [
            wr.Runset(entity=owner, project=project, name=name, filters=f"Metric('ID') in {kept!r}")
            for (owner, project), kept in ids.items()
        ]
        return [wr.PanelGrid(runsets=runsets, panels=list(panels), hide_run_sets=hidden)]

    sections = _of_one(found, grid) if isinstance(found, Facts) else _of_several(found, grid)
    (title, opening), *rest = [(title, [block for block in blocks if block]) for title, blocks in sections]
    blocks = [*opening, wr.TableOfContents()]
    for heading, inside in rest:
        blocks += [wr.H2(text=heading), *inside] if inside else []
    owner, project = next(iter(ids))
    return wr.Report(
        entity=owner,
        project=project,
        title=plain(title)[:TITLE],
        description=f"Written by `vitdist report --wandb`, {moment(time.time())}.",
        blocks=blocks,
        width="fixed",
    )


# ---- one run -----------------------------------------------------------------------------------

SPEED: list[Curves] = [
    ("Images per second", ("perf/images_per_s",)),
    ("Waiting for data, % of the time", ("perf/data_wait_pct",)),
    ("Seconds a step", ("perf/step_p50_s", "perf/step_p95_s", "perf/step_max_s")),
    ("MFU, % of the FLOPs that the GPU can do", ("perf/mfu_pct",)),
    ("GPU memory, GiB", ("perf/memory_gib",)),
    ("Processors, mean of all nodes, and memory of the fullest, %", ("sys/cpu_pct", "sys/ram_pct")),
    ("GPUs, mean of all nodes, %", ("sys/gpu_pct",)),
]
LOGARITHMIC = {"optim/grad_norm", "optim/loss_scale", "lr/.*"}


def _of_one(facts: Facts, grid: Grid) -> Sections:
    run, (word, sentence), logged = facts.run, verdict(facts), facts.history.names()

    def curves(*shown: Curves) -> list[Any]:
        known = ((title, tuple(key for key in keys if key in logged)) for title, keys in shown)
        return grid(_plots((title, keys) for title, keys in known if keys))

    shares = tuple(f"val/{name}" for name in ("top1", "balanced_accuracy", "macro_f1"))
    optimizer: list[Curves] = [("Gradient norm", ("optim/grad_norm",))]
    if facts.record.get("precision") == "fp16":
        optimizer += [("Loss scale", ("optim/loss_scale",)), ("Skipped updates", ("optim/skipped_steps",))]
    lost: list[Curves] = [("Goodput, % of the steps", ("run/goodput_pct",))] if len(facts.starts) > 1 else []
    if any(count for _, count in facts.series("data/bad_samples")):
        lost.append(("Broken samples that were met", ("data/bad_samples",)))
    fan = [("Learning rate of each group", ("lr/.*",))] if charts.peaks(facts) else []
    return [
        (f"{run.name} {word}", [wr.CalloutBlock(text=plain(f"{run.name}: {sentence}")), *_opening(facts)]),
        ("What ran", _what_ran(facts)),
        ("Data", [*_data(facts), *grid(_inputs(run))]),
        ("Learning curves", curves(("Loss", ("train/loss", "val/loss")), ("Quality", shares))),
        ("Learning rate of each layer", [*grid(_plots(fan)), _groups(facts)]),
        ("Optimizer", curves(*optimizer)),
        ("Speed", curves(*SPEED)),
        ("Classes", [*_classes(facts), *grid(_pictures(run, "val/pictures"))]),
        ("Calibration", _calibration(facts)),
        ("Worst mistakes", grid(_pictures(run, "val/mistakes"))),
        ("Reliability", [*_reliability(facts), *curves(*lost)]),
        ("Files and commands", _commands(facts)),
    ]


def _plots(curves: Iterable[Curves], runs: int = 1) -> list[Any]:
    """A panel for each of `curves`; a key that is a pattern stands alone."""
    panels = []
    for title, keys in curves:
        drawn = {"metric_regex": keys[0]} if keys[0].startswith("lr/") else {"y": list(keys)}
        log, most = bool(LOGARITHMIC & set(keys)) or None, min(MOST_RUNS, runs) if runs > 1 else None
        panels.append(wr.LinePlot(title=title, x=STEP, log_y=log, max_runs_to_show=most, **drawn))
    return panels


def _opening(facts: Facts) -> list[Any]:
    """The figures that one looks for first, and what was expected of them."""
    rows, counts = measured(facts), class_counts(facts, "val").values()
    naive = (
        f"Always naming the largest class would be right for {percent(max(counts) / sum(counts))}." if counts else ""
    )
    (hours, unit), fast = cost(facts), facts.about("summary").get("images_per_s") or facts.middle("perf/images_per_s")
    more = [("time", duration(facts.seconds), ""), (unit, hours, "")] if facts.seconds else []
    more += [("images/s", figure(fast), "")] if fast else []
    return [
        _text(expectation(facts)),
        _text("" if facts.record["state"] == "done" else newest(facts)),
        _table(("figure", "value", "95 % interval"), [*rows, *more]),
        _text(naive if rows else ""),
    ]


def _what_ran(facts: Facts) -> list[Any]:
    """Model, batch, engine and code; the settings that differ from the recipe and from the defaults."""
    record, env, model, batch, base = facts.record, facts.env, facts.about("model"), facts.about("batch"), recipe(facts)
    zero = f"ZeRO-{record['zero']}" if record.get("zero") else "every rank holds all"
    split = "{global_batch} = {micro_batch} x {accumulation} x {world} ranks"
    versions = env.get("versions") or env.get("packages") or facts.about("versions")
    known = [
        ("model", model.get("name")),
        ("weights", model.get("weights")),
        ("parameters", f"{model['parameters']:,}, of which {model['trainable']:,} trained" if model else ""),
        ("batch", split.format(**batch) if batch else ""),
        ("engine", f"{record['precision']}, {zero}" if "precision" in record else ""),
        ("ran on", f"{record['world']} x {record.get('device', 'rank')}" if "world" in record else ""),
        ("code", (env.get("commit") or "")[:12] + (" with uncommitted changes" if env.get("dirty") else "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    changed = [(name, setting(value), setting(usual)) for name, value, usual in base.changed] if base else []
    differ = [(name, setting(value), setting(usual)) for name, value, usual in differing(facts.settings)]
    own = f"Settings that differ from {base.name}" if base else ""
    return [
        _table(("what", "which"), [(name, value) for name, value in known if value]),
        *_titled(plain(own), _table(("setting", "value", "recipe"), changed)),
        *_titled("Settings that are not the default", _table(("setting", "value", "default"), differ)),
    ]


def _data(facts: Facts) -> list[Any]:
    """Both sets, and the samples of each class; of many classes the largest and the smallest."""
    sets = {kind: facts.about("data").get(kind) for kind in ("train", "val")}
    sizes = [(kind, f"{about['samples']:,}", about["digest"][:12]) for kind, about in sets.items() if about]
    counts, val = sorted(class_counts(facts, "train").items(), key=lambda one: -one[1]), class_counts(facts, "val")
    half, many = MATRIX // 2, len(counts) > MATRIX
    few = [*counts[:half], *counts[-half:]] if many else counts
    title = f"The {half} largest and the {half} smallest of {len(counts):,} classes" if many else "Classes"
    rows = [(name, f"{count:,}", f"{val[name]:,}" if name in val else "") for name, count in few]
    return [
        _table(("set", "samples", "digest"), sizes),
        *_titled(title, _table(("class", "training samples", "validation"), rows)),
    ]


def _inputs(run: RunDir) -> list[Any]:
    shown = wr.MediaBrowser(title="The first inputs, as the model got them", media_keys=["inputs"])
    return [shown] if _uploaded(run, "images/inputs") else []


def _groups(facts: Facts) -> Any:
    columns = ("name", "lr_scale", "weight_decay", "tensors", "parameters")
    groups = [[figure(group.get(column)) for column in columns] for group in facts.record.get("groups") or ()]
    return _table(("group", "rate x", "weight decay", "tensors", "parameters"), groups)


def _classes(facts: Facts) -> list[Any]:
    """Scores of each class, the confusion matrix of a few, the mistakes made most often."""
    record = facts.evaluation
    if not record:
        return []
    names, confusion = record["classes"], np.array(record["confusion"])
    scores, occurring = results.worst_first(record, MOST_CLASSES)
    columns = ("class", "samples", "recall", "95 % interval", "precision", "F1", "most often taken for")
    few = (
        f"the {len(scores)} lowest recalls of {occurring:,} classes" if len(scores) < occurring else "the lowest first"
    )
    pairs = [(f"{names[i]} taken for {names[j]}", f"{n:,}", percent(share)) for i, j, n, share in confused(confusion)]
    matrix = [[name, *(n or "" for n in line)] for name, line in zip(names, confusion.tolist(), strict=True)]
    return [
        _text(f"Measured on {int(confusion.sum()):,} validation samples at step {record['step']:,}; {few}."),
        _table(columns, [results.class_cells(row, record) for row in scores]),
        *_titled(
            "Confusion: rows the true class, columns the predicted one",
            _table(["", *names], matrix if 1 < len(names) <= MATRIX else []),
        ),
        *_titled("Mistakes made most often", _table(("mistake", "samples", "of class"), pairs)),
    ]


def _calibration(facts: Facts) -> list[Any]:
    """Whether the model is right as often as it is sure."""
    bins = facts.evaluation.get("calibration") or []
    rows = [
        (f"{b['from']:.0%} to {b['to']:.0%}", f"{b['count']:,}", percent(b["confidence"]), percent(b["accuracy"]))
        for b in bins
    ]
    return [_table(("sure", "samples", "mean", "right"), rows)]


def _pictures(run: RunDir, table: str) -> list[Any]:
    return [wr.WeavePanelSummaryTable(table_name=table)] if _uploaded(run, f"table/{table}") else []


def _uploaded(run: RunDir, media: str) -> bool:
    """Whether the run gave W&B such a thing, as the copies under its W&B folder tell."""
    return any(run.wandb.glob(f"*run-*/files/media/{media}_*"))


def _reliability(facts: Facts) -> list[Any]:
    """What interruptions cost: each start, why it ended, what was met on the way."""
    starts = facts.starts
    rows = [
        (
            f"Start {start.number}",
            moment(start.began) if start.began else "",
            "" if wait is None else duration(wait),
            duration(start.seconds) if start.seconds else "",
            f"{start.first:,} to {start.last:,}" if start.trained or start.last > start.first else "none",
            start.state,
            f"{lost:,}" if lost else "",
            ". ".join(part.strip().rstrip(".") for part in (start.why, start.remedy) if part),
        )
        for start, lost, wait in zip(starts, undone(starts), waits(starts), strict=True)
    ]
    events = [
        (e["time"][:19].replace("T", " "), start.number, f"{e['step']:,}", e["kind"].replace("_", " "), e["text"])
        for start in starts
        for e in start.events
    ]
    more = sum(start.left_out for start in starts) + max(0, len(events) - MOST_EVENTS)
    columns = ("start", "began", "after a gap of", "ran for", "steps", "end", "steps lost", "why")
    return [
        _text(goodput(starts)),
        _table(columns, rows),
        *_titled("Events", _table(("time (UTC)", "start", "step", "kind", "what"), events[:MOST_EVENTS])),
        _text(f"{more:,} further events are not shown." if more else ""),
    ]


def _commands(facts: Facts) -> list[Any]:
    """Files of the run, and the commands that make more of it."""
    run = facts.run
    paths = (run.config, run.submit, run.metrics, run.evaluation, run.predictions, run.checkpoints, run.model, run.code)
    use = f'classify = pipeline("image-classification", model={str(run.model)!r})'
    predict = ["from transformers import pipeline", use, 'classify("picture.jpg")'] if run.model.exists() else []
    return [
        *_code("Files", [str(path) for path in paths if path.exists()], None),
        *_code("Predict", predict, "python"),
        *_code("Resume", [resumption(facts)] if facts.record["state"] != "done" else [], None),
        *_code("Reproduce", reproduction(facts), None),
    ]


# ---- several runs ------------------------------------------------------------------------------


def _of_several(found: Comparison, grid: Grid) -> Sections:
    metric, entries = found.metric, found.entries
    target, words = f"val/{metric}", results.METRICS.get(metric, metric)
    higher = selection.higher_is_better(metric)
    # The trainer has W&B keep the best value of the metric that chooses, under this name.
    kept = f"{target}.{'max' if higher else 'min'}"
    bars = [
        wr.BarPlot(title=words, metrics=[kept], max_bars_to_show=MOST_RUNS),
        wr.ScalarChart(title=f"Best {words}", metric=kept, groupby_aggfunc="max" if higher else "min"),
    ]
    curves = [(words, (target,)), ("Validation loss", ("val/loss",)), ("Training loss", ("train/loss",))]
    speed = [
        ("Images per second", ("perf/images_per_s",)),
        ("Waiting for data, % of the time", ("perf/data_wait_pct",)),
    ]
    rates = [("Gradient norm", ("optim/grad_norm",)), ("Learning rate of the head", (r"lr/\d+_head",))]
    title = f"{entries[0].name} and {len(entries) - 1} other{'s' * (len(entries) > 2)}"
    return [
        (title, [wr.CalloutBlock(text=plain(" ".join(compare.head(found))))]),
        ("The runs", [*map(_text, found.warnings), _runs(found)]),
        ("Result", grid(bars if found.valued else [], hidden=False)),
        ("Learning curves", grid(_plots(dict(curves).items(), len(entries)))),
        ("Optimizer", grid(_plots(rates, len(entries)))),
        ("Speed", grid(_plots(speed, len(entries)))),
        ("Settings", _settings(found, kept, grid)),
        ("Reliability", [_table(("run", "what became of it"), [(entry.name, entry.sentence) for entry in entries])]),
        ("Commands", _code("Reproduce", [entry.again for entry in entries], None)),
    ]


def _runs(found: Comparison) -> Any:
    """A line for each run, the best first and bold."""
    metrics = [found.metric, *(m for m in ("top1", "balanced_accuracy", "macro_f1", "loss") if m != found.metric)]
    metrics = [m for m in metrics if any(entry.metrics.get(m) is not None for entry in found.entries)]
    rows = []
    for entry in found.entries:
        scores = [results.figure(m, entry.metrics[m]) if entry.metrics.get(m) is not None else "" for m in metrics]
        between = results.between_words(found.metric, entry.intervals.get(found.metric))
        took = [duration(entry.seconds), " ".join(entry.cost)] if entry.seconds else ["", ""]
        fast = figure(entry.fast) if entry.fast else ""
        cells = [entry.name, entry.word, *scores[:1], between, compare.standing(found, entry), *scores[1:]]
        cells = [cell(part) for part in (*cells, f"{entry.step:,}", *took, fast)]
        rows.append([f"**{part}**" if part and entry in found.winners else part for part in cells])
    names = [results.METRICS[m] for m in metrics]
    head = (
        "run",
        "state",
        *names[:1],
        "95 % interval",
        "against the best",
        *names[1:],
        "steps",
        "time",
        "cost",
        "images/s",
    )
    return _of_cells(head, rows)


def _settings(found: Comparison, kept: str, grid: Grid) -> list[Any]:
    """What differs between the runs, as a table and as W&B's panels; of a sweep also what mattered."""
    shown = found.varied[:MOST_SETTINGS]
    rows = [[entry.name, *(setting(entry.settings[name]) for name in shown)] for entry in found.entries]
    panels: list[Any] = []
    if len(found.valued) >= SWEEP and shown:
        result = wr.ParallelCoordinatesPlotColumn(
            metric=wr.SummaryMetric(kept), inverted=not selection.higher_is_better(found.metric) or None
        )
        axes = [
            # The run's settings lie under "settings" in its W&B config.
            wr.ParallelCoordinatesPlotColumn(
                metric=wr.Config(f"settings.{name}"),
                display_name=name,
                log=_wide([entry.settings[name] for entry in found.entries]) or None,
            )
            for name in shown
        ]
        panels.append(wr.ParallelCoordinatesPlot(title="Settings and result", columns=[*axes, result]))
        panels.append(wr.ParameterImportancePlot(with_respect_to=kept))
    more = f"{len(found.varied) - len(shown)} further settings differ; the last panel has them."
    return [
        _table(("run", *shown), rows if shown else []),
        _text(more if len(found.varied) > len(shown) else ""),
        *grid(panels),
        *grid([wr.RunComparer(diff_only="split")]),
    ]


def _wide(values: Sequence[Any]) -> bool:
    """Whether numbers spread so far that their axis is better logarithmic."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(numbers) == len(values) and max(numbers) >= 10 * min(numbers)


# ---- blocks ------------------------------------------------------------------------------------


def plain(text: Any) -> str:
    """`text` in one line for others to read, without the secrets of URLs and the commands of pipes."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return re.sub(r"\bpipe:.*", "pipe:...", open_to_all(line))


def cell(value: Any) -> str:
    """`value` as a cell of a table, where W&B also reads HTML and formulas."""
    line = plain(value)
    return markdown.text(f"{line[:LONG]} ..." if len(line) > LONG else line)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table; None without rows."""
    return _of_cells(head, [[cell(value) for value in row] for row in rows])


def _of_cells(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """The same of cells that are Markdown already."""
    lines = [[cell(name) for name in head], ["---"] * len(head), *rows]
    return wr.MarkdownBlock(text="\n".join(f"| {' | '.join(line)} |" for line in lines)) if rows else None


def _text(text: str) -> Any:
    return wr.P(text=plain(text)) if text else None


def _titled(title: str, block: Any) -> list[Any]:
    return [wr.H3(text=title), block] if block else []


def _code(title: str, lines: Sequence[str], language: str | None) -> list[Any]:
    return _titled(title, wr.CodeBlock(code="\n".join(map(plain, lines)), language=language)) if lines else []


# ---- W&B ---------------------------------------------------------------------------------------


def _wandb_id(run: RunDir) -> str:
    """The run's id at W&B, of its folder. Raises ValueError where it has none."""
    file = run.wandb / "run-id"
    if not file.exists():
        raise ValueError(
            f"{run.path}: was not tracked by W&B, whose report would be empty; `vitdist report {run.path}` makes a page"
        )
    known = file.read_text().strip()
    if not _ID.fullmatch(known):
        raise ValueError(f"{file}: {known[:80]!r} is no id of a W&B run")
    return known


def _members(found: Facts | Comparison) -> list[RunDir]:
    return [found.run] if isinstance(found, Facts) else [entry.run for entry in found.entries]


def _project(run: RunDir, entity: str) -> tuple[str, str]:
    """(entity, project) that the run's settings name."""
    settings = config.read_yaml(run.config) if run.config.exists() else {}
    tracking = settings.get("tracking") or {}
    return tracking.get("entity") or entity, tracking.get("project") or config.Tracking().project


def _runsets(report: Any) -> list[Any]:
    return [runset for block in report.blocks if isinstance(block, wr.PanelGrid) for runset in block.runsets]


def _write(path: Path, report: Any, url: str) -> None:
    rundir.publish_json(path, {"url": url, **specification(report)})


def _upload(found: Facts | Comparison, known: str) -> Any:
    """Save the report of `found` at W&B, over the one of id `known` if that is there still; returns it."""
    wandb.setup(
        settings=wandb.Settings(
            silent=True,
            x_graphql_timeout_seconds=ANSWER_S,
            x_graphql_retry_max=RETRIES,
            x_graphql_retry_wait_min_seconds=0.5,
            x_graphql_retry_wait_max_seconds=2,
        )
    )
    api = wandb.Api()
    report = build(found, api.settings["entity"] or api.default_entity or "")
    if not report.entity:
        raise NotSavedError("W&B has no user or team for this key: set tracking.entity in the run's config.yaml")
    _check_known(api, found, report)
    earlier = _earlier(report, known) if known else None
    if earlier is not None:
        # The object that was loaded is kept: it has the comments that people wrote into the report.
        earlier.title, earlier.description = report.title, report.description
        earlier.blocks, earlier.width = report.blocks, report.width
        report = earlier
    return report.save()


def _check_known(api: Any, found: Facts | Comparison, report: Any) -> None:
    """Whether W&B has all these runs: the panels of others stay empty. Raises NotSavedError."""
    ids = {_wandb_id(run): run for run in _members(found)}
    places = sorted({f"{runset.entity}/{runset.project}" for runset in _runsets(report)})
    there: set[str] = set()
    for where in places:
        try:
            there |= {run.id for run in api.runs(where, filters={"name": {"$in": list(ids)}})}
        except ValueError:
            continue  # there is no such project
    missing = [str(run.path) for known, run in ids.items() if known not in there]
    if missing:
        raise NotSavedError(
            f"W&B has no such run at {', '.join(places)}: {', '.join(missing)}\n"
            f"upload first: vitdist sync {shlex.join(missing)}"
        )


def _earlier(report: Any, known: str) -> Any:
    """The report of id `known` as W&B has it; None if it was deleted there."""
    try:
        return wr.Report.from_url(f"https://wandb/{report.entity}/{report.project}/reports/r--{known}")
    except TypeError:  # the answer for one that was deleted is null, which the library takes apart unasked
        return None


def _said(error: Exception) -> str:
    """What W&B's error means for a user."""
    if isinstance(error, NotSavedError):
        return str(error)
    text = re.sub(r"POST \S+ giving up after \d+ attempt\(s\)(: (?=Post)| while retrying: )", "", plain(error))
    text = text.partition(" while retrying")[0][:300]
    if isinstance(error, wandb.errors.UsageError) or "not logged in" in text:
        return "W&B has no API key here: `wandb login`, then once more"
    if any(f"error {code}" in text or f"HTTP {code}" in text for code in (401, 403)):
        return "W&B refuses the API key: `wandb login --relogin`, then once more"
    return f"W&B did not take the report ({text}): once more from where it can be reached"

"""The run as one page, runs/NAME/report.html: verdict, what ran, curves, classes, mistakes, interruptions, commands.

    vitdist report runs/NAME

Made from the run folder alone, without torch, at any moment of a run; what is missing is left out.
The page is one file that opens from disk without a network; report.css and report.js are put into it.
"""

# Charts are Vega-Lite, its JavaScript brought by vl-convert: both are kept by the Vega project. It answers to
# the pointer, and takes CSS variables for colours, so one drawing serves light, dark and print. 0.9 MB and
# 1.8 s of a page. Altair would write the same charts for 0.7 s of import and 2 s of checking its own output;
# matplotlib's SVG (0.9 s of import) has fixed colours and answers to nothing.

import base64
import functools
import hashlib
import io
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from markupsafe import Markup
from PIL import Image

from vitdist import config, faults, rundir
from vitdist.config import Config
from vitdist.data import index
from vitdist.data.index import Index
from vitdist.rundir import RunDir

POINTS = 600  # of a curve: with the extremes of each bucket kept, as many as a chart has pixels
FAN_POINTS = 100  # of each layer's learning rate: smooth, and there may be 34 of them
MATRIX = 20  # classes up to which a confusion matrix is a table that can be read
LISTED = 16  # classes or pictures shown before the rest is folded away
PAIRS = 10
SQUARES = 200  # on a side of the picture of more: smaller ones cannot be seen
THUMB = 96

Record = dict[str, Any]
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Start:
    """One attempt as the report tells it; times in seconds since 1970."""

    number: int
    state: str
    why: str
    where: str
    began: float | None
    ended: float | None
    first: int
    """Steps done when it began."""
    last: int
    """Steps done at its end; of one that was killed as far as rows tell, so at least."""
    trained: bool
    """Whether it came as far as going on with the training."""
    remedy: str
    """What to do about its end, if a rank noted what that was."""
    events: list[Record]
    left_out: int
    """Events beyond those that its record holds."""

    @property
    def seconds(self) -> float:
        # Two hosts' clocks may disagree.
        return max(0.0, self.ended - self.began) if self.ended and self.began else 0.0


@dataclass(frozen=True)
class Facts:
    """What a run folder says; `record` is the newest that a trainer wrote (see rundir.state)."""

    run: RunDir
    settings: Record
    env: Record
    record: Record
    starts: list[Start]
    rows: list[Record]
    evaluation: Record

    def about(self, name: str) -> Record:
        """A part of the trainer's record, {} where it is missing."""
        return self.record.get(name) or {}

    def series(self, key: str) -> Points:
        """(step, value) of one figure, without gaps, infinities and NaN."""
        found = ((row["train/global_step"], row.get(key)) for row in self.rows)
        return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]

    def middle(self, key: str) -> float | None:
        """Median of one figure over the run."""
        points = self.series(key)
        return float(np.median([v for _, v in points])) if points else None

    @property
    def seconds(self) -> float:
        return sum(start.seconds for start in self.starts)

    @property
    def scores(self) -> Record:
        """Figures of the newest evaluation, {} before the first one."""
        return self.evaluation.get("metrics") or self.about("summary")


def write(run: RunDir) -> Path:
    """Make the report of `run`, whatever its state; returns its path. Raises ValueError for bad records."""
    rundir.publish(run.report, page(read(run)))
    return run.report


# ---- what the folder says ----------------------------------------------------------------------


def read(run: RunDir) -> Facts:
    """Collect a run folder; missing files give empty records."""
    reached, attempts = _reached(run), run.attempts()
    starts = [_start(a, a is attempts[-1], *reached.get(a.number, (0, None))) for a in attempts]
    record = rundir.state(run)
    if starts:  # a killed trainer's record says "running" for ever; the launcher may know more
        record = {**record, "state": starts[-1].state}
    return Facts(
        run=run,
        settings=config.read_yaml(run.config) if run.config.exists() else {},
        env=rundir.read_json(run.env) or {},
        record=record,
        starts=starts,
        rows=rundir.rows(run),
        evaluation=rundir.read_json(run.evaluation) or {},
    )


def _start(attempt: rundir.Attempt, newest: bool, step: int, seen: float | None) -> Start:
    record, job = rundir.read_json(attempt.train) or {}, rundir.read_json(attempt.job) or {}
    noted = faults.read(attempt)
    fault = faults.root(noted) or next(iter(noted), None)
    state = record.get("state", "running")
    if state == "running":
        known = job.get("state") in ("done", "failed", "refused", "stopped", "requeued")
        # lost: no one lived to say how it ended
        state = job["state"] if known else "failed" if fault else "running" if newest else "lost"
    if state in ("done", "stopped"):
        fault = None  # a rank that lost the others while all were leaving
    error, first = record.get("error"), record.get("resumed_from") or 0
    why = f"{error['type']}: {error['message']}" if error else record.get("reason") or job.get("cause") or ""
    if fault:
        host, at = fault.host and f" on {fault.host}", fault.where and f" at {fault.where}"
        what = f"rank {fault.rank}{host}, step {fault.step:,}, {fault.phase}{at}"
        why = f"{fault.word.replace('_', ' ')} ({what}): {fault.type}: {fault.message}"
    hosts = job.get("hosts") or []
    nodes = ", ".join(hosts[:8]) + (" ..." if hosts[8:] else "")
    began, ended = (record.get(key) or job.get(key) for key in ("started", "ended"))
    seen = max(fault.time, seen or 0.0) if fault else seen
    return Start(
        number=attempt.number,
        state=state,
        why=why,
        where=f"Job {job['job_id']} on {nodes}" if hosts else "",
        began=datetime.fromisoformat(began).timestamp() if began else None,
        ended=datetime.fromisoformat(ended).timestamp() if ended else seen,
        first=first,
        last=max(record.get("step") or 0, step, first, fault.step if fault else 0),
        trained="resumed_from" in record,
        remedy=faults.WORDS.get(fault.word, "") if fault else "",
        events=list(record.get("events") or ()),
        left_out=record.get("events_left_out", 0),
    )


def undone(starts: Sequence[Start]) -> list[int]:
    """Of each start the steps that came to nothing: those beyond the one that the next training start went on from."""
    lost = []
    for i, start in enumerate(starts):
        following = next((later for later in starts[i + 1 :] if later.trained), None)
        lost.append(max(0, start.last - max(start.first, following.first)) if start.trained and following else 0)
    return lost


def waits(starts: Sequence[Start]) -> list[float | None]:
    """Seconds from the end of the start before to the beginning of each; None where that is not known."""
    found: list[float | None] = [None] if starts else []
    for before, start in itertools.pairwise(starts):
        found.append(max(0.0, start.began - before.ended) if start.began and before.ended else None)
    return found


def _reached(run: RunDir) -> dict[int, tuple[int, float | None]]:
    """Attempt -> (step, time) of its last row, later undone or not: a killed trainer says no more."""
    found: dict[int, tuple[int, float | None]] = {}
    for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line, of a writer that was killed
        earlier = found.get(row["attempt"], (0, None))[1]
        found[row["attempt"]] = row["train/global_step"], row.get("time", earlier)
    return found


def thin(points: Sequence[tuple[int, float]], limit: int) -> Points:
    """At most `limit` of `points`: both ends, lowest and highest of each bucket, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    values = np.array([v for _, v in points])
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), (limit - 2) // 2):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return [points[i] for i in sorted(kept)]


def differing(settings: Record) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, default) of settings that are not the default; "required" where there is none."""
    rows = []
    for name, _, default, _ in config.flat(Config):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        usual = "required" if default is ... else config.to_plain(default)
        if value is not None and value != usual:
            rows.append((name, value, usual))
    return rows


def confused(confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
    """(true, predicted, samples, share of the true class) of the mistakes made most often."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True)]
    return [(i, j, int(off[i, j]), float(off[i, j] / confusion[i].sum())) for i, j in pairs if off[i, j]]


def class_counts(facts: Facts, kind: str) -> dict[str, int]:
    """Class -> samples of "train" or "val" as indexed, or {} where the shards are out of reach."""
    try:
        given = facts.settings["data"][kind]
        shards = index.join([Index.open(folder) for folder in ([given] if isinstance(given, str) else given)])
    except (OSError, ValueError, KeyError):
        scores = facts.evaluation.get("per_class", ()) if kind == "val" else ()
        return {c["name"]: c["support"] for c in scores}
    return dict(zip(shards.classes, shards.counts, strict=True))


# ---- words -------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    whole = round(seconds)
    for size, name, rest, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            more = whole % size // rest
            return f"{whole // size} {name}" + (f" {more} {small}" if more else "")
    return f"{whole} s"


def figure(value: Any) -> str:
    """A number with the digits that matter; other things as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%-d %b %Y, %H:%M} UTC"


def verdict(facts: Facts) -> tuple[str, str]:
    """(a word for the badge, what became of the run in a sentence or two)."""
    record, scores, error = facts.record, facts.scores, facts.about("error")
    step, total = max((s.last for s in facts.starts), default=0), record.get("total_steps")
    place = f"step {step:,}" + (f" of {total:,}" if total else "")
    good = ""
    if "top1" in scores:
        good = f"{percent(scores['top1'])} of the validation samples are classified right (top-1)"
        good += f", macro-F1 {scores['macro_f1']:.3f}" if "macro_f1" in scores else ""
    match record["state"]:
        case "done":
            took = f" in {duration(facts.seconds)}" if facts.seconds else ""
            starts = f" and {len(facts.starts)} starts" if len(facts.starts) > 1 else ""
            return "finished", f"Trained to the end, {step:,} steps{took}{starts}{good and ': '}{good}."
        case "failed" | "refused":
            cause, noted = facts.starts[-1].why or "No cause is recorded", facts.starts[-1].remedy
            rank = f" on rank {error['rank']}" if error.get("rank") is not None and not noted else ""
            word, text = "failed", f"Failed at {place}{rank}. {cause.rstrip('.')}."
        case "stopped" | "requeued":
            word, why = "stopped", facts.starts[-1].why
            text = f"Stopped at {place}{why and ' by '}{why}; it can go on from its last checkpoint."
        case "running":
            left = [f", about {duration(eta)} left" for _, eta in facts.series("perf/eta_s")[-1:]]
            word, text = "running", f"At {place}{''.join(left)}."
        case _:
            return "submitted", "Nothing has been trained yet."
    return word, text + (f" At the newest evaluation {good}." if good else "")


def cost(facts: Facts) -> tuple[str, str]:
    """(how many, of what): GPU-hours of all starts together, on a CPU core-hours."""
    hours = facts.seconds / 3600 * facts.record.get("world", 1)
    if facts.record.get("device", "CPU") == "CPU":
        return f"{hours * facts.record.get('threads', 1):.2g}", "CPU core-hours"
    return f"{hours:.2g}", "GPU-hours"


# ---- pieces of a page: Markup.format escapes every argument that is not Markup itself ----------


def html(template: str, *values: Any, **named: Any) -> Markup:
    """`template` with `values` put in, escaped."""
    return Markup(template).format(*values, **named)


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(part for part in parts if part)


def wrap(template: str, *parts: Markup) -> Markup:
    """`template` around what `parts` have to show; nothing around nothing."""
    inside = join(parts)
    return html(template, inside) if inside else Markup()


def section(title: str, *parts: Markup) -> Markup:
    name = title.lower().replace(" ", "-")
    opening = html('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>', name, title)
    return wrap(opening + Markup("{}</section>"), *parts)


def note(text: str) -> Markup:
    return wrap('<p class="note">{}</p>', html("{}", text))


def pair(*parts: Markup) -> Markup:
    """Side by side where there is room."""
    return wrap('<div class="pair">{}</div>', *parts)


def table(head: Sequence[str], body: Sequence[Sequence[Any]], caption: str, kind: str = "") -> Markup:
    """A table whose first cell in a row names the row; nothing without rows."""
    heads = join(html('<th scope="col">{}</th>', title) for title in head)
    lines = join(
        html('<tr><th scope="row">{}</th>{}</tr>', name, join(html("<td>{}</td>", cell) for cell in cells))
        for name, *cells in body
    )
    opening = html('<table class="{}"><caption>{}</caption><thead><tr>{}</tr></thead>', kind, caption, heads)
    return wrap(opening + Markup("<tbody>{}</tbody></table>"), lines)


def bar(share: float, text: str) -> Markup:
    """A value with a bar of `share` of the cell's width."""
    return html('<span class="bar" style="--share:{:.1f}%">{}</span>', 100 * share, text)


def folded(summary: str, inside: Markup) -> Markup:
    return html("<details><summary>{}</summary>{}</details>", summary, inside) if inside else Markup()


def listing(pairs: Iterable[tuple[str, Any]], kind: str = "facts") -> Markup:
    """Names and values; those without a value are left out."""
    lines = (html("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in pairs if value)
    return wrap(f'<dl class="{kind}">{{}}</dl>', *lines)


def command(title: str, *lines: str) -> Markup:
    return html('<h3>{}</h3><pre tabindex="0"><code>{}</code></pre>', title, "\n".join(lines))


def chart(facts: Facts, title: str, text: str, keys: dict[str, str], **form: Any) -> Markup:
    """A figure of curves (name -> key of a row) over steps, drawn by report.js; nothing without two points.

    `form`: format (d3), log, zero, stairs, fan (colours from the first curve to the last).
    """
    lowest = 0.0 if form.get("log") else -math.inf
    found = {name: [p for p in facts.series(key) if p[1] > lowest] for name, key in keys.items()}
    limit = FAN_POINTS if form.get("fan") else POINTS
    curves = {
        name: ([s for s, _ in points], [float(f"{v:.4g}") for _, v in points])
        for name, points in ((name, thin(points, limit)) for name, points in found.items())
        if len(points) > 1
    }
    marks = [(s.first, f"start {s.number}") for s in facts.starts[1:] if s.last > s.first]
    data = {"about": f"{title}. {text}", "curves": curves, "restarts": marks, "format": "~g", **form}
    # A closing tag in a name would end the script element.
    inside = Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    return (
        html(
            '<figure><figcaption><h3>{}</h3><p>{}</p></figcaption><div class="chart"></div>'
            '<script type="application/json">{}</script></figure>',
            title,
            text,
            inside,
        )
        if curves
        else Markup()
    )


def data_uri(picture: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- the page, section by section --------------------------------------------------------------


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vegaEmbed as one script; 1.8 s of work."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def page(facts: Facts) -> str:
    """The whole page as text."""
    here = Path(__file__)
    scripts = [vega(), here.with_suffix(".js").read_text(encoding="utf-8")]
    # Only these two may run and nothing may be loaded, whatever a class is called.
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    sections = (head, what_ran, curves, rates, optimizer, speed, classes, mistakes, reliability, commands)
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: vitdist report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        "<style>\n{css}</style></head>\n<body><main>\n{body}\n</main>\n{scripts}</body></html>\n",
        name=facts.run.name,
        policy=policy,
        css=Markup(here.with_suffix(".css").read_text(encoding="utf-8")),
        body=join(make(facts) for make in sections),
        scripts=join(Markup(f"<script>{script}</script>") for script in scripts),
    )


def head(facts: Facts) -> Markup:
    """The verdict, and the figures that one looks for first."""
    word, sentence = verdict(facts)
    scores, (hours, unit) = facts.scores, cost(facts)
    fast = facts.about("summary").get("images_per_s") or facts.middle("perf/images_per_s")
    tiles = [
        ("top-1", percent(scores["top1"]) if "top1" in scores else ""),
        ("macro-F1", f"{scores['macro_f1']:.3f}" if "macro_f1" in scores else ""),
        ("balanced accuracy", percent(scores["balanced_accuracy"]) if "balanced_accuracy" in scores else ""),
        ("time", duration(facts.seconds) if facts.seconds else ""),
        (unit, hours if facts.seconds else ""),
        ("images/s", figure(round(fast) if fast > 10 else fast) if fast else ""),
    ]
    counts = class_counts(facts, "val").values() if scores else ()
    largest = percent(max(counts) / sum(counts)) if counts else ""
    naive = f"Always naming the largest class would be right for {largest}." if largest else ""
    return html(
        '<header><p class="note">vitdist report · {}</p><h1>{} <span class="badge {}">{}</span></h1>'
        '<p class="verdict">{}</p>{}{}</header>',
        moment(datetime.now(UTC).timestamp()),
        facts.run.name,
        word,
        word,
        sentence,
        listing(tiles, "tiles"),
        note(naive),
    )


def what_ran(facts: Facts) -> Markup:
    """Model, data, batch, engine, code, and the settings that differ from the defaults."""
    record, env, model, batch = facts.record, facts.env, facts.about("model"), facts.about("batch")
    sets = {kind: facts.about("data").get(kind) or {} for kind in ("train", "val")}
    sizes = {k: f"{s['samples']:,} samples, digest {s['digest'][:12]}" for k, s in sets.items() if s}
    zero = f"ZeRO-{record['zero']}" if record.get("zero") else "every rank holds all"
    versions = env.get("versions") or env.get("packages") or facts.about("versions")
    code = (env.get("commit") or "")[:12] + (" with uncommitted changes" if env.get("dirty") else "")
    settings = [(name, figure(value), figure(usual)) for name, value, usual in differing(facts.settings)]
    split = "{global_batch} = {micro_batch} x {accumulation} x {world} ranks"
    title = "Settings that are not the default"
    columns = ("setting", "value", "default")
    known = [
        ("model", model.get("name")),
        ("weights", model.get("weights")),
        ("parameters", f"{model['parameters']:,}, of which {model['trainable']:,} trained" if model else ""),
        ("training set", sizes.get("train")),
        ("validation set", sizes.get("val")),
        ("batch", split.format(**batch) if batch else ""),
        ("engine", f"{record['precision']}, {zero}" if "precision" in record else ""),
        ("ran on", f"{record['world']} x {record.get('device', 'rank')}" if "world" in record else ""),
        ("host", env.get("host")),
        ("code", code),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return section(
        "What ran",
        pair(
            wrap("<div>{}</div>", listing(known), table(columns, settings, title, "settings")),
            wrap("<div>{}</div>", balance(class_counts(facts, "train"))),
        ),
    )


def balance(counts: dict[str, int]) -> Markup:
    """Samples of each class as bars; of many classes the largest and the smallest."""
    order = sorted(counts.items(), key=lambda item: -item[1])
    if not order:
        return Markup()
    most, least, half = order[0][1], order[-1][1], LISTED // 2
    shown = order if len(order) <= MATRIX else order[:half] + order[-half:]
    rows: list[tuple[str, Any]] = [(name, bar(n / max(1, most), f"{n:,}")) for name, n in shown]
    if len(shown) < len(order):
        rows.insert(half, (f"… {len(order) - len(shown)} classes between …", ""))
    ratio = f", the largest {most / least:.3g} times the smallest" if least and most > least else ""
    what = f"{len(order):,} classes{ratio}" if len(order) > 1 else "One class"
    return table(("class", "training samples"), rows, what, "bars")


def curves(facts: Facts) -> Markup:
    """Losses and validation quality over the run."""
    top1, best = max(((v, -s) for s, v in facts.series("val/top1")), default=(0.0, 0))
    dashed = " Dashed: a restart from a checkpoint." if len(facts.starts) > 1 else ""
    instead = "The charts need JavaScript; their numbers are in metrics.jsonl."
    loss = {"training": "train/loss", "validation": "val/loss"}
    quality = {"top-1": "val/top1", "macro-F1": "val/macro_f1"}
    figures = pair(
        chart(facts, "Loss", f"Smoothed labels and augmentation raise that of training.{dashed}", loss),
        chart(facts, "Quality", f"Best top-1 {percent(top1)}, at step {-best:,}.", quality, format="~%"),
    )
    hint = "Point at a curve for its numbers; zoom with Ctrl and the wheel, back with a double click."
    bare = wrap("<noscript>{}</noscript>", note(instead))
    return section("Learning curves", *([bare, figures, note(hint)] if figures else []))


def rates(facts: Facts) -> Markup:
    """Learning rate of each layer group, as a fan, and the table of groups."""
    keys = sorted({key for row in facts.rows for key in row if key.startswith("lr/")}, reverse=True)
    peaks = {key[3:]: max(v for _, v in facts.series(key)) for key in keys if facts.series(key)}
    text, scale = "", Markup()
    if len(peaks) > 1:
        (top, high), *_, (bottom, low) = peaks.items()
        text = f"At the peak from {high:.2g} ({top}) down to {low:.2g} ({bottom}); logarithmic axis."
        scale = html('<p class="fan">{}<i aria-hidden="true"></i>{}</p>', top, bottom)
    columns = ("name", "lr_scale", "weight_decay", "tensors", "parameters")
    groups = [[figure(group.get(column)) for column in columns] for group in facts.record.get("groups") or ()]
    fan = {name: f"lr/{name}" for name in peaks}
    return section(
        "Learning rate of each layer",
        chart(facts, "One line a layer", text, fan, format="~e", log=True, fan=True),
        scale,
        folded(
            f"{len(groups)} parameter groups",
            table(("group", "rate x", "weight decay", "tensors", "parameters"), groups, "Parameter groups"),
        ),
    )


def optimizer(facts: Facts) -> Markup:
    """Gradient norm; in fp16 the loss scale and the updates skipped for it."""
    skipped, scale = facts.series("optim/skipped_steps"), facts.series("optim/loss_scale")
    clip = (facts.settings.get("optim") or {}).get("clip")
    about = f"Before it is clipped at {clip:g}." if clip else "Not clipped."
    figures, text = [chart(facts, "Gradient norm", about, {"gradient norm": "optim/grad_norm"}, log=True)], ""
    if facts.record.get("precision") == "fp16" and skipped and scale:
        text = f"{skipped[-1][1]:.0f} of {skipped[-1][0]:,} updates were skipped for an overflow."
        about, keys = "Halved at overflows, then doubled again.", {"loss scale": "optim/loss_scale"}
        figures.append(chart(facts, "Loss scale", about, keys, format=".2s", log=True, stairs=True))
    if skipped and skipped[-1][1]:
        about, keys = "Counted from the first.", {"skipped": "optim/skipped_steps"}
        figures.append(chart(facts, "Skipped updates", about, keys, zero=True, stairs=True))
    return section("Optimizer", note(text), pair(*figures))


def speed(facts: Facts) -> Markup:
    """Throughput and what it was lost to."""
    names = {
        "images/s": "perf/images_per_s",
        "% of the time waiting for data": "perf/data_wait_pct",
        "% of the FLOPs that the GPU can do": "perf/mfu_pct",
        "GiB of GPU memory": "perf/memory_gib",
    }
    found = [(facts.middle(key), name) for name, key in names.items()]
    medians = ", ".join(f"{figure(value)} {name}" for value, name in found if value is not None)
    fast, wait = {"images/s": "perf/images_per_s"}, {"data wait": "perf/data_wait_pct"}
    about = "Percent of the time in which training stood still for data."
    return section(
        "Speed",
        note(f"Medians over the run: {medians}." if medians else ""),
        pair(
            chart(facts, "Images per second", "Of all ranks, training alone.", fast, format=",~f", zero=True),
            chart(facts, "Waiting for data", about, wait, zero=True),
        ),
    )


def classes(facts: Facts) -> Markup:
    """Scores of each class, the confusion matrix, the mistakes made most often."""
    found = facts.evaluation
    if not found:
        return Markup()
    names, confusion = found["classes"], np.array(found["confusion"])
    rows = [
        (
            c["name"],
            f"{c['support']:,}",
            bar(c["precision"], percent(c["precision"])),
            bar(c["recall"], percent(c["recall"])),
            f"{c['f1']:.3f}",
        )
        for c in sorted(found["per_class"], key=lambda c: c["f1"])
    ]
    columns = ("class", "samples", "precision", "recall", "F1")
    few = LISTED if len(rows) > MATRIX else len(rows)
    rest = f"The other {len(rows) - few:,} classes"
    title = f"The {few} hardest of {len(rows):,}" if few < len(rows) else "Every class, the hardest first"
    pairs = [
        (html("{} <i>taken for</i> {}", names[i], names[j]), f"{n:,}", percent(share))
        for i, j, n, share in confused(confusion)
    ]
    often = table(("mistake", "samples", "of class"), pairs, "Mistakes made most often", "pairs")
    both = [matrix(names, confusion), often] if len(names) > 1 else []
    return section(
        "Classes",
        note(f"Measured on {int(confusion.sum()):,} validation samples at step {found['step']:,}."),
        table(columns, rows[:few], title, "scores"),
        folded(rest, table(columns, rows[few:], rest, "scores")),
        wrap("<h3>Confusion</h3>{}", *(both if 10 < len(names) <= MATRIX else [pair(*both)])),
    )


def matrix(names: list[str], confusion: np.ndarray) -> Markup:
    """Rows the true class, columns the predicted one: a table of a few classes, a picture of many."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    key = "Rows: the true class; columns: the predicted one; stronger: more of the class."
    if len(names) > MATRIX:
        side = -(-len(names) // SQUARES)
        edges = np.arange(0, len(names), side)
        share = np.maximum.reduceat(np.maximum.reduceat(share, edges), edges, axis=1)
        # The value is in the alpha channel, so that the picture suits a light page and a dark one.
        pixels = np.zeros((*share.shape, 4), np.uint8)
        pixels[..., :3] = (213, 94, 0)
        pixels[np.eye(len(share), dtype=bool), :3] = (0, 114, 178)
        pixels[..., 3] = np.round(255 * np.sqrt(share))
        key += f" {len(names):,} classes in their order; blue right, orange wrong."
        key += f" A square is the strongest of {side} x {side} pairs." if side > 1 else ""
        return html(
            '<figure class="matrix"><figcaption>{}</figcaption><img src="{}" '
            'alt="Confusion matrix; the table next to it names the mistakes made most often."></figure>',
            key,
            data_uri(Image.fromarray(pixels)),
        )
    heads = join(html('<th scope="col" title="{0}"><span>{0}</span></th>', name) for name in names)
    lines = []
    for i, line in enumerate(confusion):
        cells = join(
            html(
                '<td class="{}" style="--v:{:.0f}%" title="{} taken for {}">{}</td>',
                "hit" if i == j else "miss",
                100 * math.sqrt(share[i, j]),
                names[i],
                names[j],
                int(n) or "",
            )
            for j, n in enumerate(line)
        )
        lines.append(html('<tr><th scope="row" title="{0}"><span>{0}</span></th>{1}</tr>', names[i], cells))
    return html(
        '<div><table class="confusion"><caption>{}</caption><thead><tr><td></td>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>",
        key,
        heads,
        join(lines),
    )


def mistakes(facts: Facts) -> Markup:
    """The most confident mistakes as pictures out of the validation shards."""
    if not facts.evaluation or not facts.run.predictions.exists():
        return Markup()
    with np.load(facts.run.predictions) as kept:
        ids, labels, predicted, sure = (kept[name] for name in ("ids", "labels", "predicted", "confidence"))
    wrong, names = np.flatnonzero(labels != predicted), facts.evaluation["classes"]
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:LISTED]
    text = f"{len(wrong):,} of {len(labels):,} validation samples are classified wrong"
    try:
        shards = Index.open(facts.settings["data"]["val"])
        pictures = [(k, shards.source(int(ids[k])), thumbnail(shards.image(int(ids[k])))) for k in worst]
    except (OSError, ValueError, KeyError, IndexError) as error:
        return section("Worst mistakes", note(f"{text}; their pictures cannot be read here: {error}"))
    items = [
        html(
            '<li><img src="{0}" title="{1}" alt="Validation sample {2}: is {3}, was taken for {4}">'
            "<p><b>{3}</b></p><p>taken for <b>{4}</b>, {5}</p></li>",
            picture,
            source,
            ids[k],
            names[labels[k]],
            names[predicted[k]],
            percent(sure[k]),
        )
        for k, source, picture in pictures
    ]
    text += "; below, those that the model was surest of: look for wrong labels first." if items else "."
    return section("Worst mistakes", note(text), wrap('<ul class="pictures">{}</ul>', *items))


def thumbnail(stored: bytes) -> str:
    """A small picture as data URI; a tiny one enlarged to squares instead of a blur. Raises OSError."""
    with Image.open(io.BytesIO(stored)) as file:
        picture = file.convert("RGB")
    times = THUMB // max(picture.size)
    if times > 1:
        size = picture.width * times, picture.height * times
        return data_uri(picture.resize(size, Image.Resampling.NEAREST))
    picture.thumbnail((THUMB, THUMB))
    return data_uri(picture, "JPEG")


ENDS = {"done": "finished", "stopped": "stopped and saved", "lost": "ended without a word"}


def reliability(facts: Facts) -> Markup:
    """What interruptions cost: each attempt from which step to which, how it ended and why; what was met on the way."""
    return section(
        "Reliability",
        note(goodput(facts.starts)),
        timeline(facts),
        causes(facts.starts),
        happenings(facts.starts),
    )


def goodput(starts: Sequence[Start]) -> str:
    """How many of the steps done were kept, in words; empty before the first step."""
    done = sum(start.last - start.first for start in starts if start.trained)
    if not done:
        return ""
    kept = done - sum(undone(starts))
    between = sum(filter(None, waits(starts)))
    text = f"Goodput {percent(kept / done)}: {kept:,} of {done:,} steps done were kept"
    text += f", in {len(starts)} starts" if len(starts) > 1 else ""
    return text + (f" with {duration(between)} between them." if between >= 1 else ".")


def timeline(facts: Facts) -> Markup:
    """A line for each start, with a bar from its first step to its last."""
    total = max(facts.record.get("total_steps") or 0, *(s.last for s in facts.starts), 1)
    rows = []
    for start, lost, wait in zip(facts.starts, undone(facts.starts), waits(facts.starts), strict=True):
        steps, span = "none", Markup()
        if start.trained or start.last > start.first:
            steps = f"{start.first:,} to {start.last:,}"
            span = html(
                '<span class="span" aria-hidden="true"><i style="margin-left:{:.2f}%;width:{:.2f}%"></i>'
                '<i class="lost" style="width:{:.2f}%"></i></span>',
                100 * start.first / total,
                100 * (start.last - start.first - lost) / total,
                100 * lost / total,
            )
        badge = html('<span class="badge {}">{}</span>', start.state, ENDS.get(start.state, start.state))
        rows.append(
            (
                f"Start {start.number}",
                moment(start.began) if start.began else "",
                "" if wait is None else duration(wait),
                duration(start.seconds) if start.seconds else "",
                html("{}{}", steps, span),
                badge,
                f"{lost:,}" if lost else "",
            )
        )
    columns = ("start", "began", "after a gap of", "ran for", "steps", "end", "steps lost")
    return wrap('<div class="wide" tabindex="0">{}</div>', table(columns, rows, "Every start of the run", "starts"))


def causes(starts: Sequence[Start]) -> Markup:
    """Why starts ended and where they ran; of those that say neither, nothing."""
    return listing(
        (
            (
                f"Start {start.number}",
                join(
                    html("<p>{}.</p>", text.strip().rstrip("."))
                    for text in (
                        f"Stopped by {start.why}" if start.why and start.state == "stopped" else start.why,
                        start.remedy and f"To do: {start.remedy}",
                        start.where,
                    )
                    if text
                ),
            )
            for start in starts
        ),
        "facts causes",
    )


def happenings(starts: Sequence[Start]) -> Markup:
    """What the trainer warned of, of all starts, in their order; a long list is folded."""
    rows = [
        (e["time"][:19].replace("T", " "), f"{start.number}", f"{e['step']:,}", e["kind"].replace("_", " "), e["text"])
        for start in starts
        for e in start.events
    ]
    more = sum(start.left_out for start in starts)
    counts = Counter(kind for _, _, _, kind, _ in rows).most_common()
    caption = "Events: " + ", ".join(f"{count} x {kind}" for kind, count in counts)
    caption += f"; {more:,} further ones are not kept" if more else ""
    columns = ("time (UTC)", "start", "step", "kind", "what")
    made = wrap('<div class="wide" tabindex="0">{}</div>', table(columns, rows, caption, "events"))
    return made if len(rows) <= LISTED else folded(f"{len(rows):,} events", made)


def submission(env: Record, name: str) -> str:
    """The command that submitted a run, for one of this name; empty if it was not submitted."""
    argv = [str(part) for part in env.get("argv") or ()]
    if not argv or not argv[0].endswith("submit.py"):
        return ""
    named = argv.index("--name") if "--name" in argv[:-1] else len(argv)
    return shlex.join(["python", *argv[:named], *argv[named + 2 :], "--name", name])


def commands(facts: Facts) -> Markup:
    """Files of the run, and the commands that make more of it."""
    run, env = facts.run, facts.env
    at, ranks = shlex.quote(str(run.path)), facts.record.get("world", 1)
    files = {
        "settings": run.config,
        "script": run.submit,
        "figures": run.metrics,
        "evaluation": run.evaluation,
        "predictions": run.predictions,
        "checkpoints": run.checkpoints,
        "model": run.model,
        "code": run.code,
    }
    again = [f"git checkout {env['commit']}"] if env.get("commit") else []
    again += [f"git apply {at}/patch.diff"] if env.get("dirty") and run.patch.exists() else []
    direct = f"torchrun --nproc-per-node {ranks} -m vitdist.train {at}"
    again += [submission(env, f"{run.name}-again") or f"{direct}/config.yaml"]
    resume = submission(env, run.name) or direct
    use = f'classify = pipeline("image-classification", model={str(run.model)!r})'
    return section(
        "Files and commands",
        listing((title, html("<code>{}</code>", path)) for title, path in files.items() if path.exists()),
        command("Predict", "from transformers import pipeline", use, 'classify("picture.jpg")')
        if run.model.exists()
        else Markup(),
        command("Resume", resume) if facts.record["state"] != "done" else Markup(),
        command("Reproduce", *again),
        command("Upload to Weights & Biases", f"wandb sync {at}/wandb/offline-run-*")
        if any(run.wandb.glob("offline-run-*"))
        else Markup(),
    )

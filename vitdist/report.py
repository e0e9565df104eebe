"""The run as one page, runs/NAME/report.html: how good, what ran, curves, classes, mistakes, starts, commands.

    vitdist report runs/NAME

Made from the run folder alone, without torch, at any moment of a run; what is missing is left out.
The page is one file that opens from disk without a network.
"""

# Charts are Vega-Lite through Altair, its JavaScript inlined by vl-convert: both are kept by the Vega
# project, and the charts answer to the pointer. Measured: 0.9 MB of page, 0.7 s import, 1.8 s to bundle;
# matplotlib's SVG is as slow to import, and neither interactive nor able to follow the reader's dark mode,
# which the SVG that Vega draws in the browser does, through the CSS variables given to it as colours.

import base64
import hashlib
import io
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from markupsafe import Markup
from PIL import Image

from vitdist import config, rundir
from vitdist.config import Config
from vitdist.data.index import Index
from vitdist.rundir import RunDir

POINTS = 600  # of a curve: with the extremes of each bucket kept, as many pixels as a chart is wide
FAN_POINTS = 100  # of each layer's learning rate: smooth, and there may be 34 of them
MATRIX = 20  # classes up to which a confusion matrix is a table that can be read
LISTED = 16  # classes, pairs or pictures shown before the rest is folded away
THUMB = 96

Record = dict[str, Any]
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Start:
    """One attempt as the report tells it."""

    number: int
    state: str
    why: str
    began: float | None
    """Seconds since 1970, as `ended`."""
    ended: float | None
    first: int
    """Steps done when it began."""
    last: int


@dataclass(frozen=True)
class Facts:
    """What a run folder says; `record` is the newest trainer's, {"state": "submitted"} before there is one."""

    run: RunDir
    settings: Record
    env: Record
    record: Record
    starts: list[Start]
    rows: list[Record]
    evaluation: Record | None

    @property
    def restarts(self) -> list[int]:
        """Steps at which a later attempt took over."""
        return [s.first for s in self.starts if s.number != self.starts[0].number and s.last > s.first]

    def series(self, key: str) -> Points:
        """(step, value) of one figure, without gaps, infinities and NaN."""
        found = ((row["train/global_step"], row.get(key)) for row in self.rows)
        return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]

    @property
    def seconds(self) -> float:
        return sum(s.ended - s.began for s in self.starts if s.began is not None and s.ended is not None)


def write(run: RunDir) -> Path:
    """Make the report of `run`, whatever its state; returns its path. Raises ValueError for unreadable records."""
    rundir.publish(run.report, page(read(run)))
    return run.report


# ---- what the folder says ------------------------------------------------------------------------


def read(run: RunDir) -> Facts:
    """Collect a run folder; missing files give empty records."""
    rows, reached = rundir.rows(run), _reached(run)
    starts = []
    for attempt in run.attempts():
        record, job = rundir.read_json(attempt.train) or {}, rundir.read_json(attempt.job) or {}
        newest = attempt.number == run.attempts()[-1].number
        step, seen = reached.get(attempt.number, (0, None))
        state = record.get("state") or job.get("state") or "no record"
        if state == "running" and not newest:
            state = "lost"  # the next start knows that this one did not live to say how it ended
        error = record.get("error") or {}
        why = f"{error['type']}: {error['message']}" if error else record.get("reason") or job.get("reason") or ""
        first = record.get("resumed_from") or 0
        starts.append(Start(
            attempt.number, state, str(why), _seconds(record.get("started")) or _seconds(job.get("started")),
            _seconds(record.get("ended")) or seen or _seconds(job.get("ended")), first, max(record.get("step") or 0, step, first),
        ))
    return Facts(
        run=run,
        settings=config.read_yaml(run.config) if run.config.exists() else {},
        env=rundir.read_json(run.env) or {},
        record=rundir.state(run),
        starts=starts,
        rows=rows,
        evaluation=rundir.read_json(run.evaluation),
    )


def _reached(run: RunDir) -> dict[int, tuple[int, float | None]]:
    """Attempt -> (last step, time of the last row), of every row written: a killed trainer says no more."""
    found: dict[int, tuple[int, float | None]] = {}
    for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["attempt"]] = max(row["train/global_step"], found.get(row["attempt"], (0, None))[0]), row.get("time")
    return found


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def thin(points: Sequence[tuple[int, float]], limit: int) -> Points:
    """At most `limit` of `points`: lowest and highest of each bucket, so that no spike is lost, and both ends."""
    if len(points) <= limit:
        return list(points)
    values = np.array([v for _, v in points])
    kept = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), (limit - 2) // 2):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return [points[i] for i in sorted(kept)]


# ---- words ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    whole = round(seconds)
    for size, name, rest, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name}" + (f" {whole % size // rest} {small}" if whole % size // rest else "")
    return f"{whole} s"


def figure(value: Any) -> str:
    """A number with as many digits as matter; other things as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "—" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def when(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%-d %b %Y, %H:%M} UTC" if seconds is not None else "—"


def quality(facts: Facts) -> Record:
    """Figures of the newest evaluation, {} before the first one."""
    return (facts.evaluation or {}).get("metrics") or facts.record.get("summary") or {}


def verdict(facts: Facts) -> tuple[str, str]:
    """(one word for the badge, what became of the run in a sentence or two)."""
    record, scores = facts.record, quality(facts)
    step, total = max((s.last for s in facts.starts), default=0), record.get("total_steps")
    place = f"step {step:,}" + (f" of {total:,}" if total else "")
    good = ""
    if scores.get("top1") is not None:
        good = f"{percent(scores['top1'])} of the validation samples are classified right"
        good += f", macro-F1 {scores['macro_f1']:.3f}" if scores.get("macro_f1") is not None else ""
    took = duration(facts.seconds) if facts.seconds else ""
    match record["state"]:
        case "done":
            starts = f" in {len(facts.starts)} starts" if len(facts.starts) > 1 else ""
            return "finished", (f"{good or 'Trained to the end'}, after {place}" + (f" and {took}" if took else "") + f"{starts}.")
        case "failed":
            error = record.get("error") or {}
            rank = f" on rank {error['rank']}" if error.get("rank") is not None else ""
            cause = f"{error['type']}: {error['message']}" if error else record.get("reason") or "no cause was recorded"
            word, text = "failed", f"Failed at {place}{rank}: {cause.rstrip('.')}."
        case "stopped":
            word, text = "stopped", f"Stopped at {place} by {record.get('reason') or 'a request'}; it can go on from its last checkpoint."
        case "running":
            left = facts.series("perf/eta_s")
            word = "running"
            text = f"At {place}" + (f", about {duration(left[-1][1])} left when this page was made." if left else ".")
        case _:
            return "submitted", "Nothing has been trained yet."
    return word, text + (f" At the newest evaluation {good}." if good else "")


def cost(facts: Facts) -> tuple[str, str]:
    """(how many, what): GPU-hours, or core-hours on a CPU, of all starts together."""
    hours = facts.seconds / 3600 * facts.record.get("world", 1)
    gpu = facts.record.get("device", "CPU") != "CPU"
    return f"{hours * (1 if gpu else facts.record.get('threads', 1)):.2g}", "GPU-hours" if gpu else "CPU core-hours"


def differing(settings: Record) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, default) of settings that are not the default; required ones have default "required"."""
    rows = []
    for name, _, default, _ in config.flat(Config):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        plain = None if default is ... else config.to_plain(default)
        if value is not None and value != plain:
            rows.append((name, value, "required" if default is ... else plain))
    return rows


def confused(confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
    """(true, predicted, samples, share of the true class) of the mistakes made most often."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:LISTED]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True)]
    return [(i, j, int(off[i, j]), float(off[i, j] / confusion[i].sum())) for i, j in pairs if off[i, j]]


# ---- pieces of HTML: Markup.format escapes every argument that is not Markup itself ----------------


def html(template: str, *values: Any, **named: Any) -> Markup:
    """`template` with `values` put in, escaped."""
    return Markup(template).format(*values, **named)


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(parts)


def section(title: str, *parts: Markup) -> Markup:
    """A section, or nothing where no part has anything to show."""
    inside = join(part for part in parts if part)
    name = title.lower().replace(" ", "-")
    return html('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>\n{2}</section>', name, title, inside) if inside else Markup()


def table(head: Sequence[str], body: Iterable[Sequence[Any]], caption: str, kind: str = "") -> Markup:
    """A table whose first cell in each row names the row."""
    heads = join(html('<th scope="col">{}</th>', h) for h in head)
    lines = join(
        html('<tr><th scope="row">{}</th>{}</tr>', row[0], join(html("<td>{}</td>", cell) for cell in row[1:])) for row in body
    )
    return html('<table class="{}"><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>', kind, caption, heads, lines)


def bar(share: float, text: str) -> Markup:
    """A value with a bar of `share` of the cell under it."""
    return html('<span class="bar" style="--share:{:.1f}%">{}</span>', 100 * share, text)


def folded(summary: str, inside: Markup) -> Markup:
    return html("<details><summary>{}</summary>{}</details>", summary, inside) if inside else Markup()


def facts_list(pairs: Iterable[tuple[str, Any]], kind: str = "facts") -> Markup:
    return html('<dl class="{}">{}</dl>', kind, join(html("<div><dt>{}</dt><dd>{}</dd></div>", k, v) for k, v in pairs if v not in (None, "")))


def command(title: str, *lines: str) -> Markup:
    return html('<h3>{}</h3><pre tabindex="0"><code>{}</code></pre>', title, "\n".join(lines))


# ---- charts --------------------------------------------------------------------------------------


def chart(title: str, note: str, curves: dict[str, Points], restarts: Sequence[int], *, form: str = "~g", log: bool = False,
          zero: bool = False, stairs: bool = False, fan: bool = False) -> Markup:
    """A figure of curves over steps; nothing where no curve has two points. `fan` colours them from first to last."""
    curves = {name: [p for p in points if p[1] > 0 or not log] for name, points in curves.items()}
    curves = {name: thin(points, FAN_POINTS if fan else POINTS) for name, points in curves.items() if len(points) > 1}
    if not curves:
        return Markup()
    names = list(curves)
    colours = [f"var(--c{i + 1})" for i in range(len(names))]
    if fan:
        colours = [f"color-mix(in oklab, var(--c2) {100 * i / max(1, len(names) - 1):.0f}%, var(--c1))" for i in range(len(names))]
    values = [{"x": s, "y": float(f"{v:.4g}"), "k": name} for name, points in curves.items() for s, v in points]
    steps = [v["x"] for v in values]
    x = alt.X("x:Q", title="step", scale=alt.Scale(domain=[min(steps), max(steps)], nice=False), axis=alt.Axis(format="~s", tickCount=5))
    legend = alt.Legend(title=None, orient="top", symbolType="stroke") if len(names) > 1 and not fan else None
    base = alt.Chart(alt.Data(values=values)).encode(
        x=x, y=alt.Y("y:Q", title=None, axis=alt.Axis(format=form, tickCount=5), scale=alt.Scale(type="log" if log else "linear", zero=zero)),
        color=alt.Color("k:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
    )
    near = alt.selection_point(nearest=True, on="pointermove", clear="pointerout", fields=["x", "k"], empty=False)
    zoom = alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey]", translate=False)
    hints = [alt.Tooltip("k:N", title="curve"), alt.Tooltip("x:Q", title="step", format=","), alt.Tooltip("y:Q", title="value", format=form)]
    marks = alt.Chart(alt.Data(values=[{"x": s, "t": "restart"} for s in restarts])).mark_rule(strokeDash=[3, 4], color="var(--muted)", clip=True)
    sparse = [v for v in values if len(curves[v["k"]]) <= 60 and not fan]
    drawn = alt.layer(
        marks.encode(x="x:Q", tooltip=[alt.Tooltip("t:N", title="attempt"), alt.Tooltip("x:Q", title="step", format=",")]),
        base.mark_line(strokeWidth=1.6, interpolate="step-after" if stairs else "linear", clip=True).add_params(zoom),
        base.properties(data=alt.Data(values=sparse)).mark_point(filled=True, size=22, opacity=1, clip=True),
        base.mark_point(filled=True, size=70).encode(opacity=alt.condition(near, alt.value(1), alt.value(0)), tooltip=hints).add_params(near),
    ).properties(width="container", height=220, description=f"{title}. {note}")
    spec = Markup(json.dumps(drawn.to_dict(), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    return html('<figure><figcaption><h3>{}</h3><p>{}</p></figcaption><div class="chart"></div><script type="application/json">{}</script></figure>',
                title, note, spec)


# ---- the page, section by section ----------------------------------------------------------------


def page(facts: Facts) -> str:
    """The whole page as text."""
    here = Path(__file__)
    scripts = [vl_convert.javascript_bundle(), here.with_suffix(".js").read_text(encoding="utf-8")]
    # Only these two scripts may run and nothing may be loaded, whatever a class is called.
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    body = join(part for part in (
        head(facts), what_ran(facts), curves(facts), rates(facts), optimizer(facts), speed(facts), classes(facts),
        mistakes(facts), attempts(facts), commands(facts),
    ) if part)
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name} – vitdist report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}\">\n"
        "<style>\n{css}</style></head>\n<body><main>\n{body}\n</main>\n{scripts}</body></html>\n",
        name=facts.run.name, hashes=hashes, css=Markup(here.with_suffix(".css").read_text(encoding="utf-8")), body=body,
        scripts=join(Markup(f"<script>{s}</script>") for s in scripts),
    )


def head(facts: Facts) -> Markup:
    """The verdict and the figures that one looks for first."""
    word, sentence = verdict(facts)
    scores, summary = quality(facts), facts.record.get("summary") or {}
    hours, unit = cost(facts)
    fast = summary.get("images_per_s") or _median(facts.series("perf/images_per_s"))
    tiles = [
        ("top-1", percent(scores["top1"]) if scores.get("top1") is not None else None),
        ("macro-F1", f"{scores['macro_f1']:.3f}" if scores.get("macro_f1") is not None else None),
        ("balanced accuracy", percent(scores["balanced_accuracy"]) if scores.get("balanced_accuracy") is not None else None),
        ("time", duration(facts.seconds) if facts.seconds else None),
        (unit, hours if facts.seconds else None),
        ("images/s", figure(round(fast)) if fast else None),
    ]
    counts = np.array(_counts(facts, "val"))
    guess = f"For comparison: always naming the largest class would be right for {percent(counts.max() / counts.sum())}." if counts.sum() else ""
    return html(
        '<header><p class="eyebrow">vitdist · run report · {}</p><h1>{} <span class="badge {}">{}</span></h1><p class="verdict">{}</p>{}{}</header>',
        when(datetime.now(UTC).timestamp()), facts.run.name, word, word, sentence, facts_list(tiles, "tiles"),
        html('<p class="note">{}</p>', guess) if guess and scores else "",
    )


def what_ran(facts: Facts) -> Markup:
    record, model, batch = facts.record, facts.record.get("model") or {}, facts.record.get("batch") or {}
    data = {kind: (record.get("data") or {}).get(kind) or {} for kind in ("train", "val")}
    sizes = {kind: f"{d['samples']:,} samples, digest {str(d.get('digest', '—'))[:12]}" for kind, d in data.items() if "samples" in d}
    split = f"{batch['global_batch']} = {batch['micro_batch']} × {batch['accumulation']} × {batch['world']} (micro batch × accumulation × ranks)"
    scale = "replicated" if record.get("zero") == 0 else f"ZeRO-{record.get('zero')}"
    pairs = [
        ("model", model.get("name")), ("weights", model.get("weights")),
        ("parameters", f"{model['parameters']:,}, {model['trainable']:,} trained" if "parameters" in model else None),
        ("training set", sizes.get("train")), ("validation set", sizes.get("val")),
        ("global batch", split if batch else None),
        ("engine", f"{record['precision']}, {scale}, {record.get('world')} ranks on {record.get('device', '?')}" if "precision" in record else None),
        ("code", _commit(facts.env)), ("host", facts.env.get("host")),
        ("versions", ", ".join(f"{k} {v}" for k, v in (facts.env.get("versions") or record.get("versions") or {}).items())),
    ]
    settings = [(name, figure(value), figure(default)) for name, value, default in differing(facts.settings)]
    return section(
        "What ran", facts_list(pairs), _balance(facts),
        folded(f"{len(settings)} settings that are not the default", table(("setting", "value", "default"), settings, "Settings of this run", "settings"))
        if settings else Markup(),
    )


def _commit(env: Record) -> str | None:
    return f"{env['commit'][:12]}{' and uncommitted changes (patch.diff)' if env.get('dirty') else ''}" if env.get("commit") else None


def _names(facts: Facts) -> list[str]:
    known = (facts.evaluation or {}).get("classes") or ((facts.record.get("data") or {}).get("train") or {}).get("classes")
    return list(known) if isinstance(known, list) else []


def _counts(facts: Facts, kind: str) -> list[int]:
    found = ((facts.record.get("data") or {}).get(kind) or {}).get("counts") or []
    return list(found.values()) if isinstance(found, dict) else list(found)


def _balance(facts: Facts) -> Markup:
    """Training samples of each class as bars; of many classes the largest and the smallest."""
    counts = _counts(facts, "train")
    if not counts:
        return Markup()
    names = _names(facts) or [f"class {i}" for i in range(len(counts))]
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    shown = order if len(order) <= MATRIX else order[: LISTED // 2] + order[-LISTED // 2 :]
    ratio = f", the largest {max(counts) / max(1, min(counts)):.3g} times the smallest" if len(counts) > 1 else ""
    rows = [(names[i], bar(counts[i] / max(1, *counts), f"{counts[i]:,}")) for i in shown]
    if len(shown) < len(order):
        rows.insert(LISTED // 2, (f"… {len(order) - len(shown)} classes between …", ""))
    note = f"Training samples of {len(counts)} class{'es' if len(counts) > 1 else ''}{ratio}"
    return html("<h3>Classes</h3>{}", table(("class", "samples"), rows, note, "bars"))


def curves(facts: Facts) -> Markup:
    best = max(((v, s) for s, v in facts.series("val/top1")), default=None)
    restarted = " Dashed lines: a restart from a checkpoint." if facts.restarts else ""
    return section(
        "Learning curves",
        html('<div class="pair">{}{}</div>', *_or_empty(
            chart("Loss", f"Training loss has label smoothing and augmentation in it, so it may lie above the other.{restarted}",
                  {"training": facts.series("train/loss"), "validation": facts.series("val/loss")}, facts.restarts),
            chart("Validation quality", f"Best top-1 {percent(best[0])}, at step {best[1]:,}." if best else "",
                  {"top-1": facts.series("val/top1"), "macro-F1": facts.series("val/macro_f1")}, facts.restarts, form=".0%"),
        )),
        html('<p class="note">Point at a curve for its numbers; Ctrl + wheel or a pinch zooms, a double click shows all again.</p>')
        if facts.series("train/loss") else Markup(),
    )


def _or_empty(*parts: Markup) -> tuple[Markup, ...]:
    return parts


def rates(facts: Facts) -> Markup:
    keys = sorted({key for row in facts.rows for key in row if key.startswith("lr/")}, reverse=True)
    fan = {key.removeprefix("lr/"): facts.series(key) for key in keys}
    peaks = {name: max(v for _, v in points) for name, points in fan.items() if points}
    note = ""
    if peaks:
        top, low = list(peaks)[0], list(peaks)[-1]
        note = f"From {top} (peak {peaks[top]:.2g}) down to {low} (peak {peaks[low]:.2g}); logarithmic axis."
    key = html('<p class="fan"><span>{}</span><i aria-hidden="true"></i><span>{}</span></p>', list(fan)[0], list(fan)[-1]) if len(fan) > 1 else Markup()
    groups = [(g.get("name"), figure(g.get("lr_scale")), figure(g.get("weight_decay")), figure(g.get("tensors")), figure(g.get("parameters")))
              for g in facts.record.get("groups") or []]
    return section(
        "Learning rate of each layer", chart("Learning rates", note, fan, facts.restarts, form=".0e", log=True, fan=True), key,
        folded(f"{len(groups)} parameter groups", table(("group", "rate ×", "weight decay", "tensors", "parameters"), groups, "Parameter groups")) if groups else Markup(),
    )


def optimizer(facts: Facts) -> Markup:
    skipped, scale = facts.series("optim/skipped_steps"), facts.series("optim/loss_scale")
    times = int(skipped[-1][1]) if skipped else 0
    lost = f"{times} of {skipped[-1][0]:,} updates were skipped for an overflow." if skipped else ""
    changing = len({v for _, v in scale}) > 1
    clip = (facts.settings.get("optim") or {}).get("clip")
    charts = [chart("Gradient norm", f"Before clipping at {clip:g}." if clip else "Not clipped.", {"gradient norm": facts.series("optim/grad_norm")}, facts.restarts, log=True)]
    if changing:
        charts.append(chart("Loss scale", "Halved at an overflow, doubled after a quiet while.", {"loss scale": scale}, facts.restarts, form="~s", log=True, stairs=True))
    if times:
        charts.append(chart("Skipped updates", "Counted from the start.", {"skipped": skipped}, facts.restarts, stairs=True, zero=True))
    fixed = f" The loss scale stayed at {scale[-1][1]:g}." if scale and not changing else ""
    return section("Optimizer", html('<p class="note">{}{}</p>', lost, fixed) if lost or fixed else Markup(), html('<div class="pair">{}</div>', join(charts)) if any(charts) else Markup())


def speed(facts: Facts) -> Markup:
    wait, fast = facts.series("perf/data_wait_pct"), facts.series("perf/images_per_s")
    more = [("images/s (median)", figure(_median(fast))), ("waiting for data (median)", f"{_median(wait):.1f}%" if wait else None)]
    more += [(title, f"{_median(facts.series(key)):.1f} {unit}") for title, key, unit in
             (("model FLOPs utilisation", "perf/mfu_pct", "%"), ("GPU memory of rank 0", "perf/memory_gib", "GiB")) if facts.series(key)]
    charts = [chart("Images per second", "All ranks together, training alone.", {"images/s": fast}, facts.restarts, form="~s", zero=True),
              chart("Waiting for data", "Share of the time in which the training loop stood still, in percent.", {"data wait": wait}, facts.restarts, zero=True)]
    return section("Speed", facts_list(more) if fast else Markup(), html('<div class="pair">{}</div>', join(charts)) if any(charts) else Markup())


def _median(points: Points) -> float | None:
    return float(np.median([v for _, v in points])) if points else None


def classes(facts: Facts) -> Markup:
    found = facts.evaluation
    if not found:
        return Markup()
    names, confusion = found["classes"], np.array(found["confusion"])
    scores = sorted(found["per_class"], key=lambda c: c["f1"])
    rows = [(c["name"], f"{c['support']:,}", bar(c["precision"], percent(c["precision"])), bar(c["recall"], percent(c["recall"])), f"{c['f1']:.3f}") for c in scores]
    head = ("class", "samples", "precision", "recall", "F1")
    few = rows if len(rows) <= MATRIX else rows[:LISTED]
    title = "Every class, the hardest first" if few is rows else f"The {len(few)} hardest of {len(rows)} classes"
    pairs = [(html("{} <span>taken for</span> {}", names[i], names[j]), f"{n:,}", bar(share, percent(share))) for i, j, n, share in confused(confusion)]
    return section(
        "Classes", html('<p class="note">Measured on {:,} validation samples at step {:,}.</p>', int(confusion.sum()), found.get("step") or 0),
        table(head, few, title, "scores"),
        folded(f"The other {len(rows) - len(few)} classes", table(head, rows[len(few):], "The other classes", "scores")) if few is not rows else Markup(),
        html("<h3>Confusion</h3>{}", matrix(names, confusion)) if len(names) > 1 else Markup(),
        table(("mistake", "samples", "of the class"), pairs, "Mistakes made most often", "pairs") if pairs and len(names) > 2 else Markup(),
    )


def matrix(names: list[str], confusion: np.ndarray) -> Markup:
    """Rows the true class, columns the predicted one: a table for a few classes, a picture for many."""
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    if len(names) > MATRIX:
        # The alpha channel carries the value, so that the picture suits a light page and a dark one.
        pixels = np.zeros((*share.shape, 4), np.uint8)
        pixels[..., :3] = (213, 94, 0)
        pixels[np.eye(len(names), dtype=bool), :3] = (0, 114, 178)
        pixels[..., 3] = np.round(255 * np.sqrt(share))
        return html('<figure class="matrix"><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>', _data_uri(Image.fromarray(pixels)),
                    f"Confusion matrix of {len(names)} classes; the mistakes made most often are in the table below.",
                    f"{len(names)} × {len(names)} classes in their order: rows true, columns predicted; blue right, orange wrong, stronger for a larger share of the class.")
    heads = join(html('<th scope="col"><span>{}</span></th>', n) for n in names)
    lines = join(
        html('<tr><th scope="row">{}</th>{}</tr>', names[i], join(
            html('<td class="{}" style="--v:{:.0f}%" title="{}">{}</td>', "hit" if i == j else "miss", 100 * math.sqrt(share[i, j]),
                 f"{names[i]}, predicted {names[j]}: {n}", int(n) or "") for j, n in enumerate(confusion[i])))
        for i in range(len(names))
    )
    return html('<table class="confusion"><caption>Rows: the true class; columns: the predicted one. Stronger: a larger share of the class.</caption>'
                '<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table>', heads, lines)

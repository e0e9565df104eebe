"""The report as one page, runs/NAME/report.html, that opens from disk without a network.

    vitdist report runs/NAME

page.css and page.js are put into it, the pictures and the scripts of the charts too.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from vitdist import gallery, results, rundir
from vitdist.report import charts, words
from vitdist.report.charts import Chart
from vitdist.report.facts import (
    Facts,
    Start,
    class_counts,
    confused,
    differing,
    read,
    recipe,
    shards,
    spread,
    undone,
    waits,
)
from vitdist.report.markup import (
    bar,
    command,
    data_uri,
    folded,
    html,
    join,
    listing,
    note,
    pair,
    section,
    table,
    wide,
    wrap,
)
from vitdist.report.words import (
    cost,
    duration,
    figure,
    goodput,
    moment,
    percent,
    reproduction,
    resumption,
    setting,
    verdict,
)
from vitdist.rundir import RunDir

MATRIX = 20  # classes up to which a confusion matrix is a table that can be read
LISTED = 16  # classes or pictures shown before the rest is folded away
SQUARES = 200  # on a side of the picture of more: smaller ones cannot be seen
THUMB = 96
SAMPLES = 12
NOTHING = Markup()
MOST_BUTTONS = 10  # curves with a button each that is always seen
UNREADABLE = (OSError, ValueError, KeyError, IndexError, SyntaxError, Image.DecompressionBombError)
"""What shards that are gone or broken raise, and pictures in them: Pillow has SyntaxError for some."""

ENDS = {"done": "finished", "stopped": "stopped and saved", "lost": "ended without a word"}


def write(run: RunDir) -> Path:
    """Make the report of `run`, whatever its state; returns its path. Raises ValueError for bad records."""
    rundir.publish(run.report, page(read(run)))
    return run.report


def page(facts: Facts, refresh_s: int = 0) -> str:
    """The whole page as text; with `refresh_s` the browser reads the file again every so many seconds."""
    parts = (data, curves, rates, optimizer, speed, classes, calibration, mistakes, reliability, commands)
    return document(facts.run.name, join(make(facts) for make in (head, result, what_ran, *parts)), refresh_s=refresh_s)


def document(title: str, body: Markup, css: str = "", refresh_s: int = 0) -> str:
    """A page around `body` that loads nothing from anywhere; `css` is added to page.css."""
    here = Path(__file__)
    scripts = [charts.vega(), here.with_suffix(".js").read_text(encoding="utf-8")]
    # Only these two may run and nothing may be loaded, whatever a class is called.
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: vitdist report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        "<style>\n{css}</style></head>\n<body><main>\n{body}\n</main>\n{scripts}</body></html>\n",
        title=title,
        policy=policy,
        again=html('<meta http-equiv="refresh" content="{}">\n', refresh_s) if refresh_s else "",
        css=Markup(here.with_suffix(".css").read_text(encoding="utf-8") + css),
        body=body,
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
    remedy = facts.starts[-1].remedy.rstrip(".") if facts.starts else ""
    naive = f"Always naming the largest class would be right for {largest}." if largest else ""
    return html(
        '<header><p class="note">vitdist report · {}</p><h1>{} <span class="badge {}">{}</span></h1>'
        '<p class="verdict">{}</p>{}{}{}{}{}</header>',
        moment(words.now()),
        facts.run.name,
        word,
        word,
        sentence,
        listing(tiles, "tiles"),
        note(expectation(facts)),
        note(naive),
        note(f"To do: {remedy}." if word == "failed" and remedy else ""),
        note("" if facts.record["state"] == "done" else newest(facts)),
    )


def result(facts: Facts) -> Markup:
    """Every figure of the newest evaluation, with its interval."""
    rows = measured(facts)
    shown = 3 if any(interval != "-" for *_, interval in rows) else 2
    step, samples = facts.evaluation.get("step"), facts.scores.get("samples")
    where = f" of {samples:,} validation samples" if samples else " of the validation samples"
    where += f", at step {step:,}" if step is not None else ""
    columns = ("figure", "value", "95 % interval")[:shown]
    return section("Result", table(columns, [row[:shown] for row in rows], f"The newest evaluation,{where}", "figures"))


def measured(facts: Facts) -> list[tuple[str, ...]]:
    """(name, value, interval or -) of each figure of the newest evaluation."""
    intervals = facts.evaluation.get("intervals") or {}
    return [
        (words, results.figure(metric, facts.scores[metric]), results.between_words(metric, intervals.get(metric)))
        for metric, words in results.METRICS.items()
        if facts.scores.get(metric) is not None
    ]


def expectation(facts: Facts) -> str:
    """What the recipe says that it brings, and whether it did; empty without a recipe that says so."""
    found, scores = recipe(facts), facts.scores
    if found is None or not found.expected:
        return ""
    text = f"Expected by {found.name}: {found.expected}"
    if any(name == "data.val" for name, _, _ in found.changed):
        text += " This run was measured on other data, so that it is not held against that."
    elif facts.record["state"] == "done" and found.lowest is not None and "top1" in scores:
        missing = found.lowest - 100 * scores["top1"]
        text += f" This run is {missing:.1f} points below that." if missing > 0.05 else " This run reached that."
        text += f" Settings changed: {len(found.changed)}." if found.changed else ""
    return text


def newest(facts: Facts) -> str:
    """The last figures of a run that has not finished, each with its step, and how old they are."""
    keys = {"training loss": "train/loss", "validation loss": "val/loss", "gradient norm": "optim/grad_norm"}
    told: dict[int, list[str]] = {}
    for name, key in (keys | {"images/s": "perf/images_per_s", "top-1": "val/top1"}).items():
        for step, value in facts.series(key)[-1:]:
            told.setdefault(step, []).append(f"{name} {percent(value) if name == 'top-1' else figure(value)}")
    if not told:
        return ""
    times = [reached.time for reached in facts.history.reached.values() if reached.time]
    when = f", {moment(max(times))}" if times else ""
    ago = max(0.0, words.now() - max(times)) if times else 0.0
    age = f", {duration(ago)} before this page was made" if times and facts.record["state"] == "running" else ""
    (first, of_it), *earlier = sorted(told.items(), reverse=True)
    rest = "".join(f"; at step {step:,}: {', '.join(of)}" for step, of in earlier)
    return f"Last figures, at step {first:,}{when}{age}: {', '.join(of_it)}{rest}."


def what_ran(facts: Facts) -> Markup:
    """Model, batch, engine, code, and the settings that differ from the recipe and the defaults."""
    record, env, model, batch = facts.record, facts.env, facts.about("model"), facts.about("batch")
    zero = f"ZeRO-{record['zero']}" if record.get("zero") else "every rank holds all"
    versions = env.get("versions") or env.get("packages") or facts.about("versions")
    code = (env.get("commit") or "")[:12] + (" with uncommitted changes" if env.get("dirty") else "")
    split = "{global_batch} = {micro_batch} x {accumulation} x {world} ranks"
    known = [
        ("model", model.get("name")),
        ("weights", model.get("weights")),
        ("parameters", f"{model['parameters']:,}, of which {model['trainable']:,} trained" if model else ""),
        ("batch", split.format(**batch) if batch else ""),
        ("engine", f"{record['precision']}, {zero}" if "precision" in record else ""),
        ("ran on", f"{record['world']} x {record.get('device', 'rank')}" if "world" in record else ""),
        ("host", env.get("host")),
        ("code", code),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return section("What ran", pair(wrap("<div>{}</div>", listing(known)), wrap("<div>{}</div>", settings(facts))))


def settings(facts: Facts) -> Markup:
    """Those that differ from the recipe; folded where there is one, those that are not the default."""
    base, columns = recipe(facts), ("setting", "value", "default")
    differ = [(name, setting(value), setting(usual)) for name, value, usual in differing(facts.settings)]
    title = "Settings that are not the default"
    if base is None:
        return table(columns, differ, title, "settings")
    changed = [(name, setting(value), setting(usual)) for name, value, usual in base.changed]
    return join(
        [
            table(("setting", "value", "recipe"), changed, f"Settings that differ from {base.name}", "settings")
            or note(f"All settings are those of {base.name}."),
            folded(f"{len(differ)} settings that are not the default", table(columns, differ, title, "settings")),
        ]
    )


def data(facts: Facts) -> Markup:
    """Sets, samples of each class, and some training pictures as they are stored."""
    sets = {kind: facts.about("data").get(kind) or {} for kind in ("train", "val")}
    sizes = {k: f"{s['samples']:,} samples, digest {s['digest'][:12]}" for k, s in sets.items() if s}
    known = [("training set", sizes.get("train")), ("validation set", sizes.get("val"))]
    counts = balance(class_counts(facts, "train"), class_counts(facts, "val"))
    stored = pair(wrap("<div>{}</div>", listing(known), samples(facts)), wrap("<div>{}</div>", counts))
    return section("Data", stored, inputs(facts))


def inputs(facts: Facts) -> Markup:
    """The first pictures as the model got them."""
    try:
        kept = (rundir.read_json(facts.run.inputs) or {}).get("pictures", ())
        pictures = [(one["label"], thumbnail(base64.b64decode(one["jpeg"]))) for one in kept]
    except (*UNREADABLE, TypeError) as error:
        return note(f"{facts.run.inputs.name} cannot be read: {error}")
    items = [html('<li><img src="{1}" alt="Input of the model: {0}"><p>{0}</p></li>', *picture) for picture in pictures]
    heading = "<h3>As the model got them</h3><p>The first ones, augmented and mixed, with their labels.</p>"
    return wrap(heading + '<ul class="pictures">{}</ul>', *items)


def samples(facts: Facts) -> Markup:
    """A few training pictures of each class."""
    try:
        found = shards(facts, "train")
        chosen = spread(found.labels, len(found.classes), SAMPLES)
        pictures = [(found.classes[found.labels[i]], thumbnail(found.image(i))) for i in chosen]
    except UNREADABLE as error:
        return note(f"Training pictures cannot be read here: {error}") if facts.settings else Markup()
    items = [html('<li><img src="{1}" alt="Training sample of {0}"><p>{0}</p></li>', *picture) for picture in pictures]
    return wrap('<ul class="pictures">{}</ul>', *items)


def balance(train: dict[str, int], val: dict[str, int]) -> Markup:
    """Samples of each class as bars; of many classes the largest and the smallest."""
    order = sorted(train.items(), key=lambda item: -item[1])
    if not order:
        return Markup()
    most, least, half = order[0][1], order[-1][1], LISTED // 2
    shown = order if len(order) <= MATRIX else order[:half] + order[-half:]
    rows: list[tuple[Any, ...]] = [
        (name, bar(n / max(1, most), f"{n:,}"), *([f"{val.get(name, 0):,}"] if val else [])) for name, n in shown
    ]
    if len(shown) < len(order):
        rows.insert(half, (f"… {len(order) - len(shown):,} classes between …", *[""] * (len(rows[0]) - 1)))
    ratio = f", the largest {most / least:.3g} times the smallest" if least and most > least else ""
    what = f"{len(order):,} classes{ratio}" if len(order) > 1 else "One class"
    return table(("class", "training samples", "validation")[: len(rows[0])], rows, what, "bars")


def drawn(chart: Chart | None) -> Markup:
    """A figure that page.js draws, with a button for each curve that hides and shows it; nothing of no chart."""
    if chart is None:
        return Markup()
    buttons = join(
        html('<button type="button" aria-pressed="true" style="--hue:{}" class="{}">{}</button>', hue, style, name)
        for name, (hue, style) in list(_keys(chart).items())[chart.context :]
    )
    legend = html('<div class="legend" role="group" aria-label="Curves of {}" hidden>{}</div>', chart.title, buttons)
    many = len(chart.curves) > MOST_BUTTONS
    if not chart.legend or len(chart.curves) < 2:
        legend = Markup()
    return figure_of(
        chart.title,
        chart.about,
        {
            "columns": charts.columns(chart),
            "specification": charts.specification(dataclasses.replace(chart, legend=False)),
        },
        before=Markup() if many else legend,
        after=folded(f"Hide some of {len(chart.curves)} curves", legend) if many else Markup(),
    )


def _keys(chart: Chart) -> dict[str, tuple[str, str]]:
    """Colour of each curve, and "dashed" of those that are."""
    looks = zip(chart.curves, charts.strokes(chart), strict=True)
    return {name: (hue, "" if dash == [1, 0] else "dashed") for name, (hue, dash) in looks}


def figure_of(
    title: str, about: str, drawing: dict[str, Any], before: Markup = NOTHING, after: Markup = NOTHING
) -> Markup:
    # A closing tag in a name would end the script element.
    inside = Markup(json.dumps(drawing, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    return html(
        '<figure><figcaption><h3>{}</h3><p>{}</p></figcaption><div>{}<div class="chart"></div>'
        '<script type="application/json">{}</script>{}</div></figure>',
        title,
        about,
        before,
        inside,
        after,
    )


def curves(facts: Facts) -> Markup:
    """Losses and validation quality over the run."""
    figures = pair(drawn(charts.losses(facts)), drawn(charts.quality(facts)))
    instead = "The charts need JavaScript; their numbers are in metrics.jsonl."
    hint = (
        "Point at a curve for its numbers; its name hides it; zoom with Ctrl and the wheel, back with a double click."
    )
    bare = wrap("<noscript>{}</noscript>", note(instead))
    return section("Learning curves", *([bare, figures, note(hint)] if figures else []))


def rates(facts: Facts) -> Markup:
    """Learning rate of each layer group, as a fan, and the table of groups."""
    names, scale = list(charts.peaks(facts)), Markup()
    if len(names) > MOST_BUTTONS:
        scale = html('<p class="fan">{}<i aria-hidden="true"></i>{}</p>', names[0], names[-1])
    columns = ("name", "lr_scale", "weight_decay", "tensors", "parameters")
    groups = [[figure(group.get(column)) for column in columns] for group in facts.record.get("groups") or ()]
    return section(
        "Learning rate of each layer",
        drawn(charts.rates(facts)),
        scale,
        folded(
            f"{len(groups)} parameter group" + "s" * (len(groups) > 1),
            wide(table(("group", "rate x", "weight decay", "tensors", "parameters"), groups, "Parameter groups")),
        ),
    )


def optimizer(facts: Facts) -> Markup:
    """Gradient norm; in fp16 the loss scale and the updates skipped for it."""
    text, points = "", facts.series("optim/skipped_steps")
    if facts.record.get("precision") == "fp16" and points:
        text = f"{points[-1][1]:.0f} of {points[-1][0]:,} updates were skipped for an overflow."
    shown = (charts.gradient, charts.loss_scale, charts.skipped)
    return section("Optimizer", note(text), pair(*(drawn(chart(facts)) for chart in shown)))


def speed(facts: Facts) -> Markup:
    """Throughput and what it was lost to."""
    names = {
        "images/s": "perf/images_per_s",
        "% of the time waiting for data": "perf/data_wait_pct",
        "% of the FLOPs that the GPU can do": "perf/mfu_pct",
        "GiB of GPU memory": "perf/memory_gib",
    }
    shown = (charts.throughput, charts.waiting, charts.steps, charts.utilisation, charts.machines)
    found = [(facts.middle(key), name) for name, key in names.items()]
    medians = ", ".join(f"{figure(value)} {name}" for value, name in found if value is not None)
    return section(
        "Speed",
        note(f"Medians over the run: {medians}." if medians else ""),
        pair(*(drawn(chart(facts)) for chart in shown)),
    )


def classes(facts: Facts) -> Markup:
    """Scores of each class, the confusion matrix, the mistakes made most often."""
    found = facts.evaluation
    if not found:
        return Markup()
    names, confusion = found["classes"], np.array(found["confusion"])
    rows: list[tuple[Any, ...]] = [
        (
            c["name"],
            f"{c['support']:,}",
            bar(c["precision"], percent(c["precision"])),
            bar(c["recall"], percent(c["recall"])),
            between(c.get("recall_interval")),
            f"{c['f1']:.3f}",
        )
        for c in results.worst_first(found, len(names))[0]
    ]
    columns: tuple[str, ...] = ("class", "samples", "precision", "recall", "its 95% interval", "F1")
    if not any(c.get("recall_interval") for c in found["per_class"]):
        columns, rows = columns[:4] + columns[5:], [row[:4] + row[5:] for row in rows]
    kind = "scores with-interval" if len(columns) > 5 else "scores"
    absent = len(found["per_class"]) - len(rows)
    unseen = f" {absent:,} class{'es have' if absent > 1 else ' has'} no validation samples." if absent else ""
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
        note(f"Measured on {int(confusion.sum()):,} validation samples at step {found['step']:,}.{unseen}"),
        search(
            f"{len(rows):,} classes",
            table(columns, rows[:few], title, kind),
            folded(rest, table(columns, rows[few:], rest, kind)),
        ),
        wrap("<h3>Confusion</h3>{}", *(both if 10 < len(names) <= MATRIX else [pair(*both)])),
    )


def between(interval: Sequence[float] | None) -> str:
    return f"{100 * interval[0]:.1f} to {percent(interval[1])}" if interval else ""


def search(count: str, *tables: Markup) -> Markup:
    """Tables whose rows page.js finds by their names, over all of them, and sorts."""
    return html(
        '<div class="find"><p class="search" hidden><label>Find a class <input type="search" autocomplete="off" '
        'spellcheck="false"></label> <output data-of="{}"></output></p>{}</div>',
        count,
        join(tables),
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


def calibration(facts: Facts) -> Markup:
    """Whether the model is right as often as it is sure: the reliability diagram, and its bins."""
    bins = facts.evaluation.get("calibration")
    if not bins:
        return Markup()
    total = sum(b["count"] for b in bins)
    sure, right = (sum(b["count"] * b[name] for b in bins) / total for name in ("confidence", "accuracy"))
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total
    text = f"Expected calibration error {percent(error)}: how far confidence and accuracy of a bin are apart, the mean "
    text += f"over all {total:,} samples (15 bins of equal width, Guo et al. 2017). On average the model is "
    text += f"{percent(sure)} sure and {percent(right)} right."
    most = max(b["count"] for b in bins)
    rows = [
        (
            f"{100 * b['from']:.0f} to {100 * b['to']:.0f}%",
            bar(b["count"] / most, f"{b['count']:,}"),
            percent(b["confidence"]),
            percent(b["accuracy"]),
        )
        for b in bins
    ]
    drawing = {"columns": {}, "specification": charts.calibration(bins)}
    about = "Bars: how many are right of those that the model is so sure of; below the line it is too sure."
    return section(
        "Calibration",
        note(text),
        pair(
            wrap("<div>{}</div>", figure_of("Right by how sure", about, drawing)),
            wrap("<div>{}</div>", table(("sure", "samples", "mean", "right"), rows, "Bins with samples", "bins")),
        ),
    )


def mistakes(facts: Facts) -> Markup:
    """The most confident mistakes as pictures out of the validation shards."""
    try:
        found = gallery.predictions(facts.run)
    except UNREADABLE as error:
        return section("Worst mistakes", note(f"The predictions cannot be read: {error}"))
    if not facts.evaluation or found is None:
        return Markup()
    wrong, count = int((found.labels != found.predicted).sum()), len(found.labels)
    text = f"{wrong:,} of {count:,} validation samples are classified wrong"
    try:
        pictures = [(thumbnail(seen.stored), seen) for seen in gallery.mistakes(facts.run, LISTED)]
    except UNREADABLE as error:
        return section("Worst mistakes", note(f"{text}; their pictures cannot be read here: {error}"))
    items = [
        html(
            '<li><img src="{0}" title="{1}" alt="Validation sample {2}: is {3}, was taken for {4}">'
            "<p><b>{3}</b></p><p>taken ({5}) for <b>{4}</b></p></li>",
            picture,
            seen.source,
            seen.id,
            seen.label,
            seen.predicted,
            percent(seen.confidence),
        )
        for picture, seen in pictures
    ]
    text += "; below, those that the model was surest of: look for wrong labels first." if items else "."
    return section("Worst mistakes", note(text), wrap('<ul class="pictures">{}</ul>', *items))


def thumbnail(stored: bytes) -> str:
    """A small picture as data URI; a tiny one enlarged to squares instead of a blur. Raises UNREADABLE."""
    with Image.open(io.BytesIO(stored)) as file:
        file.draft("RGB", (2 * THUMB, 2 * THUMB))  # of a large JPEG, no more is decoded than is shown
        picture = file.convert("RGB")
    times = THUMB // max(picture.size)
    if times > 1:
        size = picture.width * times, picture.height * times
        return data_uri(picture.resize(size, Image.Resampling.NEAREST))
    picture.thumbnail((THUMB, THUMB))
    return data_uri(picture, "JPEG")


def reliability(facts: Facts) -> Markup:
    """What interruptions cost: each attempt from which step to which, how it ended and why; what was met on the way."""
    return section(
        "Reliability",
        note(goodput(facts.starts)),
        timeline(facts),
        causes(facts.starts),
        happenings(facts.starts),
    )


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
    return wide(table(columns, rows, "Every start of the run", "starts"))


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
    made = wide(table(columns, rows, caption, "events"))
    return made if len(rows) <= LISTED else folded(f"{len(rows):,} events", made)


def commands(facts: Facts) -> Markup:
    """Files of the run, and the commands that make more of it."""
    run, at = facts.run, shlex.quote(str(facts.run.path))
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
    use = f'classify = pipeline("image-classification", model={str(run.model)!r})'
    return section(
        "Files and commands",
        listing((title, html("<code>{}</code>", path)) for title, path in files.items() if path.exists()),
        command("Predict", "from transformers import pipeline", use, 'classify("picture.jpg")')
        if run.model.exists()
        else Markup(),
        command("Resume", resumption(facts)) if facts.record["state"] != "done" else Markup(),
        command("Reproduce", *reproduction(facts)),
        command("Upload to Weights & Biases", f"vitdist sync {at}")
        if any(run.wandb.glob("offline-run-*"))
        else Markup(),
    )

"""What `vitdist stats` found as one page that opens without a network, or its classes alone as a picture.

    stats_page.write(stats, Path("shards/stats.html"))      # or classes.svg, classes.png

No script in it: bars are CSS, so one page serves light, dark, phone and print. The style is the report's.
"""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from vitdist import rundir
from vitdist.data import survey
from vitdist.data.survey import Pair, Stats

SHOWN = 10
"""Pairs and groups of each kind that are drawn."""
EXAMPLES = 6
"""Pictures of each class; of the classes that are folded away fewer, for a page of a thousand classes."""
_FOLDED_EXAMPLES = 2
_OPEN = 24  # classes up to which none is folded away
_ENDS = 8  # of more, so many of the largest and of the smallest are shown
_THUMB, _PAIR = 112, 224  # pixels: twice those on the page, for sharp screens

_STYLE = """
:root { --s0: var(--c1); --s1: var(--c2); --s2: var(--good); --s3: var(--muted); }
.findings { padding-left: 1.1rem; margin: 0 0 1rem; }
.findings li { margin: .35rem 0; max-width: 44rem; }
.key { display: flex; flex-wrap: wrap; gap: 1.25rem; list-style: none; padding: 0; margin: 0 0 1rem; }
.key li { font-size: .875rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
.key i, .stack i { background: var(--of); }
.classes { list-style: none; padding: 0; margin: 0; }
.classes li {
  display: grid; grid-template-columns: minmax(6rem, 14rem) minmax(8rem, 1fr) 356px; gap: .3rem 1.25rem;
  align-items: center; padding: .45rem 0; border-bottom: 1px solid var(--line);
}
.classes b { font-weight: 600; }
.classes span { color: var(--muted); font-size: .875rem; }
.classes .name { min-width: 0; line-height: 1.3; }
.stack { display: flex; height: 1.1rem; gap: 1px; }
.stack i { min-width: 1px; }
.stack i:first-child { border-radius: 3px 0 0 3px; }
.stack i:last-child { border-radius: 0 3px 3px 0; }
.stack i:only-child { border-radius: 3px; }
.thumbs { display: flex; gap: 4px; }
.thumbs img { width: 56px; height: 56px; object-fit: cover; }
.thumbs img, .twins img { border-radius: 3px; background: var(--soft); display: block; }
.twins {
  list-style: none; padding: 0; margin: 1rem 0 0; display: grid; gap: 1.75rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr));
}
.twins > li { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem .4rem; align-content: start; max-width: 20rem; }
.twins img { width: 100%; aspect-ratio: 1; object-fit: contain; }
.twins p { margin: 0; font-size: .8125rem; line-height: 1.35; color: var(--muted); }
.twins b { color: var(--ink); font-weight: 600; }
.twins > li > p:last-child { grid-column: 1 / -1; }
.groups { max-width: 36rem; }
@media (max-width: 40rem) {
  .classes li { grid-template-columns: minmax(0, 1fr); padding: .8rem 0; }
  .thumbs img { flex: 0 1 56px; min-width: 0; height: auto; aspect-ratio: 1; }
}
"""


def write(stats: Stats, place: Path) -> None:
    """Draw `stats` into an .html, .svg or .png. Raises OSError where nothing can be written."""
    match place.suffix:
        case ".html":
            rundir.publish(place, page(stats))
        case ".svg":
            import vl_convert

            rundir.publish(place, vl_convert.vegalite_to_svg(chart(stats)))
        case _:
            import vl_convert

            rundir.publish(place, vl_convert.vegalite_to_png(chart(stats), scale=2))


def chart(stats: Stats) -> dict[str, Any]:
    """Samples of each class and split as a Vega-Lite chart; of many classes a curve, the largest first."""
    total = stats.counts.sum(0)
    order = np.argsort(-total, kind="stable").tolist()
    many = len(order) > _OPEN
    values = [
        {"class": stats.classes[k], "rank": rank, "split": name, "samples": int(row[k]), "order": s}
        for rank, k in enumerate(order, 1)
        for s, (name, row) in enumerate(zip(stats.splits, stats.counts, strict=True))
    ]
    names = {"field": "class", "type": "nominal", "sort": [stats.classes[k] for k in order], "title": None}
    ranks = {"field": "rank", "type": "quantitative", "title": "class, the largest first"}
    samples = {"field": "samples", "type": "quantitative", "stack": "zero"}
    colours = {"domain": list(stats.splits), "range": ["#0072b2", "#d55e00", "#00735a", "#626a73"]}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 640,
        **({"height": 320} if many else {"height": {"step": 22}}),
        "background": "white",
        "data": {"values": values},
        "mark": {"type": "area", "interpolate": "step"} if many else {"type": "bar"},
        "encoding": {
            "x": ranks if many else samples,
            "y": samples if many else names,
            "color": {"field": "split", "type": "nominal", "scale": colours, "title": None},
            "order": {"field": "order"},
        },
    }


# ---- the page ---------------------------------------------------------------------------------------


def html(template: str, *values: Any, **named: Any) -> Markup:
    """`template` with `values` put in, escaped."""
    return Markup(template).format(*values, **named)


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(part for part in parts if part)


def section(title: str, *parts: Markup) -> Markup:
    inside = join(parts)
    return html("<section><h2>{}</h2>{}</section>", title, inside) if inside else Markup()


def page(stats: Stats) -> str:
    """The whole page as text."""
    style = (Path(__file__).parents[1] / "report" / "page.css").read_text(encoding="utf-8") + _STYLE
    folders = ", ".join(part.folder for part in stats.splits.values())
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{folders}: vitdist stats</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n<style>\n{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n",
        folders=folders,
        style=Markup(style),
        body=join([head(stats, folders), classes(stats), copies(stats), groups(stats)]),
    )


def head(stats: Stats, folders: str) -> Markup:
    """What there is, what is wrong with it, and the figures that one puts into a configuration."""
    total = stats.counts.sum(0)
    ratio = survey.imbalance(total)
    sizes = survey.record(stats, pairs=False)
    width, height = sizes["width"], sizes["height"]
    tiles = [
        *((name, f"{n:,}") for name, n in zip(stats.splits, stats.counts.sum(1).tolist(), strict=True)),
        ("classes", f"{len(stats.classes):,}"),
        ("largest : smallest class", f"{ratio:,.1f}" if ratio else "one is empty"),
        ("median pixels", f"{width['median']:,} x {height['median']:,}" if width else "-"),
    ]
    found = survey.sentences(stats)
    listed = join(html("<li>{}</li>", line[0].upper() + line[1:] + ".") for line in found)
    verdict = "No copies, no groups across splits, nothing broken."
    return html(
        '<header><p class="note">vitdist stats · {}</p><h1>{:,} pictures of {:,} classes</h1>{}'
        '<dl class="tiles">{}</dl><dl class="facts">{}</dl></header>',
        folders,
        int(total.sum()),
        len(stats.classes),
        html('<ul class="findings verdict">{}</ul>', listed) if found else html('<p class="verdict">{}</p>', verdict),
        join(html("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in tiles),
        join(html("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in survey.facts(stats)),
    )


def copies(stats: Stats) -> Markup:
    """The gravest pairs of each kind as pictures."""
    titles = {
        "labels differ": "Copies with different labels",
        "across splits": "Copies across splits",
        "within a split": "Copies within a split",
    }
    ranked = survey.ranked(stats)
    parts = []
    for what, title in titles.items():
        pairs = [pair for pair in ranked if survey.kind(stats, pair) == what]
        more = f"The first {SHOWN} of {len(pairs):,}; --json names all." if len(pairs) > SHOWN else ""
        items = join(twins(stats, pair) for pair in pairs[:SHOWN])
        if items:
            parts.append(section(title, html('<p class="note">{}</p><ul class="twins">{}</ul>', more, items)))
    return join(parts)


def twins(stats: Stats, pair: Pair) -> Markup:
    sides = [survey.sample_record(stats, row) for row in (pair.first, pair.second)]
    images = join(
        html('<img src="{}" title="{}" alt="{}">', thumbnail(stats, row, _PAIR), side.get("path"), side["class"])
        for row, side in zip((pair.first, pair.second), sides, strict=True)
    )
    words = join(html("<p><b>{}</b><br>{} {}</p>", s["class"], s["split"], s.get("path", s["key"])) for s in sides)
    return html("<li>{}{}<p>{}</p></li>", images, words, "same file" if pair.exact else f"{pair.likeness:.3f} alike")


def groups(stats: Stats) -> Markup:
    """Groups that lie on both sides of a split."""
    found = survey.crossing_groups(stats)
    rows = join(
        html('<tr><th scope="row">{}</th>{}</tr>', group, join(html("<td>{}</td>", n or "") for n in counts))
        for group, counts in found[:SHOWN]
    )
    heads = join(html('<th scope="col">{}</th>', name) for name in ("group", *stats.splits))
    caption = f"{len(found):,} groups" + (f", the largest {SHOWN}; --json names all" if len(found) > SHOWN else "")
    table = html(
        '<table class="groups"><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>',
        caption,
        heads,
        rows,
    )
    return section("Groups across splits", table if rows else Markup())


def classes(stats: Stats) -> Markup:
    """Each class with its samples in every split and some of its pictures; of many the middle is folded away."""
    total = stats.counts.sum(0)
    order = np.argsort(-total, kind="stable").tolist()
    rows = _rows_of_classes(stats)
    largest = max(1, int(total.max()))

    def listed(numbers: list[int], examples: int) -> Markup:
        items = join(_class(stats, k, rows[k], largest, examples) for k in numbers)
        return html('<ol class="classes">{}</ol>', items) if items else Markup()

    key = join(
        html('<li><i style="--of:var(--s{})"></i>{}</li>', min(s, 3), name) for s, name in enumerate(stats.splits)
    )
    legend = html('<ul class="key">{}</ul>', key) if len(stats.splits) > 1 else Markup()
    if len(order) <= _OPEN:
        return section("Classes", legend, listed(order, EXAMPLES))
    middle = order[_ENDS:-_ENDS]
    folded = html(
        "<details><summary>{:,} classes between</summary>{}</details>", len(middle), listed(middle, _FOLDED_EXAMPLES)
    )
    return section("Classes", legend, listed(order[:_ENDS], EXAMPLES), folded, listed(order[-_ENDS:], EXAMPLES))


def _rows_of_classes(stats: Stats) -> list[np.ndarray]:
    """Rows of each class that can be shown."""
    good = np.flatnonzero(stats.look.form != "")
    order = good[np.argsort(stats.labels[good], kind="stable")]
    return np.split(order, np.searchsorted(stats.labels[order], np.arange(1, len(stats.classes))))


def _class(stats: Stats, number: int, rows: np.ndarray, largest: int, examples: int) -> Markup:
    counts = stats.counts[:, number].tolist()
    splits = list(stats.splits)
    bars = join(
        html('<i style="width:{:.2f}%;--of:var(--s{})" title="{}: {:,}"></i>', 100 * n / largest, min(s, 3), name, n)
        for s, (n, name) in enumerate(zip(counts, splits, strict=True))
        if n
    )
    # Spread over all: neighbours in a shard that was not shuffled are often alike.
    shown = rows[np.linspace(0, len(rows) - 1, min(examples, len(rows))).astype(int)] if len(rows) else rows
    images = join(html('<img src="{}" alt="">', thumbnail(stats, int(row), _THUMB)) for row in shown)
    return html(
        '<li><div class="name"><b>{}</b><br><span>{}</span></div><div class="stack">{}</div>'
        '<div class="thumbs">{}</div></li>',
        stats.classes[number],
        " + ".join(f"{n:,}" for n in counts),
        bars,
        images,
    )


def thumbnail(stats: Stats, row: int, side: int) -> str:
    """A small picture as data URI; a tiny one enlarged to squares instead of a blur."""
    source, inside = stats.place(row)
    picture = survey.opened(source.image(inside), side).pixels
    times = side // max(picture.size)
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

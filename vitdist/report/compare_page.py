"""The comparison of several runs as one page, of the same make as that of a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from vitdist.report import charts, compare, sweep, words
from vitdist.report.compare import Comparison, Entry
from vitdist.report.markup import bar, command, folded, html, join, listing, note, pair, section, table, wrap
from vitdist.report.page import MOST_BUTTONS, document, drawn, figure_of
from vitdist.report.words import DONE, moment, setting

LISTED = 30  # runs in the table before the rest is folded away


def page(found: Comparison, home: Path, refresh_s: int = 0, named: Sequence[Path] = ()) -> str:
    """The page that lies in the folder `home`, of runs that go by the folders `named`: a sweep by its own."""
    body = join(
        [
            head(found),
            runs(found, home),
            settings(found),
            curves(found),
            mattered(found),
            ends(found),
            again(named or [entry.run.path for entry in found.entries]),
        ]
    )
    css = Path(__file__).with_name("compare.css").read_text(encoding="utf-8")
    return document(f"{len(found.entries)} runs", body, css, refresh_s)


def head(found: Comparison) -> Markup:
    warnings = wrap('<ul class="warnings">{}</ul>', *(html("<li>{}</li>", text) for text in found.warnings))
    return html(
        '<header><p class="note">vitdist report · {}</p><h1>{} runs</h1><p class="verdict">{}</p>{}</header>',
        moment(words.now()),
        len(found.entries),
        " ".join(compare.head(found)),
        warnings,
    )


def swatch(number: int) -> Markup:
    """The stroke of a run in the charts."""
    if number >= compare.SHOWN:
        colour, dash = charts.themed("line"), [1, 0]
    else:
        colour, dash = charts.stroke(number)
    dashes = "" if dash == [1, 0] else f";stroke-dasharray:{dash[0]} {dash[1]}"
    return html(
        '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><line x1="1" x2="25" y1="4" y2="4" '
        'style="stroke:{}{}"/></svg>',
        colour,
        dashes,
    )


def named(entry: Entry, number: int, home: Path) -> Markup:
    """The run's name with its stroke; a link to its page if there is one."""
    if entry.run.report.exists():
        link = quote(compare.relative(entry.run.report, home))
        return html('{}<a href="{}">{}</a>', swatch(number), link, entry.name)
    return html("{}{}", swatch(number), entry.name)


def runs(found: Comparison, home: Path) -> Markup:
    """Each run with what it came to, the best first."""
    columns, rows = compare.table(found)
    marked = []
    for number, (entry, cells) in enumerate(zip(found.entries, rows, strict=True)):
        value = html("<b>{}</b>", cells[2]) if entry in found.winners else cells[2]
        badge = html('<span class="badge {0}">{0}</span>', entry.word)
        marked.append((named(entry, number, home), badge, value, *cells[3:]))
    title = "The best first; intervals are 95 %, of the validation samples alone"
    rest = f"The other {len(marked) - LISTED:,} runs"

    def wide(part: Sequence[Sequence[object]], caption: str) -> Markup:
        return wrap('<div class="wide" tabindex="0">{}</div>', table(columns, part, caption, "runs"))

    return section("Runs", wide(marked[:LISTED], title), folded(rest, wide(marked[LISTED:], rest)))


def settings(found: Comparison) -> Markup:
    """Settings that differ, a row each, where they are too many for the table of runs."""
    if len(found.varied) <= compare.BESIDE:
        return Markup()
    shown = found.entries[:LISTED]
    rows = [(name, *(setting(entry.settings.get(name)) for entry in shown)) for name in found.varied]
    made = table(("setting", *(entry.name for entry in shown)), rows, "A row for each of them", "differ")
    return section("Settings that differ", wrap('<div class="wide" tabindex="0">{}</div>', made))


def curves(found: Comparison) -> Markup:
    made = compare.together(found)
    figures = [drawn(chart) for chart in made]
    if not figures:
        return Markup()
    names = []
    if len(found.entries) > MOST_BUTTONS:  # of fewer, each chart names them
        shown = enumerate(found.entries[: compare.SHOWN])
        names = [html("<li>{}{}</li>", swatch(number), entry.name) for number, entry in shown]
    if (grey := len(found.entries) - compare.SHOWN) > 0:
        some = f"{compare.GREY} of {grey:,} others" if grey > compare.GREY else f"{grey} others"
        names.append(html("<li>{}{}</li>", swatch(compare.SHOWN), some))
    return section(
        "Curves",
        wrap("<noscript>{}</noscript>", note("The charts need JavaScript; their numbers are in metrics.jsonl.")),
        wrap('<ul class="strokes">{}</ul>', *names),
        pair(*figures[:2]),
        pair(*figures[2:]),
        note("Point at a curve for its numbers; zoom with Ctrl and the wheel, back with a double click."),
    )


def mattered(found: Comparison) -> Markup:
    """Parallel coordinates, and the effect of each setting."""
    swept = compare.swept(found)
    if not swept:
        return Markup()
    specification = sweep.parallel(swept.names, swept.axes, swept.told)
    lines = figure_of(
        "Every run through its settings",
        "The stronger, the better; the best has the other colour.",
        {"columns": {}, "specification": specification},
    )
    many, rows = len(swept.names), []
    for effect in swept.effects:
        share, chance, what = compare.effect_cells(effect, found.metric, many)
        rows.append((effect.name, bar(effect.share, share) if share else "", chance, what))
    columns = ("setting", "explains", "p", "mean result by value")
    text = (
        f"Of {many} finished runs: the share of the variance that each setting explains by itself, and how often "
        "results in a random order would be explained as well (p)."
    )
    if any(effect.correlation is not None for effect in swept.effects):
        text += " Settings with another value in nearly every run have their best value and trend instead."
    few = " With so few runs only strong effects can be seen." if many < compare.MANY else ""
    made = wrap('<div class="wide" tabindex="0">{}</div>', table(columns, rows, "The strongest first", "effects"))
    return section("What mattered", lines, note(text + few), made)


def ends(found: Comparison) -> Markup:
    """What became of runs that did not finish."""
    return wrap(
        '<section aria-labelledby="not-finished"><h2 id="not-finished">Not finished</h2>{}</section>',
        listing(((e.name, e.sentence) for e in found.entries if e.word != DONE), "facts causes"),
    )


def again(named: Sequence[Path]) -> Markup:
    """The command, of runs that can be named in one."""
    if len(named) > LISTED:
        return Markup()
    return section("Commands", command("Make this page again", shlex.join(["vitdist", "report", *map(str, named)])))

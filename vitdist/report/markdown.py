"""The report in Markdown, for a pull request or a paper: verdict, figures, settings, classes, commands.

vitdist report runs/NAME --markdown         # runs/NAME/report.md; made after --figures, it shows these
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from vitdist import results
from vitdist.report import compare
from vitdist.report.compare import Comparison
from vitdist.report.facts import Facts, differing
from vitdist.report.page import expectation
from vitdist.report.words import DONE, cost, duration, figure, goodput, moment, reproduction, setting, verdict

HARDEST = 20  # classes in the table
MOST_RUNS = 50  # in the table of a comparison
FIRST = ("loss", "quality", "classes", "confusion", "calibration")


def of_run(facts: Facts, made: float, pictures: Iterable[Path]) -> str:
    """The report of one run, made at that time, with `pictures` by their paths from it."""
    word, sentence = verdict(facts)
    settings = [
        (f"`{name}`", text(setting(value)), text(setting(usual))) for name, value, usual in differing(facts.settings)
    ]
    return document(
        f"# {text(facts.run.name)}: {word}",
        text(sentence),
        text(expectation(facts)),
        table(("figure", "value", "95 % interval"), _figures(facts)),
        table(("what", "which"), _known(facts)),
        text(goodput(facts.starts)),
        titled("Settings that are not the default", table(("setting", "value", "default"), settings)),
        _classes(facts),
        titled("Figures", images(pictures)),
        titled("Reproduce", block(reproduction(facts))),
        f"vitdist report, {moment(made)}",
    )


def of_runs(found: Comparison, made: float, pictures: Iterable[Path]) -> str:
    """The comparison of several runs."""
    columns, rows = compare.table(found)
    many = [] if len(found.varied) <= compare.BESIDE else found.varied
    beside = found.entries[:HARDEST]
    differ = [(f"`{name}`", *(text(setting(entry.settings.get(name))) for entry in beside)) for name in many]
    swept = compare.swept(found)
    effects = (
        [
            (f"`{effect.name}`", *map(text, compare.effect_cells(effect, found.metric, len(swept.names))))
            for effect in swept.effects
        ]
        if swept
        else []
    )
    return document(
        f"# {len(found.entries)} runs",
        text(" ".join(compare.head(found))),
        "\n".join(f"- {text(warning)}" for warning in found.warnings),
        table(list(map(text, columns)), [list(map(text, row)) for row in rows[:MOST_RUNS]]),
        f"{len(rows) - MOST_RUNS:,} more runs are not shown." if len(rows) > MOST_RUNS else "",
        titled("Settings that differ", table(("setting", *(text(entry.name) for entry in beside)), differ)),
        titled("What mattered", table(("setting", "share of the variance", "p", "what was found"), effects)),
        titled("Figures", images(pictures)),
        titled(
            "Not finished", "\n".join(f"- {text(e.name)}: {text(e.sentence)}" for e in found.entries if e.word != DONE)
        ),
        f"vitdist report, {moment(made)}",
    )


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    intervals = facts.evaluation.get("intervals") or {}
    rows = [
        (words, results.figure(metric, facts.scores[metric]), results.between_words(metric, intervals.get(metric)))
        for metric, words in results.METRICS.items()
        if facts.scores.get(metric) is not None
    ]
    hours, unit = cost(facts)
    fast = facts.about("summary").get("images_per_s") or facts.middle("perf/images_per_s")
    more = [("time", duration(facts.seconds)), (unit, hours)] if facts.seconds else []
    more += [("images/s", figure(fast))] if fast else []
    return [*rows, *((name, value, "") for name, value in more)]


def _known(facts: Facts) -> list[tuple[str, str]]:
    model, batch, record = facts.about("model"), facts.about("batch"), facts.record
    sets = {kind: facts.about("data").get(kind) for kind in ("train", "val")}
    known = [
        ("model", model.get("name")),
        ("weights", model.get("weights")),
        ("parameters", f"{model['parameters']:,}, of which {model['trainable']:,} trained" if model else ""),
        *((f"data, {k}", f"{s['samples']:,} samples, digest {s['digest'][:12]}") for k, s in sets.items() if s),
        ("batch", f"{batch['global_batch']:,}" if batch else ""),
        ("steps", f"{max((s.last for s in facts.starts), default=0):,}"),
        ("ran on", f"{record['world']} x {record.get('device', 'rank')}" if "world" in record else ""),
        ("code", (facts.env.get("commit") or "")[:12] + (" with changes" if facts.env.get("dirty") else "")),
    ]
    return [(name, text(str(value))) for name, value in known if value]


def _classes(facts: Facts) -> str:
    if not facts.evaluation:
        return ""
    rows, occurring = results.worst_first(facts.evaluation, HARDEST)
    few = f"The {len(rows)} lowest recalls of {occurring:,} classes" if len(rows) < occurring else "Classes"
    head = ("class", "samples", "recall", "95 % interval", "precision", "F1", "most often taken for")
    body = [[text(cell) for cell in results.class_cells(row, facts.evaluation)] for row in rows]
    return titled(few, f"At step {facts.evaluation['step']:,}.\n\n{table(head, body)}")


# ---- Markdown ------------------------------------------------------------------------------------


def document(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def titled(title: str, body: str) -> str:
    """A section; nothing without a body."""
    return f"## {title}\n\n{body}" if body else ""


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right; nothing without rows. Cells are Markdown already."""
    if not body:
        return ""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SPECIAL = re.compile(r"[&<>@\\`*\[\]#~$|!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}


def text(plain: str) -> str:
    """`plain` as it stands, also in a cell: no markup, no HTML, and nobody is mentioned."""
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), " ".join(plain.split()))


def images(pictures: Iterable[Path]) -> str:
    ordered = sorted(pictures, key=lambda p: (FIRST.index(p.stem) if p.stem in FIRST else len(FIRST), p.stem))
    return "\n".join(f"![{p.stem.replace('-', ' ')}]({quote(p.as_posix())})" for p in ordered)


def block(lines: Iterable[str]) -> str:
    """Lines of code, in a fence that none of them can close."""
    inside = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", inside)), default=0))
    return f"{fence}sh\n{inside}\n{fence}"

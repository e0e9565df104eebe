"""The figures of a report as files, an SVG and a PNG each, fit for a paper: light, still, without a title.

vitdist report runs/NAME --figures          # runs/NAME/figures/loss.svg, loss.png, ...
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vitdist import rundir
from vitdist.report import charts, compare, sweep
from vitdist.report.charts import Chart, Specification
from vitdist.report.compare import Comparison
from vitdist.report.facts import Facts

WIDTH, HEIGHT = 420, 260
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
MOST_BARS = 40  # classes, the hardest: more names cannot be read on a page
MOST_NAMED = 40  # classes whose names stand at the confusion matrix
MOST_COUNTED = 16  # classes up to which its squares have room for numbers
MOST_SQUARES = 100  # on a side of it
SIDE = 400  # of it, in pixels


def write(drawings: dict[str, Specification], folder: Path) -> list[Path]:
    """Draw name -> specification into `folder`; returns the paths. Raises OSError."""
    made = []
    for name, drawing in drawings.items():
        for kind, content in charts.picture(drawing).items():
            made.append(folder / f"{name}.{kind}")
            rundir.publish(made[-1], content)
    return made


def of_run(facts: Facts) -> dict[str, Specification]:
    """Every figure that a run has, by the name of its files."""
    drawings = {chart.name: still(chart) for make in charts.CHARTS if (chart := make(facts))}
    if facts.evaluation:
        drawings |= {"confusion": confusion(facts.evaluation), "classes": classes(facts.evaluation)}
    if facts.evaluation.get("calibration"):
        drawings["calibration"] = framed(charts.calibration(facts.evaluation["calibration"], light), 300, 300)
    return drawings


def of_runs(found: Comparison) -> dict[str, Specification]:
    """Every figure of a comparison."""
    drawings = {chart.name: still(chart) for chart in compare.together(found)}
    if swept := compare.swept(found):
        lines = sweep.parallel(swept.names, swept.axes, swept.told, light, still=True)
        drawings["sweep"] = framed(lines, max(WIDTH, 120 * len(swept.axes)))
    return drawings


@functools.cache
def _colours() -> dict[str, str]:
    sheets = (Path(__file__).with_name(f"{name}.css").read_text(encoding="utf-8") for name in ("page", "compare"))
    found = [pair for sheet in sheets for pair in re.findall(r"--([a-z]+\d?): *(#[0-9a-f]{6})\b", sheet)]
    return dict(reversed(found))  # the first one is that of a light page


def light(name: str) -> str:
    """A colour of the style sheets by its name there, for white paper."""
    return _colours()[name]


def framed(drawing: Specification, width: int = WIDTH, height: int = HEIGHT) -> Specification:
    """`drawing` with a size, on white."""
    config = charts.config(light) | {"background": "white", "padding": 8, "font": FONT}
    return {**drawing, "width": width, "height": height, "config": config}


def still(chart: Chart) -> Specification:
    """A chart with its points in it."""
    points = [
        {"k": name, "x": step, "y": value}
        for name, (steps, values) in charts.columns(chart).items()
        for step, value in zip(steps, values, strict=True)
    ]
    return framed(charts.specification(chart, light, still=True) | {"datasets": {"points": points}})


def confusion(evaluation: dict[str, Any]) -> Specification:
    """Which share of each true class was taken for which; of very many classes the strongest of several pairs."""
    names, counts = evaluation["classes"], np.array(evaluation["confusion"])
    side = -(-len(names) // MOST_SQUARES)
    edges = np.arange(0, len(names), side)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    share = np.maximum.reduceat(np.maximum.reduceat(share, edges), edges, axis=1)
    squares = [
        {"true": i, "taken": j, "share": float(f"{share[i, j]:.4g}"), "n": int(counts[i, j]) if side == 1 else 0}
        for i, j in np.ndindex(*share.shape)
        if share[i, j]
    ]
    named = len(names) <= MOST_NAMED
    order = list(range(len(edges)))
    title = "" if named else f" ({len(names):,}, in their order)"
    axis = {
        "labelExpr": f"{json.dumps(names)}[datum.value]" if named else "''",
        "labelLimit": 110,
        "labelFontSize": 11 if len(names) <= MOST_COUNTED else 8,
        "grid": False,
        "domain": False,
    }
    x = {"field": "taken", "type": "ordinal", "scale": {"domain": order, "padding": 0}, "title": f"Taken for{title}"}
    y = {"field": "true", "type": "ordinal", "scale": {"domain": order, "padding": 0}, "title": f"True class{title}"}
    place = {"x": x | {"axis": axis | {"labelAngle": -90, "labelAlign": "right"}}, "y": y | {"axis": axis}}
    hue = {"condition": {"test": "datum.true === datum.taken", "value": light("c1")}, "value": light("c2")}
    # As on the page: the root, so that rare mistakes are seen.
    scale = {"type": "sqrt", "domain": [0, 1], "range": [0, 0.85]}
    strength = {"field": "share", "type": "quantitative", "legend": None, "scale": scale}
    layer: list[Specification] = [
        {"mark": {"type": "rect", "strokeWidth": 0}, "encoding": {**place, "color": hue, "opacity": strength}}
    ]
    if len(names) <= MOST_COUNTED:
        ink = {"condition": {"test": "datum.share > 0.6", "value": "white"}, "value": light("ink")}
        layer.append(
            {
                "mark": {"type": "text", "fontSize": 10},
                "encoding": {**place, "text": {"field": "n", "format": ",d"}, "color": ink},
            }
        )
    edge = SIDE // len(edges) * len(edges)
    return framed({"data": {"values": squares}, "layer": layer, "view": {"stroke": light("line")}}, edge, edge)


def classes(evaluation: dict[str, Any]) -> Specification:
    """Recall of each class with its interval, the lowest first; of many classes the hardest."""
    rows = sorted((c for c in evaluation["per_class"] if c["support"]), key=lambda c: (c["recall"], c["name"]))
    values = []
    for i, c in enumerate(rows[:MOST_BARS]):
        low, high = c.get("recall_interval") or (None, None)
        values.append({"i": i, "class": c["name"], "recall": c["recall"], "low": low, "high": high})
    names = [value["class"] for value in values]
    which = f"Class (the {len(values)} hardest of {len(rows):,})" if len(values) < len(rows) else "Class"
    axis = {"labelExpr": f"{json.dumps(names)}[datum.value]", "labelLimit": 140, "domain": False}
    y = {"field": "i", "type": "ordinal", "title": which, "axis": axis}
    scale = {"domain": [0, 1]}
    x = {"type": "quantitative", "scale": scale, "title": "Recall, with its 95 % interval"}
    across = {"format": "~%", "grid": False}
    ends = {"x": x | {"field": "low", "axis": across}, "x2": {"field": "high"}, "y": y}
    layer = [
        {
            "mark": {"type": "bar", "color": light("c1"), "opacity": 0.35},
            "encoding": {"x": x | {"field": "recall"}, "y": y},
        },
        {"mark": {"type": "rule", "color": light("ink")}, "encoding": ends},
        {
            "mark": {"type": "point", "filled": True, "color": light("c1"), "opacity": 1},
            "encoding": {"x": x | {"field": "recall"}, "y": y},
        },
    ]
    return framed({"data": {"values": values}, "layer": layer}, WIDTH, 15 * max(4, len(values)))

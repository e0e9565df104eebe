"""The charts of a report: which curves they show, and how they are drawn, by Vega-Lite, on the page and in files."""

# Vega-Lite's JavaScript is brought by vl-convert: both are kept by the Vega project. It answers to the pointer, and
# takes CSS variables for colours, so one drawing serves light, dark and print. 0.9 MB and 1.8 s of a page. Altair
# would write the same charts for 0.7 s of import and 2 s of checking its own output; matplotlib's SVG (0.9 s of
# import) has fixed colours and answers to nothing.

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

from vitdist import results, rundir, selection
from vitdist.config import Evaluation
from vitdist.report.facts import Facts, Points

POINTS = 600  # of a curve: with the extremes of each bucket kept, as many as a chart has pixels
FAN_POINTS = 100  # of each layer's learning rate: smooth, and there may be 34 of them
SPARSE = 60  # points up to which each one is marked
COLOURS = 8  # c1, c2, ... of the style sheets; curves beyond them are dashed in the same colours
VEGA_LITE = "6.4"  # the newest that vl-convert has
NAMED = 8  # names in the legend of a fan in a file, where no pointer asks for the others

Specification = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """Curves over steps, thinned to what can be seen."""

    name: str
    """Of its files."""
    title: str
    about: str
    """A sentence under the title; empty where the title says all."""
    curves: dict[str, Points]
    restarts: list[tuple[int, str]] = field(default_factory=list)
    """(step, label) of dashed lines."""
    format: str = "~r"
    """Of values, in d3's notation. Not g, which labels an axis 4e+1."""
    log: bool = False
    zero: bool = False
    """Whether the axis begins at 0."""
    stairs: bool = False
    fan: bool = False
    """Colours run from the first curve to the last."""
    axis: str = ""
    """Of the values, in a file, which has no title; empty: the title."""
    x: str = "step"
    """What curves go over."""
    context: int = 0
    """So many curves, the first ones, are grey and under the others: only there to be seen beside them."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Which colour and dashes each curve has, of runs beside each other; empty: those of its place."""
    legend: bool = True
    """Whether the page needs one."""


def of(facts: Facts, name: str, title: str, about: str, keys: dict[str, str], **form: Any) -> Chart | None:
    """The chart of `keys` (name of a curve -> key of a row); None without a curve of two points."""
    lowest = 0.0 if form.get("log") else -math.inf
    limit = FAN_POINTS if form.get("fan") else POINTS
    found = {name: thin(*facts.history.series(key), limit, lowest) for name, key in keys.items()}
    curves = {name: points for name, points in found.items() if len(points) > 1}
    marks = [(s.first, f"start {s.number}") for s in facts.starts[1:] if s.last > s.first]
    return Chart(name, title, about, curves, marks, **form) if curves else None


def thin(steps: np.ndarray, values: np.ndarray, limit: int, lowest: float = -math.inf) -> Points:
    """At most `limit` points above `lowest`: both ends, and the extremes of each bucket, so that no spike is lost."""
    steps, values = steps[values > lowest], values[values > lowest]
    kept = np.arange(len(values))
    if len(values) > limit:
        parts = np.array_split(kept, (limit - 2) // 2)
        extremes = [part[0] + end for part in parts for end in (values[part].argmin(), values[part].argmax())]
        kept = np.unique([0, *extremes, len(values) - 1])
    return list(zip(steps[kept].tolist(), values[kept].tolist(), strict=True))


# ---- which there are ---------------------------------------------------------------------------


def losses(facts: Facts) -> Chart | None:
    dashed = " Dashed: a restart from a checkpoint." if len(facts.starts) > 1 else ""
    text = f"Smoothed labels and augmentation raise that of training.{dashed}"
    return of(facts, "loss", "Loss", text, {"training": "train/loss", "validation": "val/loss"})


def quality(facts: Facts) -> Chart | None:
    """Shares over the run, with that which chooses the best; a loss that does so has a chart of its own."""
    chooses = (facts.settings.get("evaluation") or {}).get("best") or Evaluation().best
    called = {"top1": "top-1", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
    called |= {name: results.METRICS[name].split(" (each")[0] for name in (chooses,) if name not in called}
    found = selection.best(facts.series(f"val/{chooses}"), chooses)
    about = f"Best {called[chooses]} {results.figure(chooses, found[1])}, at step {found[0]:,}." if found else ""
    keys = {name: f"val/{metric}" for metric, name in called.items() if metric != "loss"}
    return of(facts, "quality", "Quality", about, keys, format="~%")


def peaks(facts: Facts) -> dict[str, float]:
    """Layer group -> highest learning rate, from the head down."""
    keys = sorted((key for key in facts.history.names() if key.startswith("lr/")), reverse=True)
    found = {key[3:]: facts.history.series(key)[1] for key in keys}
    return {name: float(values.max()) for name, values in found.items() if len(values)}


def rates(facts: Facts) -> Chart | None:
    text, highest = "", peaks(facts)
    if len(highest) > 1:
        (top, high), *_, (bottom, low) = highest.items()
        text = f"At the peak from {high:.2g} ({top}) down to {low:.2g} ({bottom}); logarithmic axis."
    keys = {name: f"lr/{name}" for name in highest}
    form = {"format": "~e", "log": True, "fan": True, "axis": "Learning rate"}
    return of(facts, "learning-rates", "One line a layer", text, keys, **form)


def gradient(facts: Facts) -> Chart | None:
    clip = (facts.settings.get("optim") or {}).get("clip")
    about = f"Before it is clipped at {clip:g}." if clip else "Not clipped."
    return of(facts, "gradient-norm", "Gradient norm", about, {"gradient norm": "optim/grad_norm"}, log=True)


def loss_scale(facts: Facts) -> Chart | None:
    """Of fp16 alone."""
    if facts.record.get("precision") != "fp16" or not facts.series("optim/skipped_steps"):
        return None
    about, keys = "Halved at overflows, then doubled again.", {"loss scale": "optim/loss_scale"}
    return of(facts, "loss-scale", "Loss scale", about, keys, format=".2s", log=True, stairs=True)


def skipped(facts: Facts) -> Chart | None:
    """Where an update was skipped."""
    points = facts.series("optim/skipped_steps")
    if not points or not points[-1][1]:
        return None
    about, keys = "Counted from the first.", {"skipped": "optim/skipped_steps"}
    return of(facts, "skipped-updates", "Skipped updates", about, keys, zero=True, stairs=True)


def throughput(facts: Facts) -> Chart | None:
    about, keys = "Of all ranks, training alone.", {"images/s": "perf/images_per_s"}
    return of(facts, "throughput", "Images per second", about, keys, format=",~f", zero=True)


def waiting(facts: Facts) -> Chart | None:
    about, keys = "Percent of the time in which training stood still for data.", {"data wait": "perf/data_wait_pct"}
    return of(facts, "data-wait", "Waiting for data", about, keys, zero=True, axis="Waiting for data (%)")


def steps(facts: Facts) -> Chart | None:
    about = "Seconds, of the steps between two rows."
    keys = {"median": "perf/step_p50_s", "95 % below": "perf/step_p95_s", "longest": "perf/step_max_s"}
    return of(facts, "step-time", "Time of a step", about, keys, zero=True, axis="Time of a step (s)")


def utilisation(facts: Facts) -> Chart | None:
    about, keys = "Percent of the FLOPs that the GPUs can do (MFU).", {"MFU": "perf/mfu_pct"}
    return of(facts, "mfu", "Use of the GPUs", about, keys, zero=True, axis="MFU (%)")


def machines(facts: Facts) -> Chart | None:
    about = "Percent; cores and GPUs in the mean of all nodes, memory of the fullest one."
    keys = {"cores": "sys/cpu_pct", "memory": "sys/ram_pct", "GPUs busy": "sys/gpu_pct"}
    return of(facts, "machines", "Use of the nodes", about, keys, zero=True, axis="Use of the nodes (%)")


CHARTS = (losses, quality, rates, gradient, loss_scale, skipped, throughput, waiting, steps, utilisation, machines)

# ---- how they are drawn ------------------------------------------------------------------------


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vegaEmbed as one script: 1.8 s of work, so kept for the next report."""
    # Not yet there, not to be written (OSError), or no home at all (RuntimeError): then it is made.
    with contextlib.suppress(OSError, RuntimeError):
        return kept().read_text(encoding="utf-8")
    made = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with contextlib.suppress(OSError, RuntimeError):
        rundir.publish(kept(), made)
    return made


def kept() -> Path:
    return Path.home() / ".cache" / "vitdist" / f"vega-{metadata.version('vl-convert-python')}.js"


def picture(drawing: Specification) -> dict[str, bytes]:
    """Kind of file -> content, of a specification that brings its data along; half a second, the first one two."""
    svg = vl_convert.vegalite_to_svg(drawing, vl_version=VEGA_LITE)
    return {"svg": svg.encode(), "png": vl_convert.vegalite_to_png(drawing, vl_version=VEGA_LITE, scale=2)}


def themed(name: str) -> str:
    """A colour of page.css by its name there."""
    return f"var(--{name})"


def config(colour: Callable[[str], str]) -> Specification:
    """Vega-Lite's look for every chart."""
    line, muted, ink = colour("line"), colour("muted"), colour("ink")
    return {
        "background": "transparent",
        "padding": {"left": 0, "right": 6, "top": 4, "bottom": 4},
        "view": {"stroke": None},
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif",
        "axis": {
            "labelColor": muted,
            "titleColor": muted,
            "gridColor": line,
            "domainColor": line,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "titlePadding": 6,
            "labelPadding": 5,
            "ticks": False,
        },
        "axisX": {"grid": False},
        "legend": {
            "labelColor": ink,
            "labelFontSize": 12,
            "symbolStrokeWidth": 2.5,
            "symbolSize": 160,
            "offset": 4,
            "padding": 0,
        },
    }


def columns(chart: Chart) -> dict[str, tuple[list[int], list[float]]]:
    """The points of each curve as (steps, values), the values to four digits, in the order in which they are drawn.

    Of numbered ones the first is drawn last: the best run lies on top.
    """
    names = list(chart.curves)
    order = [*names[: chart.context], *names[chart.context :][::-1]] if chart.numbers else names
    return {
        name: ([s for s, _ in chart.curves[name]], [float(f"{v:.4g}") for _, v in chart.curves[name]]) for name in order
    }


def strokes(chart: Chart, colour: Callable[[str], str] = themed) -> list[tuple[str, list[int]]]:
    """Colour and dashes of each curve, in their order."""
    if chart.fan:
        last = max(1, len(chart.curves) - 1)
        return [(_between(i / last, colour), [1, 0]) for i in range(len(chart.curves))]
    bright = [chart.numbers.get(name, i) for i, name in enumerate(list(chart.curves)[chart.context :])]
    return [(colour("line"), [1, 0])] * chart.context + [stroke(number, colour) for number in bright]


def stroke(number: int, colour: Callable[[str], str] = themed) -> tuple[str, list[int]]:
    """Colour and dashes of the curve of that number."""
    dashes = ([1, 0], [6, 3], [2, 2])
    return colour(f"c{number % COLOURS + 1}"), dashes[number // COLOURS % len(dashes)]


def specification(chart: Chart, colour: Callable[[str], str] = themed, still: bool = False) -> Specification:
    """The Vega-Lite specification of `chart` over a dataset "points" of {k: curve, x: step, y: value}, to be added.

    `colour` gives the colours called c1, c2, ..., line, muted and ink. `still`: of a file, which answers to nothing
    and stands alone.
    """
    names = list(chart.curves)
    points = [point for curve in chart.curves.values() for point in curve]
    steps, levels = [s for s, _ in points], [v for _, v in points]
    looks = strokes(chart, colour)
    x = {
        "field": "x",
        "type": "quantitative",
        "title": chart.x,
        "axis": {"format": ",d", "tickCount": 5},
        "scale": {"domain": [min(steps), max(steps)], "nice": False},
    }
    axis: Specification = {"format": chart.format, "tickCount": 5}
    if found := ticks(levels, chart.stairs) if chart.log else None:
        axis["values"] = found
    if chart.stairs:
        axis["tickMinStep"] = 1
    wide = {"type": "log", "nice": False, "domain": [0.85 * min(levels), 1.15 * max(levels)]}
    y = {"field": "y", "type": "quantitative", "title": (chart.axis or chart.title) if still else None, "axis": axis}
    y["scale"] = wide if chart.log else {"zero": chart.zero}
    color: Specification = {
        "field": "k",
        "type": "nominal",
        "scale": {"domain": names, "range": [hue for hue, _ in looks]},
        "legend": _legend(chart, still),
    }
    encoding: Specification = {"x": x, "y": y, "color": color}
    if any(dash != [1, 0] for _, dash in looks):
        encoding["strokeDash"] = {**color, "scale": {"domain": names, "range": [dash for _, dash in looks]}}
    zoom = {
        "name": "zoom",
        "bind": "scales",
        "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.ctrlKey]", "translate": False},
    }
    near = {
        "name": "near",
        "select": {
            "type": "point",
            "fields": ["x", "k"],
            "nearest": True,
            "on": "pointermove",
            "clear": "pointerout",
        },
    }
    # A list of fields shows names as "undefined" under `nearest` up to Vega-Lite 6.4 (vega/vega-lite#9707).
    at = "(datum.datum || datum)"
    said = f'{{curve: {at}.k, "{chart.x}": format({at}.x, ",d"), value: format({at}.y, "{chart.format}")}}'
    seen = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    shape = "step-after" if chart.stairs else "linear"
    line: Specification = {
        "mark": {"type": "line", "strokeWidth": 1.6, "clip": True, "interpolate": shape},
        "encoding": encoding,
    }
    pointed: Specification = {
        "params": [near],
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {"x": x, "y": y, "color": color, "tooltip": {"value": {"expr": said}}, "opacity": seen},
    }
    layer = [line] if still else [{"params": [zoom], **line}, pointed]
    marked = [] if chart.fan else list(chart.curves.items())[chart.context :]
    if few := [name for name, curve in marked if len(curve) <= SPARSE]:
        layer.insert(
            1,
            {
                "transform": [{"filter": {"field": "k", "oneOf": few}}],
                "mark": {"type": "point", "filled": True, "size": 22, "opacity": 1, "clip": True},
                "encoding": {"x": x, "y": y, "color": color},
            },
        )
    if chart.restarts:
        step = {"field": "x", "type": "quantitative", "title": "step", "format": ",d"}
        hint = [{"field": "t", "type": "nominal", "title": "start"}, step]
        layer.insert(
            0,
            {
                "data": {"values": [{"x": at, "t": label} for at, label in chart.restarts]},
                "mark": {"type": "rule", "strokeDash": [3, 4], "color": colour("muted"), "clip": True},
                "encoding": {"x": x, "tooltip": hint},
            },
        )
    return {
        "width": "container",
        "height": 220,
        "data": {"name": "points"},
        "config": config(colour),
        "description": f"{chart.title}. {chart.about}",
        "layer": layer,
    }


def calibration(bins: Sequence[dict[str, float]], colour: Callable[[str], str] = themed) -> Specification:
    """The reliability diagram of an evaluation's bins: accuracy by confidence, and where both would be the same."""
    unit = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": "~%", "tickCount": 5}}
    x, y = {**unit, "title": "confidence"}, {**unit, "title": "accuracy"}
    hint = [
        {"field": "count", "type": "quantitative", "title": "samples", "format": ",d"},
        {"field": "confidence", "type": "quantitative", "format": ".1%"},
        {"field": "accuracy", "type": "quantitative", "format": ".1%"},
    ]
    size = {"field": "count", "type": "quantitative", "scale": {"range": [12, 400]}, "legend": None}
    place = {"x": x | {"field": "confidence"}, "y": y | {"field": "accuracy"}}
    layer = [
        {
            "mark": {"type": "bar", "color": colour("c1"), "opacity": 0.3, "binSpacing": 1},
            "encoding": {
                "x": x | {"field": "from", "bin": "binned"},
                "x2": {"field": "to"},
                "y": y | {"field": "accuracy"},
                "tooltip": hint,
            },
        },
        {
            "data": {"values": [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]},
            "mark": {"type": "line", "strokeDash": [3, 4], "color": colour("muted"), "strokeWidth": 1.6},
            "encoding": place,
        },
        {
            "mark": {"type": "point", "filled": True, "color": colour("c1"), "opacity": 0.9},
            "encoding": {**place, "size": size, "tooltip": hint},
        },
    ]
    return {
        "width": "container",
        "height": 280,
        "data": {"values": list(bins)},
        "config": config(colour),
        "description": "Accuracy by confidence, and the line on which both are the same. The table has the numbers.",
        "layer": layer,
    }


def _legend(chart: Chart, still: bool) -> Specification | None:
    names = list(chart.curves)
    if len(names) < 2 or not (still or (chart.legend and not chart.fan)):
        return None
    legend: Specification = {"title": None, "orient": "top", "symbolType": "stroke"}
    if chart.fan and len(names) > NAMED:
        legend["values"] = [names[i * (len(names) - 1) // (NAMED - 1)] for i in range(NAMED)]
    elif chart.context:
        legend["values"] = names[chart.context :]
    return legend | {"columns": 4, "labelLimit": 110} if still else legend


def ticks(values: Iterable[float], stairs: bool) -> list[float] | None:
    """Where a logarithmic axis is labelled: at the values themselves of few stairs, at round ones of a curve."""
    levels = sorted(set(values))
    if stairs:
        return levels if len(levels) <= 8 else None
    low, high = levels[0], levels[-1]
    digits = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    # The text of a number keeps 1e-05 from becoming 1.0000000000000001e-05.
    found = [value for power in powers for d in digits if low <= (value := float(f"{d}e{power}")) <= high]
    return found if len(found) > 1 else None


def _between(share: float, colour: Callable[[str], str]) -> str:
    """A colour on the way from c1 to c2, hue by hue; the page's browser mixes what only it knows."""
    ends = colour("c1"), colour("c2")
    if not ends[0].startswith("#"):
        return f"color-mix(in oklch increasing hue, {ends[1]} {100 * share:.4g}%, {ends[0]})"
    shades = []
    for end in ends:
        light = np.array([int(end[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(light > 0.04045, ((light + 0.055) / 1.055) ** 2.4, light / 12.92)
        level, a, b = _OKLAB @ np.cbrt(_LMS @ linear)
        shades.append((level, math.hypot(a, b), math.atan2(b, a) % math.tau))
    (level, chroma, hue) = ((1 - share) * np.array(shades[0]) + share * np.array(shades[1])).tolist()
    lab = np.array([level, chroma * math.cos(hue), chroma * math.sin(hue)])
    linear = np.clip(np.linalg.solve(_LMS, np.linalg.solve(_OKLAB, lab) ** 3), 0, 1)
    light = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return "#" + "".join(f"{round(255 * part):02x}" for part in light)


# Oklab (Ottosson 2020): linear sRGB -> cones, their cube roots -> lightness and two axes of colour.
_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

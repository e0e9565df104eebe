"""What mattered in a sweep: the effect of each setting on the result, and all runs as lines through their settings.

Effects are shares of variance with the probability of chance. A random forest and its importances, as the panel of W&B
has it, fit noise of so few runs and say nothing of that: a sweep here has 4 to 50. Each setting is looked at by itself,
which is exact where all combinations ran.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitdist.report import charts
from vitdist.report.charts import Specification
from vitdist.report.words import figure, setting

FEWEST = 3  # runs from which on there is something to tell
PERMUTATIONS = 2000
CHANCE = 5  # runs from which on a rank correlation has a p: of fewer, no order is below 0.05
THIRDS = 9  # runs from which on a setting of many values is looked at in thirds
MOST_AXES = 8
MOST_TICKS = 8
WIDE_RANGE = 20  # largest over smallest value from which on an axis is logarithmic


@dataclass(frozen=True)
class Effect:
    """What a setting did to the result."""

    name: str
    share: float
    """Of the variance of the results that it explains by itself, from 0 to 1."""
    chance: float
    """How often results in a random order would be explained as well."""
    means: list[tuple[str, float]]
    """Each value that was tried, or third of them, and the mean of the results with it."""
    correlation: float | None
    """Of the ranks, Spearman's, where the share is its square: few runs, each with another value."""


def effects(settings: dict[str, list[Any]], result: Sequence[float]) -> list[Effect]:
    """The effect of each setting (a value for each run), the strongest first.

    Words that hardly repeat explain everything and nothing: they are left out.
    """
    of = np.array(result, float)
    shuffled = np.random.default_rng(0).permuted(np.tile(of, (PERMUTATIONS, 1)), axis=1)
    found = [_effect(name, values, np.vstack([of, shuffled])) for name, values in settings.items()]
    return sorted(filter(None, found), key=lambda effect: (-effect.share, effect.name))


def _effect(name: str, values: list[Any], results: np.ndarray) -> Effect | None:
    keys = [json.dumps(value, sort_keys=True) for value in values]
    distinct = sorted(set(keys), key=lambda key: _order(values[keys.index(key)]))
    codes = np.array([distinct.index(key) for key in keys])
    labels, correlation = [setting(values[keys.index(key)]) for key in distinct], None
    numbers = all(map(_numeric, values))
    if 2 * len(distinct) <= len(values) and (len(distinct) <= MOST_TICKS or not numbers):
        shares = _explained(codes, results)
    elif not numbers:
        return None
    elif len(values) >= THIRDS:  # a correlation would not see a best value in the middle
        codes = codes * 3 // len(distinct)
        ends = [(i * len(distinct) + 2) // 3 for i in range(4)]
        bounds = [figure(values[keys.index(key)]) for key in distinct]  # of a range, rounded ones say enough
        labels = [f"{bounds[first]} to {bounds[after - 1]}" for first, after in itertools.pairwise(ends)]
        shares = _explained(codes, results)
    else:
        by_rank = _correlated(codes, results)
        shares, correlation = by_rank**2, float(by_rank[0])
    means = [(label, float(results[0][codes == i].mean())) for i, label in enumerate(labels)]
    chance = (1 + int((shares[1:] >= shares[0] - 1e-9).sum())) / len(shares)
    return Effect(name, float(shares[0]), chance, means, correlation)


def _explained(codes: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Eta squared of each row: the variance of the groups' means over that of all."""
    groups = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    centred = results - results.mean(1, keepdims=True)
    between = ((centred @ groups) ** 2 / groups.sum(0)).sum(1)
    total = (centred**2).sum(1)
    return np.divide(between, total, out=np.zeros_like(total), where=total > 0)


def _correlated(codes: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Rank correlation of each row with the settings in their order."""
    first, rows = _ranks(codes), np.array([_ranks(row) for row in results])
    first, rows = first - first.mean(), rows - rows.mean(1, keepdims=True)
    size = np.sqrt((first**2).sum() * (rows**2).sum(1))
    return np.divide(rows @ first, size, out=np.zeros(len(rows)), where=size > 0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0 on; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers in their order, then words."""
    return (False, value, "") if _numeric(value) else (True, 0.0, setting(value))


# ---- parallel coordinates --------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    name: str
    places: list[float]
    """From 0 to 1, of each run."""
    ticks: list[tuple[float, str]]


def axis(name: str, values: Sequence[Any]) -> Axis:
    """Of a setting: few values stand at equal distances, many numbers where they belong."""
    distinct = sorted({json.dumps(value, sort_keys=True): value for value in values}.values(), key=_order)
    if len(distinct) <= MOST_TICKS or not all(map(_numeric, distinct)):
        last = max(1, len(distinct) - 1)
        every = -(-len(distinct) // MOST_TICKS)
        ticks = [(i / last, setting(value)) for i, value in enumerate(distinct) if i % every == 0]
        return Axis(name, [distinct.index(value) / last for value in values], ticks)
    low, high = float(distinct[0]), float(distinct[-1])
    if low > 0 and high / low >= WIDE_RANGE:
        places = (np.log(np.array(values, float) / low) / np.log(high / low)).tolist()
        between = np.geomspace(low, high, 5)
    else:
        places = ((np.array(values, float) - low) / (high - low)).tolist()
        between = np.linspace(low, high, 5)
    return Axis(name, places, [(i / 4, f"{value:.2g}") for i, value in enumerate(between)])


def result(name: str, values: Sequence[float], higher: bool, say: Callable[[float], str]) -> Axis:
    """The last axis, the better end above."""
    low, high = (min(values), max(values)) if higher else (max(values), min(values))
    places = [(value - low) / ((high - low) or 1) for value in values]
    return Axis(name, places, [(i / 4, say(low + (high - low) * i / 4)) for i in range(5)])


def parallel(
    names: Sequence[str],
    axes: Sequence[Axis],
    told: Sequence[str],
    colour: Callable[[str], str] = charts.themed,
    still: bool = False,
) -> Specification:
    """A line for each run through its values, the last axis its result: the stronger, the better; `told` is the hint.

    The best run has the second colour.
    """
    order = np.argsort(axes[-1].places, kind="stable").tolist()
    strength = np.linspace(0.15, 0.85, len(order)).tolist()
    columns = [one.name for one in axes]
    points = [
        {"k": names[run], "a": one.name, "i": i, "y": one.places[run], "s": strength[rank], "t": told[run]}
        | ({"best": True} if run == order[-1] else {})
        for rank, run in enumerate(order)
        for i, one in enumerate(axes)
    ]
    ticks = [{"a": one.name, "y": at, "t": text} for one in axes for at, text in one.ticks]
    x = {
        "field": "a",
        "type": "nominal",
        "sort": columns,
        "scale": {"type": "point", "domain": columns, "padding": 0.35},
        "title": None,
        "axis": {
            "orient": "top",
            "offset": 8,
            "labelAngle": 0,
            "labelLimit": 110,
            "labelColor": colour("ink"),
            "domain": False,
        },
    }
    y = {"field": "y", "type": "quantitative", "scale": {"domain": [0, 1], "nice": False}, "axis": None}
    hue = {"condition": {"test": "datum.best", "value": colour("c2")}, "value": colour("c1")}
    thick = {"condition": {"test": "datum.best", "value": 2.5}, "value": 1.4}
    near = {
        "name": "near",
        "select": {"type": "point", "fields": ["k"], "nearest": True, "on": "pointermove", "clear": "pointerout"},
    }
    at = "(datum.datum || datum)"
    hint = {"value": {"expr": f"{{run: {at}.k, settings: {at}.t}}"}}
    pointed = {} if still else {"condition": {"param": "near", "empty": False, "value": 1}}
    opacity = {"field": "s", "type": "quantitative", "scale": None, "legend": None, **pointed}
    line: Specification = {
        "mark": {"type": "line", "strokeJoin": "round"},
        "encoding": {
            "x": x,
            "y": y,
            "detail": {"field": "k", "type": "nominal"},
            "order": {"field": "i", "type": "quantitative"},
            "color": hue,
            "opacity": opacity,
            "strokeWidth": thick,
        },
    }
    label = {"type": "text", "align": "left", "dx": 6, "fontSize": 11}
    text = {"x": x, "y": y, "text": {"field": "t", "type": "nominal"}}
    layer: list[Specification] = [
        {
            "data": {"values": [{"a": name} for name in columns]},
            "mark": {"type": "rule", "color": colour("line"), "strokeWidth": 2},
            "encoding": {"x": x},
        },
        line,
        {
            "data": {"values": ticks},
            "mark": {**label, "stroke": colour("paper"), "strokeWidth": 3, "strokeJoin": "round"},
            "encoding": text,
        },
        {"data": {"values": ticks}, "mark": {**label, "color": colour("muted")}, "encoding": text},
    ]
    if not still:
        layer.append(
            {
                "params": [near],
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {"x": x, "y": y, "color": hue, "tooltip": hint, "opacity": {**pointed, "value": 0}},
            }
        )
    return {
        "width": "container",
        "height": 260,
        "data": {"values": points},
        "config": charts.config(colour),
        "description": "Parallel coordinates: a line for each run through its settings to its result.",
        "layer": layer,
    }

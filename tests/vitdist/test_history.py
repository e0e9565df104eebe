"""Columns out of metrics.jsonl say what a plain reading row by row says, whatever the file holds.

pytest tests/vitdist/test_history.py
"""

import json
import math
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdist import history
from vitdist.rundir import RunDir

KEYS = ["train/loss", "lr/01_head", "perf/eta_s", "ä"]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that count, one by one."""
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    first: dict[int, int] = {}
    for row in rows:
        if "val/loss" not in row:
            first.setdefault(row["attempt"], row["train/global_step"])
        kept[row["train/global_step"], "val/loss" in row] = row
    return [
        row
        for (step, _), row in sorted(kept.items(), key=lambda item: item[0])
        if not any(attempt > row["attempt"] and begin <= step for attempt, begin in first.items())
    ]


def plain_series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    found = ((row["train/global_step"], row.get(key)) for row in plain(rows))
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def series(found: history.History, key: str) -> list[tuple[int, float]]:
    steps, values = found.series(key)
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


values = st.one_of(st.floats(width=32), st.integers(-9, 9), st.booleans(), st.sampled_from([None, "7", []]))
rows = st.builds(
    lambda attempt, step, time, more: {"attempt": attempt, "train/global_step": step, **time, **more},
    st.integers(0, 4),
    st.integers(0, 12),
    st.sampled_from([{}, {"time": 1.5}, {"time": 2.5}]),
    st.dictionaries(st.sampled_from([*KEYS, "val/loss"]), values, max_size=4),
)
torn = st.sampled_from(
    [b'{"attempt": 1, "train/glo', '{"attempt": 0, "train/global_step": 3, "ä'.encode()[:-1], b"\0\0\0", b"7"]
)


@settings(deadline=None)  # a busy machine takes its time
@given(st.lists(st.one_of(rows, torn), max_size=30), st.booleans(), st.sampled_from([1, 300, 1 << 20]))
def test_columns_are_those_of_a_plain_reading(lines: list[dict[str, Any] | bytes], ended: bool, at_once: int) -> None:
    whole = [line for line in lines if isinstance(line, dict)]
    text = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.metrics.write_bytes(text + b"\n" * ended)
        with unittest.mock.patch.object(history, "AT_ONCE", at_once):
            found = history.read(run)
    assert found.steps.tolist() == [row["train/global_step"] for row in plain(whole)]
    for key in [*KEYS, "val/loss", "never"]:
        assert series(found, key) == plain_series(whole, key)
        assert (key in found.names()) == bool(plain_series(whole, key))
    last = {row["attempt"]: row["train/global_step"] for row in whole}
    times = {row["attempt"]: row["time"] for row in whole if "time" in row}
    assert found.reached == {attempt: (step, times.get(attempt)) for attempt, step in last.items()}


def test_before_the_first_row_there_is_nothing(tmp_path: Path) -> None:
    found = history.read(RunDir(tmp_path))
    assert (found.names(), found.reached, series(found, "train/loss")) == (set(), {}, [])


def test_a_number_beyond_every_float_is_no_figure(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    row, huge = '{"attempt": 0, "train/global_step": %s, "a": %s, "b": 2}\n', "1" + "0" * 400
    run.metrics.write_text(row % (1, huge) + row % (huge, 1))
    assert (series(history.read(run), "a"), series(history.read(run), "b")) == ([], [(1, 2.0)])


def test_a_line_is_split_at_its_end_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text(
        '{"attempt": 0, "train/global_step": 1, "said": "one\u2028two\x85", "a": 2}\n', encoding="utf-8"
    )
    assert series(history.read(run), "a") == [(1, 2.0)]

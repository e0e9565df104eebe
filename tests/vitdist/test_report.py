"""The report page: pure parts, escaping, missing pieces, and that it loads nothing from anywhere.

pytest tests/vitdist/test_report.py
"""

import base64
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitdist import config, faults, gallery, rundir
from vitdist.data import index
from vitdist.report import charts, facts, markdown, page, words
from vitdist.rundir import RunDir

NAMES = ["<script>alert(1)</script>", 'a "quoted" & long_name_' + "x" * 80, "Übergang"]


@pytest.fixture(autouse=True)
def _day_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "now", lambda: 1.8e9 + 200)


class Page(HTMLParser):
    """Tags with their attributes, the contents of scripts and styles, and the text that is seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.text = self.style = self._kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._kind = "chart" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        self._kind = ""

    def handle_data(self, data: str) -> None:
        if self._kind == "script":
            self.scripts.append(data)
        elif self._kind == "chart":
            self.charts.append(json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))
        elif self._kind == "style":
            self.style += data
        else:
            self.text += data

    def seen(self) -> str:
        return " ".join(self.text.split())


def make_shards(folder: Path, labels: list[int], names: list[str]) -> None:
    folder.mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(picture, "png")
    with tarfile.open(folder / "000.tar", "w") as tar:
        for i, label in enumerate(labels):
            for extension, data in (("png", picture.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index.build(folder, names, workers=1)


def make_run(folder: Path, names: list[str] = NAMES, **record: Any) -> RunDir:
    """A run of 200 steps; `record` changes what its trainer wrote."""
    run = RunDir(folder / "runs" / "tiny")
    run.path.mkdir(parents=True)
    labels = [i % len(names) for i in range(max(12, len(names)))]
    for part in ("train", "val"):
        make_shards(folder / part, labels, names)
    run.config.write_text(
        config.to_yaml(
            config.parse(
                config.Config,
                {
                    "data": {"train": str(folder / "train"), "val": str(folder / "val"), "flip": 0.0},
                    "model": {"scratch": {}, "image_size": 32},
                    "train": {"global_batch": 8, "steps": 200},
                },
                "test",
            )
        )
    )
    rundir.publish_json(run.env, {"commit": "0123456789abcdef", "dirty": True, "host": "login", "argv": ["a", "b c"]})
    rows = [
        {
            "attempt": 0,
            "time": 1.8e9 + s,
            "train/global_step": s,
            "train/loss": 1 / s,
            "lr/00_embeddings": 1e-4 * s,
            "lr/01_head": 1e-3 * s,
            "optim/grad_norm": 1.0,
            "optim/loss_scale": 2.0 ** (s // 50),
            "optim/skipped_steps": 1,
            "perf/images_per_s": 100.0,
            "perf/data_wait_pct": 1.0,
            "perf/eta_s": 200.0 - s,
        }
        for s in range(1, 201)
    ]
    rows += [
        {"attempt": 0, "train/global_step": s, "val/loss": 1.0, "val/top1": s / 200, "val/macro_f1": 0.5}
        for s in (100, 200)
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predicted = [(label + (i == 0)) % len(names) for i, label in enumerate(labels)]
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    scores = {"top1": 0.9166, "macro_f1": 0.915, "balanced_accuracy": 0.91}
    per_class = [{"name": n, "support": 4, "precision": 0.5, "recall": 0.5, "f1": 0.5} for n in names]
    rundir.publish_json(
        run.evaluation,
        {
            "step": 200,
            "metrics": scores,
            "classes": names,
            "confusion": confusion.tolist(),
            "per_class": per_class,
        },
    )
    np.savez(
        run.predictions,
        ids=np.arange(len(labels)),
        labels=labels,
        predicted=predicted,
        confidence=np.full(len(labels), 0.7),
    )
    data = index.Index.open(folder / "train").summary()
    rundir.publish_json(
        run.attempt(0).train,
        {
            "attempt": 0,
            "state": "done",
            "step": 200,
            "total_steps": 200,
            "world": 2,
            "threads": 3,
            "device": "CPU",
            "precision": "fp16",
            "zero": 2,
            "started": "2026-11-23T09:00:00+00:00",
            "ended": "2026-11-23T11:00:00+00:00",
            "batch": {"global_batch": 8, "micro_batch": 4, "accumulation": 1, "world": 2},
            "resumed_from": None,
            "data": {"train": data, "val": data},
            "model": {"name": "ViT", "weights": "random", "parameters": 9, "trainable": 9},
            "groups": [{"name": "01_head", "lr_scale": 1.0, "weight_decay": 0.05, "tensors": 2, "parameters": 9}],
            "summary": scores | {"images_per_s": 100.0, "seconds": 7200.0},
            **record,
        },
    )
    return run


def made(run: RunDir) -> Page:
    return Page(page.write(run).read_text(encoding="utf-8"))


# ---- pure parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 99, 100, 101, 5_000, 100_001])
def test_thinning_keeps_ends_and_spikes(length: int) -> None:
    points = [(i, float(np.sin(i))) for i in range(length)]
    if length > 200:
        points[137], points[150] = (137, 50.0), (150, -50.0)
    kept = charts.thin(np.array([s for s, _ in points], int), np.array([v for _, v in points], float), 100)
    assert len(kept) <= 100
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    if length > 200:
        assert {(137, 50.0), (150, -50.0)} <= set(kept)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (18_610, "5 h 10 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_most_confused_pairs_come_first_and_hits_never() -> None:
    pairs = facts.confused(np.array([[5, 1, 0], [0, 2, 6], [0, 0, 9]]))
    assert pairs == [(1, 2, 6, 0.75), (0, 1, 1, 1 / 6)]


def test_settings_that_differ_from_the_defaults() -> None:
    given = {
        "data": {"train": "a", "val": "b", "flip": 0.5},
        "optim": {"lr": 0.1},
        "model": {"scratch": None},
    }
    assert facts.differing(given) == [
        ("data.train", "a", "required"),
        ("data.val", "b", "required"),
        ("optim.lr", 0.1, 0.001),
    ]


GOOD = "91.7% of the validation samples are classified right (top-1), macro-F1 0.915"


@pytest.mark.parametrize(
    ("record", "word", "sentence"),
    [
        ({}, "finished", f"Trained to the end, 200 steps in 2 h: {GOOD}."),
        (
            {"state": "stopped", "reason": "SIGUSR2"},
            "stopped",
            "Stopped at step 200 of 200 by SIGUSR2; it can go on from its last checkpoint. "
            f"At the newest evaluation {GOOD}.",
        ),
        (
            {"state": "failed", "error": {"type": "ValueError", "message": "no.", "rank": 1, "step": 3}},
            "failed",
            f"Failed at step 200 of 200 on rank 1. ValueError: no. At the newest evaluation {GOOD}.",
        ),
        (
            {"state": "failed"},
            "failed",
            f"Failed at step 200 of 200. No cause is recorded. At the newest evaluation {GOOD}.",
        ),
        (
            {"state": "running", "ended": None},
            "running",
            f"At step 200 of 200, about 0 s left. At the newest evaluation {GOOD}.",
        ),
    ],
)
def test_verdict(tmp_path: Path, record: dict[str, Any], word: str, sentence: str) -> None:
    run = make_run(tmp_path, **record)
    assert words.verdict(facts.read(run)) == (word, sentence)
    assert sentence in made(run).seen()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "none"),
        (True, "true"),
        (0.9999, "0.9999"),
        (0.7525, "0.7525"),
        (1e-05, "1e-05"),
        (12345, "12345"),
        ("bf16", "bf16"),
        ("s3://user:secret@host/set", "s3://host/set"),
        (["s3://user:secret@host/set", "b"], '["s3://host/set", "b"]'),
        ({"a": [0.5, False]}, '{"a": [0.5, false]}'),
    ],
)
def test_settings_are_shown_as_they_were(value: Any, said: str) -> None:
    assert words.setting(value) == said


def test_no_setting_is_rounded(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settings = config.read_yaml(run.config)
    settings["optim"]["ema"] = 0.9999
    run.config.write_text(json.dumps(settings))
    assert "optim.ema0.9999 " in made(run).seen()
    assert "| `optim.ema` | 0.9999 |" in markdown.of_run(facts.read(run), 0.0, [])


def test_every_start_costs_its_own_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="stopped", reason="SIGUSR2")
    later = {"state": "done", "resumed_from": 200, "step": 300, "world": 8, "threads": 5, "device": "CPU"}
    hour = {"started": "2026-11-23T12:00:00+00:00", "ended": "2026-11-23T13:00:00+00:00"}
    early = {"state": "failed", "device": "CPU"} | hour  # it ended before it told how many it was
    rundir.publish_json(run.attempt(1).train, early)
    rundir.publish_json(run.attempt(2).train, later | hour)
    found = facts.read(run)
    assert words.cost(found) == ("92", "CPU core-hours")
    found.record["device"] = "NVIDIA H200"
    assert words.cost(found) == ("20", "GPU-hours")


def test_cost_counts_every_rank_and_thread(tmp_path: Path) -> None:
    found = facts.read(make_run(tmp_path))
    assert words.cost(found) == ("12", "CPU core-hours")
    found.record["device"] = "NVIDIA H200"
    assert words.cost(found) == ("4", "GPU-hours")


@pytest.mark.parametrize("home", ["free", "a file", "none"])
def test_the_script_of_charts_is_kept_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    def where() -> Path:
        if home == "none":
            raise RuntimeError("Could not determine home directory.")
        return tmp_path / "home"

    made = []
    if home == "a file":
        (tmp_path / "home").touch()
    monkeypatch.setattr(Path, "home", where)
    monkeypatch.setattr(charts.vl_convert, "javascript_bundle", lambda text: made.append(text) or "vega")
    assert [charts.vega.__wrapped__() for _ in range(2)] == ["vega", "vega"]
    assert len(made) == (1 if home == "free" else 2)


# ---- the page ----------------------------------------------------------------------------------


def test_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = made(run)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    assert not re.search(r"url\(|@import", page.style)
    policy = next(a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-eval" not in policy
    assert len(page.scripts) == 2
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert run.report.stat().st_size < 3_000_000


def test_class_names_are_text_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = made(run)
    assert "<script>alert(1)" not in run.report.read_text(encoding="utf-8")
    assert page.seen().count(NAMES[0]) >= 4  # bars, scores, matrix, pictures
    assert all("alert" not in script for script in page.scripts[1:])


def test_page_is_accessible(tmp_path: Path) -> None:
    page = made(make_run(tmp_path))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption")
    assert ("html", {"lang": "en"}) in page.tags
    assert all(chart["specification"]["description"] for chart in page.charts)


def test_charts_hold_the_curves_without_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with open(run.metrics, "a") as file:
        file.write(
            json.dumps({"attempt": 0, "train/global_step": 201, "train/loss": math.nan, "optim/grad_norm": math.inf})
        )
        file.write('\n{"attempt": 0, "trai')
    shown = {tuple(chart["columns"]): chart for chart in made(run).charts}
    assert shown["training", "validation"]["columns"]["validation"] == [[100, 200], [1.0, 1.0]]
    curve = shown["01_head", "00_embeddings"]["specification"]["layer"][0]["encoding"]
    assert curve["y"]["scale"]["type"] == "log"
    assert "color-mix" in curve["color"]["scale"]["range"][0]
    assert shown["training", "validation"]["columns"]["training"][0][-1] == 200
    assert ("loss scale",) in shown
    assert ("skipped",) in shown


@pytest.mark.parametrize(
    "missing",
    [
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "evaluation.json",
        "predictions.npz",
        "attempts/0/train.json",
    ],
)
def test_missing_pieces_are_left_out(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path)
    (run.path / missing).unlink()
    assert "Reproduce" in made(run).seen()


def test_an_empty_run_folder_gets_a_page(tmp_path: Path) -> None:
    assert "Nothing has been trained yet." in made(RunDir(tmp_path)).seen()


def test_shards_that_went_away_take_only_the_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "val" / "000.tar").unlink()
    assert "1 of 12 validation samples are classified wrong; their pictures cannot be read here" in made(run).seen()


@pytest.mark.parametrize("kept", [0, 1, 300, None])
def test_damaged_predictions_take_only_the_pictures(tmp_path: Path, kept: int | None) -> None:
    run = make_run(tmp_path)
    whole = run.predictions.read_bytes()
    run.predictions.write_bytes(whole[:kept] if kept is not None else whole.replace(b"PK", b"pk"))
    with pytest.raises(ValueError, match=r"predictions\.npz: is damaged"):
        gallery.predictions(run)
    seen = made(run).seen()
    assert "Worst mistakesThe predictions cannot be read: " in seen
    assert "predictions.npz: is damaged" in seen


def test_shards_that_were_packed_anew_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part).rename(tmp_path / f"{part}-before")
        make_shards(tmp_path / part, [0] * 30, NAMES)
    page = made(run)
    assert page.seen().count("changed since the run") == 2
    assert not [tag for tag, attributes in page.tags if (attributes.get("alt") or "").startswith(("Training", "Valid"))]
    assert facts.class_counts(facts.read(run), "train") == {}
    assert facts.class_counts(facts.read(run), "val") == dict.fromkeys(NAMES, 4)


def test_mistakes_are_shown_enlarged_without_blur(tmp_path: Path) -> None:
    page = made(make_run(tmp_path))
    (source,) = [a["src"] or "" for tag, a in page.tags if (a.get("alt") or "").startswith("Validation sample 0: ")]
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert picture.size == (96, 96)
    assert picture.getcolors() == [(96 * 96, (200, 30, 30))]


def test_training_pictures_of_each_class_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shown = [a["alt"] for tag, a in made(run).tags if (a.get("alt") or "").startswith("Training sample of ")]
    assert shown == [f"Training sample of {name}" for name in NAMES for _ in range(4)]
    (tmp_path / "train" / "000.tar").unlink()
    assert "Training pictures cannot be read here: " in made(run).seen()


@pytest.mark.parametrize(
    ("labels", "most", "chosen"),
    [
        ([0, 0, 0, 1, 1, 2], 6, [0, 2, 3, 4, 5]),
        ([0, 2, 2, 2], 2, [0, 1]),
        ([3, 1, 2, 0], 2, [3, 0]),
        ([5], 12, [0]),
    ],
)
def test_samples_to_show_are_spread_over_classes(labels: list[int], most: int, chosen: list[int]) -> None:
    assert facts.spread(np.array(labels), max(labels) + 2, most) == chosen


# ---- what was expected, what was found ---------------------------------------------------------


def give_recipe(run: RunDir, head: str, settings: dict[str, Any] | None = None) -> None:
    """The settings of the run, or other ones, as a recipe in its snapshot."""
    (run.code / "configs").mkdir(parents=True)
    text = config.to_yaml(config.parse(config.Config, settings or config.read_yaml(run.config), "test"))
    (run.code / "configs" / "mine.yaml").write_text(f"# Mine.\n#\n{head}\n\n{text}")
    rundir.publish_json(run.env, {"argv": ["launch/submit.py", "--config", "/elsewhere/mine.yaml"]})


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (
            "# Expected: about 85.1 to 85.6 % top-1.\n# Source: no.",
            "about 85.1 to 85.6 % top-1. This run reached that.",
        ),
        ("# Expected: at least\n# 95 %, of 2.", "at least 95 %, of 2. This run is 3.3 points below that."),
        ("# Expected: not measured. More.", "not measured."),
        ("# Cost: a lot.", ""),
    ],
)
def test_what_the_recipe_expects_is_told_beside_what_was_reached(tmp_path: Path, head: str, said: str) -> None:
    run = make_run(tmp_path)
    give_recipe(run, head)
    seen = made(run).seen()
    assert (f"Expected by configs/mine.yaml: {said}Always naming" in seen) == bool(said)
    assert "All settings are those of configs/mine.yaml." in seen


def test_settings_that_the_recipe_does_not_have_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settings = config.read_yaml(run.config)
    settings["data"]["train"], settings["optim"]["lr"] = "train", 0.25
    give_recipe(run, "# Expected: 1 %.", settings)
    page = made(run)
    # A place given from where one is, is the same place.
    assert "Settings that differ from configs/mine.yamlsetting value recipeoptim.lr0.001 0.25" in page.seen()
    assert "This run reached that. Settings changed: 1." in page.seen()


def test_settings_of_another_version_are_compared_with_the_defaults(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    give_recipe(run, "# Expected: 1 %.")
    with open(run.code / "configs" / "mine.yaml", "a") as file:
        file.write("unheard: 1\n")
    assert "Settings that are not the default" in made(run).seen()


def test_how_sure_is_beside_how_right(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "Calibration" not in made(run).seen()
    bins = [
        {"from": 0.4, "to": 7 / 15, "count": 3, "confidence": 0.45, "accuracy": 1 / 3},
        {"from": 14 / 15, "to": 1.0, "count": 9, "confidence": 0.95, "accuracy": 1.0},
    ]
    found = rundir.read_json(run.evaluation)
    assert found is not None
    rundir.publish_json(run.evaluation, found | {"calibration": bins})
    page = made(run)
    assert "Expected calibration error 6.7%" in page.seen()
    assert "On average the model is 82.5% sure and 83.3% right." in page.seen()
    assert "40 to 47%3 45.0% 33.3%" in page.seen()
    assert bins in [chart["specification"].get("data", {}).get("values") for chart in page.charts]


@pytest.mark.parametrize("state", ["running", "failed", "done"])
def test_a_run_that_has_not_finished_tells_its_last_figures(tmp_path: Path, state: str) -> None:
    seen = made(make_run(tmp_path, state=state, ended=None)).seen()
    last = "Last figures, at step 200, 15 Jan 2027, 08:03 UTC"
    assert (last in seen) == (state != "done")
    assert (f"{last}, 0 s before this page was made: training loss 0.005" in seen) == (state == "running")
    assert ("validation loss 1, gradient norm 1, images/s 100, top-1 100.0%." in seen) == (state != "done")


def test_what_the_speed_is_lost_to_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "Time of a step" not in made(run).seen()
    more = {
        "perf/step_p50_s": 0.1,
        "perf/step_max_s": 0.3,
        "perf/mfu_pct": 40.0,
        "sys/cpu_pct": 90.0,
        "sys/ram_pct": 9.0,
    }
    with open(run.metrics, "a") as file:
        file.writelines(json.dumps({"attempt": 0, "train/global_step": s, **more}) + "\n" for s in (201, 202))
    curves = {tuple(chart["columns"]) for chart in made(run).charts}
    assert {("median", "longest"), ("MFU",), ("cores", "memory")} <= curves


@pytest.mark.parametrize(("curves", "folded"), [(10, False), (11, True)])
def test_every_curve_has_a_button(curves: int, folded: bool) -> None:
    names = [f"<{i}>" for i in range(curves)]
    text = page.drawn(charts.Chart("x", "Title", "", {name: [(1, 1.0), (2, 2.0)] for name in names}))
    found = Page(str(text))
    assert [tag for tag, a in found.tags].count("button") == curves
    assert all(name in found.text for name in names)
    assert ("Hide some of 11 curves" in found.seen()) == folded
    assert not any(chart["specification"]["layer"][0]["encoding"]["color"]["legend"] for chart in found.charts)


def test_restarts_are_told_and_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="running", ended=None)
    later = {
        "state": "done",
        "step": 300,
        "total_steps": 300,
        "resumed_from": 150,
        "started": "2027-01-15T08:10:00+00:00",
    }
    rundir.publish_json(run.attempt(1).train, later | {"ended": "2027-01-15T08:20:00+00:00"})
    page = made(run)
    seen = page.seen()
    assert "0 to 200 ended without a word 50" in seen
    assert "Start 115 Jan 2027, 08:10 UTC 6 min 40 s 10 min 150 to 300 finished" in seen
    assert "Goodput 85.7%: 300 of 350 steps done were kept, in 2 starts with 6 min 40 s between them." in seen
    marks = [chart["specification"]["layer"][0]["data"]["values"] for chart in page.charts]
    assert marks == [[{"x": 150, "t": "start 1"}]] * len(marks)


@pytest.mark.parametrize(("classes", "table"), [(1, False), (20, True), (21, False), (450, False)])
def test_confusion_matrix_suits_the_number_of_classes(tmp_path: Path, classes: int, table: bool) -> None:
    run = make_run(tmp_path, [f"class {i}" for i in range(classes)])
    page = made(run)
    assert any(a.get("class") == "confusion" for _, a in page.tags) == table
    assert any(a.get("class") == "matrix" for _, a in page.tags) == (classes > 20)
    assert run.report.stat().st_size < 3_000_000


def test_report_imports_no_torch() -> None:
    code = "import sys, vitdist.report.page; assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_launcher_knows_of_ends_that_the_trainer_could_not_record(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="running", ended=None, summary=None)
    job = {"state": "failed", "cause": "node2 went away", "job_id": "7", "hosts": ["node1", "node2"]}
    rundir.publish_json(run.attempt(0).job, job)
    page = made(run)
    assert "Failed at step 200 of 200. node2 went away." in page.seen()
    assert "0 to 200 failed" in page.seen()
    assert "Job 7 on node1, node2" in page.seen()


def test_commands_resume_this_run_and_reproduce_another(tmp_path: Path) -> None:
    env = {"argv": ["launch/submit.py", "--nodes", "2", "--name", "a", "optim.lr=1e-3"]}
    assert words.submission(env, "b") == "python launch/submit.py --nodes 2 optim.lr=1e-3 --name b"
    assert words.submission({"argv": ["vitdist/train.py"]}, "b") == words.submission({}, "b") == ""
    run = make_run(tmp_path, state="stopped", reason="SIGTERM")
    rundir.publish_json(run.env, {"argv": ["launch/submit.py"]})
    seen = made(run).seen()
    assert "Resumepython launch/submit.py --name tiny" in seen
    assert "Reproducepython launch/submit.py --name tiny-again" in seen


@pytest.mark.parametrize("how", ["new code", "same code", "once"])
def test_a_run_that_went_on_is_made_again_from_its_settings(tmp_path: Path, how: str) -> None:
    run = make_run(tmp_path, state="stopped", reason="SIGTERM")
    give_recipe(run, "# Expected: 1 %.")
    first = {"argv": ["launch/submit.py", "--config", "/elsewhere/mine.yaml", "--name", "tiny"]}
    again = {"argv": ["launch/submit.py", "--resume", "tiny", "--follow", "--yes", "optim.lr=0.1"]}
    rundir.publish_json(run.env, again if how == "new code" else first)
    rundir.publish_json(run.path / "env-before-attempt-1.json", first)
    run.cluster.write_text("nodes: 2\n")
    if how != "once":
        later = {"state": "stopped", "resumed_from": 200, "step": 300, "reason": "SIGTERM"}
        rundir.publish_json(run.attempt(1).train, later)
    seen = made(run).seen()
    command = f"python launch/submit.py --config {run.config} --nodes 2 --name tiny-again"
    assert (f"Reproduce{command}" in seen) == (how != "once")
    assert (f"Resumepython launch/submit.py --resume {run.path}" in seen) == (how != "once")
    assert "--resume tiny --name" not in seen
    assert "Expected by configs/mine.yaml: 1 %." in seen


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"argv": ["launch/submit.py", "--config=/elsewhere/mine.yaml"]}, "configs/mine.yaml"),
        ({"argv": ["launch/submit.py", "--config", "/elsewhere/mine.yaml"]}, "configs/mine.yaml"),
        ({"argv": ["launch/submit.py"], "recipe": "configs/mine.yaml"}, "configs/mine.yaml"),
        ({"argv": ["launch/submit.py", "--config"]}, None),
        ({"argv": ["launch/submit.py"]}, None),
    ],
)
def test_the_recipe_is_found_however_it_was_given(tmp_path: Path, env: dict[str, Any], name: str | None) -> None:
    run = make_run(tmp_path)
    give_recipe(run, "# Expected: 1 %.")
    rundir.publish_json(run.env, env)
    found = facts.recipe(facts.read(run))
    assert (found.name if found else None) == name


def note_fault(run: RunDir, attempt: int, rank: int, **about: Any) -> None:
    fault = {"rank": rank, "host": f"node{rank}", "step": 180, "phase": "training", "time": 1.8e9 + 300.0}
    fault |= {"word": "hang", "cascade": False, "type": "Hang", "message": "no progress for 600 s", "where": ""}
    rundir.publish_json(run.attempt(attempt).fault(rank), fault | about)


def test_the_fault_of_a_rank_is_the_cause_and_not_what_it_led_to(tmp_path: Path) -> None:
    error = {"type": "RuntimeError", "message": "connection closed by peer", "rank": 0, "step": 180}
    run = make_run(tmp_path, state="failed", error=error)
    note_fault(run, 0, 0, word="peer_lost", cascade=True, time=1.8e9)
    note_fault(run, 0, 3, where="vitdist/train.py:9 in _update", message="no <b>progress</b>")
    seen = made(run).seen()
    cause = "hang (rank 3 on node3, step 180, training at vitdist/train.py:9 in _update): Hang: no <b>progress</b>."
    assert f"Failed at step 200 of 200. {cause}" in seen
    assert seen.count(cause) == 2
    assert seen.count("To do: read the stacks of the rank") == 2
    assert "connection closed" not in seen


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("rank 1 was killed by SIGKILL, as the kernel does when memory runs out (rank-1.log)", "SIGKILL is most often"),
        ("node2 went away", ""),
    ],
)
def test_the_launcher_knows_what_the_ranks_that_are_left_do_not(tmp_path: Path, cause: str, remedy: str) -> None:
    error = {"type": "RuntimeError", "message": "connection closed by peer", "rank": 0, "step": 230}
    run = make_run(tmp_path, state="failed", error=error, ended=None)
    note_fault(run, 0, 0, word="peer_lost", cascade=True, step=230, message="connection closed by peer")
    rundir.publish_json(run.attempt(0).job, {"state": "failed", "cause": cause, "job_id": "7", "hosts": ["node1"]})
    (start,) = facts.read(run).starts
    assert (start.why, start.last, start.ended) == (cause, 230, 1.8e9 + 300)
    seen = made(run).seen()
    assert f"Failed at step 230 of 200. {cause}." in seen
    assert "connection closed" not in seen
    assert ("To do: " + remedy in seen) if remedy else ("To do" not in seen)


def test_the_launchers_words_of_a_peer_that_was_lost_are_no_better(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="failed", ended=None)
    note_fault(run, 0, 0, word="peer_lost", cascade=True)
    cause = faults.line(faults.read(run.attempt(0))[0])
    rundir.publish_json(run.attempt(0).job, {"state": "failed", "cause": cause})
    (start,) = facts.read(run).starts
    assert start.why.startswith("peer lost (rank 0 on node0, step 180")
    assert start.remedy == faults.WORDS["peer_lost"]


def test_a_fault_ends_a_start_whose_trainer_could_not_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="running", ended=None)
    note_fault(run, 0, 0, step=230)
    (start,) = facts.read(run).starts
    assert (start.state, start.last, start.ended) == ("failed", 230, 1.8e9 + 300)


def test_starts_that_never_trained_undo_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="stopped", reason="SIGUSR2")
    early = {"state": "failed", "step": 0, "started": "2026-11-23T11:00:30+00:00", "ended": "2026-11-23T11:01:00+00:00"}
    rundir.publish_json(run.attempt(1).train, early)
    rundir.publish_json(run.attempt(2).train, early | {"resumed_from": 190, "step": 200, "state": "done"})
    starts = facts.read(run).starts
    assert facts.undone(starts) == [10, 0, 0]
    assert facts.waits(starts) == [None, 30.0, 0.0]
    assert words.goodput(starts) == (
        "Goodput 95.2%: 200 of 210 steps done were kept, in 3 starts with 30 s between them."
    )
    assert "none" in made(run).seen()
    assert words.goodput([]) == ""


@pytest.mark.parametrize("count", [3, 40])
def test_events_of_all_starts_are_listed(tmp_path: Path, count: int) -> None:
    event = {"time": "2026-11-23T10:00:00+00:00", "step": 7, "kind": "slow_rank", "text": "rank 3 took <twice> as long"}
    run = make_run(tmp_path, events=[event] * count, events_left_out=5)
    page = made(run)
    row = "2026-11-23 10:00:000 7 slow rank rank 3 took <twice> as long"
    assert page.seen().count(row) == count
    assert f"Events: {count} x slow rank; 5 further ones are not kept" in page.seen()
    assert ("40 events" in page.seen()) == (count == 40)


def test_the_first_inputs_are_shown_with_their_labels(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 200, 30)).save(picture, "JPEG")
    one = {"label": f"70% {NAMES[0]} + 30% b", "jpeg": base64.b64encode(picture.getvalue()).decode()}
    rundir.publish_json(run.inputs, {"pictures": [one]})
    page = made(run)
    assert "As the model got them" in page.seen()
    assert [
        a for tag, a in page.tags if tag == "img" and (a["alt"] or "").startswith("Input of the model: 70% <script>")
    ]
    rundir.publish_json(run.inputs, {"pictures": [one | {"jpeg": "no picture"}]})
    assert "inputs.json cannot be read" in made(run).seen()


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", '{"pictures": [', '{"pictures": 7}', '{"pictures": [1]}', '{"pictures": [{"jpeg": ""}]}'],
)
def test_damaged_inputs_take_only_their_pictures(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path)
    run.inputs.write_text(content)
    assert "inputs.json cannot be read" in made(run).seen()

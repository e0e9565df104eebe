"""The other forms of a report: figures, Markdown, several runs beside each other, a page that follows its run.

pytest tests/vitdist/test_report_forms.py
"""

import html as entities
import io
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.vitdist.test_browser import CHROMIUM, DRAWN
from tests.vitdist.test_report import NAMES, Page, make_run
from vitdist import cli, config, rundir
from vitdist.report import charts, compare, compare_page, facts, figures, folders, forms, markdown, sweep, words
from vitdist.rundir import RunDir

GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def several(home: Path, *changes: dict[str, Any], answers: list[list[int]] | None = None) -> list[RunDir]:
    """Runs a, b, ... under home/runs: dotted settings, and results as "top1", of each; `answers` of each sample."""
    made, first = [], make_run(home / "made", ["cat", "dog"])
    for i, change in enumerate(changes):
        run = RunDir(home / "runs" / "abcdefghijklmnopqrstuvwxyz"[i])
        shutil.copytree(first.path, run.path)
        settings, evaluation = config.read_yaml(run.config), rundir.read_json(run.evaluation) or {}
        for name, value in change.items():
            if name in ("top1", "loss", "intervals"):
                (evaluation if name == "intervals" else evaluation["metrics"])[name] = value
            elif "." in name:
                section, _, key = name.partition(".")
                settings.setdefault(section, {})[key] = value
        run.config.write_text(yaml.safe_dump(settings))
        rundir.publish_json(run.evaluation, evaluation)
        if change.get("top1", 0) is None:
            run.evaluation.unlink()
        record = {**(rundir.read_json(run.attempt(0).train) or {}), **change.get("record", {})}
        rundir.publish_json(run.attempt(0).train, record)
        if answers:
            labels = np.arange(len(answers[i])) % 2
            np.savez(run.predictions, ids=np.arange(len(labels)), labels=labels, predicted=np.array(answers[i]))
        else:
            run.predictions.unlink()
        made.append(run)
    return made


def compared(home: Path, *changes: dict[str, Any], answers: list[list[int]] | None = None) -> compare.Comparison:
    return compare.read_all(several(home, *changes, answers=answers))


# ---- figures -----------------------------------------------------------------------------------


def test_figures_stand_alone(tmp_path: Path) -> None:
    """Each one has its data and colours, is named, asks for nothing and answers to nothing; hostile names draw too."""
    drawings = figures.of_run(facts.read(make_run(tmp_path)))
    expected = {"loss", "quality", "learning-rates", "gradient-norm", "loss-scale", "skipped-updates", "throughput"}
    assert expected | {"data-wait", "confusion", "classes"} == set(drawings)
    for drawing in drawings.values():
        text = json.dumps(drawing)
        assert "var(" not in text
        assert "color-mix" not in text
        assert "params" not in text
        assert "url" not in text
        assert drawing["config"]["background"] == "white"
        assert drawing["width"] > 100
    few = {name: drawings[name] for name in ("learning-rates", "confusion")}
    made = figures.write(few, tmp_path / "out")
    assert [path.name for path in made] == [f"{name}.{kind}" for name in few for kind in ("svg", "png")]
    assert "<script" not in (text := made[2].read_text())
    assert "alert(1)" in text
    assert ">Taken for<" in text
    with Image.open(made[1]) as picture:
        assert picture.width > 2 * figures.WIDTH
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("classes", [2, 41, 250])
def test_a_confusion_of_any_size_has_its_mistakes_in_it(classes: int) -> None:
    counts = 10 * np.eye(classes, dtype=int)
    counts[0, classes - 1] = 5
    drawing = figures.confusion({"classes": [f"c{i}" for i in range(classes)], "confusion": counts.tolist()})
    squares = drawing["data"]["values"]
    side = max(square["true"] for square in squares) + 1
    assert side == min(classes, -(-classes // -(-classes // figures.MOST_SQUARES)))
    (wrong,) = (square for square in squares if square["true"] != square["taken"])
    assert (wrong["true"], wrong["taken"], wrong["share"]) == (0, side - 1, 0.3333)
    assert drawing["width"] == drawing["height"] <= figures.SIDE


def test_a_fan_goes_from_one_colour_to_the_other_on_paper_too() -> None:
    chart = charts.Chart("x", "X", "", {f"g{i}": [(1, 1.0), (2, 2.0)] for i in range(34)}, log=True, fan=True)
    hues = [hue for hue, _ in charts.strokes(chart, figures.light)]
    assert (hues[0], hues[-1]) == (figures.light("c1"), figures.light("c2"))
    assert len(set(hues)) == 34
    legend = charts.specification(chart, figures.light, still=True)["layer"][0]["encoding"]["color"]["legend"]
    assert legend["values"][0] == "g0"
    assert legend["values"][-1] == "g33"
    assert len(legend["values"]) == charts.NAMED
    assert charts.specification(chart)["layer"][0]["encoding"]["color"]["legend"] is None


# ---- Markdown ----------------------------------------------------------------------------------


@given(
    st.text(max_size=40) | st.sampled_from([*NAMES, "a|b", "@someone", "#12", "![x](y)", "__a__", "`a", "\\|", "&lt;"])
)
def test_text_in_markdown_is_only_text(plain: str) -> None:
    plain = "x" + re.sub(r"[\x00-\x1f\x7f\ufffd]", "", plain) + "x"
    rendered = GFM.render(f"| h | i |\n| - | - |\n| {markdown.text(plain)} | last |\n")
    cells = re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)
    assert [entities.unescape(cell) for cell in cells] == [" ".join(plain.split()), "last"]
    assert "@" not in markdown.text(plain)


def test_markdown_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    settings = config.read_yaml(run.config)
    settings["data"]["train"] = "s3://me:secret@host/shards?signature=secret"
    run.config.write_text(yaml.safe_dump(settings))
    argv = ["launch/submit.py", "data.train=https://me:secret@host/a b?signature=secret", "--name", "tiny"]
    rundir.publish_json(run.env, {"argv": argv, "commit": "0123456789abcdef", "dirty": False})
    place = forms.text([run], run.path, None)
    text = place.read_text(encoding="utf-8")
    assert place == run.path / "report.md"
    assert text.startswith("# tiny: finished\n")
    assert "secret" not in text
    assert "s3://host/shards?..." in text
    assert "python launch/submit.py" in text
    rendered = GFM.render(text)
    assert "<script>" not in rendered
    assert rendered.count("<table>") == 4
    assert "<pre><code" in rendered
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in rendered
    for rows in re.findall(r"<table>(.*?)</table>", rendered, re.DOTALL):
        counts = {len(re.findall("<t[dh][ >]", row)) for row in rows.split("</tr>")[:-1]}
        assert len(counts) == 1


def test_markdown_shows_the_figures_that_were_made(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["cat", "dog"])
    for name in ("throughput.png", "loss.png", "loss.svg"):
        rundir.publish(run.path / "figures" / name, b"")
    assert (
        "![loss](figures/loss.png)\n![throughput](figures/throughput.png)\n"
        in forms.text([run], run.path, None).read_text()
    )
    elsewhere = forms.text([run], run.path, tmp_path / "a paper" / "run.md")
    assert "![loss](../runs/tiny/figures/loss.png)" in elsewhere.read_text()


def test_markdown_shows_no_figures_of_other_runs(tmp_path: Path) -> None:
    a, b, c = several(tmp_path, {}, {}, {})
    home = tmp_path / "runs"
    forms.drawings([a, b], home, None)
    rundir.publish(home / "comparison-figures" / "sweep.png", b"")  # of an earlier comparison
    shown, other = forms.text([b, a], home, None).read_text(), forms.text([a, c], home, None).read_text()
    assert "![quality](comparison-figures/quality.png)" in shown
    assert "sweep.png" not in shown
    assert "comparison-figures" not in other


def test_a_sweep_is_made_again_by_its_folder(tmp_path: Path) -> None:
    runs, home = several(tmp_path, {}, {}), tmp_path / "runs" / "lr"
    again = "Make this page againvitdist report"
    assert (
        f"{again} {runs[0].path} {runs[1].path}"
        in Page(forms.page(runs, home.parent, None).path.read_text(encoding="utf-8")).seen()
    )
    points = [{"folder": name, "overrides": []} for name in "ab"]
    rundir.publish(home / "sweep.yaml", yaml.safe_dump({"points": points}))
    page = forms.page(*folders.find([home]), None).path
    assert page == home / "comparison.html"
    assert Page(page.read_text(encoding="utf-8")).seen().endswith(f"{again} {home}")


def test_code_in_markdown_cannot_end_its_block() -> None:
    assert markdown.block(["echo ```", "x"]) == "````sh\necho ```\nx\n````"


# ---- which runs --------------------------------------------------------------------------------


def test_folders_are_runs_sweeps_and_folders_of_runs(tmp_path: Path) -> None:
    made = several(tmp_path, {}, {}, {})
    home = tmp_path / "runs"
    (home / "lr").mkdir()
    points = [{"folder": name, "overrides": [f"optim.lr={i}e-3"]} for i, name in enumerate("cax", 1)]
    (home / "lr" / "sweep.yaml").write_text(yaml.safe_dump({"points": points}))
    assert folders.find([home]) == (made, home)
    assert folders.find([home / "lr"]) == ([made[2], made[0]], home / "lr")  # in its order; x has not begun
    assert folders.find([made[1].path, home / "lr"]) == ([made[1], made[2], made[0]], home.resolve())
    assert folders.find([made[1].path, home / "b", home / "b"]) == ([made[1]], home.resolve())
    made[0].cluster.write_text("sweep: lr\n")
    assert folders.overrides(made[0]) == ["optim.lr=2e-3"]
    assert folders.overrides(made[1]) == []
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "nowhere", "none of this name"), (tmp_path / "empty", "no run folder")):
        with pytest.raises(ValueError, match=says):
            folders.find([folder])
    (home / "lr" / "sweep.yaml").write_text("points: [1]\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml: is damaged"):
        folders.find([home / "lr"])


def test_a_point_of_a_sweep_is_reproduced_alone(tmp_path: Path) -> None:
    (run,) = several(tmp_path, {})
    (tmp_path / "runs" / "lr").mkdir()
    record = {"points": [{"folder": "a", "overrides": ["optim.lr=1e-3", "train.epochs=2"]}]}
    (tmp_path / "runs" / "lr" / "sweep.yaml").write_text(yaml.safe_dump(record))
    run.cluster.write_text("sweep: lr\n")
    argv = ["launch/submit.py", "--nodes", "2", "--sweep", "optim.lr=1e-3,1e-2", "train.epochs=2,3", "--parallel", "2"]
    rundir.publish_json(run.env, {"argv": [*argv, "--name", "lr", "data.flip=0"], "commit": "", "dirty": False})
    (line,) = words.reproduction(facts.read(run))
    assert line == "python launch/submit.py --nodes 2 data.flip=0 optim.lr=1e-3 train.epochs=2 --name a-again"


# ---- several runs ------------------------------------------------------------------------------


def test_the_best_is_first_and_what_did_not_finish_is_there(tmp_path: Path) -> None:
    error = {"type": "OSError", "message": "no space left", "rank": 0}
    found = compared(
        tmp_path,
        {"top1": 0.8, "optim.lr": 1e-3},
        {"top1": None, "optim.lr": 2e-3, "record": {"state": "failed", "error": error, "summary": None}},
        {"top1": 0.9, "optim.lr": 3e-3},
        {"top1": 0.85, "optim.lr": 4e-3, "record": {"state": "running"}},
    )
    assert [entry.name for entry in found.entries] == ["c", "d", "a", "b"]
    assert found.varied == ["optim.lr"]
    assert found.winners == found.entries[:1]
    columns, rows = compare.table(found)
    assert columns[:3] == ["run", "state", "top-1"]
    assert [row[1] for row in rows] == [
        "finished",
        "running",
        "finished",
        "failed",
    ]
    assert rows[3][2] == ""
    assert rows[0][2] == "90.0 %"
    assert compare.head(found)[0].startswith("Of 4 runs (2 finished, 1 running, 1 failed), c is best")
    assert "OSError: no space left" in Page(compare_page.page(found, tmp_path / "runs")).seen()


def test_equal_figures_share_the_first_place(tmp_path: Path) -> None:
    found = compared(tmp_path, {"top1": 0.8}, {"top1": 0.9}, {"top1": 0.9})
    assert [compare.standing(found, entry) for entry in found.entries] == ["best, tied", "best, tied", ""]
    assert "b and c are best" in compare.head(found)[0]


def test_of_losses_the_lowest_is_best(tmp_path: Path) -> None:
    setting = {"evaluation.best": "loss"}
    found = compared(tmp_path, {"loss": 0.8, **setting}, {"loss": 0.5, **setting}, {"loss": 0.9, **setting})
    assert [entry.name for entry in found.entries] == ["b", "a", "c"]
    assert found.metric == "loss"


def test_other_validation_data_are_no_comparison(tmp_path: Path) -> None:
    other = {"train": {"digest": "aa", "samples": 1}, "val": {"digest": "bb", "samples": 1}}
    found = compared(tmp_path, {"top1": 0.8}, {"top1": 0.9, "data.val": "other/val", "record": {"data": other}})
    assert not found.winners
    assert compare.head(found) == ["2 runs; their figures cannot be compared."]
    assert any(text.startswith("Measured on different validation sets") for text in found.warnings)
    assert found.varied == ["data.val"]


def test_the_same_data_under_another_path_are_no_difference(tmp_path: Path) -> None:
    assert compared(tmp_path, {}, {"data.train": "elsewhere/train"}).varied == []


@pytest.mark.parametrize(("one", "other"), [("40GB", "80GB"), ("HBM3", "PCIe")])
def test_machines_differ_by_the_end_of_their_name(tmp_path: Path, one: str, other: str) -> None:
    gpus = [f"NVIDIA A100-SXM4 {end}" for end in (one, other, other)]
    told = compared(tmp_path, *({"record": {"device": device}} for device in gpus)).warnings
    assert told == [
        "Ran on different machines, so times, cost and images/s cannot be compared "
        f"(2 x {gpus[0]}: a; 2 x {gpus[1]}: b and c)."
    ]


def test_uncommitted_changes_are_other_code(tmp_path: Path) -> None:
    runs = several(tmp_path, {}, {}, {})
    assert not compare.read_all(runs).warnings
    for run, change in zip(runs, "xxy", strict=True):
        run.patch.write_text(change)
    (told,) = compare.read_all(runs).warnings
    assert re.fullmatch(
        r"Ran with different code, .+ \(0123456789ab\+[0-9a-f]{6}: a and b; 0123456789ab\+[0-9a-f]{6}: c\)\.", told
    )


def test_seeds_alone_are_averaged(tmp_path: Path) -> None:
    found = compared(tmp_path, *({"top1": 0.8 + i / 100, "train.seed": i} for i in range(3)))
    assert (
        "They differ in their seed alone: accuracy (top-1) 81.0 %, standard deviation 1.0 % (n = 3)."
        in compare.head(found)
    )
    assert compare.swept(found) is None


def test_noise_is_told_from_a_difference(tmp_path: Path) -> None:
    right = [i % 2 for i in range(400)]
    little, much = list(right), list(right)
    for i in range(3):
        little[i] = 1 - little[i]
    for i in range(60):
        much[-1 - i] = 1 - much[-1 - i]
    found = compared(tmp_path, {"top1": 1.0}, {"top1": 0.9925}, {"top1": 0.85}, answers=[right, little, much])
    assert [compare.standing(found, entry).split(" (")[0] for entry in found.entries] == [
        "best",
        "within noise",
        "behind",
    ]
    assert "b cannot be told apart from it" in compare.head(found)[1]


def test_intervals_stand_in_where_answers_are_missing(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {"top1": 0.90, "intervals": {"top1": [0.88, 0.92]}},
        {"top1": 0.89, "intervals": {"top1": [0.87, 0.91]}},
        {"top1": 0.80, "intervals": {"top1": [0.78, 0.82]}},
        {"top1": 0.70},
    )
    told = [compare.standing(found, entry) for entry in found.entries]
    assert told == ["best", "within noise (intervals overlap)", "behind", ""]


@pytest.mark.parametrize("size", [0, 100])
def test_intervals_stand_in_where_answers_are_cut_off(tmp_path: Path, size: int) -> None:
    between = ({"top1": 0.9, "intervals": {"top1": [0.88, 0.92]}}, {"top1": 0.89, "intervals": {"top1": [0.87, 0.91]}})
    runs = several(tmp_path, *between, answers=[[0, 1], [1, 1]])
    with open(runs[1].predictions, "r+b") as file:
        file.truncate(size)
    found = compare.read_all(runs)
    assert [compare.standing(found, entry) for entry in found.entries] == ["best", "within noise (intervals overlap)"]


@pytest.mark.parametrize(("b_alone", "a_alone"), [(0, 0), (3, 3), (8, 2), (20, 2)])
def test_chance_is_mcnemars(b_alone: int, a_alone: int) -> None:
    labels, many = np.zeros(200, int), b_alone + a_alone
    a, b = np.zeros(200, int), np.zeros(200, int)
    a[:b_alone], b[b_alone:many] = 1, 1
    tail = sum(math.comb(many, k) for k in range(max(a_alone, b_alone), many + 1)) / 2**many
    assert compare.chance(labels, a, b, "top1") == pytest.approx(min(1.0, 2 * tail), abs=0.04)


@pytest.mark.parametrize("metric", compare.PAIRED)
def test_chance_is_that_of_the_metric(metric: str) -> None:
    """Of two models with as many right answers, one that lost the rare class is behind where classes count alike."""
    labels = np.repeat([0, 1], [900, 30])
    a, b = labels.copy(), labels.copy()
    a[:20] = 1  # 20 of the frequent class
    b[900:920] = 0  # 20 of the rare one
    p = compare.chance(labels, a, b, metric)
    assert p > 0.5 if metric == "top1" else p < 0.05


def test_names_tell_runs_apart() -> None:
    runs = [RunDir(Path(path)) for path in ("/x/1/a", "/x/2/a", "/x/2/b")]
    assert compare._names(runs) == ["1/a", "2/a", "2/b"]
    assert compare._names(runs[1:]) == ["a", "b"]


def test_a_run_has_its_colour_in_every_chart(tmp_path: Path) -> None:
    found = compared(tmp_path, *({"top1": i / 20} for i in range(14)))
    rows = [json.loads(line) for line in found.entries[0].run.metrics.read_text().splitlines()]
    found.entries[0].run.metrics.write_text("".join(f"{json.dumps(r)}\n" for r in rows if "val/loss" not in r))
    found = compare.read_all([entry.run for entry in found.entries])
    looks = [dict(zip(chart.curves, charts.strokes(chart), strict=True)) for chart in compare.together(found)]
    assert [len(look) for look in looks] == [13, 13, 14, 14]
    first, last = found.entries[1].name, found.entries[-1].name
    assert len({json.dumps(look[first]) for look in looks}) == 1
    assert {look[last][0] for look in looks} == {"var(--line)"}
    apart = {json.dumps(look) for look in looks[-1].values()}
    assert len(apart) == compare.SHOWN + 1


def test_curves_of_other_batches_go_over_images(tmp_path: Path) -> None:
    batch = {"global_batch": 16, "micro_batch": 8, "accumulation": 1, "world": 2}
    for chart in compare.together(compared(tmp_path, {}, {"record": {"batch": batch}})):
        assert chart.x == "training images"
        assert [points[-1][0] for _, points in sorted(chart.curves.items())] == [1600, 3200]


def test_the_comparison_is_a_page_of_its_own(tmp_path: Path) -> None:
    runs = several(tmp_path, {"top1": 0.8, "optim.lr": 1e-3}, {"top1": 0.9}, {"top1": 0.7, "optim.lr": 2e-3})
    runs[1].report.touch()
    hostile = runs[2].path.rename(runs[2].path.with_name("<b>&"))
    made = forms.page([*runs[:2], RunDir(hostile)], tmp_path / "runs", None)
    page = Page(text := made.path.read_text(encoding="utf-8"))
    assert made.path == tmp_path / "runs" / "comparison.html"
    assert not made.going
    assert "<b>&<" not in text
    assert "<b>&" in page.seen()
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["b/report.html"]
    assert len(page.scripts) == 2
    assert len(page.charts) == 5
    assert "Content-Security-Policy" in text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    coloured = set(re.findall(r"var\(--(c\d)\)", text))
    assert all(f"--{name}:" in page.style for name in coloured)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on PATH: apt-get install chromium")
def test_the_comparison_in_a_browser(tmp_path: Path) -> None:
    """It asks nobody, has no fault, is nowhere wider than a phone or a sheet, and a curve can be hidden."""
    runs = several(tmp_path, *({"top1": 0.9 - i / 100, "optim.lr": 1e-3 * (i % 3 + 1)} for i in range(6)))
    runs[0] = RunDir(runs[0].path.rename(runs[0].path.with_name("a-long-name-" * 8 + "<b>")))
    address = forms.page(runs, tmp_path / "runs", None).path.as_uri()
    asked, faults = list[str](), list[str]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_function(DRAWN)
        for width, media in ((320, "screen"), (1280, "screen"), (1040, "print")):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(media="print" if media == "print" else "screen")
            sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert sizes[0] <= sizes[1], (width, media)
        page.emulate_media(media="screen")
        lines = page.locator(".chart").first.locator("path[aria-roledescription='line mark']")
        expect(lines).to_have_count(6)
        page.locator(".legend button").first.press("Enter")
        expect(lines).to_have_count(5)
        browser.close()
    assert (asked, faults) == ([address], [])


# ---- a sweep -----------------------------------------------------------------------------------


def test_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(3)
    grid = list(itertools.product([1e-4, 1e-3, 1e-2], ["adamw", "sgd"], [0.0, 0.1], [True, False]))
    result = [0.8 + 0.05 * (name == "sgd") + 0.01 * rng.normal() for _, name, _, _ in grid]
    lists = {key: [point[i] for point in grid] for i, key in enumerate(("lr", "optimizer", "smoothing", "flip"))}
    first, *rest = sweep.effects(lists, result)
    assert first.name == "optimizer"
    assert first.share > 0.7
    assert first.chance < 0.01
    assert [label for label, _ in first.means] == ["adamw", "sgd"]
    assert first.means[1][1] > first.means[0][1]
    assert all(effect.share < 0.2 and effect.chance > 0.05 for effect in rest)


def test_noise_is_an_effect_as_seldom_as_said() -> None:
    rng = np.random.default_rng(0)
    chances = [sweep.effects({"x": [i % 3 for i in range(12)]}, rng.normal(size=12))[0].chance for _ in range(200)]
    assert 0.02 < np.mean(np.array(chances) <= 0.05) < 0.09


def test_a_best_value_in_the_middle_is_found() -> None:
    rates = np.geomspace(1e-5, 1e-1, 15).tolist()
    (effect,) = sweep.effects({"lr": rates}, [-((math.log10(lr) + 3) ** 2) for lr in rates])
    assert effect.chance < 0.05
    assert len(effect.means) == 3
    assert effect.correlation is None
    assert max(effect.means, key=lambda mean: mean[1]) == effect.means[1]
    assert [label.split(" to ")[0] for label, _ in effect.means] == [f"{lr:.3g}" for lr in rates[::5]]


def test_of_few_runs_with_other_values_each_the_order_counts() -> None:
    (effect,) = sweep.effects({"lr": [0.3, 0.1, 0.2, 0.4]}, [3.0, 1.0, 2.0, 9.0])
    assert effect.correlation == pytest.approx(1)
    assert effect.share == pytest.approx(1)
    assert 0.05 < effect.chance < 0.12  # one or the other of 24 orders


@pytest.mark.parametrize(("many", "told"), [(3, False), (5, True)])
def test_a_best_value_in_the_middle_of_few_is_named_and_claims_no_share(tmp_path: Path, many: int, told: bool) -> None:
    middle = many // 2
    found = compared(
        tmp_path, *({"top1": 0.9 - abs(i - middle) / 10, "optim.lr": 10.0 ** (i - 5)} for i in range(many))
    )
    seen = Page(compare_page.page(found, tmp_path / "runs")).seen()
    best = words.setting(10.0 ** (middle - 5))
    assert re.search(rf"optim\.lr ?{'1' if told else ''} best at {best}; trend r = [+-]0\.00, which sees no best", seen)
    assert "0.0%" not in seen


def test_settings_have_all_their_digits_beside_each_other(tmp_path: Path) -> None:
    values = [0.7525, 0.7535, 0.9999]
    made = ({"top1": 0.8 + i / 100, "optim.lr": v} for i, v in enumerate(values))
    found = compared(tmp_path, *made)
    shown = Page(compare_page.page(found, tmp_path / "runs")).seen() + markdown.of_runs(found, 0.0, [])
    assert all(str(value) in shown for value in values)
    swept = compare.swept(found)
    assert swept
    assert [text for _, text in swept.axes[0].ticks] == ["0.7525", "0.7535", "0.9999"]
    assert "lr 0.9999" in swept.told[0]


def test_names_that_do_not_repeat_explain_nothing() -> None:
    assert sweep.effects({"data.train": ["a", "b", "c"]}, [1.0, 2.0, 3.0]) == []
    assert sweep.effects({"x": [1, 1, 2, 2]}, [1.0] * 4)[0].chance == 1


@given(st.lists(st.integers(-5, 5) | st.floats(1e-6, 1e6) | st.sampled_from(["a", None, True, [1, 2]]), min_size=2))
def test_axes_hold_every_value(values: list[Any]) -> None:
    axis = sweep.axis("x", values)
    assert len(axis.places) == len(values)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in axis.places)
    assert 1 <= len(axis.ticks) <= sweep.MOST_TICKS


def test_better_is_above() -> None:
    assert sweep.result("loss", [3.0, 1.0], False, str).places == [0, 1]
    assert sweep.result("top-1", [3.0, 1.0], True, str).ticks[-1] == (1.0, "3.0")


def test_how_a_run_is_measured_and_saved_does_not_matter(tmp_path: Path) -> None:
    idle = ("evaluation.batch", "checkpoint.keep", "train.seed")
    changes = [{"top1": 0.8 + i / 100, "optim.lr": 1e-3 * i, **dict.fromkeys(idle, i)} for i in range(1, 5)]
    found = compared(tmp_path, *changes)
    assert {*idle, "optim.lr"} == set(found.varied)
    swept = compare.swept(found)
    assert swept
    assert [effect.name for effect in swept.effects] == ["optim.lr"]


def test_a_sweep_draws(tmp_path: Path) -> None:
    """With settings of all kinds, Vega-Lite takes it; the unfinished run is left out."""
    found = compared(
        tmp_path,
        *({"top1": 0.8 + i / 100, "optim.lr": 10.0**-i, "loss.label_smoothing": i % 2 / 10} for i in range(1, 5)),
        {"top1": 0.99, "optim.lr": 1.0, "record": {"state": "running"}},
    )
    swept = compare.swept(found)
    assert swept
    assert swept.names == ["d", "c", "b", "a"]
    assert swept.axes[-1].name == "top-1"
    assert {one.name for one in swept.axes[:-1]} == {"lr", "label_smoothing"}
    drawing = figures.of_runs(found)["sweep"]
    with Image.open(io.BytesIO(charts.picture(drawing)["png"])) as picture:
        assert picture.width > 2 * figures.WIDTH
    text = GFM.render(markdown.of_runs(found, 0.0, []))
    assert "<td><code>optim.lr</code></td>" in text
    assert "What mattered" in text


# ---- following a run ---------------------------------------------------------------------------


def test_a_page_follows_its_run_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, ["cat", "dog"], state="running")
    pages: list[str] = []

    def sleep(seconds: float) -> None:
        pages.append(run.report.read_text(encoding="utf-8"))
        if len(pages) == 2:
            record = rundir.read_json(run.attempt(0).train) or {}
            rundir.publish_json(run.attempt(0).train, {**record, "state": "done"})

    forms.follow(lambda every: forms.page([run], run.path, None, every), 7, sleep)
    pages.append(run.report.read_text(encoding="utf-8"))
    assert ['http-equiv="refresh" content="7"' in page for page in pages] == [True, True, False]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert "At step 200" in told[0]
    assert "Trained to the end" in told[1]


def test_after_ctrl_c_the_page_rests(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["cat", "dog"], state="running")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forms.follow(lambda every: forms.page([run], run.path, None, every), 7, interrupt)
    assert "refresh" not in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("record", "job", "goes"),
    [("running", None, True), ("stopped", None, False), ("stopped", "requeued", True), ("done", None, False)],
)
def test_a_requeued_run_goes_on(tmp_path: Path, record: str, job: str | None, goes: bool) -> None:
    run = make_run(tmp_path, ["cat", "dog"], state=record)
    if job:
        rundir.publish_json(run.attempt(0).job, {"state": job})
    assert words.going(facts.read(run)) is goes
    run.attempt(0).train.unlink()
    assert words.going(facts.read(run))


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "which run?"),
        (["nowhere"], "none of this name"),
        (["RUN", "--watch", "--markdown"], "--watch:"),
        (["RUN", "--figures", "--out", "x"], "--out:"),
        (["RUN", "RUN", "--each", "--out", "x"], "--each:"),
        (["NEW", "--figures"], "nothing to draw"),
    ],
)
def test_what_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    run = make_run(tmp_path, ["cat", "dog"])
    new = RunDir(tmp_path / "new")
    rundir.publish(new.config, run.config.read_text(encoding="utf-8"))
    places = {"RUN": str(run.path), "NEW": str(new.path)}
    assert cli.main(["report", *(places.get(part, part) for part in argv)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_runs_that_have_not_begun_have_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["cat", "dog"])
    new = [RunDir(tmp_path / name) for name in ("x", "y")]
    for one in new:
        rundir.publish(one.config, run.config.read_text(encoding="utf-8"))
    assert "Nothing has been trained yet." in forms.text(new[:1], tmp_path, None).read_text(encoding="utf-8")
    assert forms.page(new, tmp_path, None)[1:] == (True, "2 runs (2 submitted); none has been evaluated yet.")


def test_the_command_takes_runs_behind_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = several(tmp_path, {}, {})
    assert cli.main(["report", "--watch", str(a.path)]) == 0
    assert capsys.readouterr().out.startswith(f"{a.report}: Trained to the end")
    assert cli.main(["report", str(a.path), str(b.path)]) == 0
    assert cli.main(["report", str(a.path), str(b.path), "--each", "--markdown"]) == 0
    assert cli.main(["report", str(a.path), str(b.path), "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "runs" / "comparison.html"),
        str(a.path / "report.md"),
        str(b.path / "report.md"),
        str(tmp_path / "x.html"),
    ]

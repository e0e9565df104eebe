"""The W&B Report: its sections, what it may not say, and that a W&B server takes it, once and again.

pytest tests/vitdist/test_wandb_report.py
"""

import base64
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces.reports.v2 as wr
import yaml
from wandb_workspaces.reports.v2 import internal

from tests import fake_wandb
from tests.vitdist.test_report import NAMES, make_run
from vitdist import cli, config, rundir
from vitdist.report import compare, facts, wandb_report
from vitdist.rundir import RunDir

SECTIONS = [
    "What ran",
    "Data",
    "Learning curves",
    "Learning rate of each layer",
    "Optimizer",
    "Speed",
    "Classes",
    "Reliability",
    "Files and commands",
]


def tracked(folder: Path, known: str = "1a2b3c4d", names: list[str] = NAMES, **record: Any) -> RunDir:
    """A made run that W&B knows by this id."""
    run = make_run(folder, names, **record)
    rundir.publish(run.wandb / "run-id", known)
    return run


def several(folder: Path, rates: tuple[float, ...] = (0.1, 0.001, 0.01)) -> list[RunDir]:
    """Runs beside each other that differ in the learning rate; the second one is the best."""
    first = tracked(folder)
    runs = [RunDir(folder / "runs" / f"run-{i}") for i in range(len(rates))]
    for i, run in enumerate(runs):
        shutil.copytree(first.path, run.path)
        rundir.publish(run.wandb / "run-id", f"{i:08x}")
        settings = config.read_yaml(run.config)
        settings["optim"]["lr"] = rates[i]
        run.config.write_text(yaml.safe_dump(settings))
        scores = json.loads(run.evaluation.read_text())
        scores["metrics"]["top1"] = 0.8 if i == 1 else 0.5
        rundir.publish_json(run.evaluation, scores)
    shutil.rmtree(first.path)
    return runs


def blocks(run: RunDir) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = wandb_report.specification(wandb_report.build(facts.read(run)))["spec"]["blocks"]
    return made


def sections(found: list[dict[str, Any]]) -> list[str]:
    return [b["children"][0]["text"] for b in found if b["type"] == "heading" and b["level"] == 2]


def panels(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    grids = [block["metadata"] for block in found if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def tables(found: list[dict[str, Any]]) -> str:
    return "\n".join(block["content"] for block in found if block["type"] == "markdown-block")


# ---- what is in it ---------------------------------------------------------------------------------


def test_sections_of_a_run_in_the_order_of_the_page(tmp_path: Path) -> None:
    found = blocks(tracked(tmp_path))
    assert sections(found) == SECTIONS
    kinds = [block["type"] for block in found]
    assert kinds[:5] == ["paragraph", "callout-block", "markdown-block", "paragraph", "table-of-contents"]
    assert "tiny: Trained to the end, 200 steps in 2 h" in json.dumps(found[1])
    drawn = {panel["config"]["chartTitle"]: panel["config"] for panel in panels(found)}
    assert drawn["Loss"]["metrics"] == ["train/loss", "val/loss"]
    assert drawn["Learning rate of each group"]["metricRegex"] == "lr/.*"
    assert drawn["Learning rate of each group"]["yLogScale"]
    assert "GPU memory, GiB" not in drawn  # a CPU's rows have none
    assert {config["xAxis"] for config in drawn.values()} == {"train/global_step"}
    for part in ("train.steps | 200", "| Übergang |", "taken for", "Start 0"):
        assert part in tables(found), part


def test_use_of_the_nodes_is_said_to_be_of_all(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    with open(run.metrics, "a") as file:
        more = {"sys/cpu_pct": 90.0, "sys/ram_pct": 9.0, "sys/gpu_pct": 50.0}
        file.writelines(json.dumps({"attempt": 0, "train/global_step": s, **more}) + "\n" for s in (201, 202))
    titles = {tuple(panel["config"].get("metrics", ())): panel["config"]["chartTitle"] for panel in panels(blocks(run))}
    assert titles["sys/cpu_pct", "sys/ram_pct"] == "Processors, mean of all nodes, and memory of the fullest, %"
    assert titles["sys/gpu_pct",] == "GPUs, mean of all nodes, %"


def test_panels_show_exactly_the_runs(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    settings = config.read_yaml(run.config)
    settings["tracking"] |= {"project": "steel", "entity": "lab"}
    run.config.write_text(yaml.safe_dump(settings))
    for block in blocks(run):
        for runset in block.get("metadata", {}).get("runSets", []):
            assert runset["project"] == {"name": "steel", "entityName": "lab"}
            (chosen,) = runset["filters"]["filters"]
            assert (chosen["key"]["name"], chosen["op"], chosen["value"]) == ("name", "IN", ["1a2b3c4d"])


def test_the_library_reads_its_report_back(tmp_path: Path) -> None:
    report = wandb_report.build(facts.read(tracked(tmp_path)))
    model = internal.ReportViewspec.model_validate(wandb_report.specification(report))
    again = wr.Report._from_model(model)
    assert [type(block) for block in again.blocks] == [type(block) for block in report.blocks]
    assert again.title == report.title == "tiny finished"


def test_class_names_are_text(tmp_path: Path) -> None:
    shown = {
        "<script>alert(1)</script>": "&lt;script&gt;alert(1)&lt;/script&gt;",
        "a|b\nc": r"a\|b c",
        "![x](http://evil/pixel)": r"\!\[x\](http://evil/pixel)",
        "**bold** `code` $x$": r"\*\*bold\*\* \`code\` \$x\$",
        "steel\x1b[31m": r"steel\[31m",
    }
    found = tables(blocks(tracked(tmp_path, names=list(shown))))
    for text in shown.values():
        assert found.count(f"| {text} |") >= 3  # sizes, scores, matrix
    for line in found.splitlines():
        assert line.startswith("| ")
        assert line.endswith(" |")


def test_many_classes_are_cut_to_the_hardest(tmp_path: Path) -> None:
    found = blocks(tracked(tmp_path, names=[f"class {i}" for i in range(300)]))
    assert "the 50 lowest recalls of 300 classes" in json.dumps(found)
    assert "Confusion: rows the true class, columns the predicted one" not in json.dumps(found)
    assert len(json.dumps(found)) < 60_000


def test_secrets_stay_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_report, "class_counts", lambda *_: {})  # asks the host for a minute
    error = {"type": "OSError", "message": "https://me:hunter2@host/a.tar?sig=hunter2: no answer", "rank": 0}
    run = tracked(tmp_path, state="failed", error=error)
    settings = config.read_yaml(run.config)
    settings["data"] |= {"train": "https://me:hunter2@host/train", "val": "pipe:fetch --key hunter2 val"}
    run.config.write_text(yaml.safe_dump(settings))
    argv = ["launch/submit.py", "data.train=https://me:hunter2@host/train?sig=hunter2", "data.val=pipe:cat hunter2"]
    rundir.publish_json(run.env, {"argv": argv})
    text = json.dumps(blocks(run))
    assert "https://host/train" in text
    assert "hunter2" not in text


def test_long_names_keep_to_the_length_of_a_title(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    long = RunDir(run.path.rename(tmp_path / "runs" / ("n" * 200)))
    assert len(wandb_report.build(facts.read(long)).title) == 128


@pytest.mark.parametrize("missing", ["config.yaml", "env.json", "metrics.jsonl", "evaluation.json", "attempts"])
def test_missing_pieces_are_left_out(tmp_path: Path, missing: str) -> None:
    run = tracked(tmp_path)
    (shutil.rmtree if (run.path / missing).is_dir() else Path.unlink)(run.path / missing)
    assert "Files and commands" in sections(blocks(run))


def test_pictures_are_shown_where_w_and_b_has_them(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    media = run.wandb / "offline-run-1" / "files" / "media"
    rundir.publish(media / "images" / "inputs_0_abc.png", "")
    rundir.publish(media / "table" / "val" / "mistakes_9_abc.table.json", "")
    found = blocks(run)
    assert "Worst mistakes" in sections(found)
    assert [p["viewType"] for p in panels(found) if p["viewType"] in ("Weave", "Media Browser")] == [
        "Media Browser",
        "Weave",
    ]


# ---- several runs ----------------------------------------------------------------------------------


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = several(tmp_path)
    report = wandb_report.build(compare.read_all(runs))
    found = wandb_report.specification(report)["spec"]["blocks"]
    assert report.title == "run-1 and 2 others"
    assert "| **run-1** |" in tables(found)
    assert "| run-0 | 0.1 |" in tables(found)
    shown = {panel["viewType"]: panel["config"] for panel in panels(found)}
    axes = [column["accessor"] for column in shown["Parallel Coordinates Plot"]["columns"]]
    assert axes == ["config:settings.value.optim.lr", "summary:val/top1.max"]
    assert shown["Parallel Coordinates Plot"]["columns"][0]["log"]
    assert shown["Parameter Importance"]["targetKey"] == "val/top1.max"
    assert shown["Run Comparer"] == {"diffOnly": "split"}
    assert shown["Bar Chart"]["metrics"] == ["val/top1.max"]
    sets = [one for block in found if block["type"] == "panel-grid" for one in block["metadata"]["runSets"]]
    assert {tuple(sorted(one["filters"]["filters"][0]["value"])) for one in sets} == {
        ("00000000", "00000001", "00000002")
    }


def test_two_runs_are_no_sweep(tmp_path: Path) -> None:
    report = wandb_report.build(compare.read_all(several(tmp_path)[:2]))
    shown = {panel["viewType"] for panel in panels(wandb_report.specification(report)["spec"]["blocks"])}
    assert "Run Comparer" in shown
    assert not shown & {"Parallel Coordinates Plot", "Parameter Importance"}


def test_runs_of_two_projects_share_each_panel(tmp_path: Path) -> None:
    runs = several(tmp_path)[:2]
    settings = config.read_yaml(runs[0].config)
    settings["tracking"] |= {"project": "other", "entity": "lab"}
    runs[0].config.write_text(yaml.safe_dump(settings))
    for grid in wandb_report.build(compare.read_all(runs), "me").blocks:
        if isinstance(grid, wr.PanelGrid):
            kept = {(one.entity, one.project, one.filters) for one in grid.runsets}
            assert kept == {
                ("lab", "other", "Metric('ID') in ['00000000']"),
                ("me", "vitdist", "Metric('ID') in ['00000001']"),
            }


def test_a_sweep_keeps_its_report_while_points_begin(tmp_path: Path) -> None:
    runs = several(tmp_path)
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "sweep.yaml").touch()
    places = {wandb_report.place(runs[:begun], tmp_path / "lr") for begun in (1, 2, 3)}
    assert places == {tmp_path / "lr" / "wandb-report.json"}


# ---- saved at W&B ----------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_wandb.Server]:
    with fake_wandb.Server() as made:
        monkeypatch.setenv("WANDB_BASE_URL", made.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield made


def test_a_report_is_saved_once_and_then_updated(
    tmp_path: Path, server: fake_wandb.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracked(tmp_path)
    server.rows["1a2b3c4d"] = []
    assert cli.main(["report", str(run.path), "--wandb"]) == 0
    (view,) = server.views
    assert capsys.readouterr().out == f"{server.url}/me/vitdist/reports/tiny-finished--{view}\n"
    kept = json.loads((run.path / "wandb-report.json").read_text())
    sent = json.loads(server.views[view]["spec"])
    assert kept["id"] == view
    for spec in (kept["spec"], sent):  # the id of the project is the server's to say
        for block in spec["blocks"]:
            for runset in block.get("metadata", {}).get("runSets", []):
                assert runset["project"].pop("entityName") == "me"
                runset["project"].pop("id", None)
    assert kept["spec"] == sent

    # What a colleague wrote into it stays; what changed in the run is told.
    sent["discussionThreads"] = [{"id": "thread"}]
    server.views[view]["spec"] = json.dumps(sent)
    record = json.loads(run.attempt(0).train.read_text())
    rundir.publish_json(run.attempt(0).train, record | {"state": "stopped"})
    assert cli.main(["report", str(run.path), "--wandb"]) == 0
    assert list(server.views) == [view]
    assert server.views[view]["displayName"] == "tiny stopped"
    assert json.loads(server.views[view]["spec"])["discussionThreads"] == [{"id": "thread"}]

    # Deleted at W&B: there will be a new one.
    server.views["another"] = server.views.pop(view)
    assert cli.main(["report", str(run.path), "--wandb"]) == 0
    assert len(server.views) == 2


def test_a_run_that_was_not_uploaded_is_named(
    tmp_path: Path, server: fake_wandb.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracked(tmp_path)
    assert cli.main(["report", str(run.path), "--wandb"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"error: W&B has no such run at me/vitdist: {run.path}\nupload first: vitdist sync {run.path}\n"
        f"what would be sent is in {run.path}/wandb-report.json\n"
    )
    assert not server.views


@pytest.mark.parametrize(
    ("behave", "says"),
    [(401, "W&B refuses the API key: `wandb login --relogin`"), (500, "W&B did not take the report (Failed to verify")],
)
def test_a_server_that_says_no(
    tmp_path: Path,
    server: fake_wandb.Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behave: int,
    says: str,
) -> None:
    monkeypatch.setattr(wandb_report, "RETRIES", 1)
    run, server.behave = tracked(tmp_path), behave
    assert cli.main(["report", str(run.path), "--wandb"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"error: {says}")
    assert told[1:] == [f"what would be sent is in {run.path}/wandb-report.json"]
    assert (run.path / "wandb-report.json").exists()


def test_without_a_key_the_way_to_one_is_told(
    tmp_path: Path, server: fake_wandb.Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    run = tracked(tmp_path)
    assert cli.main(["report", str(run.path), "--wandb"]) == 1
    assert "W&B has no API key here: `wandb login`" in capsys.readouterr().err
    assert (run.path / "wandb-report.json").exists()


# ---- without W&B -----------------------------------------------------------------------------------


def test_a_dry_run_asks_nobody_and_keeps_the_id(
    tmp_path: Path, server: fake_wandb.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracked(tmp_path)
    rundir.publish_json(run.path / "wandb-report.json", {"id": "VmlldzoxMjM=", "url": "https://host/report"})
    assert cli.main(["report", str(run.path), "--wandb", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{run.path}/wandb-report.json\n"
    kept = json.loads((run.path / "wandb-report.json").read_text())
    assert (kept["id"], kept["url"], kept["displayName"]) == ("VmlldzoxMjM=", "https://host/report", "tiny finished")
    assert base64.b64decode(kept["id"])
    assert not server.asked.is_set()


def test_each_choice_of_runs_has_a_report_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (str(run.path) for run in several(tmp_path))
    for chosen in ([one, two], [two, one], [one, two, three]):
        assert cli.main(["report", *chosen, "--wandb", "--dry-run"]) == 0
    first, again, other = map(Path, capsys.readouterr().out.split())
    assert first == again != other
    assert re.fullmatch(r"wandb-report-[0-9a-f]{8}\.json", other.name)
    assert other.parent == tmp_path / "runs"


@pytest.mark.parametrize(
    ("known", "says"),
    [(None, "was not tracked by W&B"), ("a'] or True", "is no id of a W&B run")],
)
def test_a_run_that_w_and_b_cannot_know_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], known: str | None, says: str
) -> None:
    run = make_run(tmp_path)
    if known:
        rundir.publish(run.wandb / "run-id", known)
    assert cli.main(["report", str(run.path), "--wandb", "--dry-run"]) == 2
    assert says in capsys.readouterr().err
    assert not (run.path / "wandb-report.json").exists()


@pytest.mark.parametrize("missing", ["wandb", "wandb_workspaces"])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "vitdist.report.wandb_report")
    monkeypatch.delattr("vitdist.report.wandb_report")
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2", raising=False)
    run = make_run(tmp_path)
    assert cli.main(["report", str(run.path), "--wandb"]) == 2
    named = missing.replace("_", "-")
    assert capsys.readouterr().err == f"error: --wandb: {named} is not installed: pip install {named}\n"


@pytest.mark.parametrize(
    ("given", "says"), [(["--dry-run"], "belongs to --wandb"), (["--wandb", "--markdown"], "ask for other reports")]
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert cli.main(["report", str(make_run(tmp_path).path), *given]) == 2
    assert says in capsys.readouterr().err

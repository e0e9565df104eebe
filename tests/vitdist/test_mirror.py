"""What W&B and TensorBoard get beside rows: first pictures, tables, artifacts; and that none of it can end a training.

pytest tests/vitdist/test_mirror.py
"""

import base64
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests import fake_wandb, logs_workers
from tests.vitdist.test_report import make_run
from vitdist import board, gallery, mirror, rundir
from vitdist.config import Pixels
from vitdist.data import index
from vitdist.inputs import Inputs
from vitdist.rundir import RunDir
from vitdist.tracking import Journal

PIXELS = Pixels(image_size=8, eval_crop=1.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))


@pytest.fixture
def store(server: fake_wandb.Server, wandb_home: pytest.MonkeyPatch) -> fake_wandb.Server:
    wandb_home.setattr(mirror, "FINISH_S", 15.0)
    return server


def finish(run: RunDir, **tracking: Any) -> dict[str, Any]:
    """Log the end of `run`; returns its record."""
    data = index.Index.open(run.path.parents[1] / "train").summary()
    with Journal(run, run.attempt(1), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(**tracking), {"data": {"train": data, "val": data}}, 0)
        inputs = Inputs(PIXELS, ["a", "b"], journal.inputs)
        inputs.see(torch.zeros(20, 3, 8, 8), torch.zeros(20, dtype=torch.long))
        journal.row(201, {"train/loss": 1.0})
        journal.record(state="done")
    return rundir.read_json(run.attempt(1).train) or {}


def test_a_finished_run_leaves_tables_pictures_and_artifacts(tmp_path: Path, store: fake_wandb.Server) -> None:
    run = make_run(tmp_path)
    run.model.mkdir()
    (run.model / "model.safetensors").write_bytes(bytes(1000))
    run.code.mkdir()
    (run.code / "train.py").write_text("pass\n")
    (run.code / "secret.key").write_text("canary\n")
    assert finish(run, group="a sweep").get("events", []) == []
    assert (store.runs[0]["groupName"], store.runs[0]["jobType"]) == ("a sweep", "train")
    (rows,) = store.rows.values()
    logged = {key: row for row in rows for key in row}
    assert logged["inputs"]["inputs"]["count"] == 16
    assert logged["inputs"]["inputs"]["captions"] == ["a"] * 16
    assert logged["val/classes"]["val/classes"]["nrows"] == 3
    assert logged["val/mistakes"]["val/mistakes"]["nrows"] == 1
    assert logged["val/pictures"]["val/pictures"]["nrows"] == 12
    assert logged["val/classes"]["train/global_step"] == 200
    assert "val/confusion_table" in logged
    kinds = {name: kind for name, (kind, _) in store.artifacts.items()}
    digest = index.Index.open(tmp_path / "train").digest[:12]
    assert kinds["tiny-model"] == "model"
    assert store.artifacts["tiny-model"][1] == ["model.safetensors"]
    assert kinds[f"train-{digest}"] == kinds[f"val-{digest}"] == "dataset"
    assert store.artifacts[f"train-{digest}"][1] == ["data.json"], "shards stay where they are"
    assert store.used == [f"train-{digest}", f"val-{digest}"]
    (code,) = (files for kind, files in store.artifacts.values() if kind == "code")
    assert code == ["train.py"]
    assert store.ends[-1]["exitcode"] == 0


def test_a_large_model_stays_where_it_is(
    tmp_path: Path, store: fake_wandb.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "UPLOADED", 999)
    run = make_run(tmp_path)
    run.model.mkdir()
    (run.model / "model.safetensors").write_bytes(bytes(1000))
    assert finish(run, artifacts=["model"]).get("events", []) == []
    assert store.artifacts["tiny-model"] == ("model", [])
    assert not any(kind == "dataset" for kind, _ in store.artifacts.values())


def test_W10_tables_of_many_classes_are_capped(
    tmp_path: Path, store: fake_wandb.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "MATRIX", 20)
    monkeypatch.setattr(mirror, "MOST_ROWS", 25)
    run = make_run(tmp_path, [f"class {i}" for i in range(60)])
    evaluation = rundir.read_json(run.evaluation) or {}
    evaluation["confusion"] = [[1] * 60] * 60
    rundir.publish_json(run.evaluation, evaluation)
    assert finish(run, artifacts=[]).get("events", []) == []
    (rows,) = store.rows.values()
    logged = {key: row[key] for row in rows for key in row}
    assert logged["val/classes"]["nrows"] == logged["val/confusion"]["nrows"] == 25


def test_a_server_without_artifacts_costs_them_and_nothing_else(tmp_path: Path, store: fake_wandb.Server) -> None:
    run = make_run(tmp_path)
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    store.takes_artifacts = False
    record = finish(run)
    (rows,) = store.rows.values()
    assert 201 in [row.get("train/global_step") for row in rows]
    assert store.ends[-1]["exitcode"] == 0
    told = [event["text"] for event in record["events"] if event["kind"] == "wandb"]
    assert any("W&B lacks the data as artifacts" in text for text in told)
    assert record["state"] == "done"


def test_offline_all_of_it_waits_in_the_run_folder(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    assert finish(run, wandb="offline").get("events", []) == []
    (part,) = run.wandb.glob("offline-run-*")
    media = {file.relative_to(part / "files" / "media").parts[0] for file in part.rglob("media/**/*") if file.is_file()}
    assert media == {"images", "table"}


def test_a_cleaned_tmp_costs_no_picture(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    """What a node's cleaner of /tmp does in a run of days, to the folder that W&B makes at its import."""
    from wandb.sdk.data_types import _private

    shutil.rmtree(_private.MEDIA_TMP.name, ignore_errors=True)
    run = make_run(tmp_path)
    assert finish(run, wandb="offline").get("events", []) == []
    assert list(run.wandb.glob("offline-run-*/files/media/images/*.jpg"))


def test_shards_that_are_gone_cost_the_pictures_alone(tmp_path: Path, wandb_home: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    (tmp_path / "val" / "index.json").unlink()
    record = finish(run, wandb="offline", artifacts=[])
    (event,) = record["events"]
    assert "W&B lacks the validation pictures" in event["text"]
    assert str(tmp_path / "val") in event["text"]


def test_W6_two_starts_are_one_run_with_one_axis(tmp_path: Path, store: fake_wandb.Server) -> None:
    run = RunDir(tmp_path / "run")
    for attempt, steps in enumerate([range(1, 8), range(5, 10)]):
        with Journal(run, run.attempt(attempt), first=True) as journal:
            journal.start_mirrors(logs_workers.settings(), {}, steps[0] - 1)
            for step in steps:
                journal.row(step, {"train/loss": float(attempt)})
            if attempt == 0:
                journal.stopping()
    ((name, rows),) = store.rows.items()
    assert name == (run.wandb / "run-id").read_text()
    assert [row["train/global_step"] for row in rows] == [*range(1, 8), *range(5, 10)]
    assert [end["exitcode"] for end in store.ends if end["complete"]] == [rundir.EXIT_STOPPED, 0]


def test_X1_secrets_in_urls_stay_here(tmp_path: Path, store: fake_wandb.Server) -> None:
    run, url = RunDir(tmp_path / "run"), "https://me:canary@example.com/shards?sig=canary"
    with Journal(run, run.attempt(0), first=True) as journal:
        journal.start_mirrors(logs_workers.settings(), {"settings": {"data": {"train": {url: 1.0}, "val": url}}}, 0)
    assert store.runs
    assert "canary" not in json.dumps(store.runs)
    assert "example.com" in json.dumps(store.runs)
    assert not [file for file in run.path.rglob("*") if file.is_file() and b"canary" in file.read_bytes()]


# ---- pictures ----------------------------------------------------------------------------------


def test_inputs_show_what_the_model_gets(tmp_path: Path) -> None:
    kept: list[dict[str, str]] = []
    inputs = Inputs(PIXELS, ["cat", "dog", "eel"], kept.extend)
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(PIXELS.mean)) / torch.tensor(PIXELS.std)
    pictures = red.view(1, 3, 1, 1).expand(10, 3, 8, 8)
    mixed = torch.tensor([[0.7, 0.28, 0.02]] * 10)
    inputs.see(pictures, torch.full((10,), 2))
    assert kept == [], "not before there are enough"
    inputs.see(pictures, mixed)
    inputs.see(pictures, mixed)
    assert [one["label"] for one in kept] == ["eel"] * 10 + ["70% cat + 28% dog"] * 6
    with Image.open(io.BytesIO(base64.b64decode(kept[0]["jpeg"]))) as shown:
        assert shown.size == (8, 8)
        colour = shown.getpixel((4, 4))
    assert isinstance(colour, tuple)
    assert all(abs(a - b) < 8 for a, b in zip(colour, (255, 0, 0), strict=True))


def test_the_surest_mistakes_come_first(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (wrong,) = gallery.mistakes(run, 16)
    assert (wrong.id, wrong.confidence) == (0, 0.7)
    assert wrong.label != wrong.predicted
    assert Image.open(io.BytesIO(wrong.stored)).size == (8, 8)
    assert [one.id for one in gallery.spread(run, 3)] == [0, 5, 11]
    run.predictions.unlink()
    assert gallery.mistakes(run, 16) == gallery.spread(run, 3) == []


# ---- TensorBoard -------------------------------------------------------------------------------


def test_tensorboard_gets_the_rows_and_forgets_those_that_were_undone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path / "run")
    for attempt, steps in enumerate([range(1, 8), range(5, 10)]):
        with Journal(run, run.attempt(attempt), first=True) as journal:
            journal.start_mirrors(logs_workers.settings(wandb="off", tensorboard=True), {}, steps[0] - 1)
            for step in steps:
                journal.row(step, {"train/loss": float(attempt)})
    seen = EventAccumulator(str(run.tensorboard))
    seen.Reload()
    assert [(one.step, one.value) for one in seen.Scalars("train/loss")] == [
        *((step, 0.0) for step in range(1, 5)),
        *((step, 1.0) for step in range(5, 10)),
    ]


def test_tensorboard_that_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    made = board.Board(tmp_path / "file" / "folder", 0, told.append)
    made.add(1, {"a": 1.0})
    made.close()
    assert len(told) == 1
    assert "left out from here on" in told[0]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board.Board(tmp_path, 0, told.append).add(1, {"a": 1.0})
    assert "pip install tensorboard" in told[1]
    assert len(told) == 2


def test_of_rows_that_come_too_fast_w_and_b_gets_one_a_second_and_every_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(mirror, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(mirror, "AT_ONCE", 3)
    given = mirror.Mirror(RunDir(tmp_path), logs_workers.settings(), {}, print, print)
    for step in range(1, 51):
        now[0] += 0.1
        given.log({"train/global_step": step, "train/loss": 1.0})
        if step == 25:
            given.log({"train/global_step": step, "val/loss": 1.0})
    given.finish(0)
    steps = [item["train/global_step"] for item in given._items.queue if isinstance(item, dict)]
    assert steps == [1, 2, 3, 12, 22, 25, 25, 42, 50]  # an evaluation with its row, and the last one, in any case

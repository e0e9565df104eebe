"""Whole runs of the trainer over gloo: to the end, stopped and resumed, refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import ranks, workers
from vitdist import manifest, rundir, selection
from vitdist import train as trainer
from vitdist.data.index import Index, build
from vitdist.data.reader import Bad
from vitdist.rundir import RunDir
from vitdist.session import Broken

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]


def train(
    tmp_path: Path,
    world: int,
    *arguments: str,
    stop_at: int | None = None,
    elsewhere: tuple[str, str] | None = None,
) -> tuple[set[int], str]:
    """Exit codes of all ranks, and what they wrote."""
    output = tmp_path / "output"
    codes = ranks.run(workers.train, world, list(arguments), str(tmp_path), str(output), stop_at, elsewhere)
    return set(codes), "".join((tmp_path / f"output.{rank}").read_text() for rank in range(world))


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def checkpoints(run: RunDir) -> list[str]:
    """Names of the checkpoints; nothing else but the pointer and the fence may lie beside them."""
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert {"writer.json", "latest"} <= set(names)
    return [name for name in names if name not in ("writer.json", "latest")]


def test_a_run_leaves_everything_that_the_folder_promises(tmp_path: Path, recipe: Path) -> None:
    codes, text = train(tmp_path, 2, str(recipe), "--name", "whole", "optim.lr=1e-3", "tracking.wandb=offline")
    assert codes == {0}, text
    run = RunDir(tmp_path / "runs" / "whole")
    record = json.loads(run.attempt(0).train.read_text())
    assert record["state"] == "done"
    assert record["step"] == record["total_steps"] == 12
    assert record["world"] == 2
    assert record["batch"] == {"global_batch": 12, "micro_batch": 6, "accumulation": 1, "world": 2}
    assert record["summary"]["samples"] == 21
    assert [g["name"] for g in record["groups"]][:2] == ["00_embeddings", "00_embeddings_no_decay"]
    rows = rundir.rows(run)
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["train/global_step"] for row in rows if "val/loss" in row] == [5, 10, 12]
    assert rows[0]["lr/03_head"] == pytest.approx(1e-3)
    evaluation = json.loads(run.evaluation.read_text())
    assert np.sum(evaluation["confusion"]) == 21
    assert evaluation["classes"] == ["blue", "green", "red"]
    best, _ = selection.best(selection.history(run, "top1"), "top1") or (0, 0)
    kept = {manifest.name_of(step) for step in (10, 12, best)}
    assert set(checkpoints(run)) == kept
    assert yaml.safe_load(run.config.read_text())["optim"]["lr"] == 1e-3
    assert json.loads((run.model / "config.json").read_text())["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert len(list(run.wandb.glob("offline-run-*/*.wandb"))) == 1
    assert run.report.stat().st_size > 10_000
    for said in (
        "0.03 M parameters in 8 groups",
        "60 training and 21 validation samples of 3 classes",
        "fp32 (auto), ZeRO-2",
        "top-1",
    ):
        assert said in text
    assert "Traceback" not in text
    # a second start has nothing to do
    codes, text = train(tmp_path, 1, str(run.path))
    assert codes == {0}
    assert "is finished" in text


@pytest.mark.parametrize(("world", "zero"), ranks.matrix({(2, 2), (1, 0), (2, 3)}, (1, 2, 3), range(4)))
def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path, recipe: Path, world: int, zero: int) -> None:
    how = [
        f"engine.zero={zero}",
        "optim.ema=0.9",
        "model.drop_path=0.3",
        "data.mixup=0.8",
        "loss.class_weights=inverse",
    ]
    codes, text = train(tmp_path, world, str(recipe), "--name", "straight", *how)
    assert codes == {0}, text
    codes, text = train(tmp_path, world, str(recipe), "--name", "stopped", *how, stop_at=7)
    assert codes == {rundir.EXIT_STOPPED}, text
    assert "stopped by SIGUSR2 at step 7 of 12, checkpoint saved" in text
    assert "to go on: the same command with --name stopped" in text
    run = RunDir(tmp_path / "runs" / "stopped")
    assert rundir.state(run)["state"] == "stopped"
    assert not run.model.exists()
    codes, text = train(tmp_path, world, str(recipe), "--name", "stopped", *how)
    assert codes == {0}, text
    assert "goes on at step 7 of 12" in text
    straight = RunDir(tmp_path / "runs" / "straight")
    expected, found = weights(straight), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[row["train/loss"] for row in rundir.rows(r) if "train/loss" in row] for r in (straight, run)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


AUGMENTED = [
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "data.erase=0.5",
    "data.class_shares={red: 2}",
    "data.auto_augment=rand-m9-mstd0.5-inc1",
    "model.drop_path=0.3",
    "loss.class_weights={green: 3}",
    "loss.logit_adjustment=1",
]


@pytest.mark.parametrize("settings", [pytest.param([], marks=pytest.mark.full), AUGMENTED], ids=["plain", "augmented"])
def test_worlds_see_the_same_losses(tmp_path: Path, recipe: Path, settings: list[str]) -> None:
    for name, world, more in (("one", 1, []), ("two", 2, ["train.accumulation=3"]), ("three", 3, [])):
        codes, text = train(tmp_path, world, str(recipe), "--name", name, *settings, *more)
        assert codes == {0}, text
        assert ("label smoothing promises" in text) == bool(settings)
    found = [
        [row["train/loss"] for row in rundir.rows(RunDir(tmp_path / "runs" / name)) if "train/loss" in row]
        for name in ("one", "two", "three")
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


def test_an_evaluation_that_was_interrupted_is_done_when_the_run_goes_on(tmp_path: Path, recipe: Path) -> None:
    """Stopped at the step of an evaluation, which is saved before: it belongs to the history all the same."""
    how = ["evaluation.every_steps=4", "evaluation.every_epochs=null", "checkpoint.keep=5"]
    for name in ("straight", "stopped"):
        codes, text = train(tmp_path, 2, str(recipe), "--name", name, *how, stop_at=4 if name == "stopped" else None)
        assert codes == {0 if name == "straight" else rundir.EXIT_STOPPED}, text
    straight, stopped = (RunDir(tmp_path / "runs" / name) for name in ("straight", "stopped"))
    assert selection.history(stopped, "loss") == []
    codes, text = train(tmp_path, 2, str(recipe), "--name", "stopped", *how)
    assert codes == {0}, text
    assert selection.history(stopped, "loss") == selection.history(straight, "loss")
    assert [step for step, _ in selection.history(stopped, "loss")] == [4, 8, 12]


def test_a_best_checkpoint_that_is_damaged_costs_no_model(tmp_path: Path, recipe: Path) -> None:
    how = ["evaluation.export=best", "evaluation.best=loss", "evaluation.every_steps=4", "evaluation.every_epochs=null"]
    how += ["checkpoint.keep=5"]
    assert train(tmp_path, 1, str(recipe), "--name", "r", *how, stop_at=9)[0] == {rundir.EXIT_STOPPED}
    run = RunDir(tmp_path / "runs" / "r")
    record = json.loads(selection.path(run).read_text())
    record["evaluations"][0]["metrics"]["loss"] = 0.0  # so good that it stays the best
    rundir.publish_json(selection.path(run), record)
    (run.checkpoints / "step-00000004" / "rank-0.safetensors").write_bytes(b"torn")
    codes, text = train(tmp_path, 1, str(recipe), "--name", "r", *how)
    assert codes == {0}, text
    assert "step-00000004 cannot be loaded" in text
    assert "exporting the last weights" in text
    assert json.loads(run.evaluation.read_text())["step"] == 12
    assert (run.model / "model.safetensors").exists()


def test_a_run_ends_early_and_leaves_its_best_weights(tmp_path: Path, recipe: Path) -> None:
    """A rate so high that the first evaluation is the best: two worse ones end the run, which goes back to it."""
    how = ["optim.lr=0.5", "optim.schedule=constant", "optim.clip=0", "optim.weight_decay=0", "train.steps=40"]
    how += ["evaluation.every_steps=4", "evaluation.patience=2", "evaluation.best=loss", "evaluation.export=best"]
    how += ["evaluation.unsure.cost=0.3", "optim.warmup=0", "evaluation.every_epochs=null"]
    codes, text = train(tmp_path, 2, str(recipe), "--name", "early", *how)
    assert codes == {0}, text
    run = RunDir(tmp_path / "runs" / "early")
    history = [(step, value) for step, value in selection.history(run, "loss") if value is not None]
    best, loss = min(history, key=lambda entry: entry[1])
    ended = history[-1][0]
    assert ended == best + 8 < 40
    assert f"2 evaluations brought no better loss: ends at step {ended} of 40" in text
    assert f"back to step {best}, the best by loss" in text
    evaluation = json.loads(run.evaluation.read_text())
    assert (evaluation["step"], evaluation["metrics"]["loss"]) == (best, pytest.approx(loss))
    assert evaluation["intervals"]["top1"]
    state = rundir.state(run)
    assert (state["state"], state["step"], state["summary"]["loss"]) == ("done", ended, pytest.approx(loss))
    # The best is older than the two newest, which are kept too; what is exported is the best, its rule with it.
    assert set(checkpoints(run)) == {manifest.name_of(step) for step in (best, ended - 4, ended)}
    assert json.loads((run.model / "decision.json").read_text())["unsure"] == 0.3


def test_the_average_is_evaluated_and_exported(tmp_path: Path, recipe: Path) -> None:
    """With a decay of nearly 1 and no warm-up the average stays at the initial weights, whatever was trained."""
    how = ["optim.ema=0.9999999", "optim.ema_warmup=false"]
    for name, more in (("averaged", how), ("still", ["train.steps=1", "optim.lr=1e-12"])):
        codes, text = train(tmp_path, 2, str(recipe), "--name", name, *more)
        assert codes == {0}, text
    averaged, still = (RunDir(tmp_path / "runs" / name) for name in ("averaged", "still"))
    ours, initial = weights(averaged), weights(still)
    assert all(torch.allclose(ours[name], initial[name], atol=1e-5) for name in ours)
    rows = rundir.rows(averaged)
    assert rows[-1]["val/loss"] == pytest.approx(rundir.rows(still)[-1]["val/loss"], abs=1e-4)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.02


def test_the_exported_model_classifies_digits_as_the_evaluation_did(tmp_path: Path, digits: Path) -> None:
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    shards = [f"data.train={digits}/shards/train", f"data.val={digits}/shards/val"]
    codes, text = train(
        tmp_path,
        2,
        str(demo),
        *shards,
        "train.global_batch=64",
        "train.epochs=12",
        "tracking.wandb=off",
        "--name",
        "digits",
    )
    assert codes == {0}, text
    from transformers import pipeline

    run, index = RunDir(tmp_path / "runs" / "digits"), Index.open(digits / "shards" / "val")
    classify = pipeline("image-classification", model=str(run.model))
    table = np.load(run.predictions)
    paths = [digits / "pictures" / "val" / index.source(i) for i in table["ids"][:60]]
    found = [answer[0] for answer in classify([str(path) for path in paths])]
    assert [answer["label"] for answer in found] == [index.classes[p] for p in table["predicted"][:60]]
    assert [answer["score"] for answer in found] == pytest.approx(table["confidence"][:60].tolist(), abs=2e-3)
    right = [answer["label"] == path.parent.name for answer, path in zip(found, paths, strict=True)]
    assert np.mean(right) > 0.6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["."], ". is no run folder"),
        (["{recipe}", "optim.layer_deacy=0.5"], "did you mean optim.layer_decay?"),
        (["{recipe}", "train.global_batch=7"], "does not divide over 2 ranks: use 6 or 8"),
        (["{recipe}", "data.train=empty"], "vitdist pack"),
        (["{recipe}", "--name", "../x"], "run name '../x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, recipe: Path, arguments: list[str], reason: str) -> None:
    codes, text = train(tmp_path, 2, *(argument.format(recipe=recipe) for argument in arguments))
    assert codes == {rundir.EXIT_REFUSED}
    assert reason in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_an_existing_name_with_other_settings_is_refused(tmp_path: Path, recipe: Path) -> None:
    assert train(tmp_path, 1, str(recipe), "--name", "a", "train.steps=2")[0] == {0}
    codes, text = train(tmp_path, 1, str(recipe), "--name", "a", "train.steps=3", "train.seed=1")
    assert codes == {rundir.EXIT_REFUSED}
    assert "train.seed: 0 -> 1" in text
    assert "train.steps" not in text
    assert "Traceback" not in text


def test_a_finished_run_that_is_made_longer_goes_on(tmp_path: Path, recipe: Path) -> None:
    """By the command line, and by a config.yaml that the launcher or a person has changed."""
    for steps, how in ((2, "new"), (3, "command"), (4, "folder")):
        arguments = [str(recipe), "--name", "long", f"train.steps={steps}"]
        run = RunDir(tmp_path / "runs" / "long")
        if how == "folder":
            run.config.write_text(run.config.read_text().replace("steps: 3", "steps: 4"))
            arguments = [str(run.path)]
        codes, text = train(tmp_path, 1, *arguments)
        assert codes == {0}, text
        assert ("goes on at step" in text) == (how != "new")
        assert rundir.state(run)["step"] == steps
    assert train(tmp_path, 1, str(run.path))[1].startswith(f"{run.path} is finished")


def test_a_run_without_a_name_gets_a_folder_of_its_own(tmp_path: Path, recipe: Path) -> None:
    codes, text = train(tmp_path, 2, str(recipe), "train.steps=1")
    assert codes == {0}, text
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-20")
    assert RunDir(run).model.exists()


DIVERGING = ["optim.lr=100", "optim.clip=0", "optim.eps=1e-30", "optim.warmup=0", "train.steps=400"]


@pytest.mark.parametrize("zero", [0, 2])
def test_diverging_ends_with_a_reason(tmp_path: Path, recipe: Path, zero: int) -> None:
    codes, text = train(tmp_path, 1, str(recipe), "--name", "nan", *DIVERGING, f"engine.zero={zero}")
    assert codes == {rundir.EXIT_DO_NOT_REQUEUE}, text
    assert "lower optim.lr" in text
    assert "Traceback" not in text
    rows = (tmp_path / "runs/nan/metrics.jsonl").read_text()
    assert "NaN" not in rows
    assert "Infinity" not in rows
    record = rundir.state(RunDir(tmp_path / "runs" / "nan"))
    assert record["state"] == "failed"
    assert "the run diverged" in record["reason"]


def test_a_failing_rank_with_loader_processes_ends(tmp_path: Path, recipe: Path) -> None:
    """Loaders ignore SIGTERM: a rank that left them to the interpreter's end would wait for them for ever."""
    command = [sys.executable, "-m", "vitdist.train", str(recipe), "--runs", str(tmp_path / "runs"), "--name", "x"]
    done = subprocess.run(
        [*command, *DIVERGING, "engine.zero=0", "data.workers=2"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == rundir.EXIT_DO_NOT_REQUEUE, done.stderr
    assert "lower optim.lr" in done.stderr


def test_a_torn_checkpoint_is_put_aside_and_made_again(tmp_path: Path, recipe: Path) -> None:
    every = "checkpoint.every_steps=3"
    codes, text = train(tmp_path, 1, str(recipe), "--name", "torn", every, stop_at=7)
    assert codes == {rundir.EXIT_STOPPED}, text
    run = RunDir(tmp_path / "runs" / "torn")
    victim = run.checkpoints / "step-00000007" / "rank-0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    codes, text = train(tmp_path, 1, str(recipe), "--name", "torn", every, stop_at=7)
    assert codes == {rundir.EXIT_STOPPED}, text
    assert "checkpoint passed over: step-00000007" in text
    assert "goes on at step 6 of 12" in text
    assert manifest.verify(run.checkpoints / "step-00000007") is None
    assert set(checkpoints(run)) >= {"step-00000006", "step-00000007"}


def damage(shards: Path, rows: list[int]) -> Index:
    """Flip a byte of each sample."""
    index = Index.open(shards)
    for row in rows:
        shard, offset, size = index.span(row)
        with open(index.places[shard].url, "r+b") as file:
            file.seek(offset + size // 2)
            byte = file.read(1)[0]
            file.seek(offset + size // 2)
            file.write(bytes([byte ^ 1]))
    return index


def test_bad_samples_are_replaced_listed_and_budgeted(tmp_path: Path, recipe: Path, squares: Path) -> None:
    shutil.copytree(squares, tmp_path / "shards")
    train_set, val_set = damage(tmp_path / "shards/train", [3]), damage(tmp_path / "shards/val", [5])
    places = [f"data.{name}={tmp_path}/shards/{name}" for name in ("train", "val")]
    codes, text = train(tmp_path, 2, str(recipe), "--name", "few", *places, "data.max_bad=0.1")
    assert codes == {0}, text
    run = RunDir(tmp_path / "runs/few")
    listed = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    of_train = [bad for bad in listed if bad["set"] == "train"]
    assert {(bad["id"], bad["key"], bad["shard"], bad["reason"]) for bad in of_train} == {
        (3, train_set.key(3), "shard-000000.tar", "changed")
    }
    assert len(of_train) in (2, 3)  # 12 steps of 12 are 2.4 epochs of 60: in the two whole ones, perhaps once more
    assert {(bad["id"], bad["key"]) for bad in listed if bad["set"] == "val"} == {(5, val_set.key(5))}
    last = rundir.rows(run)[-1]
    assert "evaluated 20 of 21 validation samples, each once" in text
    assert [row["data/bad_changed"] for row in rundir.rows(run) if "data/bad_changed" in row][-1] == 1
    assert last["val/unreadable"] == 1
    # the same one again and again is one, which the default budget allows, and 0 does not
    assert train(tmp_path, 1, str(recipe), "--name", "default", *places, "train.steps=20")[0] == {0}
    assert train(tmp_path, 1, str(recipe), "--name", "none", *places, "data.max_bad=0")[0] == {
        rundir.EXIT_DO_NOT_REQUEUE
    }
    damage(tmp_path / "shards/train", list(range(10, 20)))
    codes, text = train(tmp_path, 2, str(recipe), "--name", "many", *places, "data.max_bad=0.05")
    assert codes == {rundir.EXIT_DO_NOT_REQUEUE}, text
    assert "samples could not be used by step" in text
    assert "changed; " in text
    assert "in shard-000000.tar), more than data.max_bad 0.05 allows (3)" in text
    assert "Traceback" not in text


def test_broken_samples_of_two_sets_are_two_and_meetings_are_not() -> None:
    """Sets that are mixed have shards and keys of the same names; their rows differ."""
    mine = [
        Bad(3, "shard-000000.tar", "000000003", "changed", "changed"),
        Bad(70, "shard-000000.tar", "000000003", "changed", "x"),
    ]
    listed: list[Bad] = []
    session: Any = SimpleNamespace(
        me=SimpleNamespace(any=bool, gather=lambda new: [list(new), list(new)]),
        journal=SimpleNamespace(bad_samples=lambda step, kind, met: listed.extend(met)),
        engine=SimpleNamespace(steps=1),
    )
    broken = Broken()
    for _ in range(3):
        broken.new += mine
        trainer._note_broken(session, broken)
    assert (len(broken.known), broken.reasons, broken.new) == (2, {"changed": 2}, [])
    assert len(listed) == 12


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("other", "the training shards of rank 1 ("),
        ("gone", r"is missing: bring it back, or save what is whole"),
    ],
)
def test_ranks_that_see_other_shards_end_at_once(
    tmp_path: Path, recipe: Path, squares: Path, changed: str, said: str
) -> None:
    """As on two nodes with disks of their own: rank 1 has another folder under the same path."""
    shutil.copytree(squares, tmp_path / "rank-1")
    if changed == "gone":
        (tmp_path / "rank-1/train/shard-000000.tar").unlink()
    else:
        for name in ("train", "val"):
            (tmp_path / "rank-1" / name / "classes.txt").unlink()
            build(tmp_path / "rank-1" / name, ["blue", "green", "pink"])
    codes, text = train(tmp_path, 2, str(recipe), "--name", "x", elsewhere=(str(squares), str(tmp_path / "rank-1")))
    assert codes == {rundir.EXIT_REFUSED}, text
    assert re.search(re.escape(said) if "(" in said else said, text), text
    assert "Traceback" not in text


def test_training_on_the_validation_set_is_told(tmp_path: Path, recipe: Path, squares: Path) -> None:
    both = f"data.train={{{squares}/train: 1, {squares}/val: 1}}"
    codes, text = train(tmp_path, 1, str(recipe), "--name", "x", both, "train.steps=2")
    assert codes == {0}, text
    assert "warning: the validation samples are trained on too" in text


def test_a_stream_trains_and_says_what_is_lost(tmp_path: Path, recipe: Path, squares: Path) -> None:
    stream = [f"data.train=stream:{squares}/train/shard-000000.tar", "data.stream_samples=60"]
    codes, text = train(tmp_path, 1, str(recipe), "--name", "x", *stream)
    assert codes == {0}, text
    assert "a resume begins a new pass" in text
    assert "60 training and 21 validation samples" in text
    codes, text = train(tmp_path, 2, str(recipe), "--name", "y", *stream)
    assert codes == {rundir.EXIT_REFUSED}
    assert "1 shards cannot feed 2 ranks" in text

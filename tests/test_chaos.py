"""benchmarks/chaos.py: a few of its rounds, and that it sees what it looks for."""

import json
import random
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos import Outcome, Round, Straight
from vitdist import manifest, rundir
from vitdist.rundir import RunDir

IN_THE_SUITE = ("kill -9: rank 0", "flipped bit in a checkpoint")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Straight]:
    """Shards, and the undisturbed run on them."""
    folder = tmp_path_factory.mktemp("chaos")
    shards = chaos.squares(folder / "data")
    return shards, chaos.straight(folder / "straight", shards, "forked")


@pytest.mark.processes
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in IN_THE_SUITE else pytest.mark.full) for k in chaos.KINDS]
)
def test_R5_C1_C4_C5_a_disturbed_run_ends_the_same_or_refuses_by_name(
    tmp_path: Path, reference: tuple[Path, Straight], kind: str
) -> None:
    """One round of each kind; what the round looks at is told in the benchmark's head."""
    if kind == "full disk" and not chaos.can_mount():
        pytest.skip("needs root, to mount a tmpfs")
    shards, straight = reference
    made = replace(chaos.KINDS[kind](random.Random(kind), straight.seconds), kind=kind)
    made = replace(made, wandb="offline" if "wandb" in kind else "off")
    outcome = Round(tmp_path / "round", shards, 0, made, "forked", straight).play()
    assert not outcome.violations, "\n".join([*outcome.violations, *made.script(), *outcome.hits])
    expected = "refused by name" if kind == "every checkpoint damaged" else "same weights"
    # Some records hold what the next start needs, others only figures.
    either = ("refused by name",) if kind == "torn records" else ()
    assert outcome.verdict in (expected, chaos.MISSED, *either)
    assert outcome.verdict == expected or kind not in IN_THE_SUITE


# ---- it is repeatable --------------------------------------------------------------------------------


def test_a_round_follows_from_its_seed_and_number() -> None:
    kinds = len({chaos.plan(1, number, 6.0).kind for number in range(100)})
    block = [chaos.plan(1, number, 6.0) for number in range(kinds)]
    assert len({made.kind for made in block}) == kinds  # each once
    assert block == [chaos.plan(1, number, 6.0) for number in range(kinds)]
    assert block != [chaos.plan(2, number, 6.0) for number in range(kinds)]
    for made in block:
        assert all(made.script())


# ---- it sees what is wrong -----------------------------------------------------------------------------


def finished(folder: Path, made: chaos.Plan, weights: bytes = b"weights", loss: float = 1.0) -> Round:
    """A round whose run looks as if it had ended well, but for what is asked for."""
    straight = Straight(b"weights", {1: 1.0}, [], {0: [1, 2]}, 5.0)
    played = Round(folder, folder, 0, made, "forked", straight)
    played.run.model.mkdir(parents=True)
    (played.run.model / "model.safetensors").write_bytes(weights)
    played.run.metrics.write_text(json.dumps({"train/global_step": 1, "attempt": 0, "train/loss": loss}) + "\n")
    return played


def told(played: Round) -> str:
    played._compare()
    return "; ".join(played.outcome.violations)


def test_other_weights_losses_and_samples_are_violations(tmp_path: Path) -> None:
    made = chaos.Plan("TERM")
    assert told(finished(tmp_path / "a", made)) == ""
    assert told(finished(tmp_path / "b", made, weights=b"other")) == "the weights differ"
    assert told(finished(tmp_path / "c", made, loss=1.0 + 1e-9)) == "the loss of step 1 differs by 1e-09"
    elsewhere = chaos.Plan("another number of ranks", worlds=(2, 3))
    assert told(finished(tmp_path / "d", elsewhere, weights=b"other", loss=1.0 + 5e-5)) == ""
    assert "differs by 0.0002" in told(finished(tmp_path / "e", elsewhere, loss=1.0002))
    played = finished(tmp_path / "f", made)
    for rank, rows in enumerate(([2], [3])):
        line = json.dumps({"step": 0, "world": 2, "rows": rows})
        (tmp_path / "f" / f"samples-1.{rank}").write_text(line + '\n{"step": 1, "wo')
    assert told(played) == "step 0 of start 1 had other samples"


def checkpoint(run: RunDir, step: int) -> Path:
    """A folder that is whole by its files; its manifest is as little as `entries` reads."""
    folder = run.checkpoints / manifest.name_of(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for rank in range(2):
        (folder / manifest.file_of(rank)).write_bytes(bytes(range(100)))
    return folder


def test_a_checkpoint_that_vanishes_is_a_violation_unless_newer_ones_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []

    def entries(run: RunDir, thorough: bool) -> list[manifest.Entry]:
        return [manifest.Entry(run.checkpoints / manifest.name_of(step), step, None, None) for step in whole]

    monkeypatch.setattr(manifest, "entries", entries)
    played = finished(tmp_path, chaos.Plan("TERM"))
    played.run.checkpoints.mkdir()
    for whole[:] in ([4, 8], [8, 12], [12]):
        played._watch_checkpoints(2)
    assert played.outcome.violations == ["the checkpoint of step 8 vanished with start 2; left: [12]"]


def test_steps_done_again_are_counted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (2, 2)]
    lines = [json.dumps({"attempt": a, "train/global_step": s, "train/loss": 1.0}) for a, s in rows]
    run.metrics.write_text("\n".join([*lines, '{"attempt": 2, "train/glo']))
    assert chaos.lost_steps(run) == 2
    assert chaos.newest_step(run) == 2


@pytest.mark.parametrize("verb", ["truncate", "empty", "remove", "flip"])
def test_C4_C5_damage_spoils_the_newest_checkpoint_and_no_other(tmp_path: Path, verb: str) -> None:
    run = RunDir(tmp_path)
    folders = [checkpoint(run, step) for step in (4, 8)]
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    assert chaos.damage(run, f"{verb} rank", random.Random(1)) == {8}
    changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
    assert len(changed) == 1
    assert changed[0].parent == folders[1]
    assert changed[0].name.startswith("rank-")


# ---- what it publishes ---------------------------------------------------------------------------------


def test_the_table_and_the_picture_tell_the_counts() -> None:
    verdicts = ("same weights", "same weights", "refused by name", "violation")
    outcomes = [Outcome(n, "TERM", verdict, lost=n, starts=2) for n, verdict in enumerate(verdicts)]
    outcomes.append(Outcome(4, "TERM", chaos.MISSED, lost=9))
    found = chaos.summary(outcomes, Straight(b"", {}, [], {}, 5.0))
    assert found["violations"] == 1
    assert found["disturbances"]["TERM"] == {
        "rounds": 4,
        "same_weights": 2,
        "refused_by_name": 1,
        "violations": 1,
        "lost_steps_median": 1.5,
        "starts": 8,
    }
    assert chaos.table(found["disturbances"]).splitlines()[1].split() == ["TERM", "4", "2", "1", "1", "1.5"]
    drawn = ET.fromstring(chaos.picture({"date": f"{rundir.now():.10}", "forked": found, "torchrun": found}))
    text = " ".join("".join(drawn.itertext()).split())
    assert "4 with forked ranks, 4 under torchrun" in text
    assert "same weights, bit for bit: 4" in text
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") == "violation"]
    assert len(bars) == 2  # in the legend and in the row

"""Runs that are ended at any point and started again until they are done: the same bits as the straight run."""

import dataclasses
import functools
import itertools
import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from tests import interrupt_workers, ranks
from tests.interrupt_workers import POINTS, Attempt, Strike
from vitdist import manifest, rundir, selection
from vitdist.data.index import Index
from vitdist.manifest import Manifest
from vitdist.rundir import RunDir

pytestmark = pytest.mark.processes


class Ended(NamedTuple):
    """What a run leaves that must not depend on where it was interrupted."""

    files: dict[str, str]
    """SHA-256 of what each rank's file of the last checkpoint holds: masters, moments, averages, random state."""
    model: str
    """That of the exported weights."""
    counters: dict[str, Any]
    evaluations: str
    losses: list[tuple[int, float]]
    rates: dict[int, float]
    """Of the head, by step."""


def ended(run: RunDir) -> Ended:
    assert rundir.state(run)["state"] == "done"
    assert not manifest.left_over(run)
    found = newest(run)
    assert manifest.verify(run.checkpoints / manifest.name_of(found.step)) is None
    assert run.report.exists()
    rows = [row for row in rundir.rows(run) if "train/loss" in row]
    return Ended(
        {name: file.sha256 for name, file in found.files.items()},
        manifest.sha256(run.model / "model.safetensors"),
        found.counters.model_dump(),
        selection.path(run).read_text(),
        [(row["train/global_step"], row["train/loss"]) for row in rows],
        {row["train/global_step"]: row["lr/03_head"] for row in rows},
    )


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("output.*")))


def recipe_in(folder: Path, squares: Path) -> Path:
    """The settings that all runs here share, in a file."""
    path = folder / "tiny.yaml"
    path.write_text(f"""
data: {{train: {squares}/train, val: {squares}/val, crop_scale: [0.7, 1.0], flip: 0.5}}
model: {{image_size: 16, scratch: {{patch_size: 8, width: 32, depth: 2, heads: 2}}}}
train: {{global_batch: 16, steps: 12}}
optim: {{lr: 3.0e-3}}
engine: {{threads: 1}}
tracking: {{log_every: 1, wandb: off}}
""")
    return path


Kind = tuple[int, int, int, str]
"""Steps, number of ranks, ZeRO stage, precision."""


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> Callable[[Kind], Ended]:
    """What a run leaves that nobody interrupts; each kind is run once."""

    @functools.cache
    def run(kind: Kind) -> Ended:
        folder = tmp_path_factory.mktemp("straight")
        assert interrupt_workers.start(kind[1], given(folder, squares, kind)) == [0] * kind[1], output(folder)
        found = ended(RunDir(folder / "runs" / "run"))
        assert (found.counters["skipped"] > 0) == (kind[3] == "fp16")
        return found

    return run


def given(folder: Path, squares: Path, kind: Kind, strike: Strike | None = None) -> Attempt:
    steps, _, zero, precision = kind
    options = interrupt_workers.options(steps, zero, precision)
    return Attempt([str(recipe_in(folder, squares)), "--name", "run", *options], folder, strike)


BEFORE = ("start", "import", "rendezvous", "resume")
WITHIN = ("step", "accumulation", "evaluation", "write", "vote", "rename", "renamed", "pointer")
LAST = ("export", "exported", "report", "reported")
DEADLY = {"start": ("SIGTERM", "SIGUSR2", "SIGKILL")}
"""Signals that end a rank at once; at every other point it is SIGKILL alone."""


def interrupted(folder: Path, squares: Path, kind: Kind, strikes: Sequence[Strike]) -> Ended:
    """A run that is started with each strike in turn, then without; each strike must have met it."""
    world, run = kind[1], RunDir(folder / "runs" / "run")
    for strike in strikes:
        # A rank that waits in the rendezvous for one that is gone does not notice.
        waiting = strike.point in BEFORE and strike.ranks != "all"
        codes = interrupt_workers.start(world, given(folder, squares, kind, strike), 1.0 if waiting else 60.0)
        struck = range(world) if strike.ranks == "all" else [int(strike.ranks)]
        struck = [0] if POINTS[strike.point][0] else struck
        said = f"{strike}: {codes}\n{output(folder)}"
        if strike.signal in DEADLY.get(strike.point, ("SIGKILL",)):
            number = -signal.Signals[strike.signal]
            # Until it listens, a rank also ends of the SIGTERM that follows the first one's end: struck or not yet.
            late = {-signal.SIGTERM} if strike.point in BEFORE[:3] else set()
            assert number in codes, said
            assert {codes[rank] for rank in struck} <= {number} | late, said
            # The other ranks of a run that is done leave while rank 0 writes the report that is missing.
            assert strike.point in LAST or rundir.EXIT_DONE not in codes, said
        else:
            assert set(codes) == {rundir.EXIT_DONE if strike.point in LAST else rundir.EXIT_STOPPED}, said
    assert interrupt_workers.start(world, given(folder, squares, kind)) == [0] * world, output(folder)
    return ended(run)


def strike(text: str, signal: str, who: str) -> Strike:
    point, _, after = text.partition("+")
    return Strike(point, f"SIG{signal}", who, int(after or 0))


SAMPLE = [
    # steps, ranks, stage, precision, who is struck, signal and points in turn
    (6, 1, 0, "fp32", "all", "KILL import step accumulation write rename"),
    (6, 1, 2, "fp16", "all", "KILL rendezvous vote evaluation export report"),
    (6, 2, 2, "fp32", "1", "KILL rendezvous step step+1 write vote"),
    (9, 2, 1, "fp32", "all", "USR2 rendezvous step accumulation vote export"),
    (6, 2, 3, "fp16", "all", "KILL evaluation renamed exported"),
    (6, 2, 0, "fp16", "1", "TERM start accumulation rename"),
]


def everything() -> list[Any]:
    """Each point x signal x ranks x who x stage x precision; the last points in turn where a run ends at the first."""
    found = []
    for number, (precision, zero, (world, who), name) in enumerate(
        itertools.product(("fp32", "fp16"), range(4), ((1, "all"), (2, "all"), (2, "1")), ("KILL", "TERM", "USR2"))
    ):
        draw = random.Random(number)
        last = LAST if name == "KILL" else draw.choices(LAST)
        within = ["step", f"step+{draw.randint(1, 4)}", *WITHIN]
        points = " ".join([name, *BEFORE, *within, *last])
        told = f"{name}-{world}-{who}-{zero}-{precision}"
        found.append(pytest.param(44, world, zero, precision, who, points, id=told, marks=pytest.mark.full))
    return found


@pytest.mark.parametrize(("steps", "world", "zero", "precision", "who", "points"), [*SAMPLE, *everything()])
def test_C12_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path,
    squares: Path,
    straight: Callable[[Kind], Ended],
    steps: int,
    world: int,
    zero: int,
    precision: str,
    who: str,
    points: str,
) -> None:
    """Masters, moments, averages, random state, history and export, after one interruption after the other."""
    name, *places = points.split()
    kind = steps, world, zero, precision
    found = interrupted(tmp_path, squares, kind, [strike(place, name, who) for place in places])
    assert found == straight(kind)


# ---- other signals, other worlds, other settings: whole runs --------------------------------------------


def test_S3_signals_upon_signals_in_a_save_stop_once(
    tmp_path: Path, squares: Path, straight: Callable[[Kind], Ended]
) -> None:
    kind = 9, 2, 1, "fp32"
    first = dataclasses.replace(given(tmp_path, squares, kind), hook=interrupt_workers.signals_in_a_save)
    assert interrupt_workers.start(2, first) == [rundir.EXIT_STOPPED] * 2, output(tmp_path)
    run = RunDir(tmp_path / "runs" / "run")
    assert all(entry.fault is None for entry in manifest.entries(run, thorough=True))
    assert not manifest.left_over(run)
    assert interrupted(tmp_path, squares, kind, []) == straight(kind)
    assert output(tmp_path).count("checkpoint saved") == 1


def test_S5_a_save_that_does_not_end_in_time_leaves_the_old_one(
    tmp_path: Path, squares: Path, straight: Callable[[Kind], Ended]
) -> None:
    kind = 9, 2, 1, "fp32"
    hook = interrupt_workers.killed_in_the_save_of_a_stop
    first = dataclasses.replace(given(tmp_path, squares, kind), hook=hook)
    assert interrupt_workers.start(2, first) == [-signal.SIGKILL] * 2, output(tmp_path)
    run = RunDir(tmp_path / "runs" / "run")
    assert manifest.steps(run) == [3, 2]  # of the evaluation, which was the best so far, and of every second step
    assert manifest.left_over(run)
    assert interrupted(tmp_path, squares, kind, []) == straight(kind)
    assert "goes on at step 3 of 9" in output(tmp_path)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_C2_a_run_goes_on_or_ends_where_one_rank_cannot_save(
    tmp_path: Path, squares: Path, straight: Callable[[Kind], Ended], on_failure: str
) -> None:
    kind = 9, 2, 1, "fp32"
    start = given(tmp_path, squares, kind)
    start = dataclasses.replace(
        start,
        arguments=[*start.arguments, f"checkpoint.on_failure={on_failure}"],
        hook=functools.partial(interrupt_workers.full_disk, 4),
    )
    codes, said = interrupt_workers.start(2, start), "the checkpoint of step 4 could not be saved: No space left on"
    assert f"{said} device (rank 1)" in output(tmp_path), output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    if on_failure == "continue":
        assert codes == [rundir.EXIT_DONE] * 2
        assert ended(RunDir(tmp_path / "runs" / "run")) == straight(kind)
    else:
        assert codes == [rundir.EXIT_DO_NOT_REQUEUE] * 2
        # The ranks agree at the end of a step that one of them knows of a failure, and save what they have.
        newest_step, before = manifest.steps(RunDir(tmp_path / "runs" / "run"))
        assert newest_step in (5, 6)
        assert before == 3
        assert f"that of step {newest_step}, where the run ends, is saved" in output(tmp_path)
        assert interrupted(tmp_path, squares, kind, []) == straight(kind)


def test_C4_checkpoints_that_are_gone_are_no_reason_to_begin_anew(tmp_path: Path, squares: Path) -> None:
    """Purged, or not copied: a start that says so and leaves all as it is."""
    kind = 9, 1, 1, "fp32"
    first = given(tmp_path, squares, kind, Strike("step", "SIGTERM", after=5))
    assert interrupt_workers.start(1, first) == [rundir.EXIT_STOPPED], output(tmp_path)
    run = RunDir(tmp_path / "runs" / "run")
    step, away = manifest.steps(run)[0], tmp_path / "away"
    run.checkpoints.rename(away)
    assert interrupt_workers.start(1, given(tmp_path, squares, kind)) == [rundir.EXIT_REFUSED], output(tmp_path)
    assert f"holds no checkpoint, but start 0 has left one of step {step}: bring the folder back" in output(tmp_path)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    away.rename(run.checkpoints)
    assert interrupt_workers.start(1, given(tmp_path, squares, kind)) == [rundir.EXIT_DONE], output(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The place of a run whose checkpoints have a disk of their own with room for two and a half."""
    folder = tmp_path / "runs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_C3_a_full_disk_keeps_the_old_checkpoints(
    tmp_path: Path, squares: Path, small_disk: Path, on_failure: str
) -> None:
    """A real one. With `continue` the run ends with its model, though nothing more could be saved."""
    kind = 9, 1, 2, "fp32"
    start = given(tmp_path, squares, kind)
    more = ["checkpoint.keep=3", f"checkpoint.on_failure={on_failure}", "evaluation.every_steps=9"]
    start = dataclasses.replace(start, arguments=[*start.arguments, *more])
    codes = interrupt_workers.start(1, start)
    run = RunDir(tmp_path / "runs" / "run")
    whole = [entry.step for entry in manifest.entries(run, thorough=True) if entry.fault is None]
    assert len(whole) >= 2, (whole, output(tmp_path))
    assert whole == manifest.steps(run)
    assert not manifest.left_over(run)
    assert f"the checkpoint of step {whole[0] + 2} could not be saved: No space left on device" in output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    if on_failure == "continue":
        assert codes == [rundir.EXIT_DONE], output(tmp_path)
        assert (run.model / "model.safetensors").exists()
    else:
        assert codes == [rundir.EXIT_DO_NOT_REQUEUE], output(tmp_path)
        assert rundir.state(run)["state"] == "failed"


Trace = tuple[list[float], dict[int, list[int]]]
"""The loss of each update, and the rows of the samples of its global batch."""
WORLDS = {(2, 2, 3, 3)}
"""Ranks and stage before and after."""


def moves() -> list[Any]:
    pairs = [(2, 1), (1, 2), (2, 3), (4, 2)]
    everything = [(a, zero, b, other) for a, b in pairs for zero, other in ((0, 2), (1, 1), (2, 3), (3, 3), (3, 0))]
    everything = sorted(WORLDS | set(everything))
    return [pytest.param(*move, marks=[] if move in WORLDS else pytest.mark.full) for move in everything]


@pytest.mark.parametrize(("world", "zero", "other_world", "other_zero"), moves())
def test_C7_other_ranks_go_on_in_the_middle_of_an_epoch(
    tmp_path: Path, squares: Path, straight_at_one: Trace, world: int, zero: int, other_world: int, other_zero: int
) -> None:
    """The samples of each global batch are the same, in the same order over the ranks, and so are the losses."""
    losses, batches = straight_at_one
    found: dict[int, list[int]] = {}
    for number, (size, stage) in enumerate(((world, zero), (other_world, other_zero))):
        folder = tmp_path / str(number)
        folder.mkdir()
        strike = None if number else Strike("step", "SIGTERM", "0", after=3)
        codes = interrupt_workers.start(size, moving(folder, tmp_path / "runs", squares, stage, strike))
        assert codes == [rundir.EXIT_DONE if number else rundir.EXIT_STOPPED] * size, output(folder)
        found |= global_batches(folder, size)
    assert "converted: saved by" in output(tmp_path / "1")
    assert found == batches
    rows = [row["train/loss"] for row in rundir.rows(RunDir(tmp_path / "runs" / "run")) if "train/loss" in row]
    assert rows == pytest.approx(losses, abs=1e-4)


@pytest.fixture(scope="session")
def straight_at_one(
    tmp_path_factory: pytest.TempPathFactory, squares: Path
) -> tuple[list[float], dict[int, list[int]]]:
    """Losses, and the samples of each global batch, of the straight run by one rank."""
    folder = tmp_path_factory.mktemp("one")
    assert interrupt_workers.start(1, moving(folder, folder / "runs", squares, 0)) == [0], output(folder)
    run = RunDir(folder / "runs" / "run")
    return [row["train/loss"] for row in rundir.rows(run) if "train/loss" in row], global_batches(folder, 1)


def moving(folder: Path, runs: Path, squares: Path, zero: int, strike: Strike | None = None) -> Attempt:
    """As `given`, with batches that divide over 1 to 4 ranks."""
    start = given(folder, squares, (8, 1, zero, "fp32"), strike)
    return dataclasses.replace(start, arguments=[*start.arguments, "train.global_batch=48", "--runs", str(runs)])


def global_batches(folder: Path, world: int) -> dict[int, list[int]]:
    """Rows of the samples of each update, over all ranks in their order."""
    found: dict[int, list[int]] = {}
    for rank in range(world):
        for line in (folder / f"ids.{rank}").read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, []).extend(rows)
    return found


def test_C10_a_changed_rate_and_decay_are_told_and_hold_from_there(
    tmp_path: Path, squares: Path, straight: Callable[[Kind], Ended]
) -> None:
    kind = 9, 1, 1, "fp16"
    first = given(tmp_path, squares, kind, Strike("step", "SIGTERM", after=3))
    assert interrupt_workers.start(1, first) == [rundir.EXIT_STOPPED], output(tmp_path)
    second = given(tmp_path, squares, kind)
    second = dataclasses.replace(second, arguments=[*second.arguments, "optim.lr=0.03", "optim.weight_decay=0.2"])
    assert interrupt_workers.start(1, second) == [rundir.EXIT_DONE], output(tmp_path)
    said = output(tmp_path)
    assert "setting changed: optim.lr: 0.003 -> 0.03: from here on; what was trained stays" in said
    assert "setting changed: optim.weight_decay: 0.05 -> 0.2: from here on; what was trained stays" in said
    run = RunDir(tmp_path / "runs" / "run")
    expected = {step: rate * (10 if step > 4 else 1) for step, rate in straight(kind).rates.items()}
    assert ended(run).rates == pytest.approx(expected)
    assert {group.weight_decay for group in newest(run).identity.groups} == {0, 0.2}


def newest(run: RunDir) -> Manifest:
    return manifest.read(run.checkpoints / manifest.name_of(manifest.steps(run)[0]))


def keys_of(squares: Path, folder: Path, rank: int, step: int) -> list[str]:
    """Keys of the samples that a rank had in an update."""
    index = Index.open(squares / "train")
    lines = map(json.loads, (folder / f"ids.{rank}").read_text().splitlines())
    return [index.key(row) for number, rows in lines if number == step for row in rows]


def finite(run: RunDir) -> list[int]:
    """Steps of the checkpoints in which every value is."""
    found = []
    for entry in manifest.entries(run, thorough=True):
        assert entry.fault is None
        assert entry.manifest
        tensors = [values for name in entry.manifest.files for values in load_file(entry.path / name).values()]
        if all(values.isfinite().all() for values in tensors):
            found.append(entry.step)
    return found


@pytest.mark.parametrize(
    ("zero", "precision", "what"),
    ranks.matrix({(0, "fp32", "gradient"), (1, "fp16", "loss")}, range(4), ("fp32", "fp16"), ("loss", "gradient")),
)
def test_N1_a_loss_or_gradient_of_one_rank_that_is_not_finite_is_skipped_by_all(
    tmp_path: Path, squares: Path, zero: int, precision: str, what: str
) -> None:
    """Three in a row end the run, with the keys; what was saved is finite, and the run goes on from it."""
    kind, first = (8, 2, zero, precision), 4
    start = given(tmp_path, squares, kind)
    more = ["train.max_skipped=3", "engine.loss_scale_power=4"]
    hook = functools.partial(interrupt_workers.spoil, what, first, 99)
    start = dataclasses.replace(start, arguments=[*start.arguments, *more])
    codes = interrupt_workers.start(2, dataclasses.replace(start, hook=hook))
    said = " ".join(output(tmp_path).split())
    assert codes == [rundir.EXIT_DO_NOT_REQUEUE] * 2, said
    assert "Traceback" not in said
    assert f"3 updates in a row up to step {first + 3} were not finite and skipped" in said
    assert "the checkpoint of step" in said
    assert "is intact" in said
    if what == "loss":
        assert f"step {first + 1} is skipped by all ranks: its loss was not finite (rank 1: samples" in said
        for key in keys_of(squares, tmp_path, 1, first)[:8]:
            assert key in said
        assert "rank 0: samples" not in said
    else:
        assert "the gradient, though each loss was finite, was not" in said
        if precision == "fp32":  # fp16 skips in its search for the loss scale, and says nothing of it
            assert f"step {first + 1} is skipped by all ranks: its gradient, though each loss was finite" in said
    run = RunDir(tmp_path / "runs" / "run")
    assert rundir.state(run)["state"] == "failed"
    kept = manifest.steps(run)
    assert len(kept) >= 2
    assert finite(run) == kept
    once = dataclasses.replace(start, hook=functools.partial(interrupt_workers.spoil, what, 6, 7))
    assert interrupt_workers.start(2, once) == [rundir.EXIT_DONE] * 2, output(tmp_path)
    assert finite(run)[0] == 8
    assert newest(run).counters.skipped >= 1


def test_N2_a_loss_scale_at_its_end_is_a_reason_with_a_hint(tmp_path: Path, squares: Path) -> None:
    start = given(tmp_path, squares, (40, 1, 2, "fp16"))
    start = dataclasses.replace(
        start,
        arguments=[*start.arguments, "engine.loss_scale_power=4", "engine.loss_scale_hysteresis=1"],
        hook=functools.partial(interrupt_workers.spoil, "gradient", 3, 99),
    )
    codes = interrupt_workers.start(1, start)
    said = " ".join(output(tmp_path).split())
    assert codes == [rundir.EXIT_DO_NOT_REQUEUE], said
    assert "the gradients overflow in fp16 even at the smallest loss scale at step" in said
    assert "lower optim.lr" in said
    assert "engine.precision=bf16" in said
    assert "(rank 0: samples " in said
    assert "is intact" in said
    assert "Traceback" not in said
    run = RunDir(tmp_path / "runs" / "run")
    assert finite(run) == manifest.steps(run) != []

"""Runs that are ended at any point and started again until they are done: the same bits as the straight run."""

import functools
import itertools
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import interrupt_workers
from tests.interrupt_workers import POINTS, Attempt, Strike
from vitdist import manifest, rundir, selection
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


def ended(run: RunDir) -> Ended:
    assert rundir.state(run)["state"] == "done"
    assert not manifest.left_over(run)
    newest = run.checkpoints / manifest.name_of(manifest.steps(run)[0])
    assert manifest.verify(newest) is None
    found = manifest.read(newest)
    assert run.report.exists()
    rows = [(row["train/global_step"], row["train/loss"]) for row in rundir.rows(run) if "train/loss" in row]
    return Ended(
        {name: file.sha256 for name, file in found.files.items()},
        manifest.sha256(run.model / "model.safetensors"),
        found.counters.model_dump(),
        selection.path(run).read_text(),
        rows,
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
            assert {codes[rank] for rank in struck} == {-signal.Signals[strike.signal]}, said
            assert rundir.EXIT_DONE not in codes, said
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
    (9, 1, 3, "fp32", "all", "TERM import step+2 evaluation exported"),
    (6, 1, 2, "fp16", "all", "KILL rendezvous vote evaluation export report"),
    (9, 1, 1, "fp16", "all", "USR2 start resume write report"),
    (6, 2, 2, "fp32", "1", "KILL rendezvous step+1 write vote"),
    (9, 2, 1, "fp32", "all", "USR2 rendezvous accumulation vote export"),
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
        within = [f"step+{draw.randint(1, 4)}", *WITHIN]
        found.append((44, world, zero, precision, who, " ".join([name, *BEFORE, *within, *last])))
    return [pytest.param(*case, marks=pytest.mark.full) for case in found]


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
